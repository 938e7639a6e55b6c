"""A table that is far behind is set apart: it does not hold the log, and loses nothing (R33)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from arka.errors import AdmissionRejected, ArkaError, ErrorCode, Fenced
from arka.options import KIB
from arka.records import TableName, Tier
from arka.testing.answers import CollectedAnswer
from arka.testing.simnode import SimNode, create_table, with_options, write, write_some
from arka.testing.simwriters import definition_of
from arka.tiers.epochrecords import epoch_key
from arka.tiers.parking import Parking
from arka.tiers.pipeline import Pipeline
from arka.tiers.reads import ReadRequest, read_table
from arka.tiers.room import NoRoom
from arka.tiers.table import Table, TableState

SLOW, SLOW_TOO, WELL = (TableName("default", name) for name in ("slow", "slow_too", "well"))
SETTINGS = with_options(limits__disk_bytes=512 * KIB, wal__segment_bytes=32 * KIB)
# 85 of the rows of ``write_some`` are more than half of the limit, 95 more than one table may take.


async def set_apart(node: SimNode, pipeline: Pipeline, *, keyed: bool = False) -> tuple[Table, Table]:
    """Bring a table so far behind another one that it is set apart: its writes 0 to 84, of which none is committed."""
    await pipeline.tables.create(definition_of(SLOW, keyed=keyed))
    slow = await pipeline.tables.find(SLOW)
    well = await create_table(pipeline, WELL)
    node.catalog.unreadable.add(SLOW)
    await write_some(pipeline, slow, range(85), key="s")
    await write_some(pipeline, well, range(20))
    await wait_until(lambda: slow.behind_lsn == slow.last_lsn)
    return slow, well


async def commit_a_part(node: SimNode) -> None:
    """Let the slow table commit until an object of what is set apart is deleted, and no further."""
    there = node.keys_of("behind")
    node.catalog.unreadable.discard(SLOW)
    with trio.fail_after(600):
        while node.keys_of("behind") == there:
            await trio.sleep(0.001)
    node.catalog.unreadable.add(SLOW)


async def wait_until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(600):
        while not condition():
            await trio.sleep(0.5)


@pytest.mark.parametrize("keyed", [False, True], ids=["append-only", "primary-key"])
async def test_a_slow_table_is_set_apart_and_comes_back(keyed: bool, autojump_clock: MockClock) -> None:
    """Another one writes several times the limit meanwhile; the slow one's writers are held back, and then refused."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, well = await set_apart(node, pipeline, keyed=keyed)
        assert node.keys_of("behind")
        assert not slow.backlog
        with pytest.raises(NoRoom, match="far behind"):
            write(pipeline, slow, 85)
        await write_some(pipeline, well, range(20, 600))
        await pipeline.flush(well, Tier.ICEBERG_COMMITTED)
        assert node.ids(WELL) == list(range(600))
        await wait_until(lambda: slow.room.refusing)
        with pytest.raises(AdmissionRejected, match="set apart"):
            write(pipeline, slow, 85)
        assert slow.state is TableState.ACTIVE
        node.catalog.unreadable.discard(SLOW)
        await wait_until(lambda: not slow.room.shut)
        await write_some(pipeline, slow, range(85, 95), key="s")
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == list(range(95))
        await wait_until(lambda: not node.keys_of("behind"))


async def test_a_table_that_is_set_apart_stalls_with_a_word(autojump_clock: MockClock) -> None:
    """Its log is empty then, and its writes wait all the same: whatever holds them up is said, and said again (R35)."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline)
        with capture_logs() as logs:
            await trio.sleep(130)
            assert "cannot be read" in (pipeline.stalled(slow) or "")
            node.catalog.unreadable.discard(SLOW)
            await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
            await trio.sleep(1)
            assert pipeline.stalled(slow) is None
        said = [entry["event"] for entry in logs if entry["event"].startswith("stall")]
        assert said[:2] == ["stall"] * 2
        assert said[-1] == "stall.over"


async def test_a_table_that_cannot_be_read_at_the_start(autojump_clock: MockClock) -> None:
    """Nobody knows yet how far it is: what the log has of it is set apart all the same, and committed later."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, well = await create_table(pipeline, SLOW), await create_table(pipeline, WELL)
        await write_some(pipeline, slow, range(10))
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        node.catalog.unreadable.add(SLOW)
        await write_some(pipeline, slow, range(10, 20))
    async with node.run() as pipeline:
        slow, well = [await pipeline.tables.find(name) for name in (SLOW, WELL)]
        await write_some(pipeline, slow, range(20, 25))
        await write_some(pipeline, well, range(400))
        assert not slow.taken_up
        assert node.keys_of("behind")
        node.catalog.unreadable.discard(SLOW)
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        await pipeline.flush(well, Tier.ICEBERG_COMMITTED)
        assert (node.ids(SLOW), node.ids(WELL)) == (list(range(25)), list(range(400)))


