"""What every ``ports.Catalog`` must do: one list of checks for the real adapter and the simulated one.

Owns: the checks. Does not own how a subject is set up, or how the world around it is changed: the test
that runs them hands over a ``Subject``.

Each check stands alone, on tables of its own; a failed one raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID, uuid4

import pyarrow as pa

from arka.errors import AdmissionRejected, ArkaError, DataCorruption, ErrorCode, InvalidRequest
from arka.records import (
    FIELD_ID_KEY,
    PartitionRequest,
    TableDefinition,
    TableInfo,
    TableName,
    TableType,
    owner_property,
)
from arka.storage.ports import (
    Catalog,
    CatalogConflict,
    CommitJob,
    CommitMark,
    CommitOutcome,
    CommitResult,
    ReadJob,
    SegmentSlice,
    StagedFiles,
    TableExists,
    TableFrames,
    TableMissing,
)
from arka.tableproperties import OWNER
from arka.testing.answers import CollectedAnswer

SUFFIX: Final = "0123abcd"

SCHEMA: Final = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("tags", pa.list_(pa.field("element", pa.struct([pa.field("k", pa.string())])))),
    ]
)


class Subject(Protocol):
    """A catalog under test and a hand on the world behind it."""

    @property
    def catalog(self) -> Catalog:
        """The catalog."""
        ...

    @property
    def log_uuid(self) -> UUID:
        """The log whose segments ``write`` writes."""
        ...

    @property
    def directory(self) -> Path:
        """A folder for scratch files."""
        ...

    def write(
        self, info: TableInfo, frames: Sequence[tuple[int, pa.RecordBatch]], deletes: Container[int] = ()
    ) -> SegmentSlice:
        """Write batches with their LSNs as frames of one segment; those in ``deletes`` delete and have keys alone."""
        ...

    def damage(self, piece: SegmentSlice) -> None:
        """Flip a bit in the body of the last frame of a slice."""
        ...

    async def foreign_append(self, info: TableInfo, batch: pa.RecordBatch) -> None:
        """Append rows as another writer, without touching any mark."""
        ...

    async def foreign_columns(
        self, info: TableInfo, *, rename: Mapping[str, str], drop: Sequence[str], add: Sequence[str]
    ) -> None:
        """Change a table's columns as another client, in one step; ``add`` makes optional strings."""
        ...

    async def set_mark(self, info: TableInfo, mark: CommitMark) -> None:
        """Move a table's mark, as another process of the same log would."""
        ...


E = TypeVar("E", bound=Exception)

Check = Callable[[Subject], Awaitable[None]]


def rows_of(*ids: int) -> pa.RecordBatch:
    """Return a batch in ``SCHEMA`` with these ids."""
    data = [{"id": number, "name": f"n{number}", "tags": [{"k": "v"}]} for number in ids]
    return pa.RecordBatch.from_pylist(data, schema=SCHEMA)


async def _create(subject: Subject, **changes: object) -> TableInfo:
    name = TableName("default", f"t{uuid4().hex[:12]}")
    definition = TableDefinition(**{"name": name, "schema": SCHEMA, **changes})
    return (await subject.catalog.create_table(definition, SUFFIX)).info


def _frames(
    subject: Subject,
    info: TableInfo,
    frames: Sequence[tuple[int, pa.RecordBatch]],
    after: int,
    through: int,
    deletes: Container[int] = (),
) -> TableFrames:
    pieces = (subject.write(info, frames, deletes),) if frames else ()
    schemas = {info.schema_id: info.schema.serialize().to_pybytes()}
    return TableFrames(info, schemas, subject.log_uuid, after, through, pieces)


async def _encode(
    subject: Subject, info: TableInfo, frames: Sequence[tuple[int, pa.RecordBatch]], after: int, through: int
) -> StagedFiles:
    return await subject.catalog.encode(_frames(subject, info, frames, after, through))


def _read(
    subject: Subject, info: TableInfo, columns: Sequence[str] | None = None, limit: int | None = None, **more: Any
) -> ReadJob:
    return ReadJob(info, subject.log_uuid, None if columns is None else tuple(columns), limit, **more)


