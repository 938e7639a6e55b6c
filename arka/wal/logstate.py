"""The log's state: whose log this is, and up to where LSNs may be given (R1, R2).

Owns: the file ``log`` in the log's directory. Does not own when the ceiling is raised.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

from arka import failpoints
from arka._core.lsn import LSN_END
from arka.errors import ConfigurationError, DataCorruption, InternalError
from arka.storage.ports import Disk
from arka.wal.blocks import FORMAT_VERSION, check_block, magic, seal_block
from arka.wal.seal import write_whole

STATE_NAME: Final = "log"

_MAGIC: Final = magic(b"ARKL")
#: A page each, so that writing one slot cannot tear the other.
_SLOT_BYTES: Final = 4096
_SLOTS: Final = 2
# magic, crc, version, reserved, log uuid, epoch, lsn ceiling, generation
_LAYOUT: Final = struct.Struct("<IIII16sQQQ")


@dataclass(frozen=True, slots=True)
class LogState:
    """The durable state of a log beside its segments.

    Attributes:
        log_uuid: the log.
        epoch: the highest epoch in which it was written.
        lsn_ceiling: no LSN at or above it was ever given.
        generation: how often the state was written.
    """

    log_uuid: UUID
    epoch: int
    lsn_ceiling: int
    generation: int = 1

    @classmethod
    async def create(cls, directory: Path, disk: Disk, *, log_uuid: UUID, epoch: int, lsn_ceiling: int) -> LogState:
        """Make the state of a new log; one that exists is an error.

        Args:
            directory: made if it does not exist.
            disk: the file system.
            log_uuid: minted by the caller (R1).
            epoch: the first epoch.
            lsn_ceiling: LSNs below it may be given once this returns; at most 2**53.

        Raises:
            ConfigurationError: the directory holds a log already.
            OSError: the state may or may not exist.

        Durability: it is on disk on return.

        Cancellation: before it begins nothing is made; once begun it is finished.
        """
        state = cls(log_uuid, epoch, lsn_ceiling)
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
        if not 1 <= self.lsn_ceiling <= LSN_END:
            raise InternalError(f"an LSN ceiling is 1 .. 2**53, found {self.lsn_ceiling}")

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
        )
        return seal_block(fields.ljust(_SLOT_BYTES, b"\0"))

    @classmethod
    def _read_slots(cls, directory: Path, disk: Disk) -> list[LogState | None] | None:
        path = directory / STATE_NAME
        try:
            data = disk.map(path)
        except FileNotFoundError:
            return None
        slots: list[LogState | None] = []
        damage: DataCorruption | None = None
        for slot in range(_SLOTS):
            offset = slot * _SLOT_BYTES
            try:
                check_block(str(path), data, offset, _SLOT_BYTES, _MAGIC, "log state")
            except DataCorruption as error:
                damage = error
                slots.append(None)
                continue
            _, _, _, _, uuid, epoch, ceiling, generation = _LAYOUT.unpack_from(data, offset)
            slots.append(cls(UUID(bytes=uuid), epoch, ceiling, generation))
        if damage is not None and not any(slots):
            raise damage
        return slots

    @classmethod
    def _read(cls, directory: Path, disk: Disk) -> LogState | None:
        slots = cls._read_slots(directory, disk)
        if slots is None:
            return None
        return max((slot for slot in slots if slot is not None), key=lambda state: state.generation)

    def _write(self, directory: Path, disk: Disk) -> LogState:
        slots = self._read_slots(directory, disk)
        if slots is None:
            raise InternalError(f"{directory} holds no log state: create it first")
        generations = [slot.generation if slot is not None else 0 for slot in slots]
        newest = slots[generations.index(max(generations))]
        assert newest is not None
        if newest.log_uuid != self.log_uuid:
            raise InternalError(f"{directory} is log {newest.log_uuid}, not {self.log_uuid}")
        if self.epoch < newest.epoch or self.lsn_ceiling < newest.lsn_ceiling:
            raise InternalError(
                f"{directory} is at epoch {newest.epoch} and ceiling {newest.lsn_ceiling}: "
                f"neither may fall, asked for {self.epoch} and {self.lsn_ceiling}"
            )
        state = replace(self, generation=newest.generation + 1)
        first = generations.index(min(generations))
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


__all__ = ["STATE_NAME", "LogState"]
