"""Parking: frames of one table leave the log and stay in the object store (R18, R33).

Owns: the objects below ``parked/<table uuid>/`` or ``behind/<table uuid>/``, the way there and back. Does not own why a
table is stopped (``arka.tiers.table``, ``arka.tiers.tables``) or set apart (``arka.tiers.apart``), nor which objects
have to be there (``arka.tiers.held``).

A parked object is a WAL object (``arka.wal.objectfile``) with the frames of one table alone, as they stood in
their segment; its ``stored_through`` is the table's committed LSN when it was parked. The next start that finds
the table in the catalog again brings the frames back, before those of the log, and commits them in LSN order.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog
import trio

from arka._core.framing import KIND_BATCH, FrameError, crc_seed, verify_frame
from arka.errors import DataCorruption
from arka.options import MIB
from arka.records import HeldObject, TableInfo
from arka.storage.ports import Disk, ObjectExists, ObjectMeta, ObjectStore, SegmentSlice, StoreUnavailable
from arka.tiers.backlog import Backlog
from arka.tiers.held import HeldObjects
from arka.tiers.listing import list_own
from arka.tiers.retry import persist
from arka.tiers.space import DiskSpace
from arka.tiers.table import Table
from arka.tiers.watermarks import Watermark
from arka.wal.objectfile import HEADER_BYTES as OBJECT_HEADER_BYTES
from arka.wal.objectfile import EncodedObject, ObjectHeader, WalObject, encode_object, parse_object
from arka.wal.segment import HEADER_BYTES, SegmentHeader
from arka.wal.shortage import RETRY_S, Shortage, short_of

log = structlog.get_logger(__name__)

#: About how many frame bytes go into one parked object; bounds the memory used.
_OBJECT_BYTES: Final = 16 * MIB


@dataclass(frozen=True, slots=True)
class _Object:
    """One object: its key, its bytes, those of its frames, the LSNs of its first and last frame."""

    key: str
    size: int
    frame_bytes: int
    first_lsn: int
    last_lsn: int


@dataclass(slots=True)
class _Parked:
    """What the store holds of one table.

    Attributes:
        objects: those whose headers are intact, by first LSN.
        unreadable: keys and sizes of the others.
        damage: what was found wrong with one of ``objects``.
    """

    objects: list[_Object] = field(default_factory=list)
    unreadable: dict[str, int] = field(default_factory=dict)
    damage: DataCorruption | None = None

    @property
    def keys(self) -> list[str]:
        return [*(each.key for each in self.objects), *self.unreadable]

    @property
    def size(self) -> int:
        return sum(each.size for each in self.objects) + sum(self.unreadable.values())

    @property
    def first_lsn(self) -> int:
        return self.objects[0].first_lsn

    @property
    def last_lsn(self) -> int:
        return max((each.last_lsn for each in self.objects), default=0)


class Parking:
    """The parked frames of one log's tables. Used from trio's thread only."""

    def __init__(
        self,
        store: ObjectStore,
        disk: Disk,
        directory: Path,
        space: DiskSpace,
        *,
        node_id: str,
        log_uuid: UUID,
        objects: Watermark,
        wait_connected: Callable[[], Awaitable[int]],
        retry_s: float,
        rng: random.Random,
        folder: str,
        held: HeldObjects,
    ) -> None:
        """Join the store and the local disk.

        Args:
            store: keeps the parked objects.
            disk: holds the log's segments, and what is brought back.
            directory: for what is brought back; no other use is made of it.
            space: counts parked bytes against ``limits.disk_bytes``.
            node_id: the node's name in the store.
            log_uuid: the log.
            objects: the ``object_storage`` mark; nothing above it is parked (R4).
            wait_connected: waits for this process's epoch and returns it.
            retry_s: the first pause after a failed request.
            rng: for the jitter of retries.
            folder: below the node's name: ``parked``, whose bytes count as held on the disk, or ``behind``.
            held: knows which objects have to be there.
        """
        self._held = held
        self._folder = folder
        self._copies = 0
        self._store = store
        self._disk = disk
        self._directory = directory
        self._space = space
        self._node_id = node_id
        self._log_uuid = log_uuid
        self._objects = objects
        self._wait_connected = wait_connected
        self._retry_s = retry_s
        self._rng = rng
        self._epoch = 0
        self._parked: dict[UUID, _Parked] = {}
        self.loaded = False

    def parked_bytes(self, table: UUID) -> int:
        """Bytes that are parked for a table."""
        parked = self._parked.get(table)
        return 0 if parked is None else parked.size

    def frame_bytes(self, table: UUID) -> int:
        """Bytes of the frames that are here of a table."""
        parked = self._parked.get(table)
        return 0 if parked is None else sum(each.frame_bytes for each in parked.objects)

    async def load(self) -> None:
        """Look what is parked, once there is an epoch. Outages are waited for.

        An object that cannot be read is its table's trouble (R33): see ``check``.

        Cancellation: nothing changes.
        """
        self._epoch = await self._wait_connected()

        async def ask() -> None:
            self._parked.clear()
            for meta in await list_own(self._store, self._node_id, f"{self._folder}/"):
                await self._look_at(UUID(meta.key.split("/")[-2]), meta)

        await self._persist(ask)
        self._note_held(sum(parked.size for parked in self._parked.values()))
        await self._disk.run(self._clear)
        self.loaded = True

    async def _look_at(self, uuid: UUID, meta: ObjectMeta) -> None:
        """Read an object's header."""
        parked = self._parked.setdefault(uuid, _Parked())
        path = f"{self._store.url}/{meta.key}"
        try:
            head = memoryview(await self._store.get_range(meta.key, 0, OBJECT_HEADER_BYTES))
            header = ObjectHeader.from_bytes(path, head)
            _check_log(path, header, self._log_uuid)
        except KeyError:
            # A process that does not know yet that it is fenced has deleted it, since it was committed.
            log.debug("parking.gone", key=meta.key)
        except DataCorruption as error:
            parked.unreadable[meta.key] = meta.size
            self._held.note_unreadable(uuid, self._below_node(meta.key), error)
        else:
            found = _Object(meta.key, meta.size, header.frame_bytes, header.first_lsn, header.last_lsn)
            parked.objects.append(found)

    def check(self, table: Table) -> None:
        """Check that nothing is missing of a table whose mark was read, as far as keys and headers tell.

        Raises:
            DataCorruption: an object is damaged or gone, so that nothing of the table may be committed.
        """
        here = self._intact_keys(table.info.uuid)
        self._held.check(table, self._folder, here, f"{self._store.url}/{self._node_id}")

    def held(self) -> dict[UUID, list[HeldObject]]:
        """By table, the objects that there are or that have to be, for the next checkpoint."""
        found = {
            uuid: [HeldObject(self._below_node(each.key), each.first_lsn, each.last_lsn) for each in parked.objects]
            for uuid, parked in self._parked.items()
        }
        return self._held.with_missing(self._folder, found)

    def _below_node(self, key: str) -> str:
        return key.removeprefix(f"{self._node_id}/")

    def _intact_keys(self, uuid: UUID) -> set[str]:
        parked = self._parked.get(uuid)
        return set() if parked is None else {self._below_node(each.key) for each in parked.objects}

    async def park(self, table: Table) -> None:
        """Move a stopped table's frames out of the log; what is parked already stays as it is.

        On return the log need not keep anything for the table.

        Raises:
            DataCorruption: a frame in the log is damaged.

        Cancellation: what is parked so far stays so; the next start goes on.

        Durability: each frame is in the store before the backlog lets go of it.
        """
        await self._objects.wait_reached(table.last_lsn)
        frames = await self.move(table, table.last_lsn)
        if frames:
            parked = self._parked[table.info.uuid]
            log.warning(
                "table.parked", table=str(table.info.name), frames=frames, bytes=parked.size, last_lsn=parked.last_lsn
            )

    async def move(self, table: Table, through_lsn: int) -> int:
        """Move a table's frames up to ``through_lsn`` out of the log; nobody else cuts them meanwhile.

        Args:
            table: whose.
            through_lsn: at most the ``object_storage`` mark (R4).

        Returns:
            How many frames were moved.

        Raises:
            DataCorruption: a frame in the log is damaged.

        Cancellation: what was moved so far stays so.

        Durability: each frame is in the store before the backlog lets go of it.
        """
        parked = self._parked.setdefault(table.info.uuid, _Parked())
        missing = self._held.missing(table.info.uuid, self._folder, self._intact_keys(table.info.uuid))
        if parked.damage is None and not missing and not self.has_gap(table):
            table.backlog.discard_through(parked.last_lsn)
        # Else what the log still has of an object that is damaged or gone is moved once more; who reads it passes over
        # what came twice.
        frames = 0
        while (cut := table.backlog.cut(through_lsn, _OBJECT_BYTES)) is not None:
            objects = [await self._park_slice(table, piece) for piece in cut.slices]
            # In one step: a read finds each frame in one of the two places.
            here = {each.key for each in parked.objects}
            added = [each for each in objects if each.key not in here]
            parked.objects = sorted([*parked.objects, *added], key=lambda each: each.first_lsn)
            self._note_held(sum(each.size for each in added))
            table.backlog.discard_through(cut.through_lsn)
            frames += cut.frames
        return frames

    def parked_through(self, uuid: UUID) -> int:
        """The last LSN that the store holds of a table here; 0 for none."""
        parked = self._parked.get(uuid)
        return 0 if parked is None else parked.last_lsn

    async def fetch_first(self, table: Table) -> Backlog:
        """Bring the first object back that holds frames which are not committed; what is committed is deleted.

        Returns:
            Its frames; empty when there is none.

        Raises:
            DataCorruption: it is damaged.

        Cancellation: the next call does it again.
        """
        parked = self._parked.setdefault(table.info.uuid, _Parked())
        await self.discard_through(table.info.uuid, table.committed.lsn)
        found = Backlog()
        if parked.objects:
            object_ = await self._fetch_intact(parked, parked.objects[0].key)
            await self._disk.run(partial(self._clear, f"{table.info.uuid}-"))
            if not self._stop_if_rolled_back(table, object_):
                await self._bring(partial(self._write_back, table, 0, object_, found))
        return found

    async def discard_through(self, uuid: UUID, lsn: int) -> None:
        """Delete the objects whose frames all lie at or below ``lsn``: the table holds them. Outages are waited for."""
        parked = self._parked.get(uuid)
        if parked is None:
            return
        done = [each for each in parked.objects if each.last_lsn <= lsn]
        if done:
            self._held.forget(uuid, [self._below_node(each.key) for each in done])
            await self._persist(partial(self._store.delete, [each.key for each in done]))
            parked.objects = [each for each in parked.objects if each not in done]
            self._note_held(-sum(each.size for each in done))
        if not parked.objects:
            await self._disk.run(partial(self._clear, f"{uuid}-"))

    @asynccontextmanager
    async def copied(self, table: Table) -> AsyncIterator[Backlog]:
        """Copy what is here of a table to the local disk, for a read; the copy goes with the block (R25).

        Yields:
            The frames that were not committed when the block began.

        Raises:
            DataCorruption: an object is damaged.
        """
        found = Backlog()
        self._copies += 1
        prefix = f"read-{self._copies}-"
        copied: list[str] = []
        try:
            # Also what is moved meanwhile: between the last look and the block nothing can be.
            while (each := self._next_to_copy(table, copied)) is not None:
                copied.append(each.key)
                try:
                    object_ = await self._fetch(each.key)
                except DataCorruption:
                    if each.last_lsn <= table.committed.lsn:
                        # Committed and deleted meanwhile.
                        continue
                    raise
                await self._bring(partial(self._write_back, table, len(copied), object_, found, prefix))
            found.discard_through(table.committed.lsn)
            yield found
        finally:
            if copied:
                with trio.CancelScope(shield=True):
                    await self._disk.run(partial(self._clear, prefix))

    async def bring_back(self, table: Table) -> int:
        """Put a table's parked frames before those that the log has for it.

        A table that stands below what it had when its frames were parked is stopped again (R20).

        Returns:
            The last LSN that is parked: ``forget`` the table once it holds that; 0 for none.

        Raises:
            DataCorruption: a parked object is damaged.

        Cancellation: the next start does it again.
        """
        parked = self._parked.get(table.info.uuid)
        if parked is None or not parked.objects:
            return 0
        earlier = Backlog()
        for number, each in enumerate(parked.objects):
            found = await self._fetch_intact(parked, each.key)
            if self._stop_if_rolled_back(table, found):
                return 0
            if found.header.last_lsn > table.committed.lsn:
                await self._bring(partial(self._write_back, table, number, found, earlier))
        if earlier:
            log.info("table.brought_back", table=str(table.info.name), frame_bytes=earlier.frame_bytes)
        if not self.take_over(table):
            return 0
        table.last_lsn = max(table.last_lsn, parked.last_lsn)
        table.backlog.put_before(earlier)
        return parked.last_lsn

    def has_gap(self, table: Table) -> bool:
        """Whether the log has frames of a table below the first one that is here: see ``take_over``."""
        parked, waiting_lsn = self._parked.get(table.info.uuid), table.backlog.first_lsn
        if parked is None or not parked.objects or waiting_lsn is None:
            return False
        return waiting_lsn < parked.first_lsn

    def take_over(self, table: Table) -> bool:
        """Forget what the log still has of the frames that are here: a crash while they are moved leaves both.

        Frames are moved in LSN order, and deleted in that order once they are committed. So what the log has below the
        first one that is here was committed, or its object is gone. Such a table is stopped: it stands below what it
        had (R20).

        Returns:
            Whether the table may go on.
        """
        parked = self._parked.get(table.info.uuid)
        if parked is None or not parked.objects:
            return True
        if self.has_gap(table):
            table.stop(
                f"Table {table.info.name} stands at LSN {table.committed.lsn}, but LSN {table.backlog.first_lsn} was "
                "committed: "
                f"its writes were moved to {self._store.url}/{self._node_id}/{self._folder}, where the first one is "
                f"{parked.first_lsn} now. Nothing is replayed (R20); drop it, or move it back and restart"
            )
            return False
        table.backlog.discard_through(parked.last_lsn)
        return True

    async def forget(self, uuid: UUID) -> None:
        """Delete what is parked for a table that was dropped, or that holds it. Outages are waited for."""
        parked = self._parked.pop(uuid, None)
        self._held.forget_all(uuid, self._folder)
        if parked is not None:
            await self._persist(partial(self._store.delete, parked.keys))
            self._note_held(-parked.size)
            await self._disk.run(partial(self._clear, f"{uuid}-"))

    def _next_to_copy(self, table: Table, copied: list[str]) -> _Object | None:
        """The first object with frames that are not committed and not copied."""
        parked = self._parked.get(table.info.uuid)
        objects = () if parked is None else parked.objects
        waiting = (each for each in objects if each.last_lsn > table.committed.lsn and each.key not in copied)
        return next(waiting, None)

    def _stop_if_rolled_back(self, table: Table, found: WalObject) -> bool:
        """Stop a table that stands below what it had when its frames were moved (R20); returns whether it did."""
        if found.header.stored_through <= table.committed.lsn:
            return False
        table.stop(
            f"Table {table.info.name} stands at LSN {table.committed.lsn}, but {found.header.stored_through} "
            "was committed before its writes were parked: nothing is replayed (R20); drop it, or move it back "
            "and restart"
        )
        return True

    def _note_held(self, delta: int) -> None:
        """Count what is parked; what is set apart counts in the share of its table instead (R33)."""
        if self._folder == "parked":
            self._space.note_held("parked", delta)

    # -- to the store -----------------------------------------------------------------------------

    async def _park_slice(self, table: Table, piece: SegmentSlice) -> _Object:
        encoded = await self._disk.run(partial(encode_slice, self._disk, self._log_uuid, self._epoch, table, piece))
        _, _, frames, _ = encoded.parts
        # Its own for each epoch: a process that was fenced in the midst of this cannot be in the way.
        key = f"{self._node_id}/{self._folder}/{table.info.uuid}/{encoded.ref.first_lsn:016d}-{self._epoch:010d}.wal"

        async def put() -> None:
            try:
                await self._store.put_new(key, encoded.parts)
            except ObjectExists:
                # Our own, with its response lost: nobody else has this epoch.
                log.debug("parking.exists", key=key)

        await self._persist(put)
        return _Object(key, encoded.size, len(frames), encoded.ref.first_lsn, encoded.ref.last_lsn)

    # -- and back ---------------------------------------------------------------------------------

    async def _fetch_intact(self, parked: _Parked, key: str) -> WalObject:
        """Read a table's object, and remember it if it is damaged.

        Raises:
            DataCorruption: it is, or it is gone.
        """
        try:
            return await self._fetch(key)
        except DataCorruption as error:
            parked.damage = error
            raise

    async def _fetch(self, key: str) -> WalObject:
        found: list[WalObject] = []

        async def get() -> None:
            path = f"{self._store.url}/{key}"
            try:
                data = await self._store.get(key)
            except KeyError:
                raise DataCorruption(path, 0, "a parked object", "no object") from None
            found.append(parse_object(path, memoryview(data), self._log_uuid))

        await self._persist(get)
        return found[-1]

    async def _bring(self, write: Callable[[], object]) -> None:
        """Write a file of frames, for as long as there is no room or no descriptor for it (R31)."""
        while True:
            try:
                await self._disk.run(write)
            except Shortage as error:
                log.warning("parking.short", reason=str(error))
                await trio.sleep(RETRY_S)
            else:
                return

    def _write_back(self, table: Table, number: int, found: WalObject, earlier: Backlog, prefix: str = "") -> None:
        """Write an object's frames where a worker can map them; their CRCs hold as they are. Blocking."""
        header = found.header
        start = OBJECT_HEADER_BYTES + header.table_bytes
        path = self._directory / f"{prefix}{table.info.uuid}-{number:06d}-{header.first_lsn}.wal"
        with short_of():
            file = self._disk.create(path, HEADER_BYTES)
        try:
            block = SegmentHeader(
                log_uuid=self._log_uuid,
                epoch=header.segment_epoch,
                number=header.segment,
                base_lsn=0,
                first_lsn=header.first_lsn,
                capacity=HEADER_BYTES + header.frame_bytes,
                replaces=0,
                created_us=0,
                nonce=bytes(16),
            )
            file.write(0, [block.to_bytes(), found.data[start : start + header.frame_bytes]])
        finally:
            file.close()
        for offset, frame in found.frames():
            # What two processes parked is in two objects.
            if frame.kind == KIND_BATCH and frame.lsn > max(table.committed.lsn, earlier.last_lsn):
                place = HEADER_BYTES + offset - start
                earlier.add(str(path), header.segment, header.segment_epoch, frame.lsn, place, frame.frame_bytes)
        for info in found.tables():
            table.learn_schema(info.schema_id, info.schema)

    def _clear(self, prefix: str = "") -> None:
        """Remove files that were brought back; whoever has one mapped keeps it. Blocking."""
        self._disk.make_directory(self._directory)
        for name in self._disk.list_names(self._directory):
            if name.startswith(prefix):
                self._disk.remove(self._directory / name)

    async def _persist(self, request: Callable[[], Awaitable[None]]) -> None:
        """Repeat a request until the store answers it."""
        await persist(request, StoreUnavailable, _note_stalled, retry_s=self._retry_s, rng=self._rng)