@pytest.mark.parametrize("loses_disk", [False, True], ids=["restart", "node loss"])
@pytest.mark.parametrize("keyed", [False, True], ids=["append-only", "primary-key"])
async def test_a_table_that_others_set_back_while_it_is_set_apart(
    keyed: bool, loses_disk: bool, autojump_clock: MockClock
) -> None:
    """What was committed and deleted since stands in the log alone: it is not taken for what the store still has."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline, keyed=keyed)
        before = node.weather.back_up()
        await commit_a_part(node)
        assert node.keys_of("behind")
    node.catalog.unreadable.discard(SLOW)
    after = node.weather.back_up()
    assert after[slow.info.uuid] != before[slow.info.uuid]
    node.weather.restore(before)
    if loses_disk:
        node.lose_disk()
    for _ in range(2):
        async with node.run() as pipeline:
            slow = await pipeline.tables.find(SLOW)
            with trio.fail_after(600):
                while slow.state is not TableState.STOPPED:
                    await trio.sleep(0.5)
            assert "stands at LSN 0" in slow.ending_detail
            await trio.sleep(30)
            assert node.ids(SLOW) == []
    node.weather.restore(after)
    async with node.run() as pipeline:
        slow = await pipeline.tables.find(SLOW)
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == list(range(85))


async def test_an_object_that_goes_while_the_log_still_has_its_frames(autojump_clock: MockClock) -> None:
    """The next start does not take them for what the store has; it stops the table, and goes on once it is back."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        await set_apart(node, pipeline)
    (key, *others) = node.keys_of("behind")
    assert others
    kept = node.store.objects.pop(key)
    node.catalog.unreadable.discard(SLOW)
    async with node.run() as pipeline:
        slow = await pipeline.tables.find(SLOW)
        await trio.sleep(30)
        assert slow.state is TableState.STOPPED
        assert node.ids(SLOW) == []
    node.store.objects[key] = kept
    async with node.run() as pipeline:
        slow = await pipeline.tables.find(SLOW)
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == list(range(85))


@pytest.mark.parametrize("loses_disk", [False, True], ids=["restart", "node loss"])
async def test_the_next_life_finds_what_is_set_apart(loses_disk: bool, autojump_clock: MockClock) -> None:
    """The log has let go of it; it is committed before what was accepted since, once."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, well = await set_apart(node, pipeline)
        await write_some(pipeline, well, range(20, 400))
        await pipeline.flush(well, Tier.ICEBERG_COMMITTED)
    if loses_disk:
        node.lose_disk()
    async with node.run() as pipeline:
        slow = await pipeline.tables.find(SLOW)
        await wait_until(lambda: slow.room.held)
        with pytest.raises(NoRoom):
            write(pipeline, slow, 99)
        assert write(pipeline, slow, 3, b"s3").duplicate
    async with node.run() as pipeline:
        node.catalog.unreadable.discard(SLOW)
        slow = await pipeline.tables.find(SLOW)
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == list(range(85))
        await write_some(pipeline, slow, range(85, 90))
        await pipeline.flush(slow, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == list(range(90))
        await wait_until(lambda: not node.keys_of("behind"))


async def test_few_bytes_of_slow_tables_do_not_hold_the_log(autojump_clock: MockClock) -> None:
    """What counts is what the log holds for them: two tables with a write each, now and then, beside a busy one."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, slow_too, well = [await create_table(pipeline, name) for name in (SLOW, SLOW_TOO, WELL)]
        node.catalog.unreadable.update((SLOW, SLOW_TOO))
        for number in range(40):
            write(pipeline, slow, number, filler=1)
            write(pipeline, slow_too, number, filler=1)
            await write_some(pipeline, well, range(20 * number, 20 * number + 20))
            assert not well.room.refusing
        for table in (slow, slow_too):
            assert not table.room.shut, "its own bytes are far below its share"
        node.catalog.unreadable.clear()
        for table, count in ((slow, 40), (slow_too, 40), (well, 800)):
            await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
            assert node.ids(table.info.name) == list(range(count))


