"""What a start finds in the log: frames by table, keys, lost ranges, tables and drops.

Owns: gathering it with bounded memory, integers per write and an entry of 28 bytes per key. Does not own the reading
(``arka.wal.recovery``) nor what is done with it (``arka.tiers.startup``).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import structlog
import trio

from arka._core.framing import KIND_BATCH, KIND_CREATE, KIND_DROP, KIND_LOST, KIND_TABLE, crc32c
from arka.errors import DataCorruption
from arka.records import KnownTable, LsnRange, TableInfo, TableName
from arka.tiers import ddl
from arka.tiers.creates import ReplayedCreates
from arka.tiers.keys import KeyIndex, pack_entry
from arka.tiers.release import LoadedCheckpoints
from arka.tiers.table import Binding, Table
from arka.wal.recovery import RecoveredFrame
from arka.wal.segment import KIND_ACTIVITY, Activity, parse_lost, parse_lost_tables

log = structlog.get_logger(__name__)

#: How often a long recovery says how far it is, in seconds.
_PROGRESS_S: Final = 1.0
#: What one step gives to a table, four numbers for each frame: about a millisecond.
_STEP_PLACES: Final = 4 * 1_000


@dataclass(slots=True)
class TableFrames:
    """One table's recovered frames: where they lie, as the backlog wants them.

    Attributes:
        infos: by schema id; the last one met is the newest that this log knows.
        last_lsn: of its last frame; 0 for none.
        created_lsn: of its first CREATE record; 0 for none.
        named_lsn: of its last one: who got a name last, has it.
    """

    infos: dict[int, TableInfo] = field(default_factory=dict)
    last_lsn: int = 0
    created_lsn: int = 0
    named_lsn: int = 0
    # How its frames were accepted, oldest first.
    _bindings: list[Binding] = field(default_factory=list)
    _paths: list[tuple[str, int, int]] = field(default_factory=list)
    # Per frame: index into _paths, LSN, offset, frame bytes.
    _places: array[int] = field(default_factory=lambda: array("Q"))
    # Entries as the key index packs them.
    _keys: bytearray = field(default_factory=bytearray)

    @property
    def newest_info(self) -> TableInfo | None:
        """The table as the log knew it last; None if only its frames are left."""
        return next(reversed(self.infos.values()), None)

    def learn(self, info: TableInfo) -> None:
        """Note the table at a schema."""
        self.infos.pop(info.schema_id, None)
        self.infos[info.schema_id] = info

    def bind(self, info: TableInfo, from_lsn: int) -> None:
        """Note that frames from an LSN on were accepted as the table was then."""
        self._bindings.append(Binding(from_lsn, info))

    def take(self, frame: RecoveredFrame) -> None:
        """Note a batch frame."""
        header, segment = frame.header, frame.segment
        info = self.infos.get(header.schema_id)
        if info is not None and (not self._bindings or self._bindings[-1].info.schema_id != header.schema_id):
            self.bind(info, header.lsn)
        place = (str(segment.path), segment.number, segment.epoch)
        if not self._paths or self._paths[-1] != place:
            self._paths.append(place)
        self._places.extend((len(self._paths) - 1, header.lsn, frame.offset, header.frame_bytes))
        self.last_lsn = header.lsn
        if header.key_bytes:
            digest = crc32c(frame.payload_view())
            self._keys += pack_entry(UUID(bytes=header.table_uuid), frame.key, header.lsn, digest)

    async def give(self, table: Table, keys: KeyIndex) -> None:
        """Give the table its frames and schemas, and the index its keys, in slices; nothing is left here.

        Cancellation: some was given; the start is over.
        """
        for schema_id, info in self.infos.items():
            try:
                table.learn_schema(schema_id, info.schema)
            except DataCorruption as error:
                # That table's trouble alone (R33).
                table.stop(f"Table {table.info.name} cannot be committed: {error.detail}")
        places, committed = self._places, table.committed.lsn
        for at in range(0, len(places), 4):
            index, lsn, offset, frame_bytes = places[at : at + 4]
            if lsn > committed:
                path, number, epoch = self._paths[index]
                table.note_recovered(path, number, epoch, lsn, offset, frame_bytes)
            if at % _STEP_PLACES == 0:
                await trio.lowlevel.checkpoint()
        table.last_lsn = max(table.last_lsn, self.last_lsn)
        if self._bindings:
            table.recall(self._bindings)
        if self._keys:
            await keys.load_steps(table.info.uuid, self._keys)
        self._places, self._keys = array("Q"), bytearray()


class Replay:
    """Takes every frame that recovery finds. Called in the disk's thread."""

    def __init__(self) -> None:
        self.tables: dict[UUID, TableFrames] = {}
        # Creates whose outcome the log does not tell.
        self.creates = ReplayedCreates()
        # Drops that the catalog may not have done yet.
        self.drops: dict[UUID, ddl.PendingDrop] = {}
        # The LSN of each table's last drop record.
        self.dropped: dict[UUID, int] = {}
        # Each with the tables that it counts against; None for all.
        self.lost: list[tuple[LsnRange, frozenset[UUID] | None]] = []
        # The birth of the log on this disk: records of another one mean nothing here (R37).
        self.birth = 0
        # By table: whether its last record says quiet, and that record's LSN.
        self.activity: dict[UUID, tuple[bool, int]] = {}
        self._tracked = False
        # LSNs of the intents to create, by location suffix; and of those whose tables were made, by UUID.
        self._intents: dict[str, int] = {}
        self._made: dict[UUID, int] = {}

    def take(self, frame: RecoveredFrame) -> None:
        """Take one frame, in LSN order."""
        header = frame.header
        match header.kind:
            case kind if kind == KIND_BATCH:
                self._frames(UUID(bytes=header.table_uuid)).take(frame)
            case kind if kind == KIND_TABLE:
                info = TableInfo.from_bytes(frame.payload())
                self._frames(info.uuid).learn(info)
            case kind if kind == KIND_CREATE:
                payload = frame.payload()
                asked = ddl.parse_create(payload)
                self.creates.take(header.lsn, asked)
                created = ddl.parse_created(payload)
                if created is None:
                    self._intents[asked.location_suffix] = header.lsn
                else:
                    if created.location.endswith(asked.location_suffix) and asked.location_suffix in self._intents:
                        self._made[created.uuid] = self._intents[asked.location_suffix]
                    frames = self._frames(created.uuid)
                    # Of a table that others made, a record of what was adopted comes behind its first frames.
                    is_first = not frames.infos
                    frames.learn(created)
                    frames.bind(created, header.lsn)
                    if is_first:
                        frames.created_lsn = header.lsn
                    frames.named_lsn = header.lsn
            case kind if kind == KIND_DROP:
                record = ddl.parse_drop(frame.payload())
                uuid = ddl.parse_table_uuid(record)
                # What was written before the drop went with the table; what comes behind it, in a table that was
                # registered again, does not.
                self.tables.pop(uuid, None)
                self.activity.pop(uuid, None)
                self.dropped[uuid] = header.lsn
                if record.done:
                    self.drops.pop(uuid, None)
                else:
                    self.drops[uuid] = ddl.PendingDrop(
                        header.lsn, TableName(record.namespace, record.name), record.purge
                    )
            case kind if kind == KIND_LOST:
                payload = frame.payload()
                self.lost.append((parse_lost(payload), parse_lost_tables(payload)))
            case kind if kind == KIND_ACTIVITY:
                activity = Activity.from_bytes(frame.payload())
                if activity.birth == self.birth:
                    self._tracked = True
                    self.activity.update((table, (activity.quiet, header.lsn)) for table in activity.tables)

    def known(self, remembered: Iterable[KnownTable]) -> list[KnownTable]:
        """Join the tables that the log describes to those that its newest checkpoint remembers.

        Args:
            remembered: the checkpoint's tables; of those, the log knows later schemas and drops.

        Returns:
            The tables; of two with one name, the one that got it last comes last.
        """
        recorded = {table.info.uuid: table for table in remembered if table.info.uuid not in self.dropped}
        for uuid, frames in sorted(self.tables.items(), key=lambda item: item[1].named_lsn):
            info = frames.newest_info
            if info is not None:
                known = recorded.pop(uuid, KnownTable(info, 0, frames.created_lsn))
                recorded[uuid] = known._replace(info=info)
        return list(recorded.values())

    def writing(self, remembered: Iterable[KnownTable], checkpoint: LoadedCheckpoints) -> frozenset[UUID] | None:
        """The tables that may have had unfinished writes when the last process died; None if nobody kept count (R37).

        Args:
            remembered: the tables that are known now.
            checkpoint: what the newest one says of quiet tables; the log says what came after.
        """
        told = bool(self.birth) and checkpoint.birth == self.birth
        if not self._tracked and not told:
            return None
        found = {table.info.uuid for table in remembered} | self.activity.keys()
        return frozenset(table for table in found if not self.is_quiet(table, checkpoint))

    def made_lsn(self, table: UUID) -> int:
        """The LSN at which the log began to make a table; 0 for one that it may only have come to know."""
        return self._made.get(table, 0)

    def is_quiet(self, table: UUID, checkpoint: LoadedCheckpoints) -> bool:
        """Whether the log says that a table is quiet."""
        frames = self.tables.get(table)
        last_lsn = 0 if frames is None else frames.last_lsn
        record = self.activity.get(table)
        if record is not None:
            quiet, lsn = record
            return quiet and last_lsn < lsn
        return checkpoint.birth == self.birth and table in checkpoint.quiet and last_lsn <= checkpoint.through_lsn

    def _frames(self, uuid: UUID) -> TableFrames:
        frames = self.tables.get(uuid)
        if frames is None:
            frames = self.tables[uuid] = TableFrames()
        return frames


class ProgressLog:
    """Says how far recovery is, once a second when it takes longer than that. Called in the disk's thread."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _PROGRESS_S

    def __call__(self, read_bytes: int, all_bytes: int) -> None:
        """Note how many bytes are read."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _PROGRESS_S
            percent = 100 * read_bytes // max(all_bytes, 1)
            log.info("wal.recovering", percent=percent, read_bytes=read_bytes, all_bytes=all_bytes)


__all__ = ["ProgressLog", "Replay", "TableFrames"]
