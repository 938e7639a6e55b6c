"""``--new-store``: a log goes on in an empty store if the old one had nothing that the disk lacks (R38)."""

from __future__ import annotations

import msgspec
import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from arka._core.framing import crc32c
from arka.errors import ArkaError, ConfigurationError, ErrorCode
from arka.records import TableName, Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.testing.simstore import SimStore
from arka.tiers import release
from arka.tiers.table import TableState

NEW = with_options(server__new_store=True)


async def _release(node: SimNode) -> None:
    """A life in which segments are released behind checkpoints, and that ends with writes on the disk only."""
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(30)
        assert node.keys_of("checkpoint")
        node.store.away = True
        await write_all(pipeline, table, range(60, 66), Tier.DISK)


async def test_log_goes_on(autojump_clock: MockClock) -> None:
    """Each write is there once, keys are known, LSNs begin above; later a lost disk comes back from the new store."""
    node = SimNode()
    await _release(node)
    last_lsn = max(int(key.rpartition("/")[2]) for key in node.store.objects if "/lsn/" in key)
    node.store = SimStore()
    with pytest.raises(ConfigurationError, match="--new-store"):
        await node.open()
    node.settings = NEW
    # The second time the flag is still there, which changes nothing.
    for number in (66, 67):
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            assert write(pipeline, table, 0, b"k0").duplicate
            assert write(pipeline, table, 65, b"k65").duplicate
            assert write(pipeline, table, number, b"k%d" % number).lsn >= last_lsn
            await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(68))
    node.settings = with_options()
    node.lose_disk()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        assert all(write(pipeline, table, number, b"k%d" % number).duplicate for number in range(68))
        await write_all(pipeline, table, range(68, 70), Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(70))


async def test_place_is_not_empty(autojump_clock: MockClock) -> None:
    """A place with anything of this node's name in it is refused, and nothing is written there."""
    node = SimNode()
    await _release(node)
    node.store = SimStore()
    node.settings = NEW
    await node.store.put_new("n/wal/0000000001/0000000000000001.wal", [b"another log's"])
    with pytest.raises(ConfigurationError, match="not empty"):
        await node.open()
    assert len(node.store.objects) == 1


async def test_copies_of_checkpoints_are_gone(autojump_clock: MockClock) -> None:
    """Keys of released segments that no copy holds were in the old store only."""
    node = SimNode()
    await _release(node)
    node.store = SimStore()
    node.settings = NEW
    copies = await node.disk.checkpoints.list_keys("n/checkpoint/")
    await node.disk.checkpoints.delete([copy.key for copy in copies])
    with pytest.raises(ConfigurationError, match="lacks copies"):
        await node.open()
    assert not node.store.objects


async def test_parked_and_set_aside_writes_are_named(autojump_clock: MockClock) -> None:
    """Writes that only the old store had are listed by LSN; their table stops there, and another one goes on.

    With its objects in the new store the table goes on too, each write once. Set-aside writes are known all the same.
    """
    node = SimNode()
    node.catalog.poison.add(1)
    other = TableName("default", "other")
    async with node.run() as pipeline:
        table, well = await create_table(pipeline), await create_table(pipeline, other)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        committed_lsn = table.committed.lsn
        taken = node.catalog._tables.pop(NAME)
        node.catalog.poison.clear()
        for number in range(3, 40):
            if table.state is TableState.ACTIVE:
                write(pipeline, table, number, b"k%d" % number)
        last_lsn = table.last_lsn
        await trio.sleep(30)
        await write_all(pipeline, well, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(30)
        assert node.keys_of("parked")
        assert node.keys_of("checkpoint")
    node.catalog._tables[NAME] = taken
    old, node.store = node.store, SimStore()
    node.settings = NEW
    with capture_logs() as logs:
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            await trio.sleep(30)
            assert table.state is TableState.STOPPED
            well = await pipeline.tables.find(other)
            await write_all(pipeline, well, range(60, 70), Tier.ICEBERG_COMMITTED)
            assert node.ids(other) == list(range(70))
    lost = [entry for entry in logs if entry["event"] == "objects.lost_with_store"]
    assert {entry["table"] for entry in lost} == {str(NAME)}
    assert committed_lsn <= lost[0]["after_lsn"] < lost[0]["through_lsn"] < lost[-1]["through_lsn"] == last_lsn
    assert f"in LSNs ({lost[0]['after_lsn']}, {last_lsn}]" in str(table.reason)
    node.settings = with_options()
    for key in old.objects:
        if "/parked/" in key:
            node.store.objects[key] = old.objects[key]
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(40, 45), Tier.ICEBERG_COMMITTED)
        assert node.ids() == [0, *range(2, 45)]
        with pytest.raises(ArkaError) as caught:
            write(pipeline, table, 1, b"k1")
        assert caught.value.code is ErrorCode.SET_ASIDE


async def test_a_checkpoint_that_names_no_objects(autojump_clock: MockClock) -> None:
    """One of an earlier version says which tables had frames elsewhere, and not which: the start refuses."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        committed_lsn = table.committed.lsn
        node.catalog._tables.pop(NAME)
        for number in range(3, 40):
            if table.state is TableState.ACTIVE:
                write(pipeline, table, number, b"k%d" % number)
        await trio.sleep(60)
        assert node.keys_of("parked")
    copies = node.disk.checkpoints.objects
    for key in [key for key in copies if "/checkpoint/" in key]:
        body = msgspec.msgpack.encode(msgspec.structs.replace(release._parse_any(key, copies[key]), held=None))
        copies[key] = crc32c(body).to_bytes(4, "little") + body
    node.store = SimStore()
    node.settings = NEW
    with pytest.raises(ConfigurationError, match=rf"parked or set apart.*{NAME}: LSNs in \({committed_lsn}, "):
        await node.open()
    assert not node.store.objects
