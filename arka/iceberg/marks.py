"""What a table remembers of each log, in its own properties (R15).

Owns: the reading of these properties. Does not own their names (``arka.tableproperties``) nor when they move.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from arka.storage.ports import CommitMark
from arka.tableproperties import MARK, committed_lsn_property, epoch_property


def is_mark(name: str) -> bool:
    """Say whether a table property is part of a mark."""
    return MARK.match(name) is not None


def mark_of(properties: Mapping[str, str], log_uuid: UUID) -> CommitMark:
    """Read one log's mark; a log that never committed stands at LSN 0, epoch 0."""
    return CommitMark(
        log_uuid=log_uuid,
        committed_lsn=int(properties.get(committed_lsn_property(log_uuid), "0")),
        epoch=int(properties.get(epoch_property(log_uuid), "0")),
    )


def marks_of(properties: Mapping[str, str]) -> tuple[CommitMark, ...]:
    """Read the marks of all logs, in the order of their UUIDs."""
    logs = {UUID(match[1]) for name in properties if (match := MARK.match(name))}
    return tuple(mark_of(properties, log) for log in sorted(logs))


__all__ = ["is_mark", "mark_of", "marks_of"]
