"""What a table remembers of each log, in its own properties (R15).

Owns: the names and the reading of these properties. Does not own when they move.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from arka.storage.ports import CommitMark

_UUID: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_MARK: Final = re.compile(rf"arka\.({_UUID})\.(committed-lsn|epoch)\Z")


def committed_lsn_property(log_uuid: UUID) -> str:
    """Name the property that holds the last LSN of a log that the table holds."""
    return f"arka.{log_uuid}.committed-lsn"


def epoch_property(log_uuid: UUID) -> str:
    """Name the property that holds the epoch of the last commit of a log."""
    return f"arka.{log_uuid}.epoch"


def is_mark(name: str) -> bool:
    """Say whether a table property is part of a mark."""
    return _MARK.match(name) is not None


def mark_of(properties: Mapping[str, str], log_uuid: UUID) -> CommitMark:
    """Read one log's mark; a log that never committed stands at LSN 0, epoch 0."""
    return CommitMark(
        log_uuid=log_uuid,
        committed_lsn=int(properties.get(committed_lsn_property(log_uuid), "0")),
        epoch=int(properties.get(epoch_property(log_uuid), "0")),
    )


def marks_of(properties: Mapping[str, str]) -> tuple[CommitMark, ...]:
    """Read the marks of all logs, in the order of their UUIDs."""
    logs = {UUID(match[1]) for name in properties if (match := _MARK.match(name))}
    return tuple(mark_of(properties, log) for log in sorted(logs))


__all__ = ["committed_lsn_property", "epoch_property", "is_mark", "mark_of", "marks_of"]
