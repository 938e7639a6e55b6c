"""Histories that once lost, doubled or misreported something: a node's lives one after another, as few as it takes."""

from __future__ import annotations

import contextlib
import errno
from dataclasses import replace
from functools import partial
from uuid import uuid4

import pytest
import trio
from trio.testing import MockClock

from arka.errors import ArkaError, ConfigurationError, Fenced, Unavailable
from arka.records import TableDefinition, TableName, Tier
from arka.server import _register_demo_tables
from arka.storage.ports import CatalogTable, CatalogUnavailable
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.testing.simstore import Fault, Outcome
from arka.testing.simworld import ProcessCatalog
from arka.testing.simwriters import SCHEMA
from arka.tiers.demo import demo_definitions
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState

OTHER = TableName("default", "other")


async def test_restore_after_an_object_began_before_its_predecessor(autojump_clock: MockClock) -> None:
    """An object ends below its successor's first LSN, also where a restart cuts the log anew (R11, R12)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        # The first segment is full, the second one is begun; all in the store and in Iceberg.
        for number in range(14):
            await write_all(pipeline, table, range(number, number + 1))
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        node.store.away = True
        await write_all(pipeline, table, range(14, 16), Tier.DISK)
    node.store.away = False
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        node.weather.away = True
        await pipeline.flush(table, Tier.OBJECT_STORAGE)
        await trio.sleep(60)
        assert node.keys_of("checkpoint"), "the first segment was released"
    node.weather.away = False
    node.lose_disk()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(16))


async def _late_object(node: SimNode) -> None:
    """A life that ends with its second object on the wire, not acknowledged; it lands at ``store.settle``."""
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        node.store.plan("put_new", Fault(Outcome.LATE, late_s=1e9), *[Fault(Outcome.REFUSED)] * 1000, key="/wal/")
        write(pipeline, table, 2, b"k2")
        write(pipeline, table, 3, b"k3")
        await pipeline.flush(table, Tier.DISK)
        await trio.sleep(2)
        assert pipeline.table_marks(table)[Tier.OBJECT_STORAGE] < pipeline.memory.last_lsn
    node.store.calm()


async def test_object_that_lands_after_a_restore(autojump_clock: MockClock) -> None:
    """What a lost machine's process uploads after its log was restored elsewhere is no part of the log (R10, R11)."""
    node = SimNode()
    await _late_object(node)
    node.lose_disk()
    # The new machine has restored the log; then the store is away, before its start is recorded there.
    node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 1000, key="/started/")
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(10, 12), Tier.DISK)
    node.store.calm()
    node.store.settle()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(12, 14), Tier.ICEBERG_COMMITTED)
        assert node.ids() == [0, 1, 10, 11, 12, 13]
    node.lose_disk()
    async with node.run() as pipeline:
        # The client of the lost machine resends what it was acknowledged on its disk only, as the handshake asks it to.
        table = await pipeline.tables.find(NAME)
        assert pipeline.resume_marks(table, 10)[Tier.DISK] < 5
        await write_all(pipeline, table, range(2, 4), Tier.ICEBERG_COMMITTED)
    assert sorted(node.ids()) == [0, 1, 2, 3, 10, 11, 12, 13]


async def test_start_after_an_object_landed_after_a_restore(autojump_clock: MockClock) -> None:
    """The same, and the new machine had written nothing: it is not damaged and starts again (R11)."""
    node = SimNode()
    await _late_object(node)
    node.lose_disk()
    node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 1000, key="/started/")
    await node.open()
    node.disk.kill()
    node.store.calm()
    node.store.settle()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(2, 4), Tier.ICEBERG_COMMITTED)
    assert node.ids() == [0, 1, 2, 3]


