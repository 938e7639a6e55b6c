"""The object tier: what is on the local disk goes to the object store, as one chain of WAL objects.

Owns: which frames make an object, the chain's order (R11), and the moment from which ``object_storage`` may be
acked: all PUTs up to there have returned, and a read of the newest epoch *begun after that* still shows ours
(R10). Does not own bytes (``arka.wal.objectfile``), epochs (``arka.tiers.lease``), where the chain ended before
(``arka.tiers.chain``) nor the watermark's listeners. Keeps ranges of segments, never frames: an outage costs
disk, not memory.
"""

from __future__ import annotations

import errno
import random
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog
import trio

from arka import failpoints
from arka.errors import DataCorruption, InternalError
from arka.options import ObjectStoreOptions
from arka.records import TableInfo
from arka.storage.ports import Buffer, ObjectExists, ObjectStore, StoreUnavailable
from arka.storage.threads import run_compute
from arka.tiers.lease import EpochLease
from arka.tiers.retry import persist
from arka.tiers.watch import Effort
from arka.wal.objectfile import EncodedObject, ObjectRef, encode_object, first_frame_above
from arka.wal.segment import AppendedRange

log = structlog.get_logger(__name__)

T = TypeVar("T")

ReadRange = Callable[[Path, int, int], Awaitable[Buffer]]
#: Runs ``function(*args)`` where it holds nobody up.
Compute = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class ObjectStatistics:
    """The tier at one moment: bytes not yet in an object, PUTs under way, objects acknowledged, stalled or not."""

    pending_bytes: int
    uploading: int
    objects: int
    stalled: bool


