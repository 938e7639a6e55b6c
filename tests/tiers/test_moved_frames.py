"""What the log still has of frames that were moved out of it is kept until it is certain that they are elsewhere."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from arka.records import Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write_some
from arka.tiers.table import TableState

from .test_apart import SETTINGS, SLOW, WELL, commit_a_part, set_apart


@pytest.mark.parametrize("loses_disk", [False, True], ids=["restart", "node loss"])
async def test_set_back_and_set_apart_again_before_it_is_read(loses_disk: bool, autojump_clock: MockClock) -> None:
    """Others set the table back, and nobody can read how far it is: it is stopped, or has all rows once."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        slow, _ = await set_apart(node, pipeline)
        before = node.weather.back_up()
        await commit_a_part(node)
    node.weather.restore({slow.info.uuid: before[slow.info.uuid]})
    if loses_disk:
        node.lose_disk()
    async with node.run() as pipeline:
        slow, well = [await pipeline.tables.find(name) for name in (SLOW, WELL)]
        await write_some(pipeline, well, range(20, 400))
        await trio.sleep(30)
        node.catalog.unreadable.discard(SLOW)
        await trio.sleep(60)
        assert node.ids(SLOW) == ([] if slow.state is TableState.STOPPED else list(range(85)))


async def test_an_object_that_goes_before_the_table_is_read(autojump_clock: MockClock) -> None:
    """The log has its frames, and lets go of them only once they are moved again."""
    node = SimNode(SETTINGS)
    async with node.run() as pipeline:
        await set_apart(node, pipeline)
    del node.store.objects[node.keys_of("behind")[0]]
    async with node.run() as pipeline:
        slow, well = [await pipeline.tables.find(name) for name in (SLOW, WELL)]
        await write_some(pipeline, well, range(20, 400))
        node.catalog.unreadable.discard(SLOW)
        await trio.sleep(60)
        assert slow.state is TableState.ACTIVE
        assert node.ids(SLOW) == list(range(85))


async def test_a_parked_object_that_goes_while_the_log_has_its_frames(autojump_clock: MockClock) -> None:
    """The table is stopped, and what it has in the log is parked again before the log lets go of it."""
    node = SimNode(with_options(wal__segment_bytes=32 * 1024))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        node.catalog.unreadable.add(NAME)
        await write_some(pipeline, table, range(40))
        await pipeline.flush(table, Tier.OBJECT_STORAGE)
        kept = node.catalog._tables.pop(NAME)
        node.catalog.unreadable.discard(NAME)
        with trio.fail_after(60):
            while len(node.keys_of("parked")) < 3:
                await trio.sleep(0.001)
    node.catalog._tables[NAME] = kept
    first = node.keys_of("parked")[0]
    del node.store.objects[first]
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await trio.sleep(60)
        assert table.state is TableState.STOPPED
        assert first.rpartition("/")[2][:16] in [key.rpartition("/")[2][:16] for key in node.keys_of("parked")]
