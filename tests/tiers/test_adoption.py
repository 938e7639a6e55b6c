"""What others do to a table's schema, spec and properties is known here before it can do harm (R27)."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka._core.lsn import LsnAllocator
from arka._core.wire import FlightMessage
from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.flight.acks import AckForm
from arka.flight.exchange import Exchange
from arka.options import Limits
from arka.records import FIELD_ID_KEY, AckMessage, TableDefinition, TableInfo, TableName, TableType, Tier
from arka.storage.ports import CatalogTable, CommitJob, CommitResult
from arka.storage.threads import Job
from arka.testing.simcatalog import SimCatalog
from arka.testing.simnode import NAME, SimNode, create_table, with_options
from arka.testing.simwriters import SCHEMA, flight_messages, frame_buffer, parse_acks
from arka.tiers.admission import Ledger
from arka.tiers.memory import MemoryTier
from arka.tiers.pipeline import Pipeline
from arka.tiers.table import Table, TableState
from arka.wal.shortage import Shortage

PEOPLE = pa.schema([pa.field("id", pa.int64(), nullable=False), ("first", pa.utf8()), ("last", pa.utf8())])
Change = Callable[[pa.Schema, Callable[[], int]], pa.Schema]


class Stream:
    """A write stream without a socket."""

    def __init__(self, pipeline: Pipeline, schema: pa.Schema, **request: object) -> None:
        self.schema = schema
        self._ledger = Ledger(1 << 30)
        self._request = {"table_name": str(NAME), "requested_durability": "iceberg_committed", **request}
        self._exchange = Exchange(pipeline, Limits(), self, find=pipeline.tables.find_fresh, form=AckForm.METADATA)
        self.acks: list[AckMessage] = []

    def wake(self) -> None:
        """See ``Outbound``: acks are looked for by ``settle``."""

    async def open(self) -> Stream:
        await self._send(FlightMessage(app_metadata=msgspec.json.encode(self._request)))
        await self._send(FlightMessage(header=flight_messages(self.schema)))
        return self

    async def write(self, *rows: tuple[Any, ...], key: str = "", operation: str = "upsert") -> None:
        columns = [list(column) for column in zip(*rows, strict=True)]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, self.schema, strict=True)]
        header, buffer = frame_buffer(pa.record_batch(arrays, schema=self.schema))
        request = {"operation": operation, **({"idempotency_key": key} if key else {})}
        message = FlightMessage(
            header=header, app_metadata=msgspec.json.encode(request), buffer=buffer, body_bytes=buffer.body_bytes
        )
        message.charge = self._ledger.request(buffer.size, lambda: None)
        if not self._exchange.handle_at_once(message):
            await self._exchange.handle(message)

    async def settle(self) -> list[AckMessage]:
        """Wait for all acks; returns the last one of each write."""
        while not self._exchange.acks.settled:
            self.acks += parse_acks(self._exchange.take(1 << 20))
            await trio.sleep(0.01)
        last = {ack.sequence: ack for ack in self.acks}
        return [last[sequence] for sequence in sorted(last)]

    def close(self) -> None:
        self._exchange.close()

    async def _send(self, message: FlightMessage) -> None:
        message.charge = self._ledger.request(1, lambda: None)
        await self._exchange.handle(message)


@asynccontextmanager
async def stream(pipeline: Pipeline, schema: pa.Schema, **request: object) -> AsyncIterator[Stream]:
    made = Stream(pipeline, schema, **request)
    try:
        yield await made.open()
    finally:
        made.close()


async def make(pipeline: Pipeline, *, keyed: bool = False) -> Table:
    kind = TableType.PRIMARY_KEY if keyed else TableType.APPEND_ONLY
    made = TableDefinition(NAME, PEOPLE, kind, ("id",) if keyed else ())
    return (await pipeline.tables.create(made))[0]


def renamed(**names: str) -> Change:
    """Give columns other names."""
    return lambda schema, _: pa.schema([field.with_name(names.get(field.name, field.name)) for field in schema])


def without(*names: str) -> Change:
    return lambda schema, _: pa.schema([field for field in schema if field.name not in names])


def with_new(name: str, kind: pa.DataType, *, nullable: bool = True) -> Change:
    def change(schema: pa.Schema, new_id: Callable[[], int]) -> pa.Schema:
        return schema.append(pa.field(name, kind, nullable, {FIELD_ID_KEY: b"%d" % new_id()}))

    return change


def promoted(name: str, kind: pa.DataType) -> Change:
    return lambda schema, _: schema.set(schema.get_field_index(name), schema.field(name).with_type(kind))


def change(node: SimNode, *changes: Change) -> None:
    """Let others change the table's schema; each change is one of theirs."""
    for one in changes:
        node.catalog.foreign_schema(NAME, one)


