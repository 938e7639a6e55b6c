"""What foreign programs need: a server to talk to, and a place outside the tree where they are built.

Three variables steer them:

``CONFORMANCE_REQUIRED=1``
    A missing toolchain or registry fails instead of being skipped: for CI jobs that install them.
``CONFORMANCE_CACHE``
    Where builds are kept between runs; by default ``arka-conformance`` in the user's cache directory.
``CONFORMANCE_SERVER=HOST:PORT``
    A server that runs already, in place of a process of our own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

from arka.testing.serverprocess import ServerProcess

# Longest time of one step of a build, cold, on a slow line and a busy machine.
BUILD_TIMEOUT_S = 1200


@dataclass(frozen=True)
class Workshop:
    """Builds foreign programs outside the tree, once for each state of their sources."""

    cache: Path
    required: bool

    def give_up(self, reason: str) -> NoReturn:
        """Skip aloud, or fail where the toolchains are meant to be there."""
        if self.required:
            pytest.fail(f"CONFORMANCE_REQUIRED is set, but {reason}", pytrace=False)
        pytest.skip(reason)

    def tool(self, name: str) -> str:
        """Find a program on the path."""
        found = shutil.which(name)
        if found is None:
            self.give_up(f"`{name}` is not installed")
        return found

    def require_version(self, name: str, found: str, least: str) -> None:
        """Compare dotted versions, the part that ``least`` has."""
        wanted = [int(part) for part in least.split(".")]
        digits = [int("".join(filter(str.isdigit, part)) or 0) for part in found.split(".")]
        if digits[: len(wanted)] < wanted:
            self.give_up(f"{name} is {found}, older than {least}")

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """Run a short command and return what it prints."""
        return self._run(command, cwd).stdout.strip()

    def fetch(self, *command: str, cwd: Path) -> None:
        """Run a step that needs a registry unless its cache is warm; without one there is nothing to test."""
        done = self._run(command, cwd)
        if done.returncode != 0:
            self.give_up(f"`{' '.join(command)}` failed: {_tail(done.stdout + done.stderr, lines=5)}")

    def build(self, *command: str, cwd: Path) -> None:
        """Run a step that needs nothing but the sources: its failure is ours."""
        done = self._run(command, cwd)
        if done.returncode != 0:
            pytest.fail(f"`{' '.join(command)}` failed:\n{done.stdout}\n{done.stderr}", pytrace=False)

    def _run(self, command: Sequence[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
        # GOTOOLCHAIN: an older Go would fetch a whole toolchain in silence.
        environment = os.environ | {"GOTOOLCHAIN": "local"}
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )

    @contextmanager
    def room(self, name: str) -> Iterator[Path]:
        """Hold one program's directory in the cache against other test runs while it is built."""
        directory = self.cache / name
        directory.mkdir(parents=True, exist_ok=True)
        with (self.cache / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory

    def made_from(self, sources: Path, name: str, make: Callable[[Path], None]) -> Path:
        """Copy sources into the cache and build them there, unless that was done for the same sources.

        Args:
            sources: a directory; what build tools leave in it is not taken along.
            name: of the directory in the cache.
            make: builds in the copy.

        Returns:
            The copy, built.
        """
        ignored = shutil.ignore_patterns("node_modules", "target")
        digest = hashlib.sha256()
        for path in sorted(sources.rglob("*")):
            relative = path.relative_to(sources)
            if path.is_file() and not {"node_modules", "target"} & set(relative.parts):
                digest.update(f"{relative}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        with self.room(name) as directory:
            stamp = directory / "made-from"
            built = directory / "built"
            if not stamp.exists() or stamp.read_text() != digest.hexdigest():
                stamp.unlink(missing_ok=True)
                shutil.rmtree(built, ignore_errors=True)
                shutil.copytree(sources, built, ignore=ignored)
                make(built)
                stamp.write_text(digest.hexdigest())
            return built

    def go_program(self, sources: Path, package: str, name: str) -> str:
        """Build a Go program from a module whose ``go.mod`` and ``go.sum`` pin all that it is made of.

        Args:
            sources: the module's directory.
            package: of the program; ``.`` for the module's own.
            name: of the program in the cache.

        Returns:
            The binary's path. Go's own build cache knows best what has changed since the last time.
        """
        go = self.tool("go")
        lines = (sources / "go.mod").read_text().splitlines()
        least = next(line.removeprefix("go ") for line in lines if line.startswith("go "))
        self.require_version("Go", self.ask(go, "version").split()[2], least)
        self.fetch(go, "mod", "download", cwd=sources)
        with self.room(name) as directory:
            binary = str(directory / name)
            self.build(go, "build", "-mod=readonly", "-o", binary, package, cwd=sources)
        return binary


def _tail(text: str, *, lines: int) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


@pytest.fixture(scope="session")
def workshop() -> Workshop:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("CONFORMANCE_CACHE") or Path(caches) / "arka-conformance")
    return Workshop(cache.absolute(), required=os.environ.get("CONFORMANCE_REQUIRED", "0") not in ("", "0"))


@pytest.fixture(scope="module")
def server_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Give the host:port of a server of this module's own; in the end it must drain and exit with 0."""
    running = os.environ.get("CONFORMANCE_SERVER")
    if running:
        yield running
        return
    with ServerProcess(tmp_path_factory.mktemp("server") / "data") as process:
        yield process.flight