def _job(subject: Subject, info: TableInfo, staged: StagedFiles, *, epoch: int = 1) -> CommitJob:
    return CommitJob(info, subject.log_uuid, epoch, uuid4(), staged)


async def _append(
    subject: Subject, info: TableInfo, ids: Sequence[int], after: int, through: int, *, epoch: int = 1
) -> CommitResult:
    frames = [(after + 1, rows_of(*ids))] if ids else []
    staged = await _encode(subject, info, frames, after, through)
    return await subject.catalog.commit(_job(subject, info, staged, epoch=epoch))


async def _ids(subject: Subject, info: TableInfo) -> list[int]:
    return [row["id"] for row in await _rows_as_sent(subject, _read(subject, info, ["id"], None))]


async def _rows_as_sent(subject: Subject, job: ReadJob) -> list[dict[str, Any]]:
    answer = CollectedAnswer()
    count = await subject.catalog.scan(job, answer)
    rows = answer.rows()
    assert answer.copied
    assert len(rows) == count
    return rows


def _nested_ids(field: pa.Field) -> list[int]:
    own = [int(field.metadata[FIELD_ID_KEY])]
    kind = field.type
    if pa.types.is_list(kind):
        return own + _nested_ids(kind.value_field)
    if pa.types.is_struct(kind):
        return own + [number for child in kind for number in _nested_ids(child)]
    return own


async def created_table_is_described_whole(subject: Subject) -> None:
    """CreateTable gives ids to every nested field, ends the location in the suffix, and loads the same."""
    info = await _create(
        subject,
        table_type=TableType.PRIMARY_KEY,
        key_columns=("id",),
        partition=(PartitionRequest(0, None, "b", "bucket[4]"),),
        properties={"comment": "mine"},
    )
    assert info.schema.equals(SCHEMA)
    ids = [number for field in info.schema for number in _nested_ids(field)]
    assert len(ids) == len(set(ids)) == 5
    assert info.location.endswith(f"-{SUFFIX}")
    assert info.table_type is TableType.PRIMARY_KEY
    assert info.key_columns == ("id",)
    assert [(f.source_id, f.field_id, f.name, f.transform) for f in info.partition] == [(1, 1000, "b", "bucket[4]")]
    assert info.properties["comment"] == "mine"
    loaded = await subject.catalog.load_table(info.name)
    assert loaded.info == info
    assert loaded.info.schema.equals(info.schema, check_metadata=True)
    assert loaded.marks == ()
    assert loaded.snapshot_id is None
    assert info.name in [table.info.name for table in (await subject.catalog.list_tables()).tables]


async def taken_name_is_refused(subject: Subject) -> None:
    """CreateTable under a taken name raises TableExists and leaves the first table alone."""
    info = await _create(subject)
    await _error_of(TableExists, _create(subject, name=info.name))
    assert (await subject.catalog.load_table(info.name)).info.uuid == info.uuid


async def impossible_definitions_are_refused(subject: Subject) -> None:
    """A definition that Iceberg cannot hold raises CatalogConflict and makes nothing (R17)."""
    cases: list[dict[str, object]] = [
        {
            "schema": pa.schema([("x", pa.float64())]),
            "partition": (PartitionRequest(0, None, "b", "bucket[4]"),),
        },
        {"partition": (PartitionRequest(9, None, "b", "identity"),)},
        {"partition": (PartitionRequest(0, None, "b", "sideways"),)},
        {"partition": (PartitionRequest(0, None, "name", "bucket[4]"),)},
        {"partition": (PartitionRequest(2, None, "t", "identity"),)},
        {"schema": pa.schema([("x", pa.uint64())])},
        {"schema": pa.schema([("x", pa.int64()), ("x", pa.int64())])},
        {"schema": pa.schema([("x", pa.struct([]))])},
        {"schema": pa.schema([])},
        {"key_columns": ("name",)},
        {"key_columns": ("nothing",)},
        {"properties": {"format-version": "3"}},
        {"properties": {f"arka.{subject.log_uuid}.committed-lsn": "7"}},
    ]
    before = await subject.catalog.list_tables()
    for changes in cases:
        await _error_of(CatalogConflict, _create(subject, **changes))
    assert await subject.catalog.list_tables() == before


