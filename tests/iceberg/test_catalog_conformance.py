"""The real catalog, in its worker processes, and the simulated one pass the same suite."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest
import trio
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.types import StringType

from arka.iceberg.config import CATALOG_NAME
from arka.options import IcebergOptions
from arka.records import FIELD_ID_KEY, TableInfo
from arka.storage.catalog import open_catalog
from arka.storage.ports import (
    Catalog,
    CatalogUnavailable,
    CommitJob,
    CommitMark,
    CommitOutcome,
    SegmentSlice,
    TableFrames,
)
from arka.tableproperties import committed_lsn_property, epoch_property
from arka.testing.conformance_catalog import CHECKS, SCHEMA, Check, rows_of
from arka.testing.segmentfile import write_segment_file
from arka.testing.simcatalog import Fault, FaultKind, SimCatalog
from arka.wal.segment import FRAME_HEADER_BYTES, read_slice

LOG = UUID("99999999-8888-7777-6666-555555555555")


class _Files:
    """The half of a subject that both share: segments on the local disk."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log_uuid = LOG
        self._numbers = count(1)

    def write(
        self, info: TableInfo, frames: Sequence[tuple[int, pa.RecordBatch]], deletes: Container[int] = ()
    ) -> SegmentSlice:
        return write_segment_file(self.directory, next(self._numbers), info, frames, log_uuid=LOG, deletes=deletes)

    def damage(self, piece: SegmentSlice) -> None:
        last = memoryview(piece.offsets).cast("Q")[-1]
        data = bytearray(Path(piece.path).read_bytes())
        data[last + FRAME_HEADER_BYTES + 64] ^= 1
        Path(piece.path).write_bytes(data)


class _RealSubject(_Files):
    def __init__(self, catalog: Catalog, directory: Path) -> None:
        super().__init__(directory)
        self.catalog = catalog
        self._foreign = SqlCatalog(
            CATALOG_NAME, uri=f"sqlite:///{directory}/catalog.db", warehouse=f"file://{directory}/warehouse"
        )

    async def foreign_append(self, info: TableInfo, batch: pa.RecordBatch) -> None:
        table = self._foreign.load_table(tuple(info.name))
        table.append(pa.Table.from_batches([batch.cast(table.schema().as_arrow())]))

    async def foreign_columns(
        self, info: TableInfo, *, rename: Mapping[str, str], drop: Sequence[str], add: Sequence[str]
    ) -> None:
        with self._foreign.load_table(tuple(info.name)).transaction() as transaction:
            # Two updates, since one cannot give a name that it takes away.
            with transaction.update_schema() as update:
                for column, name in rename.items():
                    update.rename_column(column, name)
                for column in drop:
                    update.delete_column(column)
            with transaction.update_schema() as update:
                for column in add:
                    update.add_column(column, StringType())

    async def set_mark(self, info: TableInfo, mark: CommitMark) -> None:
        table = self._foreign.load_table(tuple(info.name))
        with table.transaction() as transaction:
            transaction.set_properties(
                {
                    committed_lsn_property(mark.log_uuid): str(mark.committed_lsn),
                    epoch_property(mark.log_uuid): str(mark.epoch),
                }
            )

    def close(self) -> None:
        self._foreign.close()


class _SimSubject(_Files):
    def __init__(self, catalog: SimCatalog, directory: Path) -> None:
        super().__init__(directory)
        self.catalog = catalog

    async def foreign_append(self, info: TableInfo, batch: pa.RecordBatch) -> None:
        self.catalog.foreign_append(info.name, pa.RecordBatch.from_arrays(batch.columns, schema=info.schema))

    async def foreign_columns(
        self, info: TableInfo, *, rename: Mapping[str, str], drop: Sequence[str], add: Sequence[str]
    ) -> None:
        def change(schema: pa.Schema, new_id: Callable[[], int]) -> pa.Schema:
            kept = [
                column.with_name(rename.get(column.name, column.name)) for column in schema if column.name not in drop
            ]
            return pa.schema(
                [*kept, *(pa.field(n, pa.string(), metadata={FIELD_ID_KEY: b"%d" % new_id()}) for n in add)]
            )

        self.catalog.foreign_schema(info.name, change)

    async def set_mark(self, info: TableInfo, mark: CommitMark) -> None:
        self.catalog.set_mark(info.name, mark)


@asynccontextmanager
async def _real(directory: Path, **options: Any) -> AsyncIterator[_RealSubject]:
    async with open_catalog(IcebergOptions(**options), directory) as catalog:
        await catalog.start()
        subject = _RealSubject(catalog, directory)
        try:
            yield subject
        finally:
            subject.close()


@pytest.mark.parametrize("stock", [False, True], ids=["lean", "stock"])
async def test_real_catalog_conforms(tmp_path: Path, stock: bool) -> None:
    """The real adapter does what the port promises, on our commit path and on pyiceberg's public one."""
    async with _real(tmp_path, stock_commit=stock) as subject:
        for check in CHECKS:
            try:
                await check(subject)
            except Exception as error:
                error.add_note(f"check: {check.__name__}")
                raise


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_simulated_catalog_conforms(check: Check, tmp_path: Path) -> None:
    """The simulated catalog does what the port promises."""
    await check(_SimSubject(SimCatalog(read_slice), tmp_path))


async def _staged_job(subject: _SimSubject) -> CommitJob:
    from arka.records import TableDefinition, TableName

    info = (await subject.catalog.create_table(TableDefinition(TableName("default", "t"), SCHEMA), "0123abcd")).info
    piece = subject.write(info, [(1, rows_of(1))])
    schemas = {0: info.schema.serialize().to_pybytes()}
    staged = await subject.catalog.encode(TableFrames(info, schemas, LOG, 0, 1, (piece,)))
    return CommitJob(info, LOG, 1, UUID(int=5), staged)


@pytest.mark.parametrize(
    ("kind", "rows"), [(FaultKind.REFUSED, 0), (FaultKind.LOST_RESPONSE, 1)], ids=lambda value: str(value)
)
async def test_planned_faults_of_the_simulation(
    kind: FaultKind, rows: int, tmp_path: Path, autojump_clock: Any
) -> None:
    """A refused call has not happened, a lost response has; run again, the job commits exactly once."""
    subject = _SimSubject(SimCatalog(read_slice, latency_s=0.5), tmp_path)
    job = await _staged_job(subject)
    subject.catalog.plan(Fault("commit", FaultKind.SLOW, delay_s=5), Fault("commit", kind))
    with trio.move_on_after(3) as scope:
        await subject.catalog.commit(job)
    assert scope.cancelled_caught
    assert subject.catalog.rows(job.table.name).num_rows == 0
    with pytest.raises(CatalogUnavailable):
        await subject.catalog.commit(job)
    assert subject.catalog.rows(job.table.name).num_rows == rows
    assert (await subject.catalog.commit(job)).outcome is CommitOutcome.COMMITTED
    assert subject.catalog.rows(job.table.name).num_rows == 1
    assert subject.catalog.calls.count("commit") == 3


def test_checks_have_a_guarantee_each() -> None:
    """Every check says what it holds, and none is listed twice."""
    checks: Sequence[Callable[..., Any]] = CHECKS
    assert all(check.__doc__ for check in checks)
    assert len({check.__name__ for check in checks}) == len(checks)
