"""File access: local files are durable and whole, and scans read what anybody wrote."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.io.pyarrow import PyArrowFile
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestWriterV2,
    write_manifest_list,
)
from pyiceberg.table.snapshots import Operation, Snapshot, Summary
from pyiceberg.table.update import AddSnapshotUpdate, SetSnapshotRefUpdate
from pyiceberg.typedef import Record

from arka.errors import InvalidRequest
from arka.iceberg.fileio import (
    WarehouseFileIO,
    local_path,
    make_directory,
    write_durable,
    write_file,
)
from arka.storage.ports import ReadJob

SCHEMA = pa.schema([pa.field("n", pa.int64()), pa.field("name", pa.string())])


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every path that is fsynced, in order."""
    paths: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


@pytest.mark.parametrize(
    ("location", "path"),
    [
        ("file:///a/b%2Fc d", "/a/b%2Fc d"),
        ("file:/a/b", "/a/b"),
        ("/a/b", "/a/b"),
        ("s3://bucket/key", None),
        ("s3a://bucket/key", None),
        ("relative/path", None),
    ],
)
def test_local_paths(location: str, path: str | None) -> None:
    """Local URLs mean the path that they spell, nothing decoded."""
    assert local_path(location) == path


def test_new_directories_are_durable(tmp_path: Path, synced: list[str]) -> None:
    """Each new directory's entry in its parent is fsynced, from the top down."""
    make_directory(str(tmp_path / "a" / "b" / "c"))
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    make_directory(str(tmp_path / "a" / "b" / "c"))
    assert len(synced) == 3


def test_file_then_directory(tmp_path: Path, synced: list[str]) -> None:
    """A file's bytes are on the disk before its name is."""
    path = tmp_path / "x" / "file"
    assert write_durable(str(path), b"abc") == 3
    assert synced == [str(tmp_path), str(path), str(path.parent)]
    with pytest.raises(FileExistsError):
        write_durable(str(path), b"other")
    assert path.read_bytes() == b"abc"
    assert write_durable(str(path), pa.py_buffer(b"longer"), overwrite=True) == 6
    assert path.read_bytes() == b"longer"


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose fsync failed is removed again: half a file must never be found under its name."""

    def fail(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_durable(str(tmp_path / "file"), b"abc")
    assert list(tmp_path.iterdir()) == []


def test_partial_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that the kernel cuts short is continued."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:1000]))
    data = bytes(range(256)) * 40
    write_durable(str(tmp_path / "file"), data)
    assert (tmp_path / "file").read_bytes() == data


def test_streams_publish_at_close_or_never(tmp_path: Path) -> None:
    """A file appears when its stream is closed; an error inside ``with`` writes nothing."""
    io = WarehouseFileIO()
    output = io.new_output(f"file://{tmp_path}/d/file")
    stream = output.create()
    stream.write(b"abc")
    assert not output.exists()
    stream.close()
    stream.close()
    assert len(output) == 3
    assert output.to_input_file().open().read() == b"abc"
    with pytest.raises(FileExistsError):
        io.new_output(output.location).create()

    def fails() -> None:
        with io.new_output(f"file://{tmp_path}/other").create() as other:
            other.write(b"half")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fails()
    assert not (tmp_path / "other").exists()
    io.delete(output)
    assert not output.exists()
    with pytest.raises(FileNotFoundError):
        io.new_input(output.location).open()
    with pytest.raises(FileNotFoundError):
        io.delete(output.location)


def test_other_schemes_go_to_pyarrow() -> None:
    """What is not local is pyarrow's file system, with the catalog's properties."""
    io = WarehouseFileIO({"s3.endpoint": "http://127.0.0.1:1", "s3.region": "us-east-1"})
    assert isinstance(io.new_input("s3://bucket/key"), PyArrowFile)
    assert isinstance(io.new_output("s3://bucket/key"), PyArrowFile)


def test_whole_files_elsewhere(tmp_path: Path) -> None:
    """A data file for another scheme goes through the file access that pyiceberg uses."""

    class Recorder(WarehouseFileIO):
        def new_output(self, location: str) -> Any:
            return super().new_output(f"file://{tmp_path}/" + location.rpartition("/")[2])

    assert write_file(Recorder(), "mem://x/key", pa.py_buffer(b"data")) == 4
    assert (tmp_path / "key").read_bytes() == b"data"


def _rows(*numbers: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"n": n, "name": f"n{n}"} for n in numbers], schema=SCHEMA)


def _scan(lake: Any, info: Any, columns: list[str] | None = None) -> list[dict[str, Any]]:
    job = ReadJob(info, lake.log_uuid, None if columns is None else tuple(columns))
    found: list[dict[str, Any]] = lake.read(job).to_pylist()
    return sorted(found, key=lambda row: row.get("n", 0))


def test_scan_reads_foreign_files_by_name(lake: Any) -> None:
    """Files without field ids, added as they are by others, are read by their names."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1)], 0)
    path = lake.directory / "foreign.parquet"
    large = pa.schema([("name", pa.large_string()), ("n", pa.int64())])
    pq.write_table(pa.table([["n2"], [2]], schema=large), path)
    catalog = lake.foreign()
    catalog.load_table(tuple(info.name)).add_files([f"file://{path}"])
    catalog.close()
    assert _scan(lake, info) == _rows(1, 2).to_pylist()
    assert _scan(lake, info, ["n"]) == [{"n": 1}, {"n": 2}]
    lake.append(info, [_rows(3)], 1)
    assert _scan(lake, info) == _rows(1, 2, 3).to_pylist()


