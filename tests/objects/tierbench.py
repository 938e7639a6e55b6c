"""An object tier on a simulated disk and store: real segments, real objects, and what was promised when."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import trio

from arka._core.framing import KIND_BATCH, KIND_LOST, KIND_TABLE, Frame
from arka.lineage import NO_STARTS
from arka.options import MIB, ObjectStoreOptions, WalOptions
from arka.records import TableInfo, TableName, TableType
from arka.testing.segmentfile import frame_buffer
from arka.testing.simdisk import SimDisk
from arka.testing.simstore import SimStore
from arka.tiers.chain import Chain
from arka.tiers.epochs import Claim, EpochLease, LocalLog, take_epoch
from arka.tiers.objects import ObjectTier
from arka.wal.objectfile import ObjectRef, WalObject, object_key, parse_object
from arka.wal.segment import FRAME_HEADER_BYTES, AppendedRange
from arka.wal.writer import WalWriter

NODE = "n"
WAL = f"{NODE}/wal/"
EPOCH = f"{NODE}/epoch/"
DISK_UUID = UUID(int=0xD15C)
SCHEMA = pa.schema([pa.field("id", pa.int64()), pa.field("blob", pa.binary())])


def make_table(number: int = 1, schema_id: int = 0) -> TableInfo:
    return TableInfo(
        uuid=UUID(int=number),
        name=TableName("default", f"table_{number}"),
        schema=SCHEMA,
        schema_id=schema_id,
        table_type=TableType.APPEND_ONLY,
        key_columns=(),
        spec_id=0,
        partition=(),
        location=f"file:///warehouse/table_{number}-00000000",
        properties={},
    )


TABLE = make_table()


def batch_frame(lsn: int, size: int = 0, table: TableInfo = TABLE) -> Frame:
    batch = pa.record_batch([pa.array([lsn], pa.int64()), pa.array([bytes(size)], pa.binary())], schema=SCHEMA)
    return Frame(
        KIND_BATCH,
        lsn,
        table=table,
        schema_id=table.schema_id,
        rows=1,
        key=b"key-%d" % lsn,
        payload=frame_buffer(batch),
        accepted_us=lsn,
    )


async def run_inline(function: Callable[..., Any], *args: object) -> Any:
    """``run_compute`` in the calling task: threads and a clock that jumps do not go together."""
    await trio.lowlevel.checkpoint()
    return function(*args)


def chain(store: SimStore, log_uuid: UUID, last: ObjectRef | None) -> list[WalObject]:
    """Follow the chain back from an object, each checked as a whole and against what its successor says of it."""
    found: list[WalObject] = []
    while last is not None:
        key = object_key(NODE, last.epoch, last.first_lsn)
        parsed = parse_object(key, memoryview(store.objects[key]), log_uuid)
        assert parsed.ref == last
        found.append(parsed)
        last = parsed.header.predecessor
    return found[::-1]


def read_back(objects: list[WalObject]) -> list[int]:
    """The LSNs of a chain's frames: rising within an object, each batch whole, its table defined before it."""
    lsns: list[int] = []
    for found in objects:
        tables = set()
        inside: list[int] = []
        for offset, frame in found.frames():
            if frame.kind == KIND_TABLE:
                tables.add((frame.table_uuid, frame.schema_id))
            if frame.lsn:
                inside.append(frame.lsn)
            if frame.kind == KIND_BATCH:
                assert (frame.table_uuid, frame.schema_id) in tables
                start = offset + FRAME_HEADER_BYTES
                message = pa.py_buffer(bytes(found.data[start : start + frame.payload_bytes]))
                assert pa.ipc.read_record_batch(message, SCHEMA)["id"].to_pylist() == [frame.lsn]
        assert inside == sorted(set(inside))
        assert (found.header.first_lsn, found.header.last_lsn) == (inside[0], inside[-1])
        lsns += inside
    return lsns


@dataclass
class Ack:
    """One advance of the tier's promise, and how many requests had been sent by then."""

    lsn: int
    requests: int
    at_s: float


