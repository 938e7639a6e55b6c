"""What stands in the object store about a node's epochs: keys and bytes.

Owns: the layout below the node's id, and the records' form. Does not own what follows from them
(``arka.tiers.epochs``, ``arka.tiers.lease``).

Every object is create-only and never changed:
    ``epoch/<epoch, 10 digits>``             JSON and its CRC, see ``EpochRecord``; the highest wins
    ``started/<epoch, 10 digits>``           the same, see ``StartRecord``: that epoch's disk holds all of the log
    ``heartbeat/<epoch, 10 digits>/<n>``     empty; the highest number changes while that epoch's process lives
    ``lsn/<ceiling, 16 digits>``             empty; LSNs below the highest ceiling may have been given
"""

from __future__ import annotations

from typing import Self, TypeVar
from uuid import UUID

import msgspec

from arka._core.framing import crc32c
from arka.errors import DataCorruption
from arka.lineage import Lineage, Start
from arka.storage.ports import ObjectStore
from arka.wal.objectfile import ObjectRef


class _Record(msgspec.Struct, frozen=True):
    """One line of JSON, for people, and one with its CRC-32C in hex. Fields are only ever added, with a default."""

    log_uuid: UUID
    epoch: int

    def to_bytes(self) -> bytes:
        """Encode."""
        body = msgspec.json.encode(self)
        return body + b"\n" + _crc(body) + b"\n"

    @classmethod
    def from_bytes(cls, path: str, data: bytes) -> Self:
        """Decode and check.

        Raises:
            DataCorruption: it is no intact record of this kind.
        """
        body, _, crc = data.rstrip(b"\n").rpartition(b"\n")
        if crc != _crc(body):
            raise DataCorruption(path, len(body) + 1, f"crc {_crc(body)!r}", repr(crc[:16]))
        try:
            return msgspec.json.decode(body, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataCorruption(path, 0, f"an {cls.__name__}", str(error)) from error


class EpochRecord(_Record, frozen=True):
    """Who took an epoch.

    Attributes:
        node_id: the node.
        disk_uuid: the data directory that the epoch's process wrote to (R13).
        started_us: when, microseconds since the Unix epoch; for people.
        host: where; for people.
        pid: its process; for people.
        disk_epoch: the epoch that the disk knew of then; 0 for a directory without a log.
        disk_ceiling: no LSN at or above it had been given by the disk; 0 for a directory without a log.
        heartbeat_s: how often that process shows that it lives, in seconds.
    """

    node_id: str
    disk_uuid: UUID
    started_us: int
    host: str
    pid: int
    disk_epoch: int = 0
    disk_ceiling: int = 0
    heartbeat_s: float = 0.0


class StartRecord(_Record, frozen=True):
    """That an epoch's disk holds all of the log, and where its chain goes on from.

    Attributes:
        disk_uuid: the data directory.
        started_us: when, microseconds since the Unix epoch; for people.
        head: epoch, first LSN, last LSN and checksum of the last object of the chain then; None for none.
        starts: epoch, token and first LSN of the starts that the disk knew of, its own last; see ``arka.lineage``.
    """

    disk_uuid: UUID
    started_us: int
    head: tuple[int, int, int, int] | None
    starts: tuple[tuple[int, int, int], ...] = ()

    @property
    def head_ref(self) -> ObjectRef | None:
        """The head as its successor names it."""
        return None if self.head is None else ObjectRef(*self.head)

    @property
    def lineage(self) -> Lineage:
        """The starts as a disk keeps them."""
        return Lineage(tuple(Start(*start) for start in self.starts))


_R = TypeVar("_R", EpochRecord, StartRecord)


async def read_record(store: ObjectStore, key: str, kind: type[_R]) -> _R:
    """Read the record under a key that was listed.

    Raises:
        DataCorruption: it is not there, not intact, or another epoch's.
        StoreUnavailable: the store does not answer.
    """
    path = f"{store.url}/{key}"
    try:
        data = await store.get(key)
    except KeyError:
        raise DataCorruption(path, 0, f"an {kind.__name__}", "no object") from None
    record = kind.from_bytes(path, data)
    if f"{record.epoch:010d}" != key.rpartition("/")[2]:
        raise DataCorruption(path, 0, f"the record of {key}", f"that of epoch {record.epoch}")
    return record


def epoch_key(node_id: str, epoch: int) -> str:
    """The key of an epoch."""
    return f"{node_id}/epoch/{epoch:010d}"


def start_key(node_id: str, epoch: int) -> str:
    """The key of an epoch's start record."""
    return f"{node_id}/started/{epoch:010d}"


def heartbeat_prefix(node_id: str, epoch: int) -> str:
    """What the keys of an epoch's heartbeats begin with."""
    return f"{node_id}/heartbeat/{epoch:010d}/"


def lsn_key(node_id: str, ceiling: int) -> str:
    """The key of a reserved block."""
    return f"{node_id}/lsn/{ceiling:016d}"


def _crc(body: bytes) -> bytes:
    return b"%08x" % crc32c(body)


__all__ = [
    "EpochRecord",
    "StartRecord",
    "epoch_key",
    "heartbeat_prefix",
    "lsn_key",
    "read_record",
    "start_key",
]