SWAP = renamed(first="last", last="first")


@pytest.mark.parametrize("keyed", [False, True])
async def test_a_new_stream_means_the_columns_that_have_the_names_now(autojump_clock: MockClock, keyed: bool) -> None:
    """Two names that others have swapped are swapped for a stream that opens 1 s later, without a commit between."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=keyed)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F", "L"))
            await old.settle()
        change(node, SWAP)
        await trio.sleep(1.1)
        async with stream(pipeline, PEOPLE) as new:
            await new.write((2, "F", "L"))
            assert [ack.durability_level for ack in await new.settle()] == ["iceberg_committed"]
        assert node.catalog.rows(NAME).to_pylist() == [
            {"id": 1, "last": "F", "first": "L"},
            {"id": 2, "last": "L", "first": "F"},
        ]
        assert table.info.schema.names == ["id", "last", "first"]


@pytest.mark.parametrize("keyed", [False, True])
async def test_an_open_stream_goes_on_by_field_id(autojump_clock: MockClock, keyed: bool) -> None:
    """Columns that others rename, reorder and widen while a stream is open get the values that its writer meant."""
    node = SimNode()
    async with node.run() as pipeline:
        await make(pipeline, keyed=keyed)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F", "L"))
            await old.settle()
            change(node, SWAP, lambda schema, _: pa.schema([schema.field(n) for n in ("first", "id", "last")]))
            await old.write((2, "F", "L"))
            await old.settle()
            # The commit of the second write has brought the new schema: the third is bound to it.
            await old.write((3, "F", "L"), (4, None, "L"))
            assert [ack.error for ack in await old.settle()] == [None] * 3
        expected = [{"id": n, "last": "F" if n < 4 else None, "first": "L"} for n in range(1, 5)]
        assert node.catalog.rows(NAME).to_pylist() == expected


@pytest.mark.parametrize(
    "changes",
    [
        [without("last")],
        [without("last"), with_new("last", pa.utf8())],
        [renamed(last="other"), with_new("last", pa.utf8()), without("other")],
        [with_new("must", pa.int32(), nullable=False)],
    ],
    ids=["dropped", "dropped and added again", "renamed and dropped", "required column added"],
)
async def test_an_open_stream_is_refused_what_the_table_no_longer_takes(
    autojump_clock: MockClock, changes: list[Change]
) -> None:
    """A column that was dropped is ``schema_mismatch`` before the memory ack, also if its name is another's now."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F", "L"), key="k1")
            await old.settle()
            change(node, *changes)
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
            await old.write((2, "F", "L"))
            await old.write((3, "F", "L"))
            # What was accepted before is answered as it was: it is in the table.
            await old.write((1, "F", "L"), key="k1")
            assert [(ack.code, ack.duplicate) for ack in await old.settle()] == [
                (None, False),
                ("schema_mismatch", False),
                ("schema_mismatch", False),
                (None, True),
            ]
            assert sum(made.batch.num_rows for made in node.catalog._tables[NAME].changes) == 1
            assert table.state is TableState.ACTIVE


async def test_a_new_column_refuses_an_open_upsert_unless_partial(autojump_clock: MockClock) -> None:
    """An upsert replaces the whole row: without the new column it may not, unless the table says ``arka.partial``."""
    node = SimNode()
    async with node.run() as pipeline:
        await make(pipeline, keyed=True)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F", "L"))
            await old.settle()
            change(node, with_new("age", pa.int32()))
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
            await old.write((2, "F", "L"))
            await old.write((1, "F", "L"), operation="delete")
            # A property that others set takes effect for the stream that is open, too.
            node.catalog.foreign_properties(NAME, {"arka.partial": "null"})
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
            await old.write((3, "F", "L"))
            codes = [ack.code for ack in await old.settle()]
        assert codes == [None, "schema_mismatch", None, None]
        assert node.ids() == [3]


