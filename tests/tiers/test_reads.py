"""Reads see every accepted write once, whatever goes on in the tiers meanwhile (R25)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.records import Operation, TableDefinition, TableName, TableType, Tier
from arka.storage.ports import CatalogUnavailable
from arka.testing.answers import CollectedAnswer
from arka.testing.simcatalog import SimCatalog
from arka.testing.simnode import NAME, SimNode, create_table, drop_under_way, with_options, write, write_all
from arka.testing.simworld import WAL
from arka.testing.simwriters import SCHEMA, definition_of, frame_buffer
from arka.tiers.pipeline import Pipeline
from arka.tiers.reads import ReadRequest, read_table
from arka.tiers.table import Table, TableState


async def ids(pipeline: Pipeline, table: Table, **request: int) -> list[int]:
    answer = CollectedAnswer()
    count = await read_table(pipeline, table, ReadRequest(("id",), **request), answer)  # type: ignore[arg-type]
    found = [row["id"] for row in answer.rows()]
    assert len(found) == count
    assert (pipeline.read_turns.running, pipeline.read_turns.pending.total, pipeline.tail_room.used_bytes) == (0, 0, 0)
    assert not pipeline.tables._pinned
    return found


async def test_writes_are_read_as_soon_as_they_are_accepted(autojump_clock: MockClock) -> None:
    """From memory on, in LSN order, through restarts, with nothing of it committed or all."""
    node = SimNode(with_options(iceberg__commit_interval_s=1000))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        assert await ids(pipeline, table) == []
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        for number in range(3, 6):
            write(pipeline, table, number)
        assert await ids(pipeline, table) == list(range(6))
        assert node.ids() == [0, 1, 2]
        assert await ids(pipeline, table, limit=4) == [0, 1, 2, 3]
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        write(pipeline, table, 6)
        assert await ids(pipeline, table) == list(range(7))
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert await ids(pipeline, table) == list(range(7)) == node.ids()


async def test_read_up_to_an_lsn(autojump_clock: MockClock) -> None:
    """``at_lsn`` cuts what lies above the snapshot; below it a snapshot must end there; beyond the log is nothing."""
    node = SimNode(with_options(iceberg__commit_interval_s=1000))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        lsns = []
        for number in range(5):
            lsns.append(write(pipeline, table, number).lsn)
            if number in (0, 2):
                await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        for number in (0, 2, 3, 4):
            assert await ids(pipeline, table, at_lsn=lsns[number]) == list(range(number + 1))
        for wrong in (lsns[1], lsns[4] + 1):
            with pytest.raises(ArkaError) as caught:
                await ids(pipeline, table, at_lsn=wrong)
            assert caught.value.code is ErrorCode.OUT_OF_RANGE
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert await ids(pipeline, table, at_lsn=lsns[2]) == [0, 1, 2]


async def test_wait_for_an_lsn(autojump_clock: MockClock) -> None:
    """``wait_for_lsn`` waits until the log has got so far, whoever writes."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        first = write(pipeline, table, 0).lsn
        found: list[int] = []

        async def read() -> None:
            found.extend(await ids(pipeline, table, wait_for_lsn=first + 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            # Before the record that nobody writes any more, which has an LSN (R37).
            await trio.sleep(0.5)
            assert found == []
            write(pipeline, table, 1)
        assert found == [0, 1]


@pytest.mark.parametrize("wrong", [-1, 2**53, 2**63, 2**52])
async def test_an_lsn_that_cannot_be_is_not_waited_for(autojump_clock: MockClock, wrong: int) -> None:
    """Below 0, above 2^53, or further than the log reserves: out of range at once, to wait for and to read at."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 0)
        began = trio.current_time()
        for asked in ({"wait_for_lsn": wrong}, {"at_lsn": wrong}):
            with pytest.raises(ArkaError) as caught:
                await ids(pipeline, table, **asked)
            assert caught.value.code is ErrorCode.OUT_OF_RANGE
            assert str(wrong) in caught.value.detail
        assert trio.current_time() - began < 1


@pytest.mark.parametrize("ended", ["in order", "by a crash"])
@pytest.mark.parametrize("then", ["nothing written", "written", "restarted"])
async def test_an_lsn_that_a_restart_skipped(autojump_clock: MockClock, ended: str, then: str) -> None:
    """Between the last recovered LSN and the first new one there is no write: out of range at once."""
    node = SimNode()
    async with node.run(closes=ended == "in order") as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.DISK)
        last = table.last_lsn
    async with node.run(closes=ended == "in order") as pipeline:
        table = await pipeline.tables.find(NAME)
        if then != "nothing written":
            written = write(pipeline, table, 5).lsn
            await pipeline.flush(table, Tier.DISK)
            assert await ids(pipeline, table, wait_for_lsn=written, at_lsn=written) == [0, 1, 5]
        skipped = pipeline._unused
        assert last <= skipped.after < skipped.through
        await _check_refused(pipeline, table, [skipped.after + 1, skipped.through])
        assert pipeline.table_marks(table)[Tier.MEMORY] >= last
    if then == "restarted" and ended == "by a crash":
        # What a crash may have lost is remembered.
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            await _check_refused(pipeline, table, [skipped.after + 1, skipped.through])
            assert await ids(pipeline, table, at_lsn=last) == [0, 1]


async def _check_refused(pipeline: Pipeline, table: Table, lsns: list[int]) -> None:
    began = trio.current_time()
    for lsn in lsns:
        for name in ("wait_for_lsn", "at_lsn"):
            with pytest.raises(ArkaError, match=f"{name} {lsn} is the LSN of no write") as caught:
                await ids(pipeline, table, **{name: lsn})
            assert caught.value.code is ErrorCode.OUT_OF_RANGE
    assert trio.current_time() - began < 1


async def test_a_wait_for_an_lsn_has_a_bound(autojump_clock: MockClock) -> None:
    """An LSN that no write gets is out of range after ``limits.read_wait_s``."""
    node = SimNode(with_options(limits__read_wait_s=20.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        first = write(pipeline, table, 0).lsn
        began = trio.current_time()
        with pytest.raises(ArkaError, match="was given to no write in 20 s") as caught:
            await ids(pipeline, table, wait_for_lsn=first + 1000)
        assert caught.value.code is ErrorCode.OUT_OF_RANGE
        assert 20 <= trio.current_time() - began < 30


async def test_a_wait_for_an_lsn_ends_with_the_log(autojump_clock: MockClock) -> None:
    """A drain does not wait for a read that waits for a write."""
    node = SimNode(with_options(limits__read_wait_s=1000.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        first = write(pipeline, table, 0).lsn
        ended: list[ErrorCode] = []

        async def read() -> None:
            with pytest.raises(ArkaError) as caught:
                await ids(pipeline, table, wait_for_lsn=first + 1)
            ended.append(caught.value.code)

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                # Before the record that nobody writes any more, which has an LSN (R37).
                await trio.sleep(0.5)
                pipeline.start_drain()
        assert ended == [ErrorCode.UNAVAILABLE]


async def test_log_is_kept_for_a_read(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that a read needs are not released while it goes on, although they are committed meanwhile."""
    node = SimNode(with_options(wal__release_grace_s=0.0))
    scan = SimCatalog.scan
    seen: list[bool] = []

    async def slow_scan(self: SimCatalog, job: object, answer: Any) -> int:
        node.weather.away = False
        for number in range(20, 60):
            write(pipeline, table, number)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        await trio.sleep(100)
        seen.append(bool(node.keys_of("checkpoint")))
        return await scan(self, job, answer)  # type: ignore[arg-type]

    async with node.run() as pipeline:
        table = await create_table(pipeline)
        node.weather.away = True
        await write_all(pipeline, table, range(20))
        files = set(node.disk.list_names(WAL))
        monkeypatch.setattr(SimCatalog, "scan", slow_scan)
        assert (await ids(pipeline, table))[:20] == list(range(20))
        monkeypatch.undo()
        assert seen
        # The same without a read: they go.
        await trio.sleep(100)
        assert files - set(node.disk.list_names(WAL))


async def test_read_before_the_catalog_answers(autojump_clock: MockClock) -> None:
    """A start that finds the catalog away takes writes; a read says ``unavailable`` and may be asked again."""
    node = SimNode()
    async with node.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(2))
    node.weather.away = True
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        write(pipeline, table, 2)
        with pytest.raises(Unavailable):
            await ids(pipeline, table)
        node.weather.away = False
        assert await ids(pipeline, table) == [0, 1, 2]


async def test_frames_that_were_parked_stay_for_a_read(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came back from parking and is committed meanwhile is there until a read has copied it."""
    node = SimNode(with_options(iceberg__commit_interval_s=5))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        node.weather.away = True
        await write_all(pipeline, table, range(2, 6))
        table.stop("for a test")
        await trio.sleep(30)
        node.weather.away = False
    scan, commit = SimCatalog.scan, SimCatalog.commit
    reading = trio.Event()
    seen: list[bool] = []

    async def late_commit(self: SimCatalog, job: object) -> object:
        await reading.wait()
        return await commit(self, job)  # type: ignore[arg-type]

    async def slow_scan(self: SimCatalog, job: object, answer: Any) -> int:
        reading.set()
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        await trio.sleep(30)
        seen.append(bool(node.keys_of("parked")))
        return await scan(self, job, answer)  # type: ignore[arg-type]

    monkeypatch.setattr(SimCatalog, "commit", late_commit)
    monkeypatch.setattr(SimCatalog, "scan", slow_scan)
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert await ids(pipeline, table) == list(range(6))
        assert seen == [True]
        await trio.sleep(10)
        assert not node.keys_of("parked")


async def test_a_slow_client_does_not_keep_the_log(autojump_clock: MockClock) -> None:
    """Once its frames are copied, the log lets go of them, however long the answer takes from there on (T27)."""
    node = SimNode(with_options(wal__release_grace_s=0.0))

    class SlowAnswer(CollectedAnswer):
        async def begin(self, header: bytes, body_bytes: int) -> None:
            if not self.messages:
                node.weather.away = False
                await write_all(pipeline, table, range(20, 60), Tier.ICEBERG_COMMITTED)
                # Longer than limits.read_pin_s too.
                await trio.sleep(1000)
                gone.update(files - set(node.disk.list_names(WAL)))
            await super().begin(header, body_bytes)

    gone: set[str] = set()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        node.weather.away = True
        await write_all(pipeline, table, range(20))
        files = set(node.disk.list_names(WAL))
        node.weather.away = False
        answer = SlowAnswer()
        await read_table(pipeline, table, ReadRequest(("id",)), answer)
        assert sorted(row["id"] for row in answer.rows())[:20] == list(range(20))
        assert gone


async def test_more_than_a_read_may_copy(autojump_clock: MockClock) -> None:
    """What waits beyond ``limits.read_disk_bytes`` is ``too_large``, with what to do: which then works (T27)."""
    node = SimNode(with_options(limits__read_disk_bytes=4096, iceberg__commit_interval_s=1000))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        committed_lsn = table.committed.lsn
        await write_all(pipeline, table, range(2, 20), Tier.DISK)
        with pytest.raises(ArkaError, match=f"read_disk_bytes.*at_lsn {committed_lsn}") as caught:
            await ids(pipeline, table)
        assert caught.value.code is ErrorCode.TOO_LARGE
        assert await ids(pipeline, table, at_lsn=committed_lsn) == [0, 1]
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert await ids(pipeline, table) == list(range(20))


async def test_a_read_keeps_the_log_for_a_while_only(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that does not get its turn ends with ``unavailable``, and the log lets go of its frames (R25)."""
    node = SimNode(with_options(wal__release_grace_s=0.0))

    async def stuck(*_: object) -> int:
        await trio.sleep_forever()
        return 0

    async with node.run() as pipeline:
        table = await create_table(pipeline)
        node.weather.away = True
        await write_all(pipeline, table, range(20))
        node.weather.away = False
        files = set(node.disk.list_names(WAL))
        monkeypatch.setattr(SimCatalog, "scan", stuck)
        with pytest.raises(Unavailable, match="read_pin_s"):
            await ids(pipeline, table)
        await write_all(pipeline, table, range(20, 60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(100)
        assert files - set(node.disk.list_names(WAL))


async def test_errors_of_reads_are_told(autojump_clock: MockClock) -> None:
    """A catalog that is away is ``unavailable``, a table that others took away ``table_not_found``: no incident."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        node.weather.away = True
        with pytest.raises(Unavailable, match="cannot be read now"):
            await ids(pipeline, table)
        node.weather.away = False
        node.catalog.remove(NAME)
        with pytest.raises(ArkaError) as caught:
            await ids(pipeline, table)
        assert caught.value.code is ErrorCode.TABLE_NOT_FOUND


async def test_read_from_a_server_whose_log_was_taken_over(autojump_clock: MockClock) -> None:
    """A process that has not noticed yet finds more committed than it gave: what it took is no part of the log."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        node.weather.away = True
        await write_all(pipeline, table, range(2), Tier.DISK)
        table.committed.advance(1 << 40, snapshot_id=None)
        with pytest.raises(Unavailable, match="taken its log over"):
            await ids(pipeline, table)


async def test_read_of_a_parked_table(autojump_clock: MockClock) -> None:
    """What is parked is not read: nobody can say whether it will ever be in the table (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        node.weather.away = True
        await write_all(pipeline, table, range(2, 4))
        table.stop("for a test")
        node.weather.away = False
        assert await ids(pipeline, table) == [0, 1]


async def test_deletes_hide_rows_at_once(autojump_clock: MockClock) -> None:
    """Of a primary-key table a read shows what its writes come to, restarts and commits in between or not."""
    node = SimNode(with_options(iceberg__commit_interval_s=1000))
    async with node.run() as pipeline:
        table, _ = await pipeline.tables.create(definition_of(NAME, keyed=True))
        for number in range(4):
            write(pipeline, table, number)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        schema = table.info.key_schema()
        _, buffer = frame_buffer(pa.record_batch({"id": [1, 3], "part": [0, 0]}, schema=schema))
        pipeline.append(table, buffer, rows=2, operation=Operation.DELETE, key=b"", charge=None)
        write(pipeline, table, 3)
        write(pipeline, table, 3)
        assert sorted(await ids(pipeline, table)) == [0, 2, 3]
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert sorted(await ids(pipeline, table)) == [0, 2, 3]
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert sorted(await ids(pipeline, table)) == [0, 2, 3] == sorted(node.ids())


@pytest.mark.parametrize("key", [False, True], ids=["append-only", "primary-key"])
@pytest.mark.parametrize("waiting", [False, True], ids=["idle", "waiting"])
@pytest.mark.parametrize("undo", ["marks removed", "put back"])
async def test_a_mark_that_others_undid_names_no_lsn(
    autojump_clock: MockClock, undo: str, waiting: bool, key: bool
) -> None:
    """What this process knows to be committed is held against the catalog: before a commit finds out, and after."""
    node = SimNode(with_options(iceberg__commit_interval_s=1000))
    name = TableName("default", "k")
    schema = SCHEMA.set(0, SCHEMA.field(0).with_nullable(False))
    kind = {"table_type": TableType.PRIMARY_KEY, "key_columns": ("id",)} if key else {}
    async with node.run() as pipeline:
        table, _ = await pipeline.tables.create(TableDefinition(name, schema, **kind))  # type: ignore[arg-type]
        await write_all(pipeline, table, range(1), Tier.ICEBERG_COMMITTED)
        older = node.weather.back_up()
        await write_all(pipeline, table, range(1, 2), Tier.ICEBERG_COMMITTED)
        lsns = [older[table.info.uuid]["marks"][pipeline.log_uuid].committed_lsn, table.committed.lsn]
        if waiting:
            await write_all(pipeline, table, range(2, 3), Tier.DISK)
            lsns.append(table.last_lsn)
        assert [await ids(pipeline, table, at_lsn=lsn) for lsn in lsns] == [list(range(n)) for n in (1, 2, 3)][
            : len(lsns)
        ]
        if undo == "put back":
            node.weather.restore(older)
        else:
            node.catalog._tables[name].marks.clear()
            node.catalog._tables[name].ends.clear()
        held = node.ids(name)
        for _ in range(2):
            for asked in [{named: lsn} for lsn in lsns for named in ("at_lsn", "wait_for_lsn")] + (
                [{}] if waiting and table.state is TableState.ACTIVE else []
            ):
                with pytest.raises(ArkaError, match=r"stands at LSN .* was committed") as caught:
                    await ids(pipeline, table, **asked)
                assert caught.value.code is ErrorCode.TABLE_STOPPED
            if not waiting or table.state is TableState.STOPPED:
                assert await ids(pipeline, table) == held
            if not waiting:
                break
            table.hurry()
            await trio.sleep(20)
            assert table.state is TableState.STOPPED
    async with node.run() as pipeline:
        # Known from the disk alone.
        table = await pipeline.tables.find(name)
        for lsn in lsns:
            with pytest.raises(ArkaError, match=r"stands at LSN .* was committed"):
                await ids(pipeline, table, at_lsn=lsn)
        await trio.sleep(20)
        assert await ids(pipeline, table) == held


async def test_a_read_while_its_table_is_dropped(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files go before the catalog's answer comes: the reader hears of the drop already then."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)

        async def scan(*args):
            raise CatalogUnavailable("a file of the snapshot is gone")

        monkeypatch.setattr(pipeline.tables.catalog, "scan", scan)
        async with drop_under_way(pipeline, purge=True):
            with pytest.raises(ArkaError, match="dropped while it was read") as caught:
                await read_table(pipeline, table, ReadRequest(("id",)), CollectedAnswer())
            assert caught.value.code is ErrorCode.TABLE_NOT_FOUND