async def dropped_table_is_gone(subject: Subject) -> None:
    """DropTable takes the table it was given and no other of the same name (R5)."""
    first = await _create(subject)
    await subject.catalog.drop_table(first.name, first.uuid, purge=False)
    await _error_of(TableMissing, subject.catalog.load_table(first.name))
    await _error_of(TableMissing, subject.catalog.drop_table(first.name, first.uuid, purge=True))
    second = await _create(subject, name=first.name)
    assert second.uuid != first.uuid
    await _error_of(TableMissing, subject.catalog.drop_table(first.name, first.uuid, purge=True))
    await _error_of(TableMissing, _ids(subject, first))
    assert (await subject.catalog.load_table(first.name)).info.uuid == second.uuid
    await subject.catalog.drop_table(second.name, second.uuid, purge=True)
    await _error_of(TableMissing, subject.catalog.load_table(first.name))


async def _error_of(kind: type[E], call: Awaitable[object]) -> E:
    try:
        found = await call
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised; the call returned {found!r}")


async def committed_rows_are_read_in_order(subject: Subject) -> None:
    """Rows of a commit stand in LSN order, and the mark and the snapshot move with them (R15)."""
    info = await _create(subject)
    frames = [(3, rows_of(1, 2)), (4, rows_of()), (9, rows_of(3))]
    staged = await _encode(subject, info, frames, 0, 12)
    assert (staged.after_lsn, staged.through_lsn, staged.rows) == (0, 12, 3)
    first = await subject.catalog.commit(_job(subject, info, staged))
    assert first.outcome is CommitOutcome.COMMITTED
    assert first.committed_lsn == 12
    loaded = await subject.catalog.load_table(info.name)
    assert loaded.marks == (CommitMark(subject.log_uuid, 12, 1),)
    assert loaded.snapshot_id == first.snapshot_id is not None
    second = await _append(subject, info, [4], 12, 13, epoch=2)
    assert second.snapshot_id != first.snapshot_id
    assert sorted(await _ids(subject, info)) == [1, 2, 3, 4]
    assert (await subject.catalog.load_table(info.name)).marks[0].epoch == 2


async def repeated_commit_adds_nothing(subject: Subject) -> None:
    """A job that is run again, its first answer lost, reports the first snapshot and adds no row (R16)."""
    info = await _create(subject)
    job = _job(subject, info, await _encode(subject, info, [(1, rows_of(1))], 0, 1))
    first = await subject.catalog.commit(job)
    await _append(subject, info, [2], 1, 2)
    again = await subject.catalog.commit(job)
    assert again.outcome is CommitOutcome.COMMITTED
    assert (again.committed_lsn, again.snapshot_id) == (2, first.snapshot_id)
    assert sorted(await _ids(subject, info)) == [1, 2]


async def moved_mark_means_recut(subject: Subject) -> None:
    """A mark that is not where the job begins ends the commit, adds nothing and names the mark (R15, R20)."""
    info = await _create(subject)
    await _append(subject, info, [1], 0, 5)
    for after in (3, 6):
        result = await _append(subject, info, [9], after, 9)
        assert (result.outcome, result.committed_lsn) == (CommitOutcome.RECUT, 5)
    staged = await _encode(subject, info, [(6, rows_of(9))], 5, 9)
    await subject.set_mark(info, CommitMark(subject.log_uuid, 7, 1))
    result = await subject.catalog.commit(_job(subject, info, staged))
    assert (result.outcome, result.committed_lsn) == (CommitOutcome.RECUT, 7)
    await subject.set_mark(info, CommitMark(subject.log_uuid, 2, 1))
    result = await subject.catalog.commit(_job(subject, info, staged))
    # Real snapshots name the LSNs that they hold, so that such a mark is known to be changed.
    assert result.outcome in (CommitOutcome.RECUT, CommitOutcome.NOT_OURS)
    assert result.committed_lsn == 2
    assert await _ids(subject, info) == [1]


