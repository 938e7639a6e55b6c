"""Measure partition transforms and the split of a batch against pyiceberg's own way.

    python bench/transforms.py [--rows N] [--rounds N] [--only WORD]

The floor of a transform is pyiceberg-core's Rust (``Transform.pyarrow_transform``) on the same array. The
floor of a split is the same Rust, a stable argsort of the combined keys in numpy, one take and slices:
what one would write today without a loop of one's own (pyiceberg's ``_determine_partitions`` filters
the batch once per partition and takes several times as long).

Both sides run in turn, one round after another, so that a noisy machine is noisy to both. Reported are
medians and the ratio of medians; above 1 Arka is faster. The last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyiceberg.transforms as iceberg
from pyiceberg.types import LongType

from arka._core.transforms import parse_transform, split_batch

Cases = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]

#: pyiceberg's wrapper takes a source type and does not look at it.
ANY_TYPE = LongType()


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


TRANSFORMS = {
    "timestamp": ["year", "month", "day", "hour", "bucket[16]", "bucket[13]"],
    "date": ["year", "month", "bucket[16]"],
    "int": ["bucket[16]", "truncate[100]"],
    "long": ["bucket[16]", "truncate[100]"],
    "long, 10% null": ["bucket[16]", "truncate[100]"],
    "decimal(22,2)": ["bucket[16]", "truncate[50]"],
    "string of 12": ["bucket[16]", "truncate[4]"],
    "string of 40": ["bucket[16]", "truncate[4]", "truncate[12]"],
    "string, not ASCII": ["truncate[4]", "truncate[12]"],
    "binary of 16": ["bucket[16]", "truncate[4]"],
    "fixed(16)": ["bucket[16]"],
}


def transform_cases(columns: dict[str, pa.Array]) -> Cases:
    """Pair each transform with pyiceberg-core's."""
    cases: Cases = {}
    for kind, texts in TRANSFORMS.items():
        array = columns[kind]
        for text in texts:
            ours = parse_transform(text).apply
            floor = iceberg.parse_transform(text).pyarrow_transform(ANY_TYPE)
            cases[f"{text} of {kind}"] = (lambda f=ours, a=array: f(a), lambda f=floor, a=array: f(a))
    return cases


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


def split_cases(columns: dict[str, pa.Array]) -> Cases:
    """Pair splits of a batch of five columns (40 bytes a row) with the floor's."""
    times = columns["timestamp, 11 days"]
    numbers = columns["long"]
    others = [columns["int"], columns["string of 12"], columns["date"]]
    mixed = pa.record_batch([times, numbers, *others], list("abcde"))
    in_order = pa.record_batch([times.take(pc.sort_indices(times)), numbers, *others], list("abcde"))
    wanted = {
        "bucket[16]": (mixed, [(1, "bucket[16]")]),
        "day, 12 of them": (mixed, [(0, "day")]),
        "day x bucket[16]": (mixed, [(0, "day"), (1, "bucket[16]")]),
        "day, rows in order of time": (in_order, [(0, "day")]),
        "day x bucket[16], 10,000 rows": (mixed.slice(0, 10_000), [(0, "day"), (1, "bucket[16]")]),
    }
    cases: Cases = {}
    for name, (batch, texts) in wanted.items():
        fields = [(column, parse_transform(text)) for column, text in texts]
        if len(split_batch(batch, fields)) != len(floor_split(batch, texts)):
            raise SystemExit(f"split by {name}: the two sides disagree")
        cases[f"split by {name}"] = (
            lambda b=batch, f=fields: split_batch(b, f),
            lambda b=batch, t=texts: floor_split(b, t),
        )
    return cases


def measure(ours: Callable[[], Any], floor: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Run both sides in turn; return their median seconds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for side, call in zip(seconds, (ours, floor), strict=True):
            start = time.perf_counter()
            call()
            if turn:  # the first one warms allocator and caches
                side.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="run the cases whose name has this in it")
    options = parser.parse_args()
    columns = source_columns(options.rows)
    cases = {**transform_cases(columns), **split_cases(columns)}
    results = {}
    print(f"{'case':44} {'arka ms':>9} {'floor ms':>9} {'ratio':>6}")
    for name, (ours, floor) in cases.items():
        if options.only in name:
            mine, theirs = measure(ours, floor, options.rounds)
            print(f"{name:44} {mine * 1e3:9.3f} {theirs * 1e3:9.3f} {theirs / mine:6.1f}")
            results[name] = {
                "arka_ms": round(mine * 1e3, 4),
                "floor_ms": round(theirs * 1e3, 4),
                "ratio": round(theirs / mine, 2),
            }
    print(
        json.dumps(
            {
                "benchmark": "transforms",
                "rows": options.rows,
                "rounds": options.rounds,
                "python": platform.python_version(),
                "pyarrow": pa.__version__,
                "cases": results,
            }
        )
    )


if __name__ == "__main__":
    main()