async def test_a_table_that_is_wholly_set_apart_and_stands_still_says_so(autojump_clock: MockClock) -> None:
    """It has nothing in the log, and waits all the same: also in a start that cannot read it (R35)."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline)
        assert not slow.backlog
        await trio.sleep(60)
        assert "no progress" in str(pipeline.stalled(slow))
        await write_some(pipeline, await pipeline.tables.find(WELL), range(20, 300))
        await trio.sleep(30)
    async with node.run() as pipeline:
        slow = await pipeline.tables.find(SLOW)
        await trio.sleep(60)
        assert not slow.backlog
        assert "no progress" in str(pipeline.stalled(slow))


async def test_nothing_is_set_apart_while_nobody_commits(autojump_clock: MockClock) -> None:
    """A catalog that is unavailable for all is no table's trouble: writes wait for room, and then all is committed."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        one, two = [await create_table(pipeline, name) for name in (SLOW, WELL)]
        await trio.sleep(20)
        node.weather.away = True
        with trio.move_on_after(25):
            await write_some(pipeline, one, range(1000))
        with trio.move_on_after(25):
            await write_some(pipeline, two, range(1000))
        assert one.room.shut
        assert node.keys_of("behind") == []
        node.weather.away = False
        await pipeline.flush(one, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == list(range(len(node.ids(SLOW))))


async def test_reads_see_what_is_set_apart(autojump_clock: MockClock) -> None:
    """Each accepted write once: what is committed, what is set apart, what has come since (R25)."""
    node = SimNode(SETTINGS)

    async def read(table: Table) -> list[int]:
        answer = CollectedAnswer()
        await read_table(pipeline, table, ReadRequest(("id",)), answer)
        return [row["id"] for row in answer.rows()]

    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline)
        # Readable, and not committed: the catalog answers reads.
        slow_commits = pipeline.tables._tenders[slow.info.uuid]
        await slow_commits.end()
        node.catalog.unreadable.discard(SLOW)
        assert await read(slow) == list(range(85))
        assert not [name for name in node.disk.list_names(Path("/data/behind")) if name.startswith("read-")]


async def test_dropping_a_table_deletes_what_is_set_apart(autojump_clock: MockClock) -> None:
    """It is nobody's any more; a table that is made again under the name has none of it."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        await set_apart(node, pipeline)
        node.catalog.unreadable.discard(SLOW)
        await pipeline.tables.drop(SLOW, purge=False)
        await wait_until(lambda: not node.keys_of("behind"))
        table = await create_table(pipeline, SLOW)
        await write_some(pipeline, table, range(3))
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert node.ids(SLOW) == [0, 1, 2]


async def test_a_log_that_lets_go_too_early_is_caught(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Mutant: frames are counted as set apart before their object is in the store; the test above then fails."""
    real = Parking._park_slice

    async def forget_to_put(self: Parking, table: Table, piece: object) -> object:
        made = await real(self, table, piece)  # type: ignore[arg-type]
        await self._store.delete([made.key])
        return made

    monkeypatch.setattr(Parking, "_park_slice", forget_to_put)
    with capture_logs() as logs, pytest.raises(ExceptionGroup):
        await test_the_next_life_finds_what_is_set_apart(False, autojump_clock)
    assert [entry for entry in logs if entry["event"] == "table.stopped" and "found no object" in entry["reason"]]


async def test_a_read_of_what_is_dropped_meanwhile(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its objects go with the table: the reader hears of the drop, not of damage."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline)
        node.catalog.unreadable.discard(SLOW)
        await pipeline.tables._tenders[slow.info.uuid].end()
        reading, dropped, get = trio.Event(), trio.Event(), node.store.get

        async def get_late(key: str) -> bytes:
            reading.set()
            await dropped.wait()
            return await get(key)

        async def read() -> None:
            with pytest.raises(ArkaError, match="dropped while it was read") as caught:
                await read_table(pipeline, slow, ReadRequest(("id",)), CollectedAnswer())
            assert caught.value.code is ErrorCode.TABLE_NOT_FOUND

        monkeypatch.setattr(node.store, "get", get_late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await reading.wait()
            await pipeline.tables.drop(SLOW, purge=False)
            await wait_until(lambda: not node.keys_of("behind"))
            dropped.set()


def take_over(node: SimNode) -> None:
    """Another process takes the log over, commits what is set apart and deletes it; this one does not know yet."""
    node.store.objects[epoch_key("n", 1_000)] = b""
    for key in node.keys_of("behind"):
        del node.store.objects[key]


async def test_a_reader_of_a_log_that_was_taken_over_hears_of_that(autojump_clock: MockClock) -> None:
    """What is gone was committed by its new owner (R10): that is no damage."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline)
        node.catalog.unreadable.discard(SLOW)
        await pipeline.tables._tenders[slow.info.uuid].end()
        take_over(node)
        with pytest.raises(Fenced):
            await read_table(pipeline, slow, ReadRequest(("id",)), CollectedAnswer())


async def test_a_table_of_a_log_that_was_taken_over_is_not_called_damaged(autojump_clock: MockClock) -> None:
    """The process ends; its streams hear that the log has another owner, not that their table is stopped."""
    node = SimNode(SETTINGS)
    found: list[Table] = []

    async def be_superseded() -> None:
        async with node.run() as pipeline:
            found.append((await set_apart(node, pipeline))[0])
            take_over(node)
            node.catalog.unreadable.discard(SLOW)
            await trio.sleep(60)

    with capture_logs() as logs, pytest.raises(ExceptionGroup) as caught:
        await be_superseded()
    assert caught.group_contains(Fenced)
    assert found[0].state is TableState.ACTIVE
    assert not [entry for entry in logs if entry["event"] == "table.stopped"]