class ObjectTier:
    """Uploads what is submitted, in order, and says how far the store has it."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        node_id: str,
        log_uuid: UUID,
        options: ObjectStoreOptions,
        on_advance: Callable[[int], None],
        read_range: ReadRange,
        rng: random.Random,
        compute: Compute = run_compute,
    ) -> None:
        """Join the log to the store; nothing is asked of it before ``connect``.

        Args:
            store: where the objects go.
            node_id: the node's name in the store.
            log_uuid: the log.
            options: sizes and times.
            on_advance: told the last LSN of which the tier's promise is true; rises.
            read_range: reads ``(path, start, end)`` of a segment.
            rng: for the jitter of retries.
            compute: runs the encoding of an object; simulations have no threads.
        """
        self._store = store
        self._lease: EpochLease | None = None
        self._connected = trio.Event()
        self._node_id = node_id
        self._log_uuid = log_uuid
        self._options = options
        self._on_advance = on_advance
        self._read_range = read_range
        self._rng = rng
        self._compute = compute
        # Invariant: LSNs rise along _pending, and all of them lie above what was cut into objects.
        self._pending: deque[AppendedRange] = deque()
        self._pending_bytes = 0
        self._unstored_bytes = 0
        self._submitted_lsn = 0
        self._recovered_lsn = 0
        self._arrived = trio.Event()
        self._hurried = trio.Event()
        # What is pending up to here does not wait for company, in however many objects it goes.
        self._hurried_lsn = 0
        self._hurry_always = False
        # The last LSN that was acknowledged; goes into each object (R11).
        self._stored_lsn = 0
        self._head: ObjectRef | None = None
        # The objects whose PUT has not been acknowledged, oldest first; the value says whether the PUT returned.
        self._uploading: deque[_Upload] = deque()
        self._uploaded = trio.Event()
        self._objects = 0
        self._stalled = False
        #: What is tried to bring the log into the store, for the watch (R35).
        self.effort = Effort("the object store, which has not answered since the start")

    @property
    def connected(self) -> bool:
        """Whether there is an epoch to upload under."""
        return self._connected.is_set()

    def connect(self, lease: EpochLease, head: ObjectRef | None) -> None:
        """Begin to upload, under an epoch, behind the chain's end; once.

        Args:
            lease: this process's epoch; its start is recorded with this head.
            head: the last object of the chain, not above the log's end; what was submitted up to there needs no
                upload.
        """
        if head is not None:
            self._submitted_lsn = max(self._submitted_lsn, head.last_lsn)
            while self._pending and self._pending[0].last_lsn <= head.last_lsn:
                piece = self._pending.popleft()
                self._pending_bytes -= piece.end - piece.start
                self._unstored_bytes -= piece.end - piece.start
            self._stored_lsn = head.last_lsn
            self._on_advance(head.last_lsn)
        self._lease, self._head = lease, head
        self._connected.set()

    def submit(self, appended: AppendedRange) -> None:
        """Take a range that is on disk (R4); LSN order. Does not wait."""
        if appended.last_lsn <= self._submitted_lsn:
            raise InternalError(f"LSN {appended.last_lsn} was submitted after {self._submitted_lsn}")
        self._submitted_lsn = appended.last_lsn
        last = self._pending[-1] if self._pending else None
        if (
            last is not None
            and last.first_lsn > self._recovered_lsn
            and last.segment == appended.segment
            and last.end == appended.start
            and last.end - last.start < self._options.bytes
        ):
            self._pending[-1] = replace(
                last, end=appended.end, last_lsn=appended.last_lsn, tables=_merge(last.tables, appended.tables)
            )
        else:
            # Without its frames: only bytes are uploaded.
            self._pending.append(replace(appended, frames=[]))
            if last is not None:
                # What was last can grow no more: there is nothing to wait for.
                self._hurried.set()
        self._pending_bytes += appended.end - appended.start
        self._unstored_bytes += appended.end - appended.start
        self._arrived.set()
        if self._pending_bytes >= self._options.bytes:
            self._hurried.set()

    def submit_recovered(self, appended: AppendedRange) -> None:
        """Take a range that recovery found, before ``connect``; LSN order. It stays as it is.

        ``connect`` drops those that the chain holds, so none may grow beyond what was uploaded.
        """
        self.submit(appended)
        self._recovered_lsn = appended.last_lsn

    def hurry(self, *, from_now_on: bool = False) -> None:
        """Do not wait for company: somebody waits for what there is.

        Args:
            from_now_on: nor for what is submitted later (drain).
        """
        self._hurry_always |= from_now_on
        self._hurried_lsn = self._submitted_lsn
        self._hurried.set()

    @property
    def unstored_bytes(self) -> int:
        """Bytes of the log that are not in the store yet, those under way among them."""
        return self._unstored_bytes

    def statistics(self) -> ObjectStatistics:
        """Where the tier stands."""
        return ObjectStatistics(self._pending_bytes, len(self._uploading), self._objects, self._stalled)

    async def run(self) -> None:
        """Upload until cancelled, once there is an epoch; outages are waited for.

        Raises:
            Fenced: another process has taken a higher epoch; nothing is acked any more.
            DataCorruption: an object of ours holds other bytes than it should.
            OSError: a segment is gone or too short.

        Cancellation: PUTs that are under way may or may not land; the chain says so at the next start.
        """
        await self._connected.wait()
        async with trio.open_nursery() as nursery:
            slots = trio.Semaphore(self._options.uploads)
            nursery.start_soon(self._acknowledge, slots)
            while True:
                await self._wait_company()
                await slots.acquire()
                upload = await self._next_upload()
                self._uploading.append(upload)
                nursery.start_soon(self._upload, upload)

    async def _wait_company(self) -> None:
        """Wait until there is something to upload, and then a little for more."""
        while not self._pending:
            self._arrived = trio.Event()
            await self._arrived.wait()
        waits = self._pending[0].first_lsn > self._hurried_lsn and len(self._pending) == 1
        if waits and not self._hurry_always and self._pending_bytes < self._options.bytes:
            with trio.move_on_after(self._options.linger_s):
                await self._hurried.wait()
        self._hurried = trio.Event()

    async def _next_upload(self) -> _Upload:
        """Cut the next object off what is pending; one segment, about ``options.bytes``."""
        piece = self._pending.popleft()
        size = piece.end - piece.start
        self._pending_bytes -= size
        data = await self._read(piece)
        encoded: EncodedObject = await self._compute(self._encode, piece, data)
        self._head = encoded.ref
        return _Upload(encoded, size)

    async def _read(self, piece: AppendedRange) -> Buffer:
        """Read a range of a segment, for as long as it takes (R31)."""
        path = piece.segment.path

        async def attempt() -> Buffer:
            try:
                return await self._read_range(path, piece.start, piece.end)
            except OSError as error:
                if error.errno in (None, errno.ENOENT):
                    # The file is gone or shorter: that does not pass.
                    raise
                raise StoreUnavailable(f"{path} cannot be read: {error}") from error

        data: Buffer = await self._persist(attempt)
        return data

    @property
    def _held(self) -> EpochLease:
        assert self._lease is not None, "nothing is uploaded before connect"
        return self._lease

    def _encode(self, piece: AppendedRange, data: Buffer) -> EncodedObject:
        """Make an object of a range; of one that begins below the chain's end, only what lies behind that.

        # Invariant: an object ends below its successor's first LSN; what may be deleted is told by that (R12).
        """
        first_lsn = piece.first_lsn
        if self._head is not None and first_lsn <= self._head.last_lsn:
            offset, first_lsn = first_frame_above(data, self._head.last_lsn)
            data = memoryview(data)[offset:]
        return encode_object(
            self._log_uuid,
            self._held.epoch,
            piece.segment.number,
            piece.segment.epoch,
            first_lsn=first_lsn,
            last_lsn=piece.last_lsn,
            tables=piece.tables,
            frames=data,
            predecessor=self._head,
            stored_through=self._stored_lsn,
        )

    async def _upload(self, upload: _Upload) -> None:
        """PUT one object, for as long as it takes."""
        key = upload.encoded.ref.key(self._node_id)

        async def put() -> None:
            await failpoints.reach("objects.begin")
            try:
                await self._store.put_new(key, upload.encoded.parts)
            except ObjectExists:
                await self._check_same(key, upload.encoded)

        await self._persist(put)
        await failpoints.reach("objects.put")
        upload.done = True
        self._unstored_bytes -= upload.log_bytes
        self._uploaded.set()

    async def _check_same(self, key: str, encoded: EncodedObject) -> None:
        """Tell a lost response of our own PUT from somebody else's object under our key."""
        try:
            data = await self._store.get(key)
        except KeyError:
            # Some stores say "exists" of a key whose first put is still under way.
            raise StoreUnavailable(f"{self._store.url}/{key} exists and cannot be read yet") from None
        if data != b"".join(encoded.parts):
            await self._held.verify()
            raise DataCorruption(
                f"{self._store.url}/{key}", 0, f"the object with checksum {encoded.ref.checksum:08x}", "other bytes"
            )

    async def _acknowledge(self, slots: trio.Semaphore) -> None:
        """Advance over the contiguous prefix of finished PUTs, after a read of the newest epoch (R10)."""
        while True:
            await self._uploaded.wait()
            self._uploaded = trio.Event()
            finished = 0
            last_lsn = 0
            for upload in self._uploading:
                if not upload.done:
                    break
                finished += 1
                last_lsn = upload.encoded.ref.last_lsn
            if finished:
                # Begun after those PUTs returned: one read covers them all.
                await self._persist(self._held.verify)
                await failpoints.reach("objects.verified")
                for _ in range(finished):
                    self._uploading.popleft()
                    slots.release()
                self._objects += finished
                self._stored_lsn = last_lsn
                self._on_advance(last_lsn)
                await failpoints.reach("objects.advanced")

    async def _persist(self, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request until it is answered."""
        self.effort.begin("the object store to answer")
        answer = await persist(
            request, StoreUnavailable, self._note_stalled, retry_s=self._options.retry_s, rng=self._rng
        )
        self.effort.succeed()
        if self._stalled:
            self._stalled = False
            log.info("objects.recovered", store=self._store.url)
        return answer

    def _note_stalled(self, error: Exception) -> None:
        self.effort.fail(str(error))
        if not self._stalled:
            self._stalled = True
            log.warning("objects.stalled", store=self._store.url, reason=str(error))


class _Upload:
    """One object on its way."""

    __slots__ = ("done", "encoded", "log_bytes")

    def __init__(self, encoded: EncodedObject, log_bytes: int) -> None:
        self.encoded = encoded
        # How much of the log it is.
        self.log_bytes = log_bytes
        self.done = False


def _merge(known: tuple[TableInfo, ...], more: tuple[TableInfo, ...]) -> tuple[TableInfo, ...]:
    """Join two lists of tables, each table at each schema once."""
    seen = {(info.uuid, info.schema_id): info for info in known}
    for info in more:
        seen.setdefault((info.uuid, info.schema_id), info)
    return tuple(seen.values()) if len(seen) > len(known) else known


__all__ = ["Compute", "ObjectStatistics", "ObjectTier"]