async def test_widened_types_and_new_columns_are_usable_at_once(autojump_clock: MockClock) -> None:
    """A stream that opens after others have widened a type or added a column may use both."""
    node = SimNode()
    wide = pa.schema([*PEOPLE, ("age", pa.int64())])
    async with node.run() as pipeline:
        await make(pipeline)
        change(node, with_new("age", pa.int32()))
        narrow = pa.schema([*PEOPLE, ("age", pa.int32())])
        await trio.sleep(1.1)
        async with stream(pipeline, narrow) as old:
            await old.write((1, "F", "L", 7))
            await old.settle()
            change(node, promoted("age", pa.int64()))
            await trio.sleep(1.1)
            async with stream(pipeline, wide) as new:
                await new.write((2, "F", "L", 2**40))
                await new.settle()
            await old.write((3, "F", "L", 9))
            await old.settle()
        assert node.catalog.rows(NAME)["age"].to_pylist() == [7, 2**40, 9]


async def test_the_last_adopted_schema_serves_while_the_catalog_is_unavailable(autojump_clock: MockClock) -> None:
    """A stream waits 1 s at most for the catalog; a restart without it goes on with what was adopted last (R5)."""
    node = SimNode()
    swapped = pa.schema([PEOPLE.field(name) for name in ("id", "last", "first")])
    async with node.run() as pipeline:
        table = await make(pipeline)
        change(node, SWAP)
        await trio.sleep(1.1)
        await pipeline.tables.find_fresh(NAME)
        node.weather.away = True
        node.weather.max_delay_s = 1000.0
        await trio.sleep(1.1)
        began = trio.current_time()
        async with stream(pipeline, swapped) as new:
            assert trio.current_time() - began == pytest.approx(1.0)
            await new.write((1, "L", "F"))
            # Nobody waits a second time for the same request.
            async with stream(pipeline, swapped):
                assert trio.current_time() - began == pytest.approx(1.0)
            await pipeline.flush(table, Tier.DISK)
    node.weather.max_delay_s = 0.0
    async with node.run() as pipeline:
        async with stream(pipeline, swapped) as new:
            await new.write((2, "L", "F"))
            node.weather.away = False
            await new.settle()
        assert node.catalog.rows(NAME).to_pylist() == [{"id": n, "last": "L", "first": "F"} for n in (1, 2)]


OTHER = TableName("default", "other")


@pytest.mark.parametrize("asked", [NAME, OTHER])
@pytest.mark.parametrize("keyed", [False, True])
async def test_columns_do_not_wait_for_a_disk_that_lacks_something(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, keyed: bool, asked: TableName
) -> None:
    """A table that others renamed and changed is known as it is, while the disk cannot record how far it is (R31)."""
    node = SimNode()

    def refuse(*_: object) -> None:
        raise Shortage(errno.ENOMEM, "planned")

    async with node.run() as pipeline:
        table = await make(pipeline, keyed=keyed)
        with monkeypatch.context() as patched:
            patched.setattr("arka.wal.committed.write_whole", refuse)
            async with stream(pipeline, PEOPLE) as old:
                await old.write((1, "F", "L"))
                await trio.sleep(2)
                assert node.ids() == [1]
                assert table.committed.lsn == 0
                change(node, SWAP)
                node.catalog.rename(NAME, OTHER)
                await trio.sleep(1.1)
                if asked == OTHER:
                    assert await pipeline.tables.find_fresh(OTHER) is table
                else:
                    with pytest.raises(ArkaError, match="not found"):
                        await pipeline.tables.find_fresh(NAME)
                assert table.info.name == OTHER
                assert table.info.schema.names == ["id", "last", "first"]
                # What rests on the record is not acknowledged.
                assert table.committed.lsn == 0
                await old.write((2, "F", "L"))
                patched.undo()
                acks = await old.settle()
                assert [ack.durability_level for ack in acks] == ["iceberg_committed"] * 2
        assert node.catalog.rows(OTHER).to_pylist() == [{"id": n, "last": "F", "first": "L"} for n in (1, 2)]


