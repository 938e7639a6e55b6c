"""What a table remembers of each log, in its own properties (R15).

Owns: the reading and the values of these properties. Does not own their names (``arka.tableproperties``), when they
move, nor whether a mark is this log's own (``arka.lineage``).

The token's property repeats epoch and LSN. So it is known to be another commit's where an older version has committed
since, which leaves it as it was, and a number that others changed is known by it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final
from uuid import UUID

from pyiceberg.table.metadata import TableMetadata

from arka.lineage import CommitMark
from arka.tableproperties import (
    MARK,
    SUMMARY_LAST_LSN,
    SUMMARY_LOG,
    UUID_FORM,
    committed_lsn_property,
    epoch_property,
    token_property,
)

_NUMBER: Final = re.compile(r"[0-9]{1,19}\Z")
_LOG: Final = re.compile(rf"{UUID_FORM}\Z")
#: Epoch, LSN, and ``Lineage.token_for`` in hex.
_TOKEN: Final = re.compile(r"([0-9]{1,19})-([0-9]{1,19})-([0-9a-f]{16})\Z")


def is_mark(name: str) -> bool:
    """Say whether a table property is part of a mark."""
    return MARK.match(name) is not None


def mark_properties(log_uuid: UUID, committed_lsn: int, epoch: int, token: int) -> dict[str, str]:
    """Return what a commit sets (R15).

    Args:
        log_uuid: the log.
        committed_lsn: the last LSN that the table holds with it.
        epoch: in which it is committed.
        token: for this mark of this table, see ``Lineage.token_for``; 0 for none.
    """
    made = {committed_lsn_property(log_uuid): str(committed_lsn), epoch_property(log_uuid): str(epoch)}
    if token:
        made[token_property(log_uuid)] = f"{epoch}-{committed_lsn}-{token:016x}"
    return made


def mark_of(properties: Mapping[str, str], log_uuid: UUID) -> CommitMark:
    """Read one log's mark; a log that never committed stands at LSN 0, epoch 0."""
    names = committed_lsn_property(log_uuid), epoch_property(log_uuid), token_property(log_uuid)
    lsn, epoch, token = map(properties.get, names)
    for name, value in zip(names, (lsn, epoch), strict=False):
        if value is not None and not _NUMBER.match(value):
            return CommitMark(log_uuid, 0, 0, damage=f"{name} is {value!r}, expected a number")
    mark = CommitMark(log_uuid, int(lsn or 0), int(epoch or 0))
    if token is None:
        return mark
    noted = _TOKEN.match(token)
    if noted is None:
        return CommitMark(log_uuid, 0, 0, damage=f"{names[2]} is {token!r}, expected EPOCH-LSN-TOKEN")
    noted_epoch, noted_lsn = int(noted[1]), int(noted[2])
    if noted_epoch < mark.epoch:
        # An older version has committed since.
        return mark
    if (noted_epoch, noted_lsn) != (mark.epoch, mark.committed_lsn):
        found = f"{lsn or 'gone'} and {epoch or 'gone'}"
        damage = f"{names[0]} and {names[1]} are {found}, expected {noted_lsn} and {noted_epoch}"
        return CommitMark(log_uuid, mark.committed_lsn, mark.epoch, damage=damage)
    return CommitMark(log_uuid, mark.committed_lsn, mark.epoch, int(noted[3], 16))


def marks_of(properties: Mapping[str, str]) -> tuple[CommitMark, ...]:
    """Read the marks of all logs, in the order of their UUIDs."""
    logs = {UUID(match[1]) for name in properties if (match := MARK.match(name))}
    return tuple(mark_of(properties, log) for log in sorted(logs))


def mark_in(metadata: TableMetadata, log_uuid: UUID) -> CommitMark:
    """Read one log's mark, and hold it against what the table's snapshots say of the same log."""
    return _held_against(metadata, log_uuid, _noted_lsns(metadata).get(log_uuid, 0))


def _held_against(metadata: TableMetadata, log_uuid: UUID, noted_lsn: int) -> CommitMark:
    mark = mark_of(metadata.properties, log_uuid)
    if mark.damage or noted_lsn <= mark.committed_lsn:
        return mark
    name = committed_lsn_property(log_uuid)
    damage = f"{name} is {metadata.properties.get(name, 'gone')}, and a snapshot has LSNs up to {noted_lsn}"
    return replace(mark, damage=damage)


def marks_in(metadata: TableMetadata) -> tuple[CommitMark, ...]:
    """Read the marks of all logs, in the order of their UUIDs, as ``mark_in`` does, removed ones too."""
    noted = _noted_lsns(metadata)
    logs = {mark.log_uuid for mark in marks_of(metadata.properties)} | noted.keys()
    return tuple(_held_against(metadata, log, noted.get(log, 0)) for log in sorted(logs))


def _noted_lsns(metadata: TableMetadata) -> dict[UUID, int]:
    """The highest LSN of each log that a retained snapshot names: no mark of that log is below it."""
    found: dict[UUID, int] = {}
    for snapshot in metadata.snapshots:
        if snapshot.summary is None:
            continue
        log, lsn = snapshot.summary.get(SUMMARY_LOG), snapshot.summary.get(SUMMARY_LAST_LSN)
        if log and lsn and _LOG.match(log) and _NUMBER.match(lsn):
            found[UUID(log)] = max(int(lsn), found.get(UUID(log), 0))
    return found


__all__ = ["is_mark", "mark_in", "mark_of", "mark_properties", "marks_in", "marks_of"]
