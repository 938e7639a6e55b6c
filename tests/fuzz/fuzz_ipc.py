"""Mutate IPC messages; whatever comes out is decoded or refused, and what is decoded can be stored.

The invariants, for each case:

1. no crash: schema messages are decoded in a subprocess, whose death is a finding (T13); batches and
   dictionaries in this process;
2. a refusal is an InvalidRequest with a code of the wire contract, never another exception;
3. a batch that is accepted validates, reads back equal from its frame, and goes through the Parquet writer
   and the statistics that a commit needs (R17).

Run:  python tests/fuzz/fuzz_ipc.py --cases 50000 --seed 1
One case again:  python tests/fuzz/fuzz_ipc.py --seed 1 --first 1234 --cases 1
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import faulthandler
import io
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from arka._core import ipc
from arka.errors import ErrorCode, InvalidRequest
from arka.flight.decode import BatchDecoder, DecodedBatch
from arka.iceberg.bounds import ColumnMetrics
from arka.iceberg.schema import iceberg_schema
from arka.options import Limits
from arka.records import TableInfo
from arka.testing.ipcstreams import StreamMessage, make_table, write_stream

LIMITS = Limits(batch_bytes=1024 * 1024, batch_rows=100_000, dictionary_bytes=256 * 1024)
CODES = {ErrorCode.INVALID_REQUEST, ErrorCode.INVALID_BATCH, ErrorCode.SCHEMA_MISMATCH, ErrorCode.TOO_LARGE}
#: Numbers that sit on edges of lengths, offsets and enum values.
EDGES = [
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
]

Corpus = list[tuple[TableInfo, list[StreamMessage]]]


def _tables() -> list[tuple[pa.Schema, pa.RecordBatch]]:
    """Make one table per family of layouts, with a batch as a client might send it."""
    day = datetime.date(2024, 2, 29)
    now = datetime.datetime(2024, 2, 29, 12)
    flat = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            ("name", pa.string()),
            ("day", pa.date32()),
            ("at", pa.timestamp("us", "UTC")),
            ("clock", pa.time64("us")),
            ("amount", pa.decimal128(10, 2)),
            ("wide", pa.decimal128(30, 4)),
            ("ok", pa.bool_()),
            ("raw", pa.binary(4)),
            ("blob", pa.binary()),
            ("ratio", pa.float32()),
        ]
    )
    row = {
        "id": 1, "name": "naïve", "day": day, "at": now, "clock": datetime.time(1, 2, 3),
        "amount": decimal.Decimal("1.25"), "wide": decimal.Decimal("-12345678901234567890.1234"), "ok": True,
        "raw": b"abcd", "blob": b"\xff\x00", "ratio": 0.5,
    }  # fmt: skip
    flat_batch = pa.RecordBatch.from_pylist([row, {"id": 2}, {**row, "id": 3}], schema=flat)
    person = pa.struct([pa.field("x", pa.int64(), nullable=False), ("y", pa.string())])
    nested = pa.schema(
        [
            ("s", person),
            ("l", pa.list_(pa.field("element", pa.int32(), nullable=False))),
            ("m", pa.map_(pa.string(), pa.date32())),
            ("deep", pa.list_(pa.field("element", pa.struct([("t", pa.timestamp("us"))])))),
        ]
    )
    deep = {"s": {"x": 1, "y": "a"}, "l": [1, 2, 3], "m": [("k", day)], "deep": [{"t": now}, None]}
    nested_batch = pa.RecordBatch.from_pylist([deep, {"s": None}, deep], schema=nested)
    encoded = pa.schema([("word", pa.string()), ("when", pa.timestamp("us")), ("n", pa.int64())])
    encoded_batch = pa.record_batch(
        {
            "word": pa.array(["a", "bb", None, "a"] * 5).dictionary_encode(),
            "when": pa.array([now, None] * 10, pa.timestamp("ms")),
            "n": pa.array(range(20), pa.uint8()),
        }
    )
    notes = pa.list_(pa.struct([("note", pa.string())]))
    view_notes = pa.large_list(pa.struct([("note", pa.string_view())]))
    modern = pa.schema(
        [("text", pa.string()), ("blob", pa.binary()), ("tags", pa.list_(pa.string())), ("notes", notes)]
    )
    modern_batch = pa.record_batch(
        {
            "text": pa.array(["short", "long enough to leave the view", None], pa.string_view()),
            "blob": pa.array([b"x" * 20, None, b""], pa.binary_view()),
            "tags": pa.array([["a"], [], None], pa.large_list(pa.dictionary(pa.int8(), pa.large_string()))),
            "notes": pa.array([[{"note": "one that is longer than a view"}], None, [None, {"note": None}]], view_notes),
        }
    )
    return [(flat, flat_batch), (nested, nested_batch), (encoded, encoded_batch), (modern, modern_batch)]


def make_corpus() -> Corpus:
    """Write each table's batch plain and compressed."""
    corpus: Corpus = []
    for schema, batch in _tables():
        partition = [("id", "truncate[10]"), ("wide", "truncate[7]")] if "wide" in schema.names else []
        table = make_table(schema, partition=partition)
        corpus += [(table, write_stream(batch.schema, [batch], compression=c)) for c in (None, "lz4", "zstd")]
    return corpus