async def test_a_list_that_was_overtaken_while_files_were_looked_for_is_not_adopted(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a table that others renamed, a list that is older than a client's answer brings no older schema back."""
    node = SimNode()
    look_at = SimCatalog.look_at

    async def slow_look(self: SimCatalog, info: TableInfo) -> None:
        await trio.sleep(0.5)
        await look_at(self, info)

    async with node.run() as pipeline:
        table = await make(pipeline)
        await trio.sleep(1.1)
        monkeypatch.setattr(SimCatalog, "look_at", slow_look)
        node.catalog.rename(NAME, OTHER)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(ArkaError, match="not found"):
                    await pipeline.tables.find_fresh(NAME)

            nursery.start_soon(ask)
            await trio.sleep(0.1)
            node.catalog.foreign_schema(OTHER, SWAP)
            assert await pipeline.tables.find(OTHER) is table
            assert table.info.schema.names == ["id", "last", "first"]
        assert table.info.schema.names == ["id", "last", "first"]


async def test_an_answer_that_was_overtaken_is_not_adopted(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit's answer that comes after that of a later question brings no older schema back."""
    node = SimNode()
    commit = SimCatalog.commit

    async def slow_commit(self: SimCatalog, job: CommitJob) -> CommitResult:
        result = await commit(self, job)
        change(node, SWAP)
        await trio.sleep(5)
        return result

    async with node.run() as pipeline:
        table = await make(pipeline)
        monkeypatch.setattr(SimCatalog, "commit", slow_commit)
        async with stream(pipeline, PEOPLE) as old, trio.open_nursery() as nursery:
            await old.write((1, "F", "L"))
            nursery.start_soon(old.settle)
            await trio.sleep(3)
            await pipeline.tables.find_fresh(NAME)
            assert table.info.schema.names == ["id", "last", "first"]
            await trio.sleep(2.5)
            assert table.info.schema.names == ["id", "last", "first"]


async def test_a_question_that_overlaps_a_commit_is_asked_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that opens while a commit's answer comes in gets the schema of its own moment."""
    node = SimNode()
    load = SimCatalog.load_table
    loads: list[float] = []

    async def slow_load(self: SimCatalog, name: TableName) -> CatalogTable:
        loads.append(trio.current_time())
        found = await load(self, name)
        await trio.sleep(0.3)
        return found

    async with node.run() as pipeline:
        table = await make(pipeline)
        async with stream(pipeline, PEOPLE) as old:
            await trio.sleep(2)
            monkeypatch.setattr(SimCatalog, "load_table", slow_load)
            await old.write((1, "F", "L"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pipeline.tables.find_fresh, NAME)
                await trio.sleep(0.05)
                change(node, SWAP)
                await old.settle()
            assert len(loads) == 2
            assert table.info.schema.names == ["id", "last", "first"]


async def test_a_batch_that_is_decoded_in_a_thread_meanwhile(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose decoding others overtake with a change is decoded again: its frame names the right columns."""
    node = SimNode(with_options(wal__segment_bytes=32 << 20))
    decodes = 0

    async def compute(_: Job, function: Any, *args: object, abandon: bool = False) -> Any:
        nonlocal decodes
        assert abandon
        decodes += 1
        made = function(*args)
        if decodes == 1:
            change(node, SWAP)
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
        return made

    async with node.run() as pipeline:
        await make(pipeline)
        monkeypatch.setattr(Job, "run", compute)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F" * (2 << 20), "L"))
            assert [ack.error for ack in await old.settle()] == [None]
        assert decodes == 2
        (row,) = node.catalog.rows(NAME).to_pylist()
        assert (row["last"][:2], row["first"]) == ("FF", "L")


async def test_a_table_that_others_made_unusable_refuses_writes_until_it_is_mended(autojump_clock: MockClock) -> None:
    """A format or type that Arka cannot write is told before the memory ack, in words, and ends when it is mended."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline)
        async with stream(pipeline, PEOPLE) as old:
            node.catalog.unusable[NAME] = "format version 3"
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
            await old.write((1, "F", "L"))
            assert "format version 3" in str(table.reason)
            del node.catalog.unusable[NAME]
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
            assert table.reason is None
            await old.write((2, "F", "L"))
            assert [ack.code for ack in await old.settle()] == ["table_stopped", None]
        assert node.ids() == [2]


async def test_a_table_of_another_under_the_same_name_is_found(autojump_clock: MockClock) -> None:
    """A name that others gave to another table means that one for the next stream."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline)
        node.catalog.remove(NAME)
        await node.catalog.create_table(TableDefinition(NAME, PEOPLE), "00000001")
        await trio.sleep(1.1)
        other = await pipeline.tables.find_fresh(NAME)
        assert other is not table
        assert table.state is TableState.STOPPED
        with pytest.raises(ArkaError) as caught:
            table.check_active()
        assert caught.value.code is ErrorCode.TABLE_STOPPED


async def test_writes_know_how_they_were_accepted_after_a_restart(autojump_clock: MockClock) -> None:
    """The log says which schema each waiting write was accepted under, by LSN, for as long as it waits."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline)
        async with stream(pipeline, PEOPLE, requested_durability="disk") as old:
            node.weather.away = True
            await old.write((1, "F", "L"))
            await old.settle()
            first_lsn = table.last_lsn
            node.weather.away = False
            change(node, SWAP)
            pipeline.tables.adoption.adopt(table, replace(node.catalog._tables[NAME].info))
            await old.write((2, "F", "L"))
            await old.settle()
            last_lsn = table.last_lsn
            accepted = [(info.schema_id, lsn) for info, lsn in table.bindings(0, last_lsn)]
            assert [number for number, _ in accepted] == [0, 1]
            assert first_lsn <= accepted[0][1] < last_lsn == accepted[1][1]
            node.weather.away = True
    async with node.run() as pipeline:
        (table,) = pipeline.tables.all()
        assert [(info.schema_id, lsn) for info, lsn in table.bindings(0, last_lsn)] == accepted


@pytest.mark.parametrize("coalesced", [False, True])
async def test_the_last_ack_names_columns_that_were_dropped(autojump_clock: MockClock, coalesced: bool) -> None:
    """Writes that were accepted before others dropped a column are told so, and no others (R24)."""
    node = SimNode(with_options(iceberg__commit_interval_s=20.0))
    async with node.run() as pipeline:
        table = await make(pipeline)
        async with stream(pipeline, PEOPLE, acks="watermark" if coalesced else "each") as old:
            await old.write((0, "F", "L"))
            await old.settle()
            await old.write((1, "F", "L"))
            change(node, without("last"))
            await pipeline.tables.find_fresh(NAME, max_age_s=0)
            async with stream(pipeline, PEOPLE.remove(2)) as new:
                await new.write((2, "F"))
                await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
                told = [ack.dropped_columns for ack in (await old.settle())[-1:] + await new.settle()]
        assert told == [["last"], None]
        assert node.catalog.rows(NAME).to_pylist() == [{"id": n, "first": "F"} for n in range(3)]


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("arka.merge", "sometimes", "last or first"),
        ("arka.partial", "yes", "null"),
        ("arka.delete-mode", "equality", "position"),
        ("arka.unheard-of", "1", "not known"),
    ],
)
async def test_a_property_that_has_no_effect_is_told(
    autojump_clock: MockClock, name: str, value: str, word: str
) -> None:
    """A value of others that cannot take effect stands in DescribeTable's reason; the last good one holds."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=True)
        node.catalog.foreign_properties(
            NAME, {name: value, "arka.partial": "null"} if name != "arka.partial" else {name: value}
        )
        await pipeline.tables.find_fresh(NAME, max_age_s=0)
        assert name in str(table.reason)
        assert word in str(table.reason)
        assert table.info.properties.get(name) is None
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F", "L"))
            assert [ack.error for ack in await old.settle()] == [None]
        # Also after a restart.
    async with node.run() as pipeline:
        (table,) = pipeline.tables.all()
        assert word in str(table.reason)


async def test_merge_of_others_takes_effect(autojump_clock: MockClock) -> None:
    """``arka.merge`` that others set decides from then on which upsert of a key stands."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=True)
        node.catalog.foreign_properties(NAME, {"arka.merge": "first"})
        await pipeline.tables.find_fresh(NAME, max_age_s=0)
        assert table.reason is None
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "A", "L"))
            await old.write((1, "B", "L"))
            await old.settle()
        assert node.catalog.rows(NAME)["first"].to_pylist() == ["A"]