def _check_log(path: str, header: ObjectHeader, log_uuid: UUID) -> None:
    if header.log_uuid != log_uuid:
        raise DataCorruption(path, 0, f"log {log_uuid}", f"log {header.log_uuid}")


def encode_slice(disk: Disk, log_uuid: UUID, epoch: int, table: Table, piece: SegmentSlice) -> EncodedObject:
    """Gather one segment's frames of a table into an object. Blocking.

    Raises:
        DataCorruption: a frame is damaged, or its file is gone.
    """
    try:
        data = disk.map(Path(piece.path))
    except FileNotFoundError as error:
        raise DataCorruption(piece.path, 0, "a file with frames", "no file") from error
    seed = crc_seed(log_uuid, piece.epoch, piece.segment)
    frames = bytearray()
    schemas: dict[int, None] = {}
    first_lsn = last_lsn = 0
    for offset in memoryview(piece.offsets).cast("Q"):
        try:
            header = verify_frame(data, offset, seed)
        except FrameError as error:
            raise DataCorruption(piece.path, offset, error.expected, error.found) from error
        frames += data[offset : offset + header.frame_bytes]
        schemas[header.schema_id] = None
        first_lsn, last_lsn = first_lsn or header.lsn, header.lsn
    return encode_object(
        log_uuid,
        epoch,
        piece.segment,
        piece.epoch,
        first_lsn=first_lsn,
        last_lsn=last_lsn,
        tables=tuple(_at_schema(table, number) for number in schemas),
        frames=frames,
        predecessor=None,
        stored_through=table.committed.lsn,
    )


def _note_stalled(error: Exception) -> None:
    log.debug("parking.stalled", reason=str(error))


def _at_schema(table: Table, schema_id: int) -> TableInfo:
    """The table as it was at one of its schemas (R24)."""
    return replace(table.info, schema=table.schemas[schema_id], schema_id=schema_id)


__all__ = ["Parking", "encode_slice"]
