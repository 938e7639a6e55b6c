"""Times in table metadata go forward, also when the clock goes back (R34)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest

from arka.iceberg import timestamps

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False)])


def _rows(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(numbers, pa.int64())}, schema=SCHEMA)


class _Clock:
    """The wall clock, moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_ms = 0
        real, real_ns = timestamps.time.time, timestamps.time.time_ns
        monkeypatch.setattr(timestamps.time, "time", lambda: real() + self.ahead_ms / 1000)
        monkeypatch.setattr(timestamps.time, "time_ns", lambda: real_ns() + self.ahead_ms * 1_000_000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    return _Clock(monkeypatch)


def check_forward(metadata: Any) -> None:
    """Check every list of times that readers check, and that nothing is younger than the table."""
    snapshots = sorted(metadata.snapshots, key=lambda snapshot: snapshot.sequence_number)
    for times in (
        [snapshot.timestamp_ms for snapshot in snapshots],
        [entry.timestamp_ms for entry in metadata.snapshot_log],
        [*(entry.timestamp_ms for entry in metadata.metadata_log), metadata.last_updated_ms],
    ):
        assert all(a < b for a, b in pairwise(times)), times
    assert metadata.last_updated_ms >= max(entry.timestamp_ms for entry in metadata.snapshot_log)


@pytest.mark.parametrize("kind", ["lean", "stock", "keyed"])
def test_a_clock_that_goes_back_is_not_followed(make_lake: Any, clock: _Clock, kind: str) -> None:
    """Created and committed to with a clock five minutes ahead, then right, then an hour behind."""
    lake = make_lake(stock_commit=kind == "stock", keep_snapshots=3)
    clock.ahead_ms = 300_000
    info = lake.create(SCHEMA, key=["n"] if kind == "keyed" else ())
    for lsn in range(3):
        lake.append(info, [_rows(lsn)], lsn)
    for ahead_ms in (0, -3_600_000, 10_000):
        clock.ahead_ms = ahead_ms
        for _ in range(2):
            lsn += 1
            lake.append(info, [_rows(lsn)], lsn)
            check_forward(lake.table(info).metadata)
    # Expiry took part in it.
    assert len(lake.table(info).metadata.snapshots) == 3


@pytest.mark.parametrize("kind", ["lean", "stock"])
def test_a_commit_follows_what_others_wrote_with_their_clock(make_lake: Any, clock: _Clock, kind: str) -> None:
    """A table whose last change came from a machine with a clock ahead goes on a millisecond behind it."""
    lake = make_lake(stock_commit=kind == "stock")
    info = lake.create(SCHEMA)
    clock.ahead_ms = 120_000
    catalog = lake.foreign()
    catalog.load_table(tuple(info.name)).append(pa.Table.from_batches([_rows(7)]))
    catalog.close()
    theirs = lake.table(info).metadata.last_updated_ms
    clock.ahead_ms = 0
    lake.append(info, [_rows(1)], 0)
    made = lake.table(info).metadata
    check_forward(made)
    assert made.current_snapshot().timestamp_ms == theirs + 1