async def test_an_owner_that_others_set_is_obeyed_and_told(autojump_clock: MockClock) -> None:
    """A primary-key table that is given to another log takes no writes here, and takes them when it is given back."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=True)
        owner = table.info.properties["arka.owner"]
        async with stream(pipeline, PEOPLE) as old:
            for given in ("other 00000000-0000-0000-0000-000000000001", owner):
                node.catalog.foreign_properties(NAME, {"arka.owner": given})
                await pipeline.tables.find_fresh(NAME, max_age_s=0)
                assert ("other" in str(table.reason)) == (given != owner)
                await old.write((1, "F", "L"))
            assert [ack.code for ack in await old.settle()] == ["table_stopped", None]


async def test_a_key_that_others_change_is_refused_until_it_is_changed_back(autojump_clock: MockClock) -> None:
    """Other key columns would double rows: new writes are refused with both keys; the old key goes on."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=True)
        found = node.catalog._tables[NAME]
        async with stream(pipeline, PEOPLE) as old:
            for keys in (("first",), ("id",)):
                found.info = replace(found.info, key_columns=keys)
                await pipeline.tables.find_fresh(NAME, max_age_s=0)
                assert ("primary key" in str(table.reason)) == (keys == ("first",))
                await old.write((1, "F", "L"))
            assert [ack.code for ack in await old.settle()] == ["table_stopped", None]