async def newer_epoch_fences(subject: Subject) -> None:
    """A mark of a newer epoch ends the commit of an older one, even at the right LSN (R15)."""
    info = await _create(subject)
    await _append(subject, info, [1], 0, 1, epoch=3)
    stale = await _append(subject, info, [2], 1, 2, epoch=2)
    assert (stale.outcome, stale.committed_lsn) == (CommitOutcome.FENCED, 1)
    await subject.set_mark(info, CommitMark(subject.log_uuid, 1, 4))
    stale = await _append(subject, info, [2], 1, 2, epoch=3)
    assert stale.outcome is CommitOutcome.FENCED
    assert await _ids(subject, info) == [1]
    current = await _append(subject, info, [2], 1, 2, epoch=4)
    assert current.outcome is CommitOutcome.COMMITTED


async def missing_table_is_gone(subject: Subject) -> None:
    """A commit to a dropped table, or to another one of its name, ends as TABLE_GONE (R5, R15)."""
    info = await _create(subject)
    staged = await _encode(subject, info, [(1, rows_of(1))], 0, 1)
    await subject.catalog.drop_table(info.name, info.uuid, purge=False)
    result = await subject.catalog.commit(_job(subject, info, staged))
    assert result == CommitResult(CommitOutcome.TABLE_GONE, 0, None)
    other = await _create(subject, name=info.name)
    result = await subject.catalog.commit(_job(subject, info, staged))
    assert result == CommitResult(CommitOutcome.TABLE_GONE, 0, None)
    assert await _ids(subject, other) == []


async def commit_without_rows_moves_the_mark(subject: Subject) -> None:
    """Batches without rows are writes too: their commit moves the mark and names a snapshot."""
    info = await _create(subject)
    for after, ids in ((0, []), (1, [1]), (2, [])):
        frames = [(after + 1, rows_of(*ids))]
        staged = await _encode(subject, info, frames, after, after + 1)
        assert len(staged.files) == len(ids)
        result = await subject.catalog.commit(_job(subject, info, staged))
        assert (result.outcome, result.committed_lsn) == (CommitOutcome.COMMITTED, after + 1)
        loaded = await subject.catalog.load_table(info.name)
        assert loaded.committed_lsn(subject.log_uuid) == after + 1
        assert loaded.snapshot_id == result.snapshot_id is not None
    assert await _ids(subject, info) == [1]


async def foreign_commits_are_kept(subject: Subject) -> None:
    """Another writer's snapshot between two of ours stays, and so do both of ours (R20)."""
    info = await _create(subject)
    await _append(subject, info, [1], 0, 1)
    staged = await _encode(subject, info, [(2, rows_of(2))], 1, 2)
    await subject.foreign_append(info, rows_of(77))
    result = await subject.catalog.commit(_job(subject, info, staged))
    assert result.outcome is CommitOutcome.COMMITTED
    await subject.foreign_append(info, rows_of(78))
    await _append(subject, info, [3], 2, 3)
    assert sorted(await _ids(subject, info)) == [1, 2, 3, 77, 78]


async def logs_have_marks_of_their_own(subject: Subject) -> None:
    """The mark of another log neither helps nor hinders (R1, R26)."""
    info = await _create(subject)
    other = UUID(int=7)
    await subject.set_mark(info, CommitMark(other, 1_000, 99))
    result = await _append(subject, info, [1], 0, 1)
    assert result.outcome is CommitOutcome.COMMITTED
    loaded = await subject.catalog.load_table(info.name)
    assert set(loaded.marks) == {CommitMark(other, 1_000, 99), CommitMark(subject.log_uuid, 1, 1)}
    assert loaded.committed_lsn(other) == 1_000
    assert loaded.committed_lsn(UUID(int=8)) == 0


