"""Times in table metadata only go forward, whatever the clock does (R34).

Owns: the time of the next change of a table. Java, Rust and Go refuse to load metadata whose snapshot log goes back by
more than a minute, so that a clock that is ahead once must not be followed when it is right again.

Source: Iceberg table spec, "Table Metadata Fields": last-updated-ms, snapshot-log, metadata-log.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.update import AddSnapshotUpdate, TableUpdate


def now_ms() -> int:
    """Return the wall clock's time in milliseconds."""
    return time.time_ns() // 1_000_000


def time_after(newest: int) -> int:
    """Return now, or a millisecond after ``newest`` if that is later; both in milliseconds."""
    return max(now_ms(), newest + 1)


def newest_ms(metadata: TableMetadata) -> int:
    """Return the newest time in a table's metadata, in milliseconds."""
    times = [metadata.last_updated_ms]
    times += [entry.timestamp_ms for entry in metadata.snapshot_log[-1:]]
    times += [entry.timestamp_ms for entry in metadata.metadata_log[-1:]]
    times += [snapshot.timestamp_ms for snapshot in metadata.snapshots]
    return max(times)


def next_ms(metadata: TableMetadata) -> int:
    """Return the time of a table's next change: now, or a millisecond after its newest time if that is later."""
    return time_after(newest_ms(metadata))


def forward_updates(base: TableMetadata, updates: Iterable[TableUpdate]) -> tuple[TableUpdate, ...]:
    """Move the snapshots that updates add behind the newest time of what they are based on.

    Args:
        base: the metadata.
        updates: in order.
    """
    at = next_ms(base)
    moved = []
    for update in updates:
        if isinstance(update, AddSnapshotUpdate) and update.snapshot.timestamp_ms <= newest_ms(base):
            update = AddSnapshotUpdate(snapshot=update.snapshot.model_copy(update={"timestamp_ms": at}))
            at += 1
        moved.append(update)
    return tuple(moved)


def forward_metadata(base: TableMetadata, made: TableMetadata) -> TableMetadata:
    """Let metadata that follows ``base`` be newer than it."""
    if made.last_updated_ms > newest_ms(base):
        return made
    return made.model_copy(update={"last_updated_ms": next_ms(base)})


__all__ = ["forward_metadata", "forward_updates", "newest_ms", "next_ms", "now_ms", "time_after"]
