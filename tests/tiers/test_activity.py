"""A lost range counts against whom it can have hurt, and against nobody else (R37)."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pyarrow as pa
import pytest
import trio
from trio.testing import MockClock

from arka._core.wire import FlightMessage
from arka.errors import Unavailable
from arka.flight.acks import AckForm
from arka.flight.exchange import Exchange
from arka.options import Limits
from arka.records import LsnRange, TableName, Tier
from arka.testing.simnode import NAME, SimNode, create_table, with_options, write, write_all
from arka.testing.simwriters import SCHEMA, definition_of, flight_messages, frame_buffer
from arka.tiers import activity
from arka.tiers.activity import TableActivity
from arka.tiers.memory import MemoryTier
from arka.tiers.pipeline import Pipeline
from arka.wal.segment import Activity, encode_lost, parse_lost, parse_lost_tables

OTHER = TableName("default", "other")
KEYED = TableName("default", "keyed")
#: More than a table takes to become quiet.
PAUSE_S = 2.0


def marks(pipeline: Pipeline, table: object, lsn: int, settled_lsn: int = 0) -> set[int]:
    return set(pipeline.resume_marks(table, lsn, settled_lsn).values())  # type: ignore[arg-type]


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("crash", [False, True])
async def test_kill_of_an_idle_server(crash: bool, keyed: bool, autojump_clock: MockClock) -> None:
    """After a kill of a quiet server every handshake answers the LSN that was asked for, life after life."""
    node = SimNode()
    given: list[int] = []
    for number in range(4):
        async with node.run() as pipeline:
            table = (await pipeline.tables.create(definition_of(NAME, keyed=keyed)))[0]
            await trio.sleep(1)
            assert all(marks(pipeline, table, lsn) == {lsn} for lsn in given)
            given.append(write(pipeline, table, number).lsn)
            await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
            assert marks(pipeline, table, given[-1]) == {given[-1]}
            await trio.sleep(PAUSE_S)
        if crash:
            node.disk.crash()


async def test_no_lsn_for_a_record(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """While no LSN can be given, a table keeps its state and the server goes on (R31)."""
    node = SimNode()

    def refuse(*_: object, **__: object) -> int:
        raise Unavailable("All LSNs are given")

    async with node.run() as pipeline:
        table = await create_table(pipeline)
        write(pipeline, table, 1)
        await pipeline.flush(table, Tier.DISK)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryTier, "append_control", refuse)
            await trio.sleep(PAUSE_S)
            assert not table.quiet
        await trio.sleep(PAUSE_S)
        assert table.quiet
        written_lsn = table.writing_lsn
        with monkeypatch.context() as patch:
            patch.setattr(MemoryTier, "append_control", refuse)
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await pipeline.activity.hold(table)
        assert table.quiet
        assert not table.streams
        await pipeline.activity.hold(table)
        assert not table.quiet
        assert table.writing_lsn > written_lsn


async def test_range_counts_against_the_table_that_was_written_to(autojump_clock: MockClock) -> None:
    """Of two tables the one with lost writes is told so; the quiet one, and one created later, are not."""
    node = SimNode()
    async with node.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        await write_all(pipeline, other, range(2), Tier.ICEBERG_COMMITTED)
        safe = other.last_lsn
        await trio.sleep(PAUSE_S)
        write(pipeline, table, 2)
        await pipeline.flush(table, Tier.DISK)
        kept = table.last_lsn
        lost = write(pipeline, table, 3).lsn
    node.disk.crash()
    async with node.run() as pipeline:
        table, other = await pipeline.tables.find(NAME), await pipeline.tables.find(OTHER)
        new = await create_table(pipeline, KEYED)
        await trio.sleep(2)
        late = [write(pipeline, each, 9).lsn for each in (table, other, new)]
        for each in (table, other, new):
            await pipeline.flush(each, Tier.ICEBERG_COMMITTED)
        assert max(marks(pipeline, table, late[0])) == kept < lost
        assert marks(pipeline, other, safe) == {safe}
        assert marks(pipeline, other, late[1]) == {late[1]}
        assert marks(pipeline, new, late[2]) == {late[2]}
        # The client has sent again what it lost, and says so.
        assert marks(pipeline, table, late[0], settled_lsn=late[0] - 1) == {late[0]}
        assert max(marks(pipeline, table, late[0], settled_lsn=kept)) == kept


async def test_settled_in_another_past_of_the_log(autojump_clock: MockClock) -> None:
    """A client with LSNs above all that this log has come to settles nothing: it lived with a later state (R3, R38)."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        kept = table.last_lsn
        write(pipeline, table, 2)
    node.disk.crash()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        late = write(pipeline, table, 9).lsn
        await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
        assert marks(pipeline, table, late, settled_lsn=late - 1) == {late}
        end = pipeline.memory.last_lsn
        for lsn, settled_lsn in ((end + 1, end), (end + 2**33, end + 2**33), (late, end + 1)):
            assert max(marks(pipeline, table, lsn, settled_lsn=settled_lsn)) == kept


async def test_what_is_quiet_outlives_the_segments_that_say_so(autojump_clock: MockClock) -> None:
    """Checkpoints remember quiet tables, and against whom a range counts, when the log's records are released."""
    node = SimNode()
    async with node.run() as pipeline:
        table, other = await create_table(pipeline), await create_table(pipeline, OTHER)
        await write_all(pipeline, other, range(2), Tier.ICEBERG_COMMITTED)
        safe = other.last_lsn
        await trio.sleep(PAUSE_S)
        await pipeline.hold(table)
        lost = write(pipeline, table, 1).lsn
    node.disk.crash()
    for life in range(3):
        async with node.run() as pipeline:
            table, other = await pipeline.tables.find(NAME), await pipeline.tables.find(OTHER)
            for number in range(20 * life, 20 * life + 20):
                await write_all(pipeline, table, range(number, number + 1), Tier.ICEBERG_COMMITTED)
            await trio.sleep(60)
            assert node.keys_of("checkpoint")
            assert max(marks(pipeline, table, table.last_lsn)) < lost
            assert marks(pipeline, other, safe) == {safe}