async def scan_honours_columns_and_limit(subject: Subject) -> None:
    """A scan has the columns asked for, in that order, in the table's types, and no row too many (R25)."""
    info = await _create(subject)
    result = await _append(subject, info, [1, 2, 3], 0, 3)
    answer = CollectedAnswer()
    assert await subject.catalog.scan(_read(subject, info, ["tags", "id"], 2), answer) == 2
    table = answer.table()
    wanted = pa.schema([info.schema.field("tags"), info.schema.field("id")])
    assert table.schema.equals(wanted)
    assert [int(field.metadata[FIELD_ID_KEY]) for field in table.schema] == [3, 1]
    assert table.schema.metadata == {
        b"arka.snapshot-id": str(result.snapshot_id).encode(),
        f"arka.{subject.log_uuid}.committed-lsn".encode(): b"3",
    }
    assert table.num_rows == 2
    answer = CollectedAnswer()
    assert await subject.catalog.scan(_read(subject, info, None, None), answer) == 3
    assert answer.table().cast(SCHEMA).to_pylist() == rows_of(1, 2, 3).to_pylist()
    answer = CollectedAnswer()
    assert await subject.catalog.scan(_read(subject, info, None, 0), answer) == 0
    assert (answer.messages, answer.table().schema.names) == (1, SCHEMA.names)
    job = _read(subject, info, ["id", "nothing"], None)
    error = await _error_of(InvalidRequest, subject.catalog.scan(job, CollectedAnswer()))
    assert "nothing" in error.detail


async def _found(subject: Subject, job: ReadJob) -> list[Any]:
    """What a read finds: the rows' ``id`` and ``name``, in order."""
    return [(row["id"], row["name"]) for row in await _rows_as_sent(subject, job)]


async def read_adds_the_frames_above_the_snapshot(subject: Subject) -> None:
    """Frames that the snapshot does not hold are read behind its rows; those that it holds are not read again (R25)."""
    info = await _create(subject)
    frames = [(lsn, rows_of(lsn)) for lsn in range(1, 5)]
    tail = _frames(subject, info, frames, 0, 4)
    for committed in (0, 2, 4):
        if committed:
            await _append(subject, info, [committed - 1, committed], committed - 2, committed)
        expected = [(number, f"n{number}") for number in range(1, 5)]
        assert sorted(await _found(subject, _read(subject, info, tail=tail))) == expected
        assert sorted(await _found(subject, _read(subject, info))) == expected[:committed]
        limited = await _found(subject, _read(subject, info, limit=3, tail=tail))
        assert sorted(limited) == expected[:3] or committed == 4
        assert len(set(limited)) == 3


async def read_lets_go_of_the_log(subject: Subject) -> None:
    """Frames may vanish as soon as they are said to be copied, which is before the first message (T27)."""
    owner = {OWNER: owner_property("node", subject.log_uuid)}
    keyed = {"table_type": TableType.PRIMARY_KEY, "key_columns": ("id",), "properties": owner}
    for kind in ({}, keyed):
        info = await _create(subject, **kind)
        await _append(subject, info, range(1000), 0, 1)
        tail = _frames(subject, info, [(2, rows_of(*range(500, 1500)))], 1, 2)
        answer = CollectedAnswer(lambda piece=tail.slices[0]: subject.damage(piece))  # type: ignore[misc]
        assert await subject.catalog.scan(_read(subject, info, tail=tail), answer) == (1500 if kind else 2000)
        assert sorted({row["id"] for row in answer.rows()}) == list(range(1500))


async def read_ends_with_its_answer(subject: Subject) -> None:
    """What the answer raises ends the read, and the next one is not held up (T27)."""
    info = await _create(subject)
    await _append(subject, info, range(1000), 0, 1)

    class Refused(CollectedAnswer):
        async def begin(self, header: bytes, body_bytes: int) -> None:
            await super().begin(header, body_bytes)
            if self.messages == 2:
                raise AdmissionRejected("the client is too slow")

    for _ in range(3):
        await _error_of(AdmissionRejected, subject.catalog.scan(_read(subject, info), Refused()))
    assert len(await _ids(subject, info)) == 1000


async def read_of_the_past(subject: Subject) -> None:
    """``at_lsn`` below the newest snapshot needs one that ends there; frames have no place on top of it."""
    info = await _create(subject)
    await _append(subject, info, [1], 0, 3)
    await subject.foreign_append(info, rows_of(7))
    await _append(subject, info, [2], 3, 9)
    tail = _frames(subject, info, [(10, rows_of(3))], 9, 10)
    first = [(1, "n1")]
    assert await _found(subject, _read(subject, info, at_lsn=3)) == first
    assert await _found(subject, _read(subject, info, at_lsn=3, tail=tail)) == first
    assert sorted(found for found, _ in await _found(subject, _read(subject, info, at_lsn=9))) == [1, 2, 7]
    newest = [found for found, _ in await _found(subject, _read(subject, info, at_lsn=10, tail=tail))]
    assert (sorted(newest), newest[-1]) == ([1, 2, 3, 7], 3)
    for between in (0, 2, 4, 8):
        error = await _error_of(
            ArkaError, subject.catalog.scan(_read(subject, info, at_lsn=between), CollectedAnswer())
        )
        assert error.code is ErrorCode.OUT_OF_RANGE


