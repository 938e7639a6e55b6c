"""A start reads the whole log and checks every frame: how fast, beside reading the same bytes with one checksum.

Both sides find the files in the page cache.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import trio

from arka._core.buffers import FrameBuffer
from arka._core.framing import KIND_BATCH, Frame, crc32c
from arka.options import WalOptions
from arka.records import TableInfo, TableName, TableType
from arka.storage.disk import PosixDisk
from arka.wal.recovery import recover
from arka.wal.writer import WalWriter
from bench import loads
from bench.harness import Result, measurement, pairs

LOG = UUID(int=1)
EPOCH = 1
FLOOR = "1 MiB reads + crc32c of the same files"
READ_BYTES = 1 << 20
GROUP_BYTES = 4 << 20


def _table(schema: pa.Schema) -> TableInfo:
    return TableInfo(
        uuid=UUID(int=2),
        name=TableName("default", loads.TABLE),
        schema=schema,
        schema_id=0,
        table_type=TableType.APPEND_ONLY,
        key_columns=(),
        spec_id=0,
        partition=(),
        location="file:///warehouse/load-00000000",
        properties={},
    )


def _payload(batch: pa.RecordBatch) -> FrameBuffer:
    # An encapsulated message: four bytes of 0xff, the metadata's length, the metadata, the body.
    message = memoryview(batch.serialize()).cast("B")
    start = 8 + int.from_bytes(message[4:8], "little")
    buffer = FrameBuffer(message[8:start], len(message) - start)
    buffer.body[:] = message[start:]
    return buffer


async def write_log(directory: Path, batch: pa.RecordBatch, count: int) -> None:
    """Write a batch again and again, in groups of some MiB, and close the log."""
    table = _table(batch.schema)
    writer = await WalWriter.open(
        directory, PosixDisk(), log_uuid=LOG, epoch=EPOCH, first_segment=1, options=WalOptions()
    )
    group = max(1, GROUP_BYTES // max(batch.nbytes, 512))
    for start in range(1, count + 1, group):
        frames = [
            Frame(KIND_BATCH, lsn, table=table, rows=batch.num_rows, payload=_payload(batch), accepted_us=lsn)
            for lsn in range(start, min(start + group, count + 1))
        ]
        await writer.append(frames)
    await writer.close()


def _replay(directory: Path, count: int) -> float:
    seen = 0

    def on_frame(frame: object) -> None:
        nonlocal seen
        seen += 1

    async def run() -> float:
        started = time.perf_counter()
        found = await recover(
            directory,
            PosixDisk(),
            log_uuid=LOG,
            new_epoch=EPOCH,
            on_frame=on_frame,
            on_progress=lambda done, total: None,
        )
        seconds = time.perf_counter() - started
        assert found.last_lsn == count
        return seconds

    seconds = trio.run(run)
    assert seen >= count, f"{seen} frames"
    return seconds


def _read(files: list[Path]) -> float:
    block = bytearray(READ_BYTES)
    view = memoryview(block)
    started = time.perf_counter()
    for path in files:
        crc = 0
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(block):
                crc = crc32c(view[:size], crc)
    return time.perf_counter() - started


@measurement("replay")
def replay() -> Iterator[Result]:
    """Logs of large batches, and of the smallest."""
    yield _compare("replay", "batches of 320 kB", 10_000, 2_000, ">= 0.8")
    yield _compare("replay-small", "batches of 1 row", 1, 200_000, "")


def _compare(name: str, batches: str, rows: int, count: int, target: str) -> Result:
    directory = Path(tempfile.mkdtemp(prefix="arka-bench-"))
    try:
        trio.run(write_log, directory, loads.numbers(rows), count)
        files = sorted(path for path in directory.iterdir() if path.stat().st_size >= READ_BYTES)
        size = sum(path.stat().st_size for path in files) / 1e6
        what = f"replay of a closed log of {size:,.0f} MB, {count:,} {batches}"
        result = Result(name, what, "MB/s", FLOOR, target)
        pairs(result, lambda: size / _replay(directory, count), lambda: size / _read(files))
    finally:
        shutil.rmtree(directory)
    result.notes["frames/s"] = round(count / size * sorted(result.values)[len(result.values) // 2])
    return result