async def test_loss_of_the_disk_counts_against_all(autojump_clock: MockClock) -> None:
    """What only a lost disk knew cannot be told from what it did not: a quiet record in the store means nothing."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        kept = table.last_lsn
        await trio.sleep(PAUSE_S)
        node.store.away = True
        await write_all(pipeline, table, range(2, 4), Tier.DISK)
        only_there = table.last_lsn
    node.store.away = False
    node.lose_disk()
    for _ in range(2):
        async with node.run() as pipeline:
            table = await pipeline.tables.find(NAME)
            late = write(pipeline, table, 9).lsn
            await pipeline.flush(table, Tier.ICEBERG_COMMITTED)
            assert kept <= max(marks(pipeline, table, late)) < only_there
            await trio.sleep(PAUSE_S)


def test_records_of_older_versions() -> None:
    """A lost range without tables counts against all, one with them against those; others are refused."""
    tables = frozenset({UUID(int=1), UUID(int=2)})
    found = LsnRange(5, 9)
    assert parse_lost_tables(encode_lost(found)) is None
    for some in (frozenset[UUID](), tables):
        payload = encode_lost(found, some)
        assert (parse_lost(payload), parse_lost_tables(payload)) == (found, some)
        with pytest.raises(ValueError, match="lost range"):
            parse_lost(payload + b"x")
    record = Activity(7, quiet=True, tables=tuple(sorted(tables)))
    assert Activity.from_bytes(record.to_bytes()) == record
    with pytest.raises(ValueError, match="activity"):
        Activity.from_bytes(record.to_bytes()[:-1])


class _Wire:
    def wake(self) -> None:
        pass


async def _write_through_a_stream(node: SimNode) -> tuple[int, int]:
    """A quiet table gets a memory-only write through a stream, and the power goes at once; returns LSN and W."""
    batch = pa.record_batch([pa.array([5]), pa.array([0], pa.int32()), pa.array(["x"])], schema=SCHEMA)
    header, buffer = frame_buffer(batch)

    class _Charge:
        def release(self) -> None:
            pass

    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.ICEBERG_COMMITTED)
        await trio.sleep(PAUSE_S)
        assert table.quiet
        exchange = Exchange(pipeline, Limits(), _Wire(), form=AckForm.METADATA, find=pipeline.tables.find)
        request = {"table_name": str(NAME), "requested_durability": "memory"}
        for message in (
            FlightMessage(app_metadata=msgspec.json.encode(request), charge=_Charge()),
            FlightMessage(header=flight_messages(SCHEMA), charge=_Charge()),
            FlightMessage(header=header, buffer=buffer, body_bytes=buffer.body_bytes, charge=_Charge()),
        ):
            await exchange.handle(message)
        assert exchange.acks.writes == 1
        lsn = table.last_lsn
        node.disk.crash()
    node.disk.crash()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        late = write(pipeline, table, 9).lsn
        await pipeline.flush(table, Tier.DISK)
        return lsn, max(marks(pipeline, table, late))


async def test_first_write_after_a_pause_is_not_called_safe(autojump_clock: MockClock) -> None:
    """The memory ack of the first write behind a pause leaves when the disk knows that the table is written to."""
    lsn, reached = await _write_through_a_stream(SimNode(with_options(wal__group_linger_s=1.0)))
    assert reached < lsn


async def test_catches_an_ack_before_writing_is_on_disk(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that does not wait for the record, or has none, is caught: W passes a lost write."""

    async def hold(self: TableActivity, table: object) -> None:
        table.streams += 1  # type: ignore[attr-defined]
        table.quiet = False  # type: ignore[attr-defined]

    monkeypatch.setattr(TableActivity, "hold", hold)
    lsn, reached = await _write_through_a_stream(SimNode(with_options(wal__group_linger_s=1.0)))
    assert reached >= lsn


async def test_catches_quiet_that_is_recorded_too_early(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that records quiet although a stream is open is caught: what that stream writes then is lost unseen."""
    is_quiet = TableActivity._is_quiet
    early = [False]

    def too_early(self: TableActivity, table: object, now: float) -> bool:
        if early[0]:
            table.quiet = False  # type: ignore[attr-defined]
            return True
        return is_quiet(self, table, now)  # type: ignore[arg-type]

    monkeypatch.setattr(TableActivity, "_is_quiet", too_early)
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await write_all(pipeline, table, range(2), Tier.DISK)
        early[0] = True
        await trio.sleep(PAUSE_S)
        early[0] = False
        table.quiet = False
        lost = write(pipeline, table, 5).lsn
        node.disk.crash()
    node.disk.crash()
    async with node.run() as pipeline:
        table = await pipeline.tables.find(NAME)
        late = write(pipeline, table, 9).lsn
        await pipeline.flush(table, Tier.DISK)
        assert max(marks(pipeline, table, late)) >= lost


async def test_open_stream_keeps_a_table_from_being_quiet(autojump_clock: MockClock) -> None:
    """As long as a stream that has written is open, its table is written to, whatever it does."""
    node = SimNode()
    async with node.run() as pipeline:
        table = await create_table(pipeline)
        await pipeline.hold(table)
        await trio.sleep(10 * activity._QUIET_S)
        assert not table.quiet
        pipeline.activity.let_go(table)
        await trio.sleep(2)
        assert table.quiet