async def _rows(subject: Subject, job: ReadJob) -> list[Any]:
    return sorted(await _rows_as_sent(subject, job), key=lambda row: tuple(row.values()))


async def read_of_the_past_has_its_own_columns(subject: Subject) -> None:
    """A read at an LSN has the names that its snapshot was written with, whatever others did to them since (R27)."""
    info = await _create(subject)
    first = rows_of(1).to_pylist()
    await _append(subject, info, [1], 0, 1)
    await subject.foreign_columns(info, rename={"name": "title"}, drop=["tags"], add=["more"])
    now = [{"id": 1, "title": "n1", "more": None}]
    # The newest snapshot is older than the change: its LSN means the table as it was.
    assert await _rows(subject, _read(subject, info)) == now
    assert await _rows(subject, _read(subject, info, at_lsn=1)) == first
    await _append(subject, info, [2], 1, 2)
    assert await _rows(subject, _read(subject, info, at_lsn=1)) == first
    assert await _rows(subject, _read(subject, info, ["name"], at_lsn=1)) == [{"name": "n1"}]
    assert await _rows(subject, _read(subject, info, at_lsn=2)) == [*now, {"id": 2, "title": "n2", "more": None}]
    await _error_of(InvalidRequest, subject.catalog.scan(_read(subject, info, ["title"], at_lsn=1), CollectedAnswer()))
    await _error_of(InvalidRequest, subject.catalog.scan(_read(subject, info, ["name"]), CollectedAnswer()))


async def commit_brings_back_what_it_loaded(subject: Subject) -> None:
    """Each definite answer carries the table as it is now, so that the server can adopt it (R27)."""
    info = await _create(subject)
    landed = await _append(subject, info, [1], 0, 1)
    assert landed.table is not None
    assert landed.table.info == info
    await subject.foreign_columns(info, rename={"name": "title"}, drop=["tags"], add=["name"])
    staged = await _encode(subject, info, [(2, rows_of(2))], 1, 2)
    job = _job(subject, info, staged)
    for result in (await subject.catalog.commit(job), await subject.catalog.commit(job)):
        assert result.outcome is CommitOutcome.COMMITTED
        assert result.table is not None
        assert result.table.info.schema.names == ["id", "title", "name"]
        assert result.table.info.schema_id != info.schema_id
        ids = [column.metadata[FIELD_ID_KEY] for column in result.table.info.schema]
        assert ids[1] == info.schema.field("name").metadata[FIELD_ID_KEY]
        assert ids[2] not in {column.metadata[FIELD_ID_KEY] for column in info.schema}
    # Rows of files that were written before go by their ids, too.
    assert await _rows(subject, _read(subject, info)) == [{"id": n, "title": f"n{n}", "name": None} for n in (1, 2)]


async def rolled_back_table_is_read_alone(subject: Subject) -> None:
    """Of a table that stands below what was committed no LSN is believed: a hole would not show (R20, R25)."""
    info = await _create(subject)
    await _append(subject, info, [1, 2], 0, 4)
    tail = _frames(subject, info, [(9, rows_of(9))], 8, 9)
    for asked in ({"tail": tail}, {"tail": tail, "at_lsn": 4}, {"at_lsn": 4}, {"at_lsn": 8}, {"at_lsn": 9}):
        job = _read(subject, info, known_lsn=8, **asked)
        error = await _error_of(ArkaError, subject.catalog.scan(job, CollectedAnswer()))
        assert error.code is ErrorCode.TABLE_STOPPED, error
        assert "stands at LSN 4, but 8 was committed" in error.detail, error
    assert sorted(await _found(subject, _read(subject, info, known_lsn=8))) == [(1, "n1"), (2, "n2")]
    assert sorted(await _found(subject, _read(subject, info, known_lsn=4, at_lsn=4))) == [(1, "n1"), (2, "n2")]


