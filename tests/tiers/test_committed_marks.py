"""What others undo in the catalog while no server runs stays so: the disk knows what was committed (R15, R20)."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from arka.errors import ConfigurationError, DataCorruption
from arka.lineage import MAX_STARTS, CommitMark
from arka.records import TableDefinition, TableName, TableType, Tier
from arka.storage.disk import PosixDisk
from arka.storage.ports import Disk
from arka.testing.simdisk import PowerCut, SimDisk
from arka.testing.simnode import NAME, SimNode, create_table, write, write_all
from arka.testing.simworld import WAL
from arka.testing.simwriters import SCHEMA
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState
from arka.wal.blocks import seal_block
from arka.wal.committed import COMMITTED_NAME, CommittedMarks, Unrecorded, read_committed
from arka.wal.dump import verify_log
from arka.wal.seal import write_whole

KEYED = TableName("default", "k")
NAMES = (NAME, KEYED)
LOG = UUID(int=7)
PATH = WAL / COMMITTED_NAME


async def _make(pipeline: Pipeline) -> list[Table]:
    schema = SCHEMA.set(0, SCHEMA.field(0).with_nullable(False))
    keyed = TableDefinition(KEYED, schema, table_type=TableType.PRIMARY_KEY, key_columns=("id",))
    return [await create_table(pipeline), (await pipeline.tables.create(keyed))[0]]


async def _commit(pipeline: Pipeline, numbers: range, names: tuple[TableName, ...] = NAMES) -> None:
    """Commit each row by itself."""
    for name in names:
        table = await pipeline.tables.find(name)
        for number in numbers:
            await write_all(pipeline, table, range(number, number + 1), Tier.ICEBERG_COMMITTED)


def _check_ids(node: SimNode, numbers: list[int]) -> None:
    for name in NAMES:
        assert node.ids(name) == numbers


def _unset(node: SimNode) -> None:
    """Let others remove the marks and expire the snapshots; the rows stay."""
    for name in NAMES:
        node.catalog._tables[name].marks.clear()


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("undo", ["back by one", "back by many", "back to none", "marks removed"])
async def test_undone_while_down(undo: str, stops: bool, autojump_clock: MockClock) -> None:
    """Commits that others undo, or whose marks they remove, are not made again; set back, the tables go on."""
    node = SimNode()
    states = []
    async with node.run(closes=stops) as pipeline:
        await _make(pipeline)
        for number in range(4):
            states.append(node.weather.back_up())
            await _commit(pipeline, range(number, number + 1))
        assert node.keys_of("checkpoint") == []
        if not stops:
            for name in NAMES:
                # Not committed yet.
                write(pipeline, await pipeline.tables.find(name), 4, b"k4")
            await trio.sleep(0.05)
    newest = node.weather.back_up()
    if undo == "marks removed":
        _unset(node)
    else:
        node.weather.restore(states[{"back by one": 3, "back by many": 1, "back to none": 0}[undo]])
    before = {name: node.ids(name) for name in NAMES}
    for _ in range(2):
        async with node.run() as pipeline:
            await trio.sleep(20)
            for name in NAMES:
                table = await pipeline.tables.find(name)
                assert table.state is TableState.STOPPED
                assert "stands at LSN" in table.ending_detail
                assert str(newest[table.info.uuid]["marks"][pipeline.log_uuid].committed_lsn) in table.ending_detail
            other = await create_table(pipeline, TableName("default", "other"))
            await write_all(pipeline, other, range(3), Tier.ICEBERG_COMMITTED)
        assert {name: node.ids(name) for name in NAMES} == before
    for name in NAMES:
        table_uuid = node.catalog._tables[name].info.uuid
        for part, value in newest[table_uuid].items():
            setattr(node.catalog._tables[name], part, value)
    async with node.run() as pipeline:
        await trio.sleep(5)
        await _commit(pipeline, range(4, 6))
    _check_ids(node, list(range(6)))


async def test_what_a_start_adopts_is_recorded(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit whose process died before it recorded it is recorded by the start that acknowledges it."""
    node = SimNode()

    async def never(self: CommittedMarks, table: UUID, mark: CommitMark) -> None:
        await trio.sleep_forever()

    async with node.run() as pipeline:
        await _make(pipeline)
        before = node.weather.back_up()
        with monkeypatch.context() as patched:
            patched.setattr(CommittedMarks, "record", never)
            for name in NAMES:
                write(pipeline, await pipeline.tables.find(name), 0, b"k0")
            await trio.sleep(5)
            for name in NAMES:
                assert node.ids(name) == [0]
                # Not acknowledged.
                assert (await pipeline.tables.find(name)).committed.lsn == 0
    async with node.run() as pipeline:
        for name in NAMES:
            assert (await pipeline.tables.find(name)).committed.lsn > 0
    node.weather.restore(before)
    async with node.run() as pipeline:
        await trio.sleep(10)
        for name in NAMES:
            assert (await pipeline.tables.find(name)).state is TableState.STOPPED
            assert node.ids(name) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("restarted", [False, True])