class _DeleteWriter(ManifestWriterV2):
    """A manifest of delete files, as other engines write it."""

    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


def _delete_positions(lake: Any, info: Any, positions: list[int]) -> None:
    """Commit a position-delete file for the table's only data file, as another engine would."""
    catalog = lake.foreign()
    table = catalog.load_table(tuple(info.name))
    (task,) = table.scan().plan_files()
    schema = pa.schema(
        [
            pa.field("file_path", pa.string(), False, metadata={"PARQUET:field_id": "2147483546"}),
            pa.field("pos", pa.int64(), False, metadata={"PARQUET:field_id": "2147483545"}),
        ]
    )
    path = Path(local_path(info.location) or "") / "data" / "deletes.parquet"
    rows = [{"file_path": task.file.file_path, "pos": position} for position in positions]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, store_schema=False)
    bound = {2147483546: task.file.file_path.encode()}
    file = DataFile.from_args(
        content=DataFileContent.POSITION_DELETES,
        file_path=f"file://{path}",
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=len(positions),
        file_size_in_bytes=path.stat().st_size,
        lower_bounds=bound,
        upper_bounds=bound,
        column_sizes={},
        value_counts={},
        null_value_counts={},
        nan_value_counts={},
    )
    file.spec_id = 0
    metadata = table.metadata
    snapshot_id = metadata.new_snapshot_id()
    sequence = metadata.next_sequence_number()
    folder = f"{info.location}/metadata"
    codec: Any = "gzip"
    with _DeleteWriter(
        table.spec(), table.schema(), table.io.new_output(f"{folder}/d-m0.avro"), snapshot_id, codec
    ) as writer:
        writer.add_entry(
            ManifestEntry.from_args(
                status=ManifestEntryStatus.ADDED,
                snapshot_id=snapshot_id,
                sequence_number=None,
                file_sequence_number=None,
                data_file=file,
            )
        )
    manifests = [writer.to_manifest_file(), *table.current_snapshot().manifests(table.io)]
    with write_manifest_list(
        2,
        table.io.new_output(f"{folder}/d-list.avro"),
        snapshot_id,
        metadata.current_snapshot_id,
        sequence,
        codec,
    ) as listed:
        listed.add_manifests(manifests)
    made: Callable[..., Any] = Snapshot
    snapshot = made(
        snapshot_id=snapshot_id,
        parent_snapshot_id=metadata.current_snapshot_id,
        sequence_number=sequence,
        manifest_list=f"{folder}/d-list.avro",
        summary=Summary(Operation.DELETE),
        schema_id=0,
    )
    ref: Callable[..., Any] = SetSnapshotRefUpdate
    updates = (
        AddSnapshotUpdate(snapshot=snapshot),
        ref(ref_name="main", snapshot_id=snapshot_id, type="branch"),
    )
    catalog.commit_table(table, (), updates)
    catalog.close()


def test_scan_and_merges_honour_position_deletes(lake: Any, duck: Any) -> None:
    """Rows that another engine deleted by position stay deleted, also when our manifests are merged (R20)."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(*range(10))], 0)
    _delete_positions(lake, info, [0, 3, 9])
    expected = [1, 2, 4, 5, 6, 7, 8]
    assert [row["n"] for row in _scan(lake, info)] == expected
    for lsn in range(1, 70):
        lake.append(info, [_rows(lsn + 100)], lsn)
    expected += [lsn + 100 for lsn in range(1, 70)]
    assert [row["n"] for row in _scan(lake, info)] == expected
    table = lake.table(info)
    assert sorted(table.scan().to_arrow()["n"].to_pylist()) == expected
    assert len(table.current_snapshot().manifests(table.io)) < 40
    counted = duck.execute("SELECT count(*) FROM iceberg_scan(?)", [table.metadata_location]).fetchone()
    assert counted == (len(expected),)


def test_scan_reads_identity_columns_from_partitions(lake: Any) -> None:
    """A column that a foreign file lacks, and that its partition gives, has the partition's value."""
    info = lake.create(SCHEMA, (1, "identity"))
    lake.append(info, [_rows(1)], 0)
    (task,) = lake.table(info).scan().plan_files()
    path = local_path(task.file.file_path) or ""
    lean = pq.read_table(path).drop_columns(["name"])
    field = info.schema.field("n")
    lean = lean.cast(pa.schema([field]))
    pq.write_table(lean, path, store_schema=False)
    assert _scan(lake, info) == [{"n": 1, "name": "n1"}]


@pytest.mark.parametrize("columns", [[], ["n", "n"], ["nothing"]])
def test_scan_of_impossible_columns(lake: Any, columns: list[str]) -> None:
    """A projection must name the table's columns, each once."""
    info = lake.create(SCHEMA)
    with pytest.raises(InvalidRequest):
        _scan(lake, info, columns)


def test_scan_of_columns_that_a_file_lacks(lake: Any) -> None:
    """Rows written before a column was added have null there, also when nothing else is asked for."""
    info = lake.create(SCHEMA)
    lake.append(info, [_rows(1, 2)], 0)
    catalog = lake.foreign()
    with catalog.load_table(tuple(info.name)).update_schema() as update:
        from pyiceberg.types import IntegerType

        update.add_column("later", IntegerType())
    catalog.close()
    assert _scan(lake, info, ["later"]) == [{"later": None}, {"later": None}]
