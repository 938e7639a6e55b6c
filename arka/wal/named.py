"""What a log's own files name, and is not there (R39).

Owns: that judgement, for the start, ``verify`` and ``salvage`` alike. The seal mark names the oldest and the newest
segment; those between them are found missing by the LSNs that their successors begin at. The log's state exists
wherever there is a log, and a seal mark wherever there are segments.

A name counts if it stands for a regular file, or for a link to one; anything else under it is nothing
(``Disk.list_names``).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Final

from arka.errors import DataCorruption
from arka.storage.ports import Disk
from arka.wal.logstate import STATE_NAME, newest_slot, read_slots
from arka.wal.seal import SEAL_NAME, SealMark
from arka.wal.segment import SegmentHeader, segment_name
from arka.wal.walk import list_segments

#: Stands in a log's directory while its segments are written from the object store, and goes with recovery.
RESTORING_NAME: Final = "restoring.new"

_NO_FILE: Final = "no regular file and no link to one"


def find_gone(directory: Path, seal: SealMark | None, headers: Mapping[int, SegmentHeader]) -> list[DataCorruption]:
    """Find the segments that the seal mark names and that are gone.

    Args:
        directory: the log's.
        seal: the mark; None where there is none.
        headers: of all segments with an intact header, by number.
    """
    replaced = {header.replaces for header in headers.values()}
    return find_unnamed(directory, seal, headers.keys() | replaced)


def find_unnamed(directory: Path, seal: SealMark | None, present: Set[int]) -> list[DataCorruption]:
    """As ``find_gone``, of the numbers whose segments are there or were copied into another one."""
    if seal is None or seal.kept is None:
        return []
    return [
        DataCorruption(str(directory / segment_name(number)), 0, f"a segment, which {SEAL_NAME} names", _NO_FILE)
        for number in sorted({seal.kept.oldest, seal.kept.newest} - {0})
        if number not in present
    ]


def find_headless(directory: Path, disk: Disk) -> DataCorruption | None:
    """Say whether a log's state, or its seal mark, is gone although the other files are there. Blocking.

    Segments that a restore from the object store has not finished need neither.

    Raises:
        DataCorruption: the state is no file.
        OSError: the directory cannot be read.
    """
    names = disk.list_names(directory)
    state = newest_slot(read_slots(directory, disk) or [])
    if STATE_NAME not in names:
        if RESTORING_NAME in names or not (SEAL_NAME in names or list_segments(directory, disk)):
            return None
        return DataCorruption(str(directory / STATE_NAME), 0, "the state of the log whose files are here", _NO_FILE)
    if SEAL_NAME not in names and state is not None and state.started_epoch:
        # Whoever opens a log for writing marks it before anything else, and before its start is recorded.
        return DataCorruption(str(directory / SEAL_NAME), 0, "the seal mark of the log whose files are here", _NO_FILE)
    return None


__all__ = ["RESTORING_NAME", "find_gone", "find_headless", "find_unnamed"]