def _named(*rows: tuple[int, str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"id": number, "name": name} for number, name in rows], schema=SCHEMA)


async def primary_key_keeps_one_row_of_each_key(subject: Subject) -> None:
    """The last write of a key stands, in what is committed and in what is read above it; or the first, if so asked."""
    keys = pa.schema([SCHEMA.field("id")])
    frames = [
        (1, _named((1, "a"), (2, "b"), (1, "c"))),
        (2, pa.record_batch([pa.array([2, 5])], schema=keys)),
        (3, _named((3, "d"), (2, "e"))),
        (4, pa.record_batch([pa.array([3])], schema=keys)),
        (5, _named((1, "f"), (4, "g"))),
    ]
    last = [{}, {1: "c", 2: "b"}, {1: "c"}, {1: "c", 3: "d", 2: "e"}, {1: "c", 2: "e"}, {1: "f", 2: "e", 4: "g"}]
    first = [{}, {1: "a", 2: "b"}, {1: "a"}, {1: "a", 3: "d", 2: "e"}, {1: "a", 2: "e"}, {1: "a", 2: "e", 4: "g"}]
    for merge, expected in (("last", last), ("first", first)):
        info = await _create(
            subject,
            schema=SCHEMA,
            table_type=TableType.PRIMARY_KEY,
            key_columns=("id",),
            properties={"arka.merge": merge, OWNER: owner_property("node", subject.log_uuid)},
        )
        committed = 0
        for through in (0, 1, 3, 4, 5):
            cut = [frame for frame in frames if committed < frame[0] <= through]
            if cut:
                staged = await subject.catalog.encode(_frames(subject, info, cut, committed, through, {2, 4}))
                result = await subject.catalog.commit(_job(subject, info, staged))
                assert result.outcome is CommitOutcome.COMMITTED
                committed = through
            for end in range(committed, 6):
                rest = [frame for frame in frames if committed < frame[0] <= end]
                tail = _frames(subject, info, rest, committed, end, {2, 4}) if rest else None
                found = await _found(subject, _read(subject, info, tail=tail))
                assert len(found) == len(dict(found))
                assert dict(found) == expected[end], (merge, committed, end)
                # Columns that are not asked for are looked at all the same.
                found = await _rows_as_sent(subject, _read(subject, info, ["name"], tail=tail))
                names = sorted(expected[end].values())
                assert sorted(row["name"] for row in found) == names


async def damaged_frame_is_never_encoded(subject: Subject) -> None:
    """Bytes that changed after they were checked are found before they reach a file (R9)."""
    info = await _create(subject)
    piece = subject.write(info, [(1, rows_of(1)), (2, rows_of(2))])
    subject.damage(piece)
    schemas = {info.schema_id: info.schema.serialize().to_pybytes()}
    job = TableFrames(info, schemas, subject.log_uuid, 0, 2, (piece,))
    error = await _error_of(DataCorruption, subject.catalog.encode(job))
    assert error.path == piece.path
    assert error.offset > 0


#: Every check, in the order in which a newcomer should read them.
CHECKS: Final[tuple[Check, ...]] = (
    created_table_is_described_whole,
    taken_name_is_refused,
    impossible_definitions_are_refused,
    dropped_table_is_gone,
    committed_rows_are_read_in_order,
    repeated_commit_adds_nothing,
    moved_mark_means_recut,
    newer_epoch_fences,
    missing_table_is_gone,
    commit_without_rows_moves_the_mark,
    foreign_commits_are_kept,
    logs_have_marks_of_their_own,
    scan_honours_columns_and_limit,
    read_adds_the_frames_above_the_snapshot,
    read_lets_go_of_the_log,
    read_ends_with_its_answer,
    read_of_the_past,
    read_of_the_past_has_its_own_columns,
    commit_brings_back_what_it_loaded,
    rolled_back_table_is_read_alone,
    primary_key_keeps_one_row_of_each_key,
    damaged_frame_is_never_encoded,
)


__all__ = ["CHECKS", "SCHEMA", "SUFFIX", "Check", "Subject", "rows_of"]