@pytest.mark.parametrize("loses_disk", [False, True], ids=["restart", "node loss"])
@pytest.mark.parametrize("waits", [False, True], ids=["idle", "writes wait"])
async def test_a_key_that_others_change_is_refused_after_a_restart_too(
    waits: bool, loses_disk: bool, autojump_clock: MockClock
) -> None:
    """The log knows the key; changed back, the table takes writes, and those that waited are there once (R18, R27)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline, keyed=True)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "A", "B"))
            await old.settle()
        if waits:
            node.catalog.unreadable.add(NAME)
            async with stream(pipeline, PEOPLE) as old:
                await old.write((2, "C", "D"))
                await pipeline.flush(table, Tier.OBJECT_STORAGE)
    found = node.catalog._tables[NAME]
    kept, found.info = found.info, replace(found.info, key_columns=("first",))
    node.catalog.unreadable.clear()
    if loses_disk:
        node.lose_disk()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        await trio.sleep(60)
        assert "primary key" in str(table.reason)
        with pytest.raises(ArkaError) as caught:
            table.check_active()
        assert caught.value.code is ErrorCode.TABLE_STOPPED
        if table.ending is not None:
            assert "restart the server" in table.ending_detail
    found.info = kept
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        async with stream(pipeline, PEOPLE) as new:
            await new.write((3, "E", "F"))
            assert [ack.code for ack in await new.settle()] == [None]
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert sorted(node.catalog.rows(NAME)["id"].to_pylist()) == ([1, 2, 3] if waits else [1, 3])


async def test_a_table_type_that_others_set_has_no_effect(autojump_clock: MockClock) -> None:
    """A table keeps the type that it was made with; the reason says so."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await make(pipeline)
        found = node.catalog._tables[NAME]
        found.info = replace(found.info, table_type=TableType.PRIMARY_KEY, key_columns=("id",))
        await pipeline.tables.find_fresh(NAME, max_age_s=0)
        assert table.info.table_type is TableType.APPEND_ONLY
        assert "arka.table-type" in str(table.reason)


async def test_no_lsn_for_what_was_adopted(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no LSN can be given, commits go on with what others changed, and no table is stopped for it (R31)."""

    def refuse(*_: object, **__: object) -> int:
        raise Unavailable("All LSNs are given")

    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        known = table.info.schema_id
        with monkeypatch.context() as patch:
            patch.setattr(MemoryTier, "append_control", refuse)
            for number in range(6):
                async with stream(pipeline, SCHEMA) as opened:
                    await opened.write((number, 0, "x"))
                change(node, with_new(f"n{number}", pa.int64()))
                await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
                await trio.sleep(3)
                await pipeline.tables.find_fresh(NAME, max_age_s=0)
                assert table.info.schema_id == known + number + 1
                assert table.state is TableState.ACTIVE
        found = await pipeline.tables.find_fresh(NAME)
        assert found.info.schema_id == known + 6
        assert node.ids() == list(range(6))


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_a_stream_that_opens_while_no_lsn_can_be_given(autojump_clock: MockClock, turns: int) -> None:
    """It means the columns that the table has, and so do its writes once there are LSNs again (R27, R31)."""
    node = SimNode(with_options(iceberg__commit_interval_s=3600.0))
    async with node.run() as pipeline:
        table = await make(pipeline)
        async with stream(pipeline, PEOPLE) as old:
            await old.write((1, "F", "L"))
            memory = pipeline.memory
            allocator = memory._allocator = LsnAllocator(memory.last_lsn + 1, memory.last_lsn + 1)
            for _ in range(turns):
                change(node, SWAP)
                await trio.sleep(1.1)
                await pipeline.tables.find_fresh(NAME)
            names = table.info.schema.names
            assert names == node.catalog.rows(NAME).column_names
            async with stream(pipeline, PEOPLE) as new:
                with pytest.raises(Unavailable, match="LSNs"):
                    await new.write((2, "F", "L"))
            async with stream(pipeline, PEOPLE) as new:
                allocator.raise_ceiling(allocator.ceiling + 1_000)
                await new.write((3, "F", "L"))
            await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        first = dict(zip(names, (1, "F", "L"), strict=True))
        assert node.catalog.rows(NAME).to_pylist() == [first, {"id": 3, "first": "F", "last": "L"}]
    node.weather.away = True
    async with node.run() as pipeline:
        assert (await pipeline.tables.find(NAME)).info.schema.names == names