class Bench:
    """One node: its disk outlives processes; ``boot`` starts one.

    Attributes:
        store: the object store.
        acked: all that was ever promised, by any process.
    """

    def __init__(self, store: SimStore, *, seed: int = 0, segment_bytes: int = MIB, **options: Any) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.disk = SimDisk(random.Random(seed))
        self.segment_bytes = segment_bytes
        self.options = ObjectStoreOptions(url="sim://store", **options)
        self.local: LocalLog | None = None
        self.ranges: list[AppendedRange] = []
        self.last_lsn = 0
        self.acked = 0
        self.newest: Process | None = None
        self.next_segment = 1

    async def boot(self, released_lsn: int = 0) -> Process:
        """Start a process: epoch, chain, and the ranges that the store does not hold."""
        lease = await take_epoch(self.store, Claim(NODE, self.local, DISK_UUID))
        head = await Chain(self.store, NODE, lease.log_uuid, released_lsn=released_lsn).find_head()
        self.local = LocalLog(lease.log_uuid, lease.epoch, 1_000_000)
        process = Process(self, lease)
        await lease.record_start(head, NO_STARTS)
        process.resumed = 0 if head is None else head.last_lsn
        assert process.resumed >= self.acked, "acknowledged, and not reached by the chain"
        self.newest = process
        for found in self.ranges:
            process.tier.submit_recovered(found)
        process.tier.connect(lease, head)
        # Each process writes to a directory of its own: what recovery does to segments is not tested here.
        process.writer = await WalWriter.open(
            Path(f"/wal-{lease.epoch}"),
            self.disk,
            log_uuid=lease.log_uuid,
            epoch=lease.epoch,
            first_segment=self.next_segment,
            options=WalOptions(segment_bytes=self.segment_bytes),
        )
        return process

    @property
    def log_uuid(self) -> UUID:
        assert self.local is not None
        return self.local.log_uuid

    def wal_keys(self) -> list[str]:
        return sorted(key for key in self.store.objects if key.startswith(WAL))

    def newest_ref(self) -> ObjectRef | None:
        """The last object in the store by key."""
        keys = self.wal_keys()
        if not keys:
            return None
        return parse_object(keys[-1], memoryview(self.store.objects[keys[-1]]), self.log_uuid).ref


class Process:
    """One process on a bench: a lease, a writer and a tier."""

    def __init__(self, bench: Bench, lease: EpochLease) -> None:
        self.bench = bench
        self.lease = lease
        self.resumed = 0
        self.acks: list[Ack] = []
        self.acked_lsn = 0
        self.advanced = trio.Event()
        self.writer: WalWriter
        self.tier = ObjectTier(
            bench.store,
            node_id=NODE,
            log_uuid=lease.log_uuid,
            options=bench.options,
            on_advance=self._advance,
            read_range=self._read_range,
            rng=bench.rng,
            compute=run_inline,
        )

    async def _read_range(self, path: Path, start: int, end: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.bench.disk.read(path)[start:end]

    def _advance(self, lsn: int) -> None:
        if not self.tier.connected:
            # What the chain holds already.
            return
        assert lsn > self.acked_lsn, "promises rise"
        assert lsn <= self.bench.last_lsn, "R4: nothing is promised that is not on disk"
        newest = self.bench.newest
        # An ack may be late; what it is about was in the store when the newest process looked (R10).
        assert newest is None or newest is self or lsn <= newest.resumed, "promised by a fenced process"
        self.acked_lsn = lsn
        self.bench.acked = max(self.bench.acked, lsn)
        self.acks.append(Ack(lsn, len(self.bench.store.requests), trio.current_time()))
        self.advanced.set()
        self.advanced = trio.Event()

    async def append(self, count: int = 1, *, size: int = 0, table: TableInfo = TABLE, gap: int = 0) -> None:
        """Write one group of frames to disk and hand it to the tier."""
        first = self.bench.last_lsn + 1 + gap
        await self.append_frames([batch_frame(lsn, size, table) for lsn in range(first, first + count)])

    async def append_control(self) -> None:
        lsn = self.bench.last_lsn + 1
        await self.append_frames([Frame(KIND_LOST, lsn, payload=bytes(16), accepted_us=0)])

    async def append_frames(self, frames: list[Frame]) -> None:
        for found in await self.writer.append(frames):
            self.bench.last_lsn = found.last_lsn
            self.bench.next_segment = found.segment.number + 1
            self.bench.ranges.append(found)
            self.tier.submit(found)

    async def wait_acked(self, lsn: int | None = None) -> None:
        wanted = self.bench.last_lsn if lsn is None else lsn
        while self.acked_lsn < wanted:
            await self.advanced.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        """Run the tier for the length of the block."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.tier.run)
            yield nursery
            nursery.cancel_scope.cancel()

    def chain(self) -> list[WalObject]:
        """The chain from the last acknowledged object back."""
        for key in reversed(self.bench.wal_keys()):
            parsed = parse_object(key, memoryview(self.bench.store.objects[key]), self.lease.log_uuid)
            if parsed.header.last_lsn <= self.acked_lsn and parsed.header.epoch <= self.lease.epoch:
                return chain(self.bench.store, self.lease.log_uuid, parsed.ref)
        return []