async def test_error_of_a_drop_that_a_crash_undid(autojump_clock: MockClock) -> None:
    """A write that ended with ``table_dropped`` is not in the table after a crash (protocol 3, R21)."""
    node = SimNode()
    told: list[object] = []
    opened = await node.open()
    async with trio.open_nursery() as nursery:
        pipeline = opened.pipeline
        await nursery.start(pipeline.run)
        table = await create_table(pipeline)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        node.store.away = True
        await write_all(pipeline, table, range(1), Tier.DISK)
        # What a stream does: the error goes to the client at once.
        table.listen_end(told.append)
        node.disk.cut_power_after(0)
        nursery.start_soon(pipeline.tables._drop, table, False, _Done())
        with trio.move_on_after(10):
            while not told:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    node.disk.crash()
    node.store.away = False
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert not (told and node.ids() == [0])


class _Done:
    def set(self, error: object) -> None:
        del error


async def test_late_checkpoint_of_a_fenced_process_ends_no_retention(autojump_clock: MockClock) -> None:
    """A checkpoint that lands late, of a process that was up for long, makes no successor's key old (R21)."""
    node = SimNode(with_options(idempotency__retention_s=3600.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await trio.sleep(4500)
        # One is on the wire when the machine is lost.
        late = Fault(Outcome.LATE, late_s=1e6)
        node.store.plan("put_new", late, *[Fault(Outcome.REFUSED)] * 1000, key="/checkpoint/")
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(10)
    node.store.calm()
    node.lose_disk()
    async with node.run() as pipeline:
        node.store.settle()
        assert len(node.keys_of("checkpoint")) == 1
        table = await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(100, 160), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        assert len(node.keys_of("checkpoint")) > 1
    async with node.run() as pipeline:
        table = await pipeline.tables.find(OTHER)
        assert write(pipeline, table, 100, b"k100").duplicate
        await trio.sleep(60)
        assert write(pipeline, table, 100, b"k100").duplicate


async def test_handshake_of_a_table_that_was_made_again(autojump_clock: MockClock) -> None:
    """A table made again under an old name does not vouch for the old one's writes (protocol 3.3)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        node.weather.away = True
        lsn = write(pipeline, table, 1, b"k1").lsn
        await pipeline.flush(table, Tier.OBJECT_STORAGE)
        # Its client is cut off here, with no ack for iceberg_committed.
        node.weather.away = False
        await pipeline.tables.drop(NAME, purge=False)
        again = await create_table(pipeline)
        await pipeline.flush(again, Tier.ICEBERG_COMMITTED)
        await trio.sleep(10)
        assert again.info.uuid != table.info.uuid
        assert pipeline.resume_marks(again, lsn)[Tier.ICEBERG_COMMITTED] < lsn


async def test_handshake_of_a_name_that_others_gave_away(autojump_clock: MockClock) -> None:
    """A table that took a parked one's name does not vouch for what is parked (protocol 3.3, R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        found = node.catalog._tables.pop(NAME)
        lsn = write(pipeline, table, 3, b"k3").lsn
        await trio.sleep(30)
        assert table.state is TableState.STOPPED
        assert node.keys_of("parked")
        made = await create_table(pipeline, OTHER)
        other = node.catalog._tables.pop(OTHER)
        del made, found

        other.info = replace(other.info, name=NAME, uuid=uuid4())
        node.catalog._tables[NAME] = other
        again = await pipeline.tables.find(NAME)
        await trio.sleep(10)
        assert again.info.uuid != table.info.uuid
        assert pipeline.resume_marks(again, lsn)[Tier.ICEBERG_COMMITTED] < lsn


async def test_drop_while_parked_writes_are_brought_back(autojump_clock: MockClock) -> None:
    """DropTable in the midst of bringing parked writes back does not end the process (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        found = node.catalog._tables.pop(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(30)
        assert len(node.keys_of("parked")) > 1
    node.catalog._tables[NAME] = found
    gate = trio.Event()
    node.store.plan("get", Fault(gate=gate), key="/parked/")
    async with node.run() as pipeline:
        await trio.sleep(1)
        await pipeline.tables.drop(NAME, purge=False)
        await trio.sleep(1)
        gate.set()
        await trio.sleep(1)


async def test_parked_writes_of_a_table_whose_drop_a_start_finished(autojump_clock: MockClock) -> None:
    """What was parked goes with its table also when a crash came between the drop and its end (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog._tables.pop(NAME)
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(30)
        assert node.keys_of("parked")
        node.store.plan("delete", *[Fault(Outcome.REFUSED)] * 100, key="/parked/")
        with trio.move_on_after(5):
            await pipeline.tables.drop(NAME, purge=False)
            await trio.sleep(1)
    node.store.calm()
    async with node.run():
        await trio.sleep(100)
        assert not node.keys_of("parked")


async def test_disk_that_fails_at_a_late_connect(autojump_clock: MockClock) -> None:
    """A disk that does not take the epoch is a failed disk: streams hear ``outcome_unknown`` (R6, protocol 3.4)."""
    node = SimNode()
    async with node.run() as pipeline:
        await create_table(pipeline)
        await pipeline.flush(await pipeline.tables.find(NAME), Tier.ICEBERG_COMMITTED)
    node.store.away = True
    told: list[object] = []
    with contextlib.suppress(BaseExceptionGroup):
        async with node.run() as pipeline:
            pipeline.listen_failure(lambda code, detail: told.append(code))
            await trio.sleep(10)
            node.disk.fail_next("sync", errno.EIO)
            node.store.away = False
            await trio.sleep(100)
    assert told


async def test_start_record_of_another_head(autojump_clock: MockClock) -> None:
    """A start record that landed late names the head that the process then goes on from (R11)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        # The next object is on the wire when the process is killed.
        node.store.plan("put_new", Fault(Outcome.LATE, late_s=10), *[Fault(Outcome.REFUSED)] * 1000, key="/wal/")
        write(pipeline, table, 2, b"k2")
        await pipeline.flush(table, Tier.DISK)
        await trio.sleep(1)
    node.store.calm()
    # So is the start record when the store goes away.
    node.store.plan("put_new", Fault(Outcome.LATE, late_s=15), *[Fault(Outcome.REFUSED)] * 9, key="/started/")
    gate = trio.Event()
    async with node.run() as pipeline:
        node.store.away = True
        await trio.sleep(8)
        node.store.away = False
        node.store.calm()
        node.store.plan("put_new", Fault(gate=gate), key="/started/")
        await trio.sleep(20)
        gate.set()
        table = await pipeline.tables.find(NAME)
        await write_all(pipeline, table, range(3, 5))
    node.lose_disk()
    async with node.run() as pipeline:
        await pipeline.flush(await pipeline.tables.find(NAME), Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(5))


async def test_old_disk_after_a_new_one_gave_lsns(autojump_clock: MockClock) -> None:
    """A disk goes on only if no other one gave LSNs of the log since (R13, protocol 3.1)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
    old = node.lose_disk()
    node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 1000, key="/started/")
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        given = write(pipeline, table, 2, b"k2").lsn
        await pipeline.flush(table, Tier.DISK)
    node.store.calm()
    new, node.disk = node.disk, old
    try:
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            later = write(pipeline, table, 3, b"k3").lsn
            await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    except ConfigurationError:
        return
    del new
    assert later > given


async def test_answer_to_a_drop_comes_after_its_last_record(autojump_clock: MockClock) -> None:
    """A drop is answered when a start cannot do it once more, to what a person has registered since (R5)."""
    node = SimNode(with_options(wal__release_grace_s=1e6))
    opened = await node.open()
    answered = False
    with contextlib.suppress(BaseExceptionGroup), trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            pipeline = opened.pipeline
            await nursery.start(pipeline.run)
            table = await create_table(pipeline)
            await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
            node.weather.max_delay_s = 0.5
            nursery.start_soon(_fail_after_the_record, node, pipeline, table)
            await pipeline.tables.drop(NAME, purge=False)
            answered = True
    assert not answered
    assert NAME not in node.catalog._tables


async def test_table_registered_again_after_a_drop(autojump_clock: MockClock) -> None:
    """A drop that was done is not done again to what a person registered, also if its last record was lost (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        kept = node.catalog._tables[NAME]
        node.weather.max_delay_s = 0.5
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pipeline.tables.drop, NAME, purge=False))
            while NAME in node.catalog._tables:
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
    node.disk.crash()
    node.weather.calm()
    async with node.run() as pipeline:
        await trio.sleep(0.5)
        node.catalog._tables[NAME] = kept
        with pytest.raises(ArkaError, match="restart the server to take it in"):
            await pipeline.tables.find(NAME)
    async with node.run():
        await trio.sleep(0.5)
        assert NAME in node.catalog._tables


async def _fail_after_the_record(node: SimNode, pipeline: Pipeline, table: Table) -> None:
    while table.drop_lsn is None or pipeline.table_marks(table)[Tier.DISK] < table.drop_lsn:
        await trio.sleep(0.001)
    node.disk.fail_next("write", errno.EIO)


async def test_renamed_table_and_its_successor_without_catalog(autojump_clock: MockClock) -> None:
    """Two tables of the log had one name, one after the other: the later one has it while the catalog is away (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        found = node.catalog._tables.pop(NAME)
        found.info = replace(found.info, name=OTHER)
        node.catalog._tables[OTHER] = found
        await write_all(pipeline, table, range(3, 5), Tier.ICEBERG_COMMITTED)
        assert table.info.name == OTHER
        again = await create_table(pipeline)
        assert again is not table
        await write_all(pipeline, again, range(100, 102), Tier.ICEBERG_COMMITTED)
    assert node.ids() == [100, 101]
    node.weather.away = True
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        write(pipeline, table, 102, b"k102")
        await trio.sleep(10)
        node.weather.away = False
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert node.ids() == [100, 101, 102]


async def test_table_found_while_the_catalog_is_listed(autojump_clock: MockClock) -> None:
    """A table that a client's request found while the first list was on its way is not taken for gone (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        await create_table(pipeline)
        await pipeline.flush(await pipeline.tables.find(NAME), Tier.ICEBERG_COMMITTED)
    node.weather.away = True
    async with node.run() as pipeline:
        catalog = pipeline.tables.catalog
        answer, gate, asked = catalog.list_tables, trio.Event(), trio.Event()

        async def slow() -> list[CatalogTable]:
            found = await answer()
            asked.set()
            await gate.wait()
            return found

        catalog.list_tables = slow  # type: ignore[method-assign]
        node.weather.away = False
        await asked.wait()
        # Somebody else makes a table; a client of ours writes to it.
        await catalog.create_table(TableDefinition(OTHER, SCHEMA), "12345678")
        table = await pipeline.tables.find(OTHER)
        gate.set()
        await trio.sleep(1)
        assert table.state is TableState.ACTIVE


async def test_drop_while_writes_are_parked(autojump_clock: MockClock) -> None:
    """DropTable in the midst of parking leaves nothing parked (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        node.catalog.remove(NAME)
        gate = trio.Event()
        node.store.plan("put_new", Fault(gate=gate), key="/parked/")
        await write_all(pipeline, table, range(3, 40))
        await trio.sleep(30)
        await pipeline.tables.drop(NAME, purge=False)
        await trio.sleep(10)
        gate.set()
        await trio.sleep(10)
        assert not node.keys_of("parked")


async def test_start_while_a_predecessor_deletes(autojump_clock: MockClock) -> None:
    """Objects that the last process had let go of may vanish while the next one looks at them (R12)."""
    node = SimNode()
    async with node.run() as pipeline:
        node.store.plan("delete", *[Fault(Outcome.REFUSED)] * 1000, key="/wal/")
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.ICEBERG_COMMITTED)
        await trio.sleep(60)
        through = int(node.keys_of("checkpoint")[-1].rpartition("/")[2])
    node.store.calm()
    gate = trio.Event()
    node.store.plan("get_range", Fault(gate=gate), key="/wal/")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.open)
        await trio.sleep(1)
        key = node.store.of("get_range", "/wal/")[-1].key
        assert int(key.rpartition("/")[2][:16]) < through
        # The delete of the process that was fenced, and had looked before it was.
        for old in node.keys_of("wal")[:-1]:
            if int(old.rpartition("/")[2][:16]) < through:
                del node.store.objects[old]
        gate.set()


async def test_start_with_a_demo_table_that_others_dropped(autojump_clock: MockClock) -> None:
    """A stopped table's trouble stays in the table: the server starts with ``--demo-tables`` all the same (R18)."""
    node = SimNode()
    async with node.run() as pipeline:
        await _register_demo_tables(pipeline)
        name = demo_definitions()[0].name
        await pipeline.flush(await pipeline.tables.find(name), Tier.DISK)
        await trio.sleep(1)
    node.catalog.remove(name)
    async with node.run() as pipeline:
        await _register_demo_tables(pipeline)


async def test_error_of_a_drop_that_a_node_loss_undid(autojump_clock: MockClock) -> None:
    """The same as ``test_error_of_a_drop_that_a_crash_undid``, with the node lost while store and catalog are away."""
    node = SimNode()
    told: list[object] = []
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        node.weather.away = True
        await write_all(pipeline, table, range(1))
        node.store.away = True
        table.listen_end(told.append)
        with pytest.raises(Unavailable):
            await pipeline.tables.drop(NAME, purge=False)
        still_there = NAME in node.catalog._tables
    node.weather.calm()
    node.store.away = False
    node.lose_disk()
    if still_there:
        async with node.run() as pipeline:
            await pipeline.flush(await pipeline.tables.find(NAME), Tier.ICEBERG_COMMITTED)
        assert not (told and node.ids() == [0])


async def test_node_loss_before_a_drop_is_in_the_store(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log keeps a table's frames until its drop is done or in the store: the loss of the disk undoes it (R12)."""
    node = SimNode(with_options(iceberg__commit_interval_s=3600.0))

    async def go_away(*_: object, **__: object) -> None:
        node.weather.away = True
        raise CatalogUnavailable("the catalog is away")

    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.OBJECT_STORAGE)
        with monkeypatch.context() as patched:
            patched.setattr(ProcessCatalog, "drop_table", go_away)
            node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 10_000, key="/wal/")
            with pytest.raises(Unavailable):
                await pipeline.tables.drop(NAME, purge=False)
        # Time for a checkpoint, and for what it lets go of.
        await trio.sleep(120)
    node.weather.calm()
    node.store.calm()
    node.lose_disk()
    async with node.run() as pipeline:
        await pipeline.flush(await pipeline.tables.find(NAME), Tier.ICEBERG_COMMITTED)
    assert node.ids() == list(range(60))


async def test_node_loss_after_a_drop_that_is_not_in_the_store(autojump_clock: MockClock) -> None:
    """A dropped table that the loss of the disk brings back has its keys (R12, R21)."""
    node = SimNode(with_options(iceberg__commit_interval_s=3600.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.OBJECT_STORAGE)
        first = write(pipeline, table, 0, b"k0")
        assert first.duplicate
        node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 10_000, key="/wal/")
        await pipeline.tables.drop(NAME, purge=False)
        # Time for a checkpoint, and for what it lets go of.
        await trio.sleep(120)
    node.store.calm()
    node.lose_disk()
    node.weather.away = True
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        again = write(pipeline, table, 0, b"k0")
        assert (again.lsn, again.duplicate) == (first.lsn, True)


async def test_a_drop_that_reaches_the_store_late_lets_go_of_the_log(autojump_clock: MockClock) -> None:
    """What a dropped table had in the log goes once its drop is in the store (R12)."""
    node = SimNode(with_options(iceberg__commit_interval_s=3600.0))
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(60), Tier.OBJECT_STORAGE)
        node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 10_000, key="/wal/")
        await pipeline.tables.drop(NAME, purge=False)
        await trio.sleep(120)
        assert node.keys_of("checkpoint") == []
        node.store.calm()
        await trio.sleep(120)
        assert node.keys_of("checkpoint")


