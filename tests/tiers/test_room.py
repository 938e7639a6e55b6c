"""Room: writes wait for it, are refused after ``limits.stall_s`` without any, and everything that waits hears of it."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from arka.errors import AdmissionRejected, ArkaError
from arka.options import KIB
from arka.records import TableName, Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.tiers.room import NoRoom, Room


async def test_a_table_has_room_only_where_the_log_has() -> None:
    """What shuts the log's room shuts each table's; a table's own shuts no other."""
    log, one, two = Room("disk", 10), Room("table", table="one"), Room("table", table="two")
    one.put_below(log)
    two.put_below(log)
    one.close("one is far behind")
    assert (log.shut, one.held, two.held) == (False, True, False)
    log.close("full")
    assert (one.reason, two.reason) == ("one is far behind", "full")
    one.open()
    assert (one.held, one.reason) == (True, "full")
    log.open()
    assert not any(room.shut for room in (one, two, log))
    one.check()


async def test_refusal_comes_after_the_stall_alone(autojump_clock: MockClock) -> None:
    """The time counts from when the room was last open; newer figures do not begin it again."""
    log, table = Room("disk", 30), Room("table", table="t")
    table.put_below(log)
    log.close("full")
    for _ in range(29):
        await trio.sleep(1)
        log.close("still full")
        log.tick()
        with pytest.raises(NoRoom):
            table.check()
    await trio.sleep(1.5)
    log.tick()
    with pytest.raises(AdmissionRejected, match=r"still full; there was no room for 30 s") as caught:
        table.check()
    assert not isinstance(caught.value, NoRoom)
    log.open()
    log.close("full again")
    with pytest.raises(NoRoom):
        table.check()


async def test_listeners_hear_once_of_either_end(autojump_clock: MockClock) -> None:
    """Those that wait go on when there is room, when writes are refused, and when their table has ended."""
    told: list[str] = []
    log, table = Room("disk", 5), Room("table", table="t")
    table.put_below(log)
    for end in (log.open, log.tick, table.detach):
        log.close("full")
        table.listen(lambda: told.append("heard"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(table.wait)
            await trio.sleep(6)
            end()
        assert told.pop() == "heard"
        assert told == []
        log.open()


@pytest.mark.parametrize("size", [200, 900, 9_000])
async def test_a_small_log_takes_any_number_of_writes(size: int, autojump_clock: MockClock) -> None:
    """Writes that wait for room get it as the table commits: far more than the limit passes, in order, all once."""
    node = SimNode(with_options(limits__disk_bytes=48 * KIB))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        held = 0
        for number in range(120):
            while True:
                try:
                    write(pipeline, table, number, filler=size)
                except NoRoom as error:
                    held += 1
                    await error.room.wait()
                else:
                    break
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert held or size == 200
        assert node.ids() == list(range(120))


async def test_a_write_larger_than_the_limit_does_not_shut_the_log_for_good(autojump_clock: MockClock) -> None:
    """The one segment that holds it goes although nothing follows it: another is begun."""
    node = SimNode(with_options(limits__disk_bytes=48 * KIB))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        for number in range(3):
            write(pipeline, table, number, filler=60 * KIB)
            with pytest.raises(NoRoom):
                write(pipeline, table, 99)
            await table.room.wait()
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert node.ids() == [0, 1, 2]
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(3, 5), Tier.ICEBERG_COMMITTED)
        assert node.ids() == list(range(5))


async def test_writes_wait_for_room_of_keys(autojump_clock: MockClock) -> None:
    """With as many keys as may be, new ones wait before they are refused; writes without a key go on."""
    node = SimNode(with_options(idempotency__keys=10))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(10))
        with pytest.raises(NoRoom) as caught:
            write(pipeline, table, 10, b"new")
        before = trio.current_time()
        await caught.value.room.wait()
        assert 30 <= trio.current_time() - before <= 32
        with pytest.raises(AdmissionRejected, match=r"idempotency\.keys.*limits\.stall_s"):
            write(pipeline, table, 10, b"new")
        write(pipeline, table, 10)


async def test_a_table_that_ends_lets_its_writes_go(autojump_clock: MockClock) -> None:
    """A write that waits for room hears of the drop of its table, and not after ``limits.stall_s``."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline, TableName("default", "gone"))
        pipeline.note_held("test", 1 << 60)
        with pytest.raises(NoRoom):
            write(pipeline, table, 0)
        before = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(table.room.wait)
            await pipeline.tables.drop(table.info.name, purge=False)
        assert trio.current_time() - before < 10
        with pytest.raises(ArkaError, match="dropped"):
            write(pipeline, table, 0)
