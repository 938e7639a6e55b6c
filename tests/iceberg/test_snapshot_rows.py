"""What a read has in memory of a snapshot is bounded, however many files, rows or wide rows there are (T27)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.manifest import ManifestFile

from arka.iceberg import snapshotrows
from arka.iceberg.pieces import MESSAGE_BYTES
from arka.storage.ports import CatalogUnavailable, ReadJob

SCHEMA = pa.schema([pa.field("n", pa.int64()), pa.field("s", pa.string())])


def _rows(start: int, count: int, text: str = "x") -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"n": n, "s": f"{n}{text}"} for n in range(start, start + count)], schema=SCHEMA)


def _live(lake: Any, info: Any, columns: list[str], **more: Any) -> Any:
    table = lake.table(info)
    schema = pa.schema([info.schema.field(name) for name in columns])
    arguments = {"batch_rows": 1 << 16, "check_wanted": lambda: None, **more}
    return snapshotrows.live_batches(table, table.metadata.current_snapshot_id, table.schema(), schema, **arguments)


def test_manifests_are_read_as_files_are(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the first file come before the second manifest is opened."""
    info = lake.create(SCHEMA)
    for number in range(5):
        lake.append(info, [_rows(number, 1)], number)
    opened: list[str] = []
    fetch = ManifestFile.fetch_manifest_entry
    monkeypatch.setattr(
        ManifestFile,
        "fetch_manifest_entry",
        lambda self, *rest, **more: opened.append(self.manifest_path) or fetch(self, *rest, **more),
    )
    live = _live(lake, info, ["n"])
    next(live)
    assert len(opened) == 1
    assert sum(batch.num_rows for batch in live) == 4
    assert len(set(opened)) == len(lake.table(info).current_snapshot().manifests(lake.table(info).io))


def test_wide_rows_come_in_small_batches(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has as many rows as its bytes allow, counted over the columns that are read."""
    monkeypatch.setattr(snapshotrows, "_BATCH_BYTES", 1 << 20)
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(0, 1000, "y" * 10_000)], 0)
    wide = list(_live(lake, info, ["s"]))
    assert sum(batch.num_rows for batch in wide) == 1000
    assert max(batch.nbytes for batch in wide) < 2 << 20
    assert [batch.num_rows for batch in _live(lake, info, ["n"])] == [1000]


def test_large_row_groups_are_not_read_whole(lake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a row group that others made too large the columns are read in pieces, with the same rows."""
    monkeypatch.setattr(snapshotrows, "_ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr(snapshotrows, "_COLUMN_BYTES", 4096)
    sizes: list[int | None] = []
    make = pq.ParquetFile

    def recorded(*arguments: Any, **more: Any) -> Any:
        sizes.append(more.get("buffer_size"))
        return make(*arguments, **more)

    monkeypatch.setattr(snapshotrows.pq, "ParquetFile", recorded)
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(0, 5000)], 0)
    assert [n for batch in _live(lake, info, ["n"]) for n in batch["n"].to_pylist()] == list(range(5000))
    assert sizes == [None, 4096]


def test_a_file_that_is_gone_is_told(lake: Any) -> None:
    """A file of the snapshot that others deleted is named, with what to do."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(0, 1)], 0)
    for path in Path(info.location.removeprefix("file://")).rglob("*.parquet"):
        path.unlink()
    with pytest.raises(CatalogUnavailable, match=r"a file of the snapshot is gone .*\.parquet.*Read again"):
        list(_live(lake, info, ["n"]))


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_row_larger_than_a_message_goes_alone(lake: Any, compression: str | None) -> None:
    """Messages stay below 2 MiB by bytes; a single larger row is one of its own (T27)."""
    info = lake.create(SCHEMA)
    texts = [b * 100_000 for b in "abcdefghij" * 3] + ["z" * (MESSAGE_BYTES + 1)]
    rows = pa.RecordBatch.from_pylist([{"n": n, "s": text} for n, text in enumerate(texts)], schema=SCHEMA)
    lake.append(info, [rows], 0)
    found = lake.read(ReadJob(info, lake.log_uuid, compression=compression))
    assert found["s"].to_pylist() == texts
    assert all(batch.nbytes <= MESSAGE_BYTES or batch.num_rows == 1 for batch in found.to_batches())


def test_a_small_limit_reads_little() -> None:
    """A limit bounds the rows of a batch, but not to so few that dead rows would make very many batches."""
    assert snapshotrows.rows_for(None, 65_536) == 65_536
    assert snapshotrows.rows_for(10, 65_536) == 1024
    assert snapshotrows.rows_for(5000, 65_536) == 5000
