"""Four gRPC stacks that are not ours write through a real server, each with its stock client.

The programs and what they check stand in ``go``, ``java``, ``javascript`` and ``rust`` beside this file.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.foreign, pytest.mark.process, pytest.mark.slow]

# Above the sum of what the scenarios take, below pytest's own limit: a hang is told with the output so far.
RUN_TIMEOUT_S = 240

SCENARIOS = [
    "create_table",
    "one_row",
    "large",
    "read_back",
    "do_put",
    "not_found",
    "status_text",
    "cancel",
    "deadline",
    "close_with_acks",
]


def go_command(workshop) -> list[str]:
    return [workshop.go_program(HERE / "go", ".", "arka-go")]


def java_command(workshop) -> list[str]:
    java, javac, maven = workshop.tool("java"), workshop.tool("javac"), workshop.tool("mvn")
    workshop.require_version("The JDK", workshop.ask(javac, "--version").split()[1], "17")

    def make(directory: Path) -> None:
        # Plugins and dependencies are one graph for Maven: resolve first, compile offline then.
        quiet = (maven, "--batch-mode", "--quiet")
        workshop.fetch(*quiet, "--strict-checksums", "process-resources", "compiler:help", cwd=directory)
        workshop.build(*quiet, "--offline", "compile", cwd=directory)

    target = workshop.made_from(HERE / "java", "java", make) / "target"
    classpath = f"{target / 'classes'}:{(target / 'classpath.txt').read_text()}"
    # Arrow's memory module reaches into java.nio.
    options = ["--add-opens=java.base/java.nio=ALL-UNNAMED", "-XX:+UseSerialGC"]
    return [java, *options, "-cp", classpath, "arka.conformance.Main"]


def javascript_command(workshop) -> list[str]:
    node, npm = workshop.tool("node"), workshop.tool("npm")
    workshop.require_version("Node", workshop.ask(node, "--version"), "18")

    def make(directory: Path) -> None:
        # Without a registry, npm's own patience is above a minute.
        impatient = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000")
        workshop.fetch(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", *impatient, cwd=directory)

    return [node, str(workshop.made_from(HERE / "javascript", "javascript", make) / "main.js")]


def rust_command(workshop) -> list[str]:
    cargo = workshop.tool("cargo")
    least = next(
        line.partition('"')[2].rstrip('"')
        for line in (HERE / "rust" / "Cargo.toml").read_text().splitlines()
        if line.startswith("rust-version")
    )
    workshop.require_version("Rust", workshop.ask(cargo, "--version").split()[1], least)

    def make(directory: Path) -> None:
        # Cargo.lock pins all that it is made of.
        workshop.fetch(cargo, "fetch", "--locked", "--quiet", cwd=directory)
        workshop.build(cargo, "build", "--locked", "--offline", "--quiet", cwd=directory)

    return [str(workshop.made_from(HERE / "rust", "rust", make) / "target" / "debug" / "arka-rust")]


RUST_SCENARIOS = {"ping_pong", "all_tiers", "batches_alone", "read_back", "metadata_if_asked"}


@pytest.mark.parametrize(
    ("command", "scenarios"),
    [
        # The stock readers of arrow-go and arrow-rs choke on metadata-only messages: they read acks as batches (T20).
        pytest.param(go_command, {*SCENARIOS, "record_reader"}, id="go"),
        pytest.param(java_command, {*SCENARIOS}, id="java"),
        pytest.param(javascript_command, {*SCENARIOS}, id="javascript"),
        pytest.param(rust_command, RUST_SCENARIOS, id="rust"),
    ],
)
@pytest.mark.timeout(1500)  # a cold build fetches everything first
def test_stock_client(command, scenarios, workshop, request):
    """A stock client writes while it reads acks, meets errors, cancels, runs into a deadline, closes early.

    In all of it the server keeps the wire contract, whatever the stack's frame sizes and windows are.
    """
    program = command(workshop)
    # Not an argument: a server is started only for a program that could be built.
    address = request.getfixturevalue("server_address")
    done = subprocess.run([*program, address], capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    said = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    print(said)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"{report['scenario']}: {report['detail']}" for report in reports if not report["ok"]]
    assert not failed, "\n".join([*failed, done.stderr])
    assert {report["scenario"] for report in reports} == scenarios, said
    assert done.returncode == 0, said