async def test_drop_of_a_name_that_a_table_no_longer_has(autojump_clock: MockClock) -> None:
    """DropTable gives up no writes of a table that others renamed meanwhile: it is still there (R5)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(3), Tier.ICEBERG_COMMITTED)
        found = node.catalog._tables.pop(NAME)
        found.info = replace(found.info, name=OTHER)
        node.catalog._tables[OTHER] = found
        node.weather.max_delay_s = 1.0
        write(pipeline, table, 3, b"k3")
        await pipeline.flush(table, Tier.DISK)
        with contextlib.suppress(ArkaError):
            await pipeline.tables.drop(NAME, purge=False)
        node.weather.calm()
        await trio.sleep(30)
    async with node.run() as pipeline:
        await trio.sleep(30)
        assert OTHER not in node.catalog._tables or node.ids(OTHER) == [0, 1, 2, 3]


async def test_lsn_that_two_disks_give(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """No LSN that another disk gave is given again, whatever that disk had recorded in the store (R2).

    With small blocks, since a real one has 2**32 LSNs.
    """
    monkeypatch.setattr("arka.tiers.lease.STORE_BLOCK", 64)
    monkeypatch.setattr("arka.tiers.startup.DISK_BLOCK", 32)
    monkeypatch.setattr("arka.tiers.memory.LEFT_FOR_OUTCOMES", 0)
    node = SimNode()
    async with node.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(2), Tier.ICEBERG_COMMITTED)
    old = node.lose_disk()
    node.store.plan("put_new", *[Fault(Outcome.REFUSED)] * 1000, key="/started/")
    given = []
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        given = [write(pipeline, table, number).lsn for number in range(2, 6)]
        await pipeline.flush(table, Tier.DISK)
    node.store.calm()
    node.disk = old
    again = []
    with contextlib.suppress(ConfigurationError):
        for _ in range(3):
            async with node.run() as pipeline:
                table = await pipeline.tables.find(NAME)
                again += [write(pipeline, table, number).lsn for number in range(6, 10)]
                await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
    assert not set(given) & set(again)


async def test_takeover_while_a_start_looks_at_the_chain(autojump_clock: MockClock) -> None:
    """A process that took its epoch and froze is fenced when it wakes; what the next owner wrote is no damage (R10)."""
    node = SimNode(with_options(server__take_over=True))
    async with node.run() as pipeline:
        await write_all(pipeline, await create_table(pipeline), range(2), Tier.ICEBERG_COMMITTED)
    gate = trio.Event()

    async def freeze() -> None:
        async with node.run():
            node.store.plan("list_keys", Fault(gate=gate), key="/checkpoint/")
            node.store.away = False
            await trio.sleep_forever()

    node.store.away = True
    with pytest.RaisesGroup(Fenced, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(freeze)
            await trio.sleep(15)
            assert node.store.of("list_keys", "/checkpoint/")[-1].ended is None
            node.lose_disk()
            async with node.run() as pipeline:
                await write_all(pipeline, await pipeline.tables.find(NAME), range(2, 4), Tier.ICEBERG_COMMITTED)
            gate.set()
            await trio.sleep(30)
    assert node.ids() == list(range(4))


async def test_requests_that_outlive_the_tables(autojump_clock: MockClock) -> None:
    """A server that stops registers what a late request found, and drops nothing any more; neither is a crash (R5)."""
    node = SimNode()
    opened = await node.open()
    pipeline = opened.pipeline
    async with trio.open_nursery() as nursery:
        await nursery.start(pipeline.run)
        await create_table(pipeline)
        await create_table(pipeline, OTHER)
        nursery.cancel_scope.cancel()
    named = node.catalog._tables.pop(OTHER)
    late = TableName("default", "late")
    named.info = replace(named.info, name=late, uuid=uuid4())
    node.catalog._tables[late] = named
    found = await pipeline.tables.find(late)
    assert found.state is TableState.ACTIVE
    with pytest.raises(Unavailable, match="stopping"):
        await pipeline.tables.drop(NAME, purge=False)
    assert NAME in node.catalog._tables
