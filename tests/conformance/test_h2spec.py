"""h2spec, the HTTP/2 and HPACK conformance suite, against a real server."""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "go" / "h2spec"
pytestmark = [pytest.mark.foreign, pytest.mark.process, pytest.mark.slow]

# How long h2spec waits for an answer that does not come. Most cases need milliseconds; 5.1.2 opens as many streams as
# are advertised, 4,000, before it asks, and takes seconds on a busy machine.
CASE_TIMEOUT_S = 20
# More than all cases may take together: the report of a server that fails them is worth the wait.
RUN_TIMEOUT_S = 500
# Of the pinned version in strict mode: a run of fewer has left something out.
CASES = 146
# This case sends one request more than may be open, each complete, and asks for an error. A turn of the reader takes
# eight requests (T22) and answers them before it reads on: no more than those are open, and there is nothing to refuse.
ANSWERED = "http2/5.1.2 Sends HEADERS frames that causes their advertised concurrent stream limit to be exceeded:"


def h2spec_binary(workshop) -> str:
    """Find h2spec by H2SPEC or on the path, else build the pinned version."""
    found = os.environ.get("H2SPEC") or shutil.which("h2spec")
    if found:
        return found
    return workshop.go_program(SOURCES, "github.com/summerwind/h2spec/cmd/h2spec", "h2spec")


def failed_cases(report: Path) -> tuple[int, list[str]]:
    """Read a JUnit report: how many cases ran, and a line for each that failed or was skipped."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    complaints = [
        f"{case.get('package')} {case.get('classname')}: {' '.join((outcome.text or outcome.tag).split())}"
        for case in cases
        for outcome in case
        if outcome.tag in ("failure", "error", "skipped")
    ]
    return len(cases), complaints


@pytest.mark.timeout(600)
def test_h2spec_strict(workshop, request, tmp_path):
    """Every case of h2spec but one passes, the strict ones among them, and the server outlives them all."""
    binary = h2spec_binary(workshop)
    host, _, port = request.getfixturevalue("server_address").rpartition(":")
    report = tmp_path / "h2spec.xml"
    command = [binary, "--strict", "--host", host, "--port", port]
    command += ["--timeout", str(CASE_TIMEOUT_S), "--junit-report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False)
    assert report.exists(), done.stdout + done.stderr
    ran, complaints = failed_cases(report)
    wrong = [line for line in complaints if not (line.startswith(ANSWERED) and line.endswith("stream_id:8001)"))]
    assert not wrong, "\n".join(wrong)
    assert ran == CASES, f"{ran} cases ran, expected {CASES}"
    assert done.returncode == bool(complaints), done.stdout