async def test_disk_that_does_not_take_it(
    restarted: bool, error: int, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ack leaves while the disk does not take the record; that is said, and nothing is lost (R31, R35)."""
    node = SimNode()

    def refuse(*_: object) -> None:
        raise OSError(error, "planned")

    async with node.run() as pipeline:
        await _make(pipeline)
        with monkeypatch.context() as patched:
            patched.setattr("arka.wal.committed.write_whole", refuse)
            for name in NAMES:
                write(pipeline, await pipeline.tables.find(name), 0, b"k0")
            await trio.sleep(30)
            for name in NAMES:
                table = await pipeline.tables.find(name)
                assert node.ids(name) == [0]
                assert table.committed.lsn == 0
                assert table.state is TableState.ACTIVE
                assert COMMITTED_NAME in (pipeline.stalled(table) or "")
        if not restarted:
            await trio.sleep(60)
            await _commit(pipeline, range(1, 2))
    with monkeypatch.context() as patched:
        patched.setattr("arka.wal.committed.write_whole", refuse)
        async with node.run() as pipeline:
            for name in NAMES:
                table = await pipeline.tables.find(name)
                assert table.state is TableState.ACTIVE
                assert table.committed.lsn == 0 or not restarted
            patched.undo()
            await trio.sleep(60)
            await _commit(pipeline, range(1, 3))
    _check_ids(node, [0, 1, 2])


async def test_dropped_and_made_again(autojump_clock: MockClock) -> None:
    """A table that is made again has another UUID; one that others register again is what they made of it."""
    node = SimNode()
    async with node.run() as pipeline:
        await _make(pipeline)
        await _commit(pipeline, range(1))
        older, names = node.weather.back_up(), {}
        await _commit(pipeline, range(1, 3))
        for name in NAMES:
            names[name] = node.catalog._tables[name]
            await pipeline.tables.drop(name, purge=False)
        await create_table(pipeline)
        await _commit(pipeline, range(2), (NAME,))
    assert len(read_committed(WAL, node.disk, pipeline.log_uuid)) == 1
    node.catalog._tables[KEYED] = names[KEYED]
    node.weather.restore({names[KEYED].info.uuid: older[names[KEYED].info.uuid]})
    for numbers in (range(5, 6), range(6, 8)):
        async with node.run() as pipeline:
            await _commit(pipeline, numbers)
    assert node.ids() == [0, 1, 5, 6, 7]
    assert node.ids(KEYED) == [0, 5, 6, 7]


async def test_directory_of_an_older_version(autojump_clock: MockClock) -> None:
    """A directory without the file starts, and has one as soon as its tables were seen."""
    node = SimNode()
    async with node.run() as pipeline:
        await _make(pipeline)
        await _commit(pipeline, range(2))
    node.disk.remove(PATH)
    older = node.weather.back_up()
    async with node.run() as pipeline:
        await _commit(pipeline, range(2, 3))
    node.weather.restore(older)
    async with node.run() as pipeline:
        for name in NAMES:
            assert (await pipeline.tables.find(name)).state is TableState.STOPPED


async def test_lost_disk(autojump_clock: MockClock) -> None:
    """The file goes with the disk: what the store brings back goes on, and is recorded."""
    node = SimNode()
    async with node.run() as pipeline:
        await _make(pipeline)
        await _commit(pipeline, range(2))
        await pipeline.uplink.leave()
    node.lose_disk()
    for numbers in (range(2, 3), range(3, 4)):
        async with node.run() as pipeline:
            assert read_committed(WAL, node.disk, pipeline.log_uuid).keys() == {
                node.catalog._tables[name].info.uuid for name in NAMES
            }
            await _commit(pipeline, numbers)
    _check_ids(node, list(range(4)))


def _flip(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def _of_another_log(data: bytes) -> bytes:
    return seal_block(data[:16] + UUID(int=1).bytes + data[32:])


def _of_a_later_version(data: bytes) -> bytes:
    return seal_block(data[:8] + (99).to_bytes(4, "little") + data[12:])


@pytest.mark.parametrize(
    "change",
    [_flip, _of_another_log, _of_a_later_version, lambda data: data[:-1], lambda data: data[:9], lambda _: b""],
)
async def test_damage(change: Callable[[bytes], bytes], autojump_clock: MockClock) -> None:
    """A damaged file refuses the start with its name, `wal verify` says so too; without it the start goes on."""
    node = SimNode()
    async with node.run() as pipeline:
        await _make(pipeline)
        await _commit(pipeline, range(2))
    assert verify_log(WAL, node.disk).ok
    node.disk.damage(PATH, change(node.disk.read(PATH)))
    with pytest.raises((DataCorruption, ConfigurationError), match=str(PATH)):
        async with node.run():
            pass
    assert any(str(PATH) in problem for problem in verify_log(WAL, node.disk).problems)
    node.disk.remove(PATH)
    async with node.run() as pipeline:
        await _commit(pipeline, range(2, 3))
    _check_ids(node, [0, 1, 2])


async def test_mark_of_a_copy_from_before_all_known_starts(autojump_clock: MockClock) -> None:
    """A mark from before all known starts is another copy's where it cannot follow what was seen (R15, R29)."""
    node = SimNode()
    async with node.run(closes=True) as pipeline:
        await _make(pipeline)
        await _commit(pipeline, range(2))
    for _ in range(2):
        async with node.run(closes=True) as pipeline:
            await _commit(pipeline, range(2, 3))
    seen = {name: next(iter(node.catalog._tables[name].marks.values())) for name in NAMES}
    for _ in range(MAX_STARTS + 3):
        async with node.run(closes=True):
            pass
    oldest = min(start.epoch for start in pipeline._state.state.lineage.starts)
    assert oldest <= 3
    async with node.run(closes=True) as pipeline:
        # One's own is as good as ever.
        assert pipeline._state.state.lineage.starts[0].epoch > max(mark.epoch for mark in seen.values())
        await _commit(pipeline, range(3, 4), (KEYED,))
    mark = seen[NAME]
    for wrong in (
        CommitMark(mark.log_uuid, mark.committed_lsn, mark.epoch, 5),
        CommitMark(mark.log_uuid, mark.committed_lsn + 1, mark.epoch - 1, 5),
    ):
        node.catalog.set_mark(NAME, wrong)
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            assert table.state is TableState.STOPPED
            assert "copy of this data directory" in table.ending_detail
    node.catalog.set_mark(NAME, mark)
    async with node.run() as pipeline:
        await _commit(pipeline, range(4, 5))
    assert node.ids() == [0, 1, 2, 4]


# -- the file itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("cut_after", range(8))
async def test_power_cut_at_each_step(cut_after: int) -> None:
    """A crash leaves the file as it was or as it was to be."""
    for seed in range(10):
        disk = SimDisk(random.Random(seed))
        disk.make_directory(WAL)
        marks = await CommittedMarks.read(WAL, disk, LOG)
        await marks.record(UUID(int=1), CommitMark(LOG, 5, 1, 9))
        disk.cut_power_after(cut_after)
        recorded = False
        try:
            await marks.record(UUID(int=2), CommitMark(LOG, 8, 2, 9))
            recorded = True
        except PowerCut:
            pass
        disk.crash()
        found = read_committed(WAL, disk, LOG)
        assert found[UUID(int=1)] == CommitMark(LOG, 5, 1, 9)
        assert UUID(int=2) in found or not recorded
    assert cut_after < 7 or recorded


async def test_tables_share_a_write(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tables commit at once, what comes while one record is written goes into the next one."""
    disk = SimDisk(random.Random(1), latency_s=0.01)
    disk.make_directory(WAL)
    marks = await CommittedMarks.read(WAL, disk, LOG)
    writes = []

    def counted(disk: Disk, path: Path, parts: list[bytes]) -> None:
        writes.append(path)
        write_whole(disk, path, parts)

    monkeypatch.setattr("arka.wal.committed.write_whole", counted)
    async with trio.open_nursery() as nursery:
        for number in range(1, 200):
            nursery.start_soon(marks.record, UUID(int=number), CommitMark(LOG, number, 1, 1))
    assert len(writes) <= 2
    writes.clear()
    await marks.record(UUID(int=1), CommitMark(LOG, 1, 1, 1))
    assert writes == []
    assert len(read_committed(WAL, disk, LOG)) == 199


async def test_on_a_real_disk(tmp_path: Path) -> None:
    """A folder that is not there is an error that passes, and the file is read as it was written."""
    folder = tmp_path / "wal"
    marks = await CommittedMarks.read(folder, PosixDisk(), LOG)
    with pytest.raises(Unrecorded, match=COMMITTED_NAME):
        await marks.record(UUID(int=1), CommitMark(LOG, 5, 1, 9))
    folder.mkdir()
    await marks.record(UUID(int=1), CommitMark(LOG, 5, 1, 9))
    again = await CommittedMarks.read(folder, PosixDisk(), LOG)
    assert again.mark_of(UUID(int=1)) == CommitMark(LOG, 5, 1, 9)
    assert again.lsn_of(UUID(int=2)) == 0
