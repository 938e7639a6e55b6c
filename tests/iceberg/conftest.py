"""A lake on the local disk, used in-process, and foreign readers that know nothing of Arka."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.table import Table

from arka.iceberg import catalogs, commit, control, encode, scan
from arka.iceberg.config import CATALOG_NAME, CatalogConfig
from arka.iceberg.garbage import Garbage
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.outlet import PIPE_NAME, RECORD
from arka.iceberg.rowdelta import KeyedTables
from arka.options import IcebergOptions
from arka.records import PartitionRequest, TableDefinition, TableInfo, TableName, TableType, owner_property
from arka.storage.ports import CommitJob, CommitResult, ReadJob, SegmentSlice, StagedFiles, TableFrames
from arka.tableproperties import OWNER
from arka.testing.segmentfile import write_segment_file
from tests.readers import open_duckdb

LOG = UUID("11111111-2222-3333-4444-555555555555")


class Lake:
    """The jobs of the workers, called directly, on a catalog and warehouse of one test."""

    def __init__(self, directory: Path, options: IcebergOptions) -> None:
        self.directory = directory
        self.config = CatalogConfig.from_options(options, directory, {})
        self.log_uuid = LOG
        self._segments = count(1)

    def create(
        self,
        schema: pa.Schema,
        *transforms: tuple[int, str],
        name: str = "t",
        properties: dict[str, str] | None = None,
        key: Sequence[str] = (),
        partition_names: Sequence[str] = (),
    ) -> TableInfo:
        fields = tuple(
            PartitionRequest(index, None, partition_names[position] if partition_names else f"p{position}", transform)
            for position, (index, transform) in enumerate(transforms)
        )
        definition = TableDefinition(
            TableName("default", name),
            schema,
            table_type=TableType.PRIMARY_KEY if key else TableType.APPEND_ONLY,
            key_columns=tuple(key),
            partition=fields,
            properties=({OWNER: owner_property("node", LOG)} if key else {}) | (properties or {}),
        )
        return control.create_table(self.config, definition, uuid4().hex[:8]).info

    def read(self, job: ReadJob) -> pa.Table:
        """Return what a worker sends of a table."""
        folder = self.directory / f"read-{uuid4()}"
        folder.mkdir()
        os.mkfifo(folder / PIPE_NAME)
        reader = os.open(folder / PIPE_NAME, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        with ThreadPoolExecutor(1) as pool, open(reader, "rb") as pipe:
            reading = pool.submit(scan.scan, self.config, job, str(folder))
            while not select.select([pipe], [], [], 0.05)[0]:
                if reading.done():
                    reading.result()
            answer, copied = bytearray(), 0
            while front := pipe.read(RECORD.size):
                header, body = RECORD.unpack(front)
                copied += not header
                if header:
                    answer += b"\xff\xff\xff\xff" + header.to_bytes(4, "little") + pipe.read(header) + pipe.read(body)
            rows = reading.result()
        assert copied == 1
        found = pa.ipc.open_stream(pa.py_buffer(bytes(answer))).read_all()
        assert found.num_rows == rows
        assert [path.name for path in folder.iterdir()] == [PIPE_NAME]
        return found

    def reload(self, info: TableInfo) -> TableInfo:
        """Return what the catalog says of a table now."""
        return control.load_table(self.config, info.name).info

    def write(
        self, info: TableInfo, frames: Sequence[tuple[int, pa.RecordBatch]], deletes: Container[int] = ()
    ) -> SegmentSlice:
        number = next(self._segments)
        return write_segment_file(self.directory, number, info, frames, log_uuid=LOG, deletes=deletes)

    def encode(
        self,
        info: TableInfo,
        batches: Sequence[pa.RecordBatch],
        after: int,
        through: int | None = None,
        deletes: Container[int] = (),
    ) -> StagedFiles:
        """Encode batches as the LSNs from ``after + 1``; those of ``deletes`` delete."""
        return self.encode_job(self.frames(info, batches, after, through, deletes))

    def encode_job(self, job: TableFrames) -> StagedFiles:
        return encode.encode(self.config, job)

    def frames(
        self,
        info: TableInfo,
        batches: Sequence[pa.RecordBatch],
        after: int,
        through: int | None = None,
        deletes: Container[int] = (),
    ) -> TableFrames:
        """Put batches into the log; returns what is to be encoded."""
        frames = [(after + 1 + index, batch) for index, batch in enumerate(batches)]
        schemas = {info.schema_id: info.schema.serialize().to_pybytes()}
        slices = (self.write(info, frames, deletes),) if frames else ()
        end = after + len(frames) if through is None else through
        return TableFrames(info, schemas, LOG, after, end, slices)

    def job(self, info: TableInfo, staged: StagedFiles, *, epoch: int = 1) -> CommitJob:
        return CommitJob(info, LOG, epoch, uuid4(), staged)

    def commit(self, info: TableInfo, staged: StagedFiles, *, epoch: int = 1) -> CommitResult:
        return commit.commit(self.config, self.job(info, staged, epoch=epoch))

    def append(self, info: TableInfo, batches: Sequence[pa.RecordBatch], after: int) -> CommitResult:
        return self.commit(info, self.encode(info, batches, after))

    def foreign(self) -> SqlCatalog:
        """Open the catalog as any pyiceberg user would."""
        return SqlCatalog(CATALOG_NAME, uri=self.config.uri, warehouse=self.config.warehouse)

    def table(self, info: TableInfo) -> Table:
        """Load a table with plain pyiceberg."""
        catalog = self.foreign()
        try:
            return catalog.load_table(tuple(info.name))
        finally:
            catalog.close()

    def files(self, info: TableInfo, suffix: str = "") -> list[Path]:
        """List the files of a table."""
        root = Path(info.location.removeprefix("file://"))
        return sorted(path for path in root.rglob(f"*{suffix}") if path.is_file())


@pytest.fixture(autouse=True)
def _fresh_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let each test begin as a worker process does: nothing opened, nothing remembered."""
    opened: dict[CatalogConfig, Any] = {}
    monkeypatch.setattr(catalogs, "_opened", opened)
    monkeypatch.setattr(commit, "_memory", ManifestMemory())
    monkeypatch.setattr(commit, "_garbage", Garbage())
    monkeypatch.setattr(commit, "_keyed", KeyedTables())
    yield
    for catalog in opened.values():
        catalog.close()


@pytest.fixture
def make_lake(tmp_path: Path) -> Callable[..., Lake]:
    def make(directory: Path = tmp_path, **options: Any) -> Lake:
        return Lake(directory, IcebergOptions(**options))

    return make


@pytest.fixture
def lake(make_lake: Callable[..., Lake]) -> Lake:
    return make_lake()


@pytest.fixture(scope="session")
def duck() -> Any:
    connection = open_duckdb()
    yield connection
    connection.close()
