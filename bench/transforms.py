"""Partition transforms and the split of a batch, against pyiceberg's own way.

The floor of a transform is pyiceberg-core's Rust (``Transform.pyarrow_transform``) on the same arrays. The floor of a
split is the same Rust, a stable argsort of the combined keys in numpy, one take and slices: what one would write today
without a loop of one's own (pyiceberg's ``_determine_partitions`` filters the batch once per partition and takes
several times as long).

A figure is over all arrays of its transform, or all splits; the notes have the ratio of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyiceberg.transforms as iceberg
from pyiceberg.types import LongType

from arka._core.transforms import parse_transform, split_batch
from bench.harness import Result, measurement, pairs

ROWS = 1_000_000
ROUNDS = 9

#: pyiceberg's wrapper takes a source type and does not look at it.
ANY_TYPE = LongType()

#: Columns of each transform, its ``[N]``, and the target.
TRANSFORMS: dict[str, tuple[str, dict[str, str]]] = {
    "bucket": (
        ">= 3.0",
        {
            "timestamp": "[16]",
            "date": "[16]",
            "int": "[16]",
            "long": "[16]",
            "long, 10% null": "[13]",
            "decimal(22,2)": "[16]",
            "string of 12": "[16]",
            "string of 40": "[16]",
            "binary of 16": "[16]",
            "fixed(16)": "[16]",
        },
    ),
    "year": (">= 3.0", {"timestamp": "", "date": ""}),
    "month": (">= 3.0", {"timestamp": "", "date": ""}),
    "day": (">= 1.2", {"timestamp": ""}),
    "hour": (">= 1.2", {"timestamp": ""}),
    "truncate": (
        ">= 1.2",
        {
            "int": "[100]",
            "long": "[100]",
            "long, 10% null": "[100]",
            "decimal(22,2)": "[50]",
            "string of 12": "[4]",
            "string of 40": "[12]",
            "string, not ASCII": "[4]",
            "binary of 16": "[4]",
        },
    ),
}


def source_columns(rows: int) -> dict[str, pa.Array]:
    """Make one random column of each kind, the same on each run."""
    rng = np.random.default_rng(0)
    numbers = pa.array(rng.integers(-(10**17), 10**17, rows))
    digits = rng.integers(0, 10**12, rows).tolist()
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(rng.bytes(16 * rows))])
    nullable = pa.array(numbers.to_numpy(), mask=rng.random(rows) < 0.1)
    start = 1_700_000_000_000_000
    return {
        "timestamp": pa.array(rng.integers(-(10**15), 2 * 10**15, rows)).view(pa.timestamp("us")),
        "timestamp, 11 days": pa.array(rng.integers(start, start + 11 * 86_400_000_000, rows)).view(pa.timestamp("us")),
        "date": pa.array(rng.integers(-10_000, 30_000, rows).astype("i4")).view(pa.date32()),
        "int": pa.array(rng.integers(-(2**31) + 100, 2**31, rows).astype("i4")),
        "long": numbers,
        "long, 10% null": nullable,
        "decimal(22,2)": pc.cast(numbers, pa.decimal128(22, 2)),
        "string of 12": pa.array([f"{number:012d}" for number in digits]),
        "string of 40": pa.array([f"{number:040d}" for number in digits]),
        "string, not ASCII": pa.array([f"é{number:012d}" for number in digits]),
        "binary of 16": fixed.cast(pa.binary()),
        "fixed(16)": fixed,
    }


@dataclass
class Case:
    """The same work for both sides.

    Attributes:
        rows: how many it is about.
        ours: does it once.
        floor: does it once.
        seconds: what each run took, by side.
    """

    rows: int
    ours: Callable[[], Any]
    floor: Callable[[], Any]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "floor": []})

    def run(self, side: str) -> float:
        """Do it once; returns seconds."""
        call = self.ours if side == "ours" else self.floor
        started = time.perf_counter()
        call()
        taken = time.perf_counter() - started
        self.seconds[side].append(taken)
        return taken


def compare(result: Result, cases: dict[str, Case]) -> Result:
    """Run all cases on both sides in turn."""
    rows = sum(case.rows for case in cases.values())

    def side(word: str) -> float:
        return rows / sum(case.run(word) for case in cases.values())

    pairs(result, lambda: side("ours"), lambda: side("floor"), count=ROUNDS)
    for name, case in cases.items():
        ours, floor = (statistics.median(case.seconds[word][1:]) for word in ("ours", "floor"))
        result.notes[f"ratio, {name}"] = round(floor / ours, 2)
    return result


@measurement("transforms")
def transforms() -> Iterator[Result]:
    """Each transform over all kinds of columns that it takes."""
    columns = source_columns(ROWS)
    for name, (target, sources) in TRANSFORMS.items():
        what = f"{name} of {ROWS:,} rows each of {', '.join(sources) if len(sources) < 3 else f'{len(sources)} types'}"
        result = Result(f"transform-{name}", what, "rows/s", "pyiceberg-core (Rust) on the same arrays", target)
        yield compare(result, {kind: _transform(columns[kind], name + width) for kind, width in sources.items()})


def _transform(array: pa.Array, text: str) -> Case:
    ours = parse_transform(text).apply
    floor = iceberg.parse_transform(text).pyarrow_transform(ANY_TYPE)
    # In the last second of a day before 1970 pyiceberg-core 0.11 says the day after.
    differ = pc.sum(pc.not_equal(floor(array), ours(array).cast(floor(array).type))).as_py() or 0
    assert differ < ROWS * 1e-5, f"the two sides disagree about {differ} rows of {text}"
    return Case(len(array), lambda: ours(array), lambda: floor(array))


def floor_split(batch: pa.RecordBatch, fields: list[tuple[int, str]]) -> list[pa.RecordBatch]:
    """Split by pyiceberg-core's transforms, numpy's stable argsort, one take, and slices."""
    key = np.zeros(batch.num_rows, dtype=np.int64)
    for column, text in fields:
        values = iceberg.parse_transform(text).pyarrow_transform(ANY_TYPE)(batch.column(column))
        key = (key << 20) + values.cast(pa.int32()).to_numpy()
    order = np.argsort(key, kind="stable")
    ordered = batch.take(pa.array(order))
    key = key[order]
    ends = [*(np.flatnonzero(np.diff(key)) + 1).tolist(), len(key)]
    return [ordered.slice(start, end - start) for start, end in zip([0, *ends], ends, strict=False)]


@measurement("split")
def split() -> Iterator[Result]:
    """Batches of five columns, 40 bytes a row."""
    columns = source_columns(ROWS)
    times = columns["timestamp, 11 days"]
    others = [columns[kind] for kind in ("long", "int", "string of 12", "date")]
    mixed = pa.record_batch([times, *others], list("abcde"))
    in_order = pa.record_batch([times.take(pc.sort_indices(times)), *others], list("abcde"))
    floor = "pyiceberg-core's transforms, numpy argsort, one take, slices"
    both = [(0, "day"), (1, "bucket[16]")]
    result = Result("split", f"{ROWS:,} rows split by day x bucket[16]", "rows/s", floor, ">= 2.0")
    yield compare(result, {"day x bucket[16]": _split(mixed, both)})
    result = Result("split-others", "the same by other fields, in order, and by 10,000 rows", "rows/s", floor)
    yield compare(
        result,
        {
            "bucket[16]": _split(mixed, [(1, "bucket[16]")]),
            "day, 12 of them": _split(mixed, [(0, "day")]),
            "day, rows in order of time": _split(in_order, [(0, "day")]),
            "day x bucket[16], 10,000 rows": _split(mixed.slice(0, 10_000), both),
        },
    )


def _split(batch: pa.RecordBatch, texts: list[tuple[int, str]]) -> Case:
    fields = [(column, parse_transform(text)) for column, text in texts]
    assert len(split_batch(batch, fields)) == len(floor_split(batch, texts)), f"the two sides disagree about {texts}"
    return Case(batch.num_rows, lambda: split_batch(batch, fields), lambda: floor_split(batch, texts))
