"""Salvaged writes sent to a running server: each once by its key, in order, and nothing by name alone (R5, R13)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pyarrow as pa
import pyarrow.flight as flight
import pytest
import trio
from click.testing import CliRunner
from pyiceberg.table.update.schema import UpdateSchema
from pyiceberg.types import LongType, StringType

from arka import cli
from arka._core.framing import KIND_BATCH, Frame
from arka.client.resubmit import Resubmitted, SentLog, resubmit
from arka.options import WalOptions
from arka.records import FIELD_ID_KEY, Operation, TableInfo, TableName, TableType, Tier
from arka.storage.disk import PosixDisk
from arka.testing.segmentfile import frame_buffer
from arka.testing.serverprocess import ServerProcess
from arka.wal.logstate import LogState
from arka.wal.salvage import LogReader
from arka.wal.survey import survey_log
from arka.wal.writer import WalWriter

from . import lake
from .clients import NUMBERS, Stream, action, connect, create, numbers

pytestmark = pytest.mark.process

LOG = UUID(int=77)


def table_info(client: flight.FlightClient, name: str, uuid: UUID | None = None) -> TableInfo:
    described = action(client, "DescribeTable", name=name)
    return TableInfo(
        uuid=uuid or UUID(described["table_uuid"]),
        name=TableName.parse(name),
        schema=pa.schema([field.with_metadata({FIELD_ID_KEY: b"1"}) for field in NUMBERS]),
        schema_id=0,
        # A log that holds deletes is of a table with a key.
        table_type=TableType.PRIMARY_KEY,
        key_columns=("n",),
        spec_id=0,
        partition=(),
        location="file:///elsewhere-00000000",
        properties={},
    )


def make_log(
    directory: Path, writes: list[tuple[TableInfo, str, Operation]], values: Sequence[int] | None = None
) -> Path:
    """Write a log of one-row batches; without ``values`` they are their LSNs, from 1 on."""
    disk = PosixDisk()

    async def main() -> None:
        await LogState.create(directory, disk, log_uuid=LOG, epoch=1, lsn_ceiling=1 << 20, store_ceiling=1 << 40)
        writer = await WalWriter.open(
            directory, disk, log_uuid=LOG, epoch=1, first_segment=1, options=WalOptions(segment_bytes=1 << 20)
        )
        frames = [
            Frame(
                KIND_BATCH,
                lsn,
                table=table,
                schema_id=table.schema_id,
                operation=int(operation),
                rows=1,
                payload=frame_buffer(numbers([lsn if values is None else values[lsn - 1]])),
                key=key.encode(),
                accepted_us=lsn,
            )
            for lsn, (table, key, operation) in enumerate(writes, 1)
        ]
        for at in range(0, len(frames), 100):
            await writer.append(frames[at : at + 100])
        await writer.close()

    trio.run(main)
    return directory


def send(log: Path, server: ServerProcess, **options: object) -> Resubmitted:
    disk = PosixDisk()
    reader = LogReader(survey_log(log, disk), disk)
    return resubmit(reader.writes(), server.location, durability=Tier.DISK, **options)  # type: ignore[arg-type]


def rows(server: ServerProcess, client: flight.FlightClient, name: str) -> list[int]:
    action(client, "Flush", name=name)
    found: list[int] = lake.rows(server.data, name)["n"].to_pylist()
    return sorted(found)


def run(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(cli.main, ["wal", "salvage", *map(str, arguments)])


def test_each_write_arrives_once(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """More writes than wait for acks at a time arrive once; sent again, all of them are duplicates."""
    create(client, table)
    info = table_info(client, table)
    log = make_log(tmp_path / "log", [(info, f"key-{n}", Operation.UPSERT) for n in range(700)])
    first = send(log, server)
    assert (first.acked, first.duplicates, first.refused) == (700, 0, {})
    again = send(log, server)
    assert (again.acked, again.duplicates, again.different, again.refused) == (0, 700, 0, {})
    assert rows(server, client, table) == list(range(1, 701))


def test_keyless_writes_need_a_word(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """A write without a key is sent only when that is asked for, and only above the LSN that is given."""
    create(client, table)
    info = table_info(client, table)
    log = make_log(tmp_path / "log", [(info, "" if n % 2 else f"k{n}", Operation.UPSERT) for n in range(10)])
    result = run(log, "--resubmit", server.location)
    assert result.exit_code == 0
    assert "5 writes without an idempotency key" in result.stdout
    assert rows(server, client, table) == [1, 3, 5, 7, 9]
    result = run(log, "--resubmit", server.location, "--keyless", "--above", 6, "--durability", "iceberg_committed")
    assert result.exit_code == 0
    assert "2 writes acked at iceberg_committed, 2 were there already" in result.stdout
    assert rows(server, client, table) == [1, 3, 5, 7, 8, 9, 10]


def test_tables_are_known_by_uuid(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """A table that was dropped and made again under its name gets nothing of the old one; others get theirs (R5)."""
    create(client, table)
    create(client, f"{table}_other")
    info = table_info(client, table)
    other = table_info(client, f"{table}_other")
    gone = table_info(client, table, UUID(int=5))
    nowhere = TableInfo(
        **{field: getattr(gone, field) for field in gone.__slots__}
        | {"uuid": UUID(int=6), "name": TableName("default", "nowhere")}
    )
    log = make_log(
        tmp_path / "log",
        [(each, f"k{n}", Operation.UPSERT) for n, each in enumerate([gone, other, gone, nowhere, info])],
    )
    result = run(log, "--resubmit", server.location)
    assert result.exit_code == 1
    assert f"2 writes: default.{table} is another table on the server" in result.stderr
    assert "1 writes: default.nowhere" in result.stderr
    assert "2 writes acked at disk" in result.stdout
    assert rows(server, client, table) == [5]
    assert rows(server, client, f"{table}_other") == [2]


def test_what_the_tables_own_mark_covers(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """A write that the mark of its log covers is left out, unless it was set aside: no table holds it (R32, R38)."""
    create(client, table)
    with lake.open_catalog(server.data) as catalog:
        marks = {f"arka.{LOG}.committed-lsn": "6", f"arka.{LOG}.epoch": "1"}
        catalog.load_table(("default", table)).transaction().set_properties(marks).commit_transaction()
    info = table_info(client, table)
    directory = make_log(tmp_path / "log", [(info, "", Operation.UPSERT) for _ in range(8)])
    disk = PosixDisk()
    writes = LogReader(survey_log(directory, disk), disk).writes()
    log = SentLog(LOG, 1, frozenset({(info.uuid, 4), (UUID(int=5), 2)}))
    sent = resubmit(writes, server.location, durability=Tier.DISK, keyless=True, log=log)
    assert (sent.acked, sent.committed, sent.refused) == (3, 5, {})
    assert rows(server, client, table) == [4, 7, 8]


def test_refusals_are_counted_with_their_reason(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """A delete is sent as one, and what the server does not take is counted with what it said."""
    create(client, table)
    info = table_info(client, table)
    operations = [Operation.UPSERT, Operation.DELETE, Operation.UPSERT]
    log = make_log(tmp_path / "log", [(info, f"k{n}", operation) for n, operation in enumerate(operations)])
    sent = send(log, server)
    assert not sent.complete
    (reason,) = [reason for reason in sent.refused if "delete" in reason]
    assert sent.acked + sum(sent.refused.values()) == 3
    assert "append-only" in reason
    assert set(rows(server, client, table)) <= {1, 3}


def test_deletes_arrive_in_their_order(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """Upserts and deletes of a primary-key table come to what they came to in the log."""
    create(client, table, [("n", "int64!")], table_type="primary_key", primary_key="n")
    info = table_info(client, table)
    steps = [(Operation.UPSERT, 1), (Operation.UPSERT, 2), (Operation.DELETE, 1), (Operation.DELETE, 2)]
    steps += [(Operation.UPSERT, 2), (Operation.UPSERT, 3), (Operation.DELETE, 9)]
    writes = [(info, f"k{number}", operation) for number, (operation, _) in enumerate(steps)]
    log = make_log(tmp_path / "log", writes, [value for _, value in steps])
    assert (send(log, server).acked, rows(server, client, table)) == (7, [2, 3])
    assert (send(log, server).duplicates, rows(server, client, table)) == (7, [2, 3])


def test_schema_that_the_server_does_not_take(
    server: ServerProcess, client: flight.FlightClient, table: str, tmp_path: Path
) -> None:
    """Where a table's columns do not fit any more, all of its writes are refused with the server's reason."""
    create(client, table, [("m", "int64!")])
    # Another column than the one that the table requires now, whatever the names.
    info = replace(
        table_info(client, table), schema=pa.schema([pa.field("n", pa.int64(), metadata={FIELD_ID_KEY: b"9"})])
    )
    log = make_log(tmp_path / "log", [(info, f"k{n}", Operation.UPSERT) for n in range(300)])
    sent = send(log, server)
    assert sent.acked == 0
    assert sum(sent.refused.values()) == 300
    assert any("'m'" in reason for reason in sent.refused)


Change = Callable[[UpdateSchema], object]
TWO: list[tuple[str, str]] = [("n", "int64!"), ("v", "utf8")]


#: By table: what others do to its schema, the row that is expected then, and the columns whose values are left out.
CHANGES: dict[str, tuple[Change, dict[str, object], list[str]]] = {
    "renamed": (lambda u: u.rename_column("v", "w"), {"n": 1, "w": "a"}, []),
    "key_renamed": (lambda u: u.rename_column("n", "m"), {"m": 1, "v": "a"}, []),
    "moved": (lambda u: u.move_first("v"), {"n": 1, "v": "a"}, []),
    "added": (lambda u: u.add_column("w", StringType()), {"n": 1, "v": "a", "w": None}, []),
    "dropped": (lambda u: u.delete_column("v"), {"n": 1}, ["v"]),
    "renamed_and_added": (
        lambda u: u.rename_column("v", "w").add_column("x", LongType()),
        {"n": 1, "w": "a", "x": None},
        [],
    ),
    "widened": (lambda u: u.update_column("i", LongType()), {"n": 1, "v": "a", "i": 7}, []),
}


@pytest.mark.parametrize("kind", ["append-only", "primary-key"])
def test_columns_that_others_changed_since(
    make_server: Callable[..., ServerProcess], tmp_path: Path, kind: str
) -> None:
    """Salvaged values go to the columns that they were written to, whatever these are called now (R24, R38)."""
    server = make_server().start()
    keyed = {"table_type": "primary_key", "primary_key": "n"} if kind == "primary-key" else {}
    with connect(server.location) as client:
        for table, (_, expected, _) in CHANGES.items():
            create(client, table, [*TWO, ("i", "int32")] if "i" in expected else TWO, **keyed)
            columns = {"n": pa.array([1], pa.int64()), "v": pa.array(["a"])}
            if "i" in expected:
                columns["i"] = pa.array([7], pa.int32())
            schema = pa.schema([pa.field(name, values.type, name != "n") for name, values in columns.items()])
            stream = Stream(client, table, schema, requested_durability="disk")
            stream.write(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema), idempotency_key="k")
            stream.finish()
    server.kill()
    shutil.copytree(server.data / "wal", tmp_path / "log")
    result = CliRunner().invoke(cli.main, ["wal", "salvage", str(server.data), "--discard", "--yes"])
    assert result.exit_code == 0, result.output
    # The log's own mark would say that it is there, had the commit been faster than the kill.
    already = set()
    with lake.open_catalog(server.data) as catalog:
        for table, (change, _, _) in CHANGES.items():
            with catalog.load_table(("default", table)).update_schema() as update:
                change(update)
            if lake.rows(server.data, table).num_rows:
                already.add(table)
    server.start()
    with connect(server.location) as client:
        result = run(tmp_path / "log", "--resubmit", server.location)
        assert result.exit_code == 0, result.output
        for table, (_, expected, dropped) in CHANGES.items():
            for column in dropped if table not in already else ():
                assert f"default.{table}: {column}" in result.stdout
            action(client, "Flush", name=table)
            assert lake.rows(server.data, table).to_pylist() == [expected]
    server.stop()


@pytest.mark.slow
def test_a_log_that_the_rest_does_not_know(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """After everything but the log was set back, the log's writes are sent again: what was there stays single."""
    server = make_server()
    server.start()
    with connect(server.location) as client:
        create(client, "t")
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        for number in range(5):
            stream.write(numbers([number]), idempotency_key=f"k{number}")
        stream.finish()
    server.stop()
    shutil.copytree(server.data, tmp_path / "older")
    server.start()
    with connect(server.location) as client:
        stream = Stream(client, "t", requested_durability="disk")
        for number in range(5, 10):
            stream.write(numbers([number]), idempotency_key=f"k{number}")
        stream.finish()
    server.kill()
    shutil.copytree(server.data / "wal", tmp_path / "log")
    shutil.rmtree(server.data)
    shutil.copytree(tmp_path / "older", server.data)
    server.start()
    with connect(server.location) as client:
        result = run(tmp_path / "log", "--to", tmp_path / "out", "--resubmit", server.location)
        assert result.exit_code == 0, result.output
        assert "5 writes acked at disk, 0 were there already" in result.stdout
        assert "left out: 5 writes that their table's own mark says are in it" in result.stdout
        assert rows(server, client, "t") == list(range(10))
    report = json.loads((tmp_path / "out" / "salvage.json").read_text())
    assert report["tables"][0]["writes"] == 10
    server.stop()


def test_server_that_goes_away(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Writes whose ack does not come because the server died are counted as refused, not as sent."""
    server = make_server()
    server.start()
    with connect(server.location) as client:
        create(client, "t")
        log = make_log(tmp_path / "log", [(table_info(client, "t"), f"k{n}", Operation.UPSERT) for n in range(600)])
    disk = PosixDisk()

    def writes():  # type: ignore[no-untyped-def]
        for write in LogReader(survey_log(log, disk), disk).writes():
            if write.lsn == 400:
                server.kill()
            yield write

    sent = resubmit(writes(), server.location, durability=Tier.DISK)
    assert not sent.complete
    assert sent.acked + sum(sent.refused.values()) == 600
    assert sent.acked < 400
