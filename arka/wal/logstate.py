"""The log's state: whose log this is, and up to where LSNs may be given (R1, R2).

Owns: the file ``log`` in the log's directory. Does not own when a ceiling is raised or an epoch taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import trio

from arka import failpoints
from arka._core.lsn import LSN_END
from arka.errors import ConfigurationError, DataCorruption, InternalError
from arka.lineage import NO_STARTS, Lineage, Start
from arka.storage.ports import Disk
from arka.wal.blocks import FORMAT_VERSION, check_block, magic, seal_block
from arka.wal.seal import write_whole
from arka.wal.shortage import short_of

STATE_NAME: Final = "log"

_MAGIC: Final = magic(b"ARKL")
#: A page each, so that writing one slot cannot tear the other.
_SLOT_BYTES: Final = 4096
_SLOTS: Final = 2
# magic, crc, version, reserved, log uuid, epoch, lsn ceiling, generation, store ceiling, started epoch, birth
_LAYOUT: Final = struct.Struct("<IIII16sQQQQQQ")
#: Behind it: how many starts the log remembers, and of each epoch, token, first LSN.
_STARTS: Final = struct.Struct("<Q")
_START: Final = struct.Struct("<QQQ")


@dataclass(frozen=True, slots=True)
class LogState:
    """The durable state of a log beside its segments.

    Attributes:
        log_uuid: the log.
        epoch: the highest epoch in which it was written.
        lsn_ceiling: no LSN at or above it was ever given.
        store_ceiling: LSNs below it are reserved for this log in the object store: while the store is away a start
            may give them all the same (R2, R13); never below ``lsn_ceiling``.
        generation: how often the state was written.
        started_epoch: the highest epoch whose start the object store was seen to record; 0 for none: nothing was ever
            served from a disk that was just made or restored, and it may be made again (R13).
        birth: a random number of this log on this disk; 0 where none was made yet. What only a disk's own log can know
            carries it, and means nothing after a restore (R37).
        lineage: the newest starts that may have committed (R15).
    """

    log_uuid: UUID
    epoch: int
    lsn_ceiling: int
    store_ceiling: int
    generation: int = 1
    started_epoch: int = 0
    birth: int = 0
    lineage: Lineage = NO_STARTS

    @classmethod
    async def create(
        cls,
        directory: Path,
        disk: Disk,
        *,
        log_uuid: UUID,
        epoch: int,
        lsn_ceiling: int,
        store_ceiling: int,
        lineage: Lineage = NO_STARTS,
    ) -> LogState:
        """Make the state of a new log; one that exists is an error.

        Args:
            directory: made if it does not exist.
            disk: the file system.
            log_uuid: minted by the caller (R1).
            epoch: the first epoch.
            lsn_ceiling: LSNs below it may be given once this returns; at most 2**53.
            store_ceiling: LSNs below it are reserved in the object store.
            lineage: the log's earlier starts.

        Raises:
            ConfigurationError: the directory holds a log already.
            OSError: the state may or may not exist.

        Durability: it is on disk on return.

        Cancellation: before it begins nothing is made; once begun it is finished.
        """
        state = cls(log_uuid, epoch, lsn_ceiling, store_ceiling, lineage=lineage)
        state._check()

        def job() -> None:
            disk.make_directory(directory)
            if STATE_NAME in disk.list_names(directory):
                raise ConfigurationError(f"{directory} holds a log already")
            write_whole(disk, directory / STATE_NAME, [state._to_slot(), state._to_slot()])
            failpoints.hit("logstate.created")

        await disk.run(job)
        return state

    @classmethod
    async def read(cls, directory: Path, disk: Disk) -> LogState | None:
        """Read the newest intact slot; None where there is no log.

        Raises:
            DataCorruption: neither slot is intact.
            ConfigurationError: another version of Arka wrote it.
            OSError: it cannot be read.
        """
        return await disk.run(lambda: cls._read(directory, disk))

    async def write(self, directory: Path, disk: Disk) -> LogState:
        """Replace the state by this one: slot after slot, the older first, each fsynced.

        So one of the two is whole at any moment, and at rest both say the same: damage to either costs
        nothing. To be called by one task at a time.

        Returns:
            The state as written, with its generation.

        Raises:
            InternalError: there is no state, it is another log's, or epoch or ceiling would fall.
            DataCorruption: what is there cannot be read.
            OSError: the old state or the new one is in force.

        Durability: it is on disk on return.

        Cancellation: before it begins nothing is written; once begun it is finished.
        """
        self._check()
        return await disk.run(lambda: self._write(directory, disk))

    def _check(self) -> None:
        if not 1 <= self.lsn_ceiling <= self.store_ceiling <= LSN_END:
            raise InternalError(
                f"LSN ceilings are 1 .. 2**53, the disk's not above the store's; found {self.lsn_ceiling} on disk and "
                f"{self.store_ceiling} in the store"
            )

    def _to_slot(self) -> bytes:
        fields = _LAYOUT.pack(
            _MAGIC,
            0,
            FORMAT_VERSION,
            0,
            self.log_uuid.bytes,
            self.epoch,
            self.lsn_ceiling,
            self.generation,
            self.store_ceiling,
            self.started_epoch,
            self.birth,
        )
        fields += _STARTS.pack(len(self.lineage.starts))
        fields += b"".join(_START.pack(*start) for start in self.lineage.starts)
        return seal_block(fields.ljust(_SLOT_BYTES, b"\0"))

    @classmethod
    def _read_slots(cls, directory: Path, disk: Disk) -> list[LogState | None] | None:
        slots = read_slots(directory, disk)
        if slots is None:
            return None
        damage = [slot for slot in slots if isinstance(slot, DataCorruption)]
        if len(damage) == _SLOTS:
            raise damage[-1]
        return [slot if isinstance(slot, LogState) else None for slot in slots]

    @classmethod
    def _read(cls, directory: Path, disk: Disk) -> LogState | None:
        slots = cls._read_slots(directory, disk)
        return None if slots is None else newest_slot(slots)

    def _write(self, directory: Path, disk: Disk) -> LogState:
        with short_of():
            slots = self._read_slots(directory, disk)
        if slots is None:
            raise InternalError(f"{directory} holds no log state: create it first")
        newest = newest_slot(slots)
        assert newest is not None
        if newest.log_uuid != self.log_uuid:
            raise InternalError(f"{directory} is log {newest.log_uuid}, not {self.log_uuid}")
        found = (newest.epoch, newest.lsn_ceiling, newest.store_ceiling, newest.started_epoch)
        asked = (self.epoch, self.lsn_ceiling, self.store_ceiling, self.started_epoch)
        if any(new < old for new, old in zip(asked, found, strict=True)):
            raise InternalError(
                f"{directory} is at epoch, ceiling, store ceiling and started epoch {found}: none may fall, asked for "
                f"{asked}"
            )
        state = replace(self, generation=newest.generation + 1)
        generations = [slot.generation if slot is not None else 0 for slot in slots]
        first = generations.index(min(generations))
        with short_of():
            file = disk.open(directory / STATE_NAME)
        try:
            for slot in (first, 1 - first):
                file.write(slot * _SLOT_BYTES, [state._to_slot()])
                failpoints.hit("logstate.slot_written")
                file.sync()
                failpoints.hit("logstate.slot_synced")
        finally:
            file.close()
        return state


class LogStateFile:
    """The state of an open log: its parts are raised by different tasks, and written here one after the other.

    Used from trio's thread only.
    """

    def __init__(self, directory: Path, disk: Disk, state: LogState) -> None:
        """Hold a state that was read or created.

        Args:
            directory: the log's directory.
            disk: its file system.
            state: what is on disk now.
        """
        self._directory = directory
        self._disk = disk
        # Invariant: what is on disk, or what a write that failed tried to put there.
        self._state = state
        self._lock = trio.Lock()

    @property
    def state(self) -> LogState:
        """What is on disk."""
        return self._state

    async def raise_to(
        self,
        *,
        epoch: int = 0,
        lsn_ceiling: int = 0,
        store_ceiling: int = 0,
        started_epoch: int = 0,
        birth: int = 0,
        start: Start | None = None,
    ) -> None:
        """Raise parts of the state; one that is higher already stays, and so does a birth.

        Raises:
            Shortage: the old state is in force: ask again (R31).
            OSError: the old state or the new one is in force.

        Durability: on return the state on disk is at least this.

        Cancellation: before it begins nothing is written; once begun it is finished.
        """
        async with self._lock:
            old = self._state
            wanted = replace(
                old,
                epoch=max(epoch, old.epoch),
                lsn_ceiling=max(lsn_ceiling, old.lsn_ceiling),
                store_ceiling=max(store_ceiling, old.store_ceiling),
                started_epoch=max(started_epoch, old.started_epoch),
                birth=old.birth or birth,
                lineage=old.lineage if start is None else old.lineage.extended(start),
            )
            if wanted != old:
                self._state = await wanted.write(self._directory, self._disk)


def read_slots(directory: Path, disk: Disk) -> list[LogState | DataCorruption] | None:
    """Read both slots, each as what it says or as what is wrong with it; None where there is no log. Blocking.

    Raises:
        ConfigurationError: another version of Arka wrote it.
        OSError: it cannot be read.
    """
    path = directory / STATE_NAME
    try:
        data = disk.map(path)
    except FileNotFoundError:
        return None
    slots: list[LogState | DataCorruption] = []
    for slot in range(_SLOTS):
        offset = slot * _SLOT_BYTES
        try:
            check_block(str(path), data, offset, _SLOT_BYTES, _MAGIC, "log state")
        except DataCorruption as error:
            slots.append(error)
            continue
        fields = _LAYOUT.unpack_from(data, offset)
        uuid, epoch, ceiling, generation, store_ceiling, started, birth = fields[4:]
        # An older version leaves zeros there.
        (number,) = _STARTS.unpack_from(data, offset + _LAYOUT.size)
        first = offset + _LAYOUT.size + _STARTS.size
        starts = tuple(Start(*_START.unpack_from(data, first + place * _START.size)) for place in range(number))
        state = LogState(UUID(bytes=uuid), epoch, ceiling, store_ceiling, generation, started, birth, Lineage(starts))
        slots.append(state)
    return slots


def newest_slot(slots: Iterable[LogState | DataCorruption | None]) -> LogState | None:
    """The state that is in force: that of the intact slot with the higher generation; None without one."""
    intact = (slot for slot in slots if isinstance(slot, LogState))
    return max(intact, key=lambda state: state.generation, default=None)


__all__ = ["STATE_NAME", "LogState", "LogStateFile", "newest_slot", "read_slots"]