def mutate(data: bytes, rng: random.Random, times: int) -> bytes:
    """Change bytes, words and lengths at random places."""
    work = bytearray(data)
    for _ in range(times):
        if not work:
            return bytes(work)
        at = rng.randrange(len(work))
        match rng.randrange(6):
            case 0:
                work[at] = rng.randrange(256)
            case 1:
                work[at] ^= 1 << rng.randrange(8)
            case 2 | 3:
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice(EDGES) * rng.choice((1, -1)) + rng.randrange(-2, 3)
                at -= at % width
                work[at : at + width] = struct.pack("<Q", value % 2**64)[:width]
            case 4:
                other = rng.randrange(len(work))
                work[at : at + 8] = work[other : other + 8]
            case _:
                cut = rng.randrange(1, 17)
                work = work[:-cut] if rng.random() < 0.5 else work + rng.randbytes(cut)
    return bytes(work)


class Oracle:
    """What a commit will do with an accepted batch."""

    def __init__(self, table: TableInfo) -> None:
        schema = iceberg_schema(table.schema)
        self._schema = table.schema
        self._metrics = ColumnMetrics(schema, {})

    def store(self, batch: pa.RecordBatch) -> None:
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, self._schema, store_schema=False, store_decimal_as_integer=True) as writer:
            writer.write_batch(batch)
        made = writer.writer.metadata
        if made.num_rows:
            self._metrics.of(made)


def decode_stream(decoder: BatchDecoder, messages: list[StreamMessage]) -> DecodedBatch | None:
    """Feed one stream; return its last batch."""
    last = None
    for message in messages:
        kind = ipc.message_type(message.header)
        if kind == ipc.SCHEMA:
            decoder.set_schema(message.header)
        elif kind == ipc.DICTIONARY_BATCH:
            decoder.add_dictionary(message)
        else:
            decoder.needs_thread(message)
            last = decoder.decode(message)
    return last


def mutate_stream(messages: list[StreamMessage], rng: random.Random) -> list[StreamMessage]:
    """Mutate one message that is not the schema: mostly its header, else its body or both."""
    victim = rng.randrange(1, len(messages))
    chosen = messages[victim]
    part = rng.randrange(4)
    header = mutate(chosen.header, rng, rng.randrange(1, 4)) if part != 2 else chosen.header
    body = mutate(chosen.body, rng, rng.randrange(1, 6)) if part >= 2 else chosen.body
    changed = list(messages)
    changed[victim] = StreamMessage.build(header, body)
    return changed


def run_batch_case(corpus: Corpus, oracles: dict[int, Oracle], seed: int, case: int) -> str:
    """Run one mutated batch or dictionary; return how it ended."""
    rng = random.Random(f"{seed}:{case}")
    number = rng.randrange(len(corpus))
    table, messages = corpus[number]
    decoder = BatchDecoder(table, LIMITS)
    try:
        decoded = decode_stream(decoder, mutate_stream(messages, rng))
    except InvalidRequest as error:
        if error.code not in CODES:
            raise
        return error.code.value
    except ValueError:
        # message_type itself: the transport's caller turns it into InvalidRequest.
        return "unreadable"
    if decoded is None:
        return "no batch"
    decoded.batch.validate(full=True)
    again = pa.ipc.read_record_batch(pa.py_buffer(decoded.buffer).slice(128), table.schema)
    if not _same(again, decoded.batch):
        raise AssertionError("the frame does not hold the batch")
    oracles.setdefault(number, Oracle(table)).store(decoded.batch)
    return "accepted"


def _same(one: pa.RecordBatch, other: pa.RecordBatch) -> bool:
    """Compare bytes rather than values: NaN is not equal to itself."""
    return one.num_rows == other.num_rows and one.serialize().equals(other.serialize())


def run_schema_case(corpus: Corpus, seed: int, case: int) -> str:
    """Run one mutated schema; to be called in a process that may die."""
    rng = random.Random(f"{seed}:{case}")
    table, messages = rng.choice(corpus)
    header = mutate(messages[0].header, rng, rng.randrange(1, 5))
    try:
        BatchDecoder(table, LIMITS).set_schema(header)
    except InvalidRequest as error:
        if error.code not in CODES:
            raise
        return error.code.value
    return "accepted"


def run_schemas_apart(seed: int, first: int, cases: int) -> list[int]:
    """Run schema cases in subprocesses; return those that killed theirs."""
    dead: list[int] = []
    start, end = first, first + cases
    while start < end:
        command = [sys.executable, str(Path(__file__).resolve()), "--schema-worker"]
        command += ["--seed", str(seed), "--first", str(start), "--cases", str(end - start)]
        worker = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if worker.returncode == 0:
            break
        # A worker says each case before it runs it.
        said = worker.stdout.split()
        if not said:
            raise RuntimeError("a schema worker died before its first case")
        dead.append(int(said[-1]))
        start = dead[-1] + 1
    return dead


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="batch cases; a tenth as many schema cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--schema-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    faulthandler.enable()
    corpus = make_corpus()
    if options.schema_worker:
        for case in range(options.first, options.first + options.cases):
            print(case, flush=True)
            run_schema_case(corpus, options.seed, case)
        return 0
    endings: Counter[str] = Counter()
    oracles: dict[int, Oracle] = {}
    for case in range(options.first, options.first + options.cases):
        try:
            endings[run_batch_case(corpus, oracles, options.seed, case)] += 1
        except BaseException:
            print(f"failed: --seed {options.seed} --first {case} --cases 1", file=sys.stderr)
            raise
        if (case + 1) % 10_000 == 0:
            print(f"{case + 1} batch cases", file=sys.stderr)
    print(f"batches: {dict(endings.most_common())}")
    schemas = max(1, options.cases // 10)
    dead = run_schemas_apart(options.seed, options.first, schemas)
    for case in dead:
        replay = f"--schema-worker --seed {options.seed} --first {case} --cases 1"
        print(f"schema case {case} killed its process: {replay}")
    print(f"schemas: {schemas} cases, {len(dead)} dead processes")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
