"""A short run of the IPC fuzzer with each test run; longer ones are started by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FUZZER = Path(__file__).parent.parent / "fuzz" / "fuzz_ipc.py"


def test_no_mutated_message_does_more_than_fail() -> None:
    """Mutated schemas, dictionaries and batches are refused, or accepted and storable; nothing crashes."""
    run = subprocess.run(
        [sys.executable, str(FUZZER), "--cases", "3000", "--seed", "20240229"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "'accepted'" in run.stdout
    assert "0 dead processes" in run.stdout
