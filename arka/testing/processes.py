"""Processes as the kernel lists them: trees of them, their ends, and the memory that they hold.

Owns: reading ``/proc``. Does not own any process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_KIB: Final = 1024


def descendants(pid: int) -> set[int]:
    """The processes below this one that run now; one that only waits to be reaped does not run."""
    children: dict[int, list[int]] = {}
    for child, parent, state in _processes():
        if state != "Z":
            children.setdefault(parent, []).append(child)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            found.add(child)
            waiting.append(child)
    return found


def wait_gone(pids: set[int], timeout_s: float = 10.0) -> set[int]:
    """Wait until none of these processes runs; returns those that still do after ``timeout_s``.

    One that only waits to be reaped does not run.
    """
    deadline = time.monotonic() + timeout_s
    while left := {pid for pid, _, state in _processes() if pid in pids and state != "Z"}:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.01)
    return set()


def memory_of(pids: set[int]) -> tuple[int, int]:
    """Add up what these processes hold: anonymous memory, and all resident memory, in bytes (R9).

    Mapped files count in the second alone. What several processes share, as those do that were forked from one
    another, counts once.
    """
    anonymous = resident = 0
    for pid in pids:
        # One that has ended and waits to be reaped cannot be read.
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            anonymous += _field(rollup, "Pss_Anon")
            resident += _field(rollup, "Pss")
    return anonymous, resident


def _field(rollup: str, name: str) -> int:
    return int(rollup.partition(f"\n{name}:")[2].split(maxsplit=1)[0]) * _KIB


def _processes() -> Iterator[tuple[int, int, str]]:
    """All processes: pid, parent, state."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                yield int(entry.name), int(parent), state


__all__ = ["descendants", "memory_of", "wait_gone"]
