"""A short run of the fuzzer of shared bytes with each test run; ``make fuzz`` runs it for long."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZER = Path(__file__).parent.parent / "fuzz" / "fuzz_shared.py"


@pytest.mark.slow
def test_shared_bytes_mean_what_they_say() -> None:
    """Views, dictionaries, runs and list views, broken or not, are refused or read as Arrow's format has them (T23)."""
    run = subprocess.run(
        [sys.executable, str(FUZZER), "--cases", "600", "--seed", "7"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for ending in ("'accepted'", "'changed, accepted'", "'changed, refused'", "'too large, refused'"):
        assert ending in run.stdout
