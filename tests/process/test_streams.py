"""Write streams through stock pyarrow: every ack exactly once, in order, whenever the client reads them."""

from __future__ import annotations

import json
import threading
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.testing.ipcstreams import write_stream
from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import (
    CALL_TIMEOUT_S,
    NUMBERS,
    TIERS,
    RawStream,
    Stream,
    action,
    check_order,
    connect,
    create,
    flight_data,
    numbers,
    tiers_to,
    write_all,
)

pytestmark = pytest.mark.process


@pytest.mark.parametrize("requested", TIERS)
def test_lock_step(client: flight.FlightClient, table: str, requested: str) -> None:
    """A client that writes, waits for each tier's ack and only then writes again gets each ack, in order."""
    create(client, table)
    stream = Stream(client, table, requested_durability=requested)
    acks = []
    for number in range(8):
        stream.write(numbers([number]))
        step = stream.acks(len(tiers_to(requested)))
        assert [(ack["sequence"], ack["durability_level"]) for ack in step] == [
            (number, tier) for tier in tiers_to(requested)
        ]
        acks += step
    assert stream.finish() == []
    check_order(acks, requested, 8)
    assert {ack["rows"] for ack in acks} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("requested", ["disk", "iceberg_committed"])
def test_write_everything_before_reading(
    server: ServerProcess, client: flight.FlightClient, table: str, requested: str
) -> None:
    """A client that sends 100,000 one-row batches before it reads anything gets every ack once, in order."""
    create(client, table)
    stream = Stream(client, table, timeout_s=200, requested_durability=requested)
    batch = numbers([7])
    for _ in range(100_000):
        stream.write(batch)
    check_order(stream.finish(), requested, 100_000)
    action(client, "Flush", name=table)
    assert lake.rows(server.data, table).num_rows == 100_000


def test_reading_in_a_second_thread(client: flight.FlightClient, table: str) -> None:
    """Acks come while the client still writes, without a half-close."""
    create(client, table)
    stream = Stream(client, table, requested_durability="iceberg_committed")
    found: list[dict[str, Any]] = []
    reading = threading.Thread(target=lambda: found.extend(stream.acks(4 * 500)))
    reading.start()
    for number in range(500):
        stream.write(numbers([number]))
    reading.join(CALL_TIMEOUT_S)
    check_order(found, "iceberg_committed", 500)
    assert stream.finish() == []


def test_watermark_acks(client: flight.FlightClient, table: str) -> None:
    """With ``acks: watermark`` each tier's acks rise to the last write, and none comes more often than needed."""
    create(client, table)
    stream = Stream(client, table, acks="watermark", requested_durability="iceberg_committed")
    for number in range(2_000):
        stream.write(numbers([number]))
    acks = stream.finish()
    for tier in TIERS:
        sequences = [ack["sequence"] for ack in acks if ack["durability_level"] == tier]
        assert sequences == sorted(set(sequences))
        assert sequences[-1] == 1_999
    assert {ack["error"] for ack in acks} == {None}
    assert len([ack for ack in acks if ack["durability_level"] == "iceberg_committed"]) < 2_000


def test_watermark_gives_rejections_and_duplicates_their_own(client: flight.FlightClient, table: str) -> None:
    """In watermark mode a rejection and a duplicate still get acks of their own."""
    create(client, table)
    stream = Stream(client, table, None, acks="watermark")
    stream.writer.begin(pa.schema([pa.field("n", pa.int64())]))
    good = pa.record_batch([pa.array([1], pa.int64())], ["n"])
    bad = pa.record_batch([pa.array([None], pa.int64())], ["n"])
    stream.write(good, idempotency_key="k")
    stream.write(bad)
    stream.write(good, idempotency_key="k")
    stream.write(good)
    acks = stream.finish()
    (rejection,) = [ack for ack in acks if ack["error"] is not None]
    assert (rejection["sequence"], rejection["code"]) == (1, "invalid_batch")
    duplicates = [ack for ack in acks if ack.get("duplicate")]
    assert [(ack["sequence"], ack["durability_level"]) for ack in duplicates] == [(2, "memory"), (2, "disk")]
    assert max(ack["sequence"] for ack in acks if ack["durability_level"] == "disk") == 3


def test_acks_as_batches(client: flight.FlightClient, table: str) -> None:
    """With ``ack_as: batch`` a reader that wants a schema and batches gets an empty schema and zero-row batches."""
    create(client, table)
    stream = Stream(client, table, ack_as="batch", requested_durability="iceberg_committed")
    for number in range(3):
        stream.write(numbers([number]))
    stream.writer.done_writing()
    acks = []
    for chunk in stream.reader:
        assert chunk.data is not None
        assert chunk.data.num_rows == 0
        acks.append(json.loads(chunk.app_metadata.to_pybytes()))
    assert stream.reader.schema == pa.schema([])
    stream.writer.close()
    check_order(acks, "iceberg_committed", 3)


def test_do_put(client: flight.FlightClient, table: str) -> None:
    """DoPut is the same write path: acks come as PutResults, rejections among them."""
    create(client, table)
    options = flight.FlightCallOptions(timeout=CALL_TIMEOUT_S)
    writer, reader = client.do_put(flight.FlightDescriptor.for_path(table), NUMBERS, options)
    writer.write_batch(numbers([1]))
    first = [json.loads(reader.read().to_pybytes()) for _ in range(2)]
    writer.write_with_metadata(numbers([2]), b'{"requested_durability": "iceberg_committed"}')
    writer.write_with_metadata(numbers([3]), b'{"requested_durability": "tomorrow"}')
    writer.done_writing()
    rest = []
    while (buffer := reader.read()) is not None:
        rest.append(json.loads(buffer.to_pybytes()))
    writer.close()
    assert [(ack["sequence"], ack["durability_level"]) for ack in first] == [(0, "memory"), (0, "disk")]
    assert [ack["durability_level"] for ack in rest if ack["sequence"] == 1] == list(TIERS)
    (rejection,) = [ack for ack in rest if ack["sequence"] == 2]
    assert (rejection["code"], rejection["lsn"]) == ("invalid_request", 0)
    assert "memory, disk, object_storage, iceberg_committed" in rejection["error"]


def test_idempotency_keys(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A known key adds nothing: the acks carry the first LSN and ``duplicate``; another payload is ``key_reused``."""
    create(client, table)
    stream = Stream(client, table, requested_durability="disk")
    stream.write(numbers([1]), idempotency_key="once")
    stream.write(numbers([1]), idempotency_key="once")
    stream.write(numbers([2]), idempotency_key="once")
    stream.write(numbers([3]), idempotency_key="other")
    acks = stream.finish()
    by_sequence = {n: [ack for ack in acks if ack["sequence"] == n] for n in range(4)}
    assert [ack["durability_level"] for n in range(4) for ack in by_sequence[n]] == ["memory", "disk"] * 4
    lsn = by_sequence[0][0]["lsn"]
    assert {ack["lsn"] for n in range(3) for ack in by_sequence[n]} == {lsn}
    assert [[ack.get("duplicate", False) for ack in by_sequence[n]] for n in range(4)] == [
        [False, False],
        [True, True],
        [True, True],
        [False, False],
    ]
    assert [[ack.get("code") for ack in by_sequence[n]] for n in (1, 2)] == [[None] * 2, ["key_reused"] * 2]
    again = Stream(client, table, requested_durability="iceberg_committed")
    again.write(numbers([1]), idempotency_key="once")
    assert [(ack["durability_level"], ack["lsn"], ack["duplicate"]) for ack in again.finish()] == [
        (tier, lsn, True) for tier in TIERS
    ]
    action(client, "Flush", name=table)
    assert sorted(lake.rows(server.data, table)["n"].to_pylist()) == [1, 3]


def test_keys_are_unique_per_table(client: flight.FlightClient, table: str) -> None:
    """The same key on another table is another write."""
    for name in (table, f"{table}_other"):
        create(client, name)
        stream = Stream(client, name, requested_durability="memory")
        stream.write(numbers([1]), idempotency_key="k")
        (ack,) = stream.finish()
        assert "duplicate" not in ack


def test_stream_key_numbers_every_batch(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A stream's key gives the n-th batch ``KEY#n``, counting rejected and overridden batches too."""
    create(client, table)
    schema = pa.schema([pa.field("n", pa.int64())])

    def batch(value: int | None) -> pa.RecordBatch:
        return pa.record_batch([pa.array([value], pa.int64())], schema=schema)

    stream = Stream(client, table, schema, idempotency_key="load", key_start=5)
    stream.write(batch(5))
    stream.write(batch(None))
    stream.write(batch(7), idempotency_key="own")
    stream.write(batch(8))
    stream.finish()
    probe = Stream(client, table, schema, requested_durability="memory")
    for value, key in ((5, "load#5"), (6, "load#6"), (70, "load#7"), (7, "own"), (8, "load#8")):
        probe.write(batch(value), idempotency_key=key)
    assert [ack.get("duplicate", False) for ack in probe.finish()] == [True, False, False, True, True]
    action(client, "Flush", name=table)
    assert sorted(lake.rows(server.data, table)["n"].to_pylist()) == [5, 6, 7, 8, 70]


def test_rejection_in_the_middle(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A rejected write gets one error ack in its turn, with LSN 0; the writes around it are untouched."""
    create(client, table)
    schema = pa.schema([pa.field("n", pa.int64())])
    stream = Stream(client, table, schema, requested_durability="iceberg_committed")
    for value in (1, None, 3):
        stream.write(pa.record_batch([pa.array([value], pa.int64())], schema=schema))
    acks = stream.finish()
    memory = [ack for ack in acks if ack["durability_level"] == "memory"]
    assert [ack["sequence"] for ack in memory] == [0, 1, 2]
    assert [(ack["lsn"] == 0, ack["error"] is None) for ack in memory] == [(False, True), (True, False), (False, True)]
    assert memory[1]["code"] == "invalid_batch"
    assert "'n'" in memory[1]["error"]
    for tier in TIERS[1:]:
        assert [ack["sequence"] for ack in acks if ack["durability_level"] == tier] == [0, 2]
    assert sorted(lake.rows(server.data, table)["n"].to_pylist()) == [1, 3]


def test_zero_row_batch_is_a_write(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A batch without rows has an LSN and all its acks."""
    create(client, table)
    stream = Stream(client, table, requested_durability="iceberg_committed")
    stream.write(numbers([]))
    stream.write(numbers([1]))
    stream.write(numbers([]))
    acks = stream.finish()
    check_order(acks, "iceberg_committed", 3)
    assert [ack["rows"] for ack in acks if ack["durability_level"] == "memory"] == [0, 1, 0]
    assert lake.rows(server.data, table)["n"].to_pylist() == [1]


def test_only_zero_row_batches(client: flight.FlightClient, table: str) -> None:
    """Nothing but batches without rows reaches the last tier as well."""
    create(client, table)
    write_all(client, table, [numbers([])])
    write_all(client, table, [numbers([])])


def test_streams_on_one_table(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """Streams of several clients on one table each get their own acks, and no LSN is given twice."""
    create(client, table)
    found = _write_at_once(server, {f"{table}:{n}": table for n in range(4)})
    assert len({lsn for lsns in found.values() for lsn in lsns}) == 4 * 200
    assert sorted(lake.rows(server.data, table)["n"].to_pylist()) == sorted(list(range(200)) * 4)


def test_streams_on_several_tables(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """Streams on several tables do not mix: each table has its rows, all tables share one LSN order."""
    names = [f"{table}_{n}" for n in range(4)]
    for name in names:
        create(client, name)
    found = _write_at_once(server, dict(zip(names, names, strict=True)))
    assert len({lsn for lsns in found.values() for lsn in lsns}) == 4 * 200
    for name in names:
        assert sorted(lake.rows(server.data, name)["n"].to_pylist()) == list(range(200))


def _write_at_once(server: ServerProcess, streams: dict[str, str]) -> dict[str, list[int]]:
    """Write 200 batches on each stream, from a client and a thread each; returns the LSNs."""
    found: dict[str, list[int]] = {}

    def run(stream: str, table: str) -> None:
        with connect(server.location) as own:
            acks = write_all(own, table, [numbers([n]) for n in range(200)])
            found[stream] = check_order(acks, "iceberg_committed", 200)

    threads = [threading.Thread(target=run, args=item) for item in streams.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CALL_TIMEOUT_S)
    assert found.keys() == streams.keys()
    return found


def test_streams_of_one_client(client: flight.FlightClient, table: str) -> None:
    """Streams that share a connection are served side by side."""
    create(client, table)
    streams = [Stream(client, table, requested_durability="disk") for _ in range(20)]
    for _ in range(3):
        for stream in streams:
            stream.write(numbers([1]))
        for stream in reversed(streams):
            assert [ack["durability_level"] for ack in stream.acks(2)] == ["memory", "disk"]
    for stream in streams:
        assert stream.finish() == []


def test_resume_handshake(client: flight.FlightClient, table: str) -> None:
    """``resume_after_lsn`` is answered with one ack per tier, sequence -1, no higher than what was asked for."""
    create(client, table)
    acks = write_all(client, table, [numbers([n]) for n in range(5)])
    last = max(ack["lsn"] for ack in acks)
    stream = Stream(client, table, None, resume_after_lsn=last)
    handshake = stream.acks(4)
    assert [(ack["durability_level"], ack["sequence"]) for ack in handshake] == [(tier, -1) for tier in TIERS]
    assert [ack["lsn"] for ack in handshake] == [last] * 4
    stream.writer.begin(NUMBERS)
    stream.write(numbers([6]))
    assert [ack["sequence"] for ack in stream.acks(2)] == [0, 0]
    assert stream.finish() == []
    below = Stream(client, table, None, resume_after_lsn=last - 2)
    assert [ack["lsn"] for ack in below.acks(4)] == [last - 2] * 4
    below.writer.begin(NUMBERS)
    below.finish()


def test_resume_with_a_stream_key_needs_its_start(client: flight.FlightClient, table: str) -> None:
    """A resuming stream with a key says which batch comes next: the server does not guess."""
    create(client, table)
    stream = Stream(client, table, None, resume_after_lsn=1, idempotency_key="k")
    assert "[invalid_request]" in (message := stream.failure())
    assert "key_start" in message


def test_resume_continues_keys(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """A client that sends again with the same keys after a lost connection doubles nothing."""
    create(client, table)
    first = Stream(client, table, idempotency_key="job")
    for number in range(3):
        first.write(numbers([number]))
    acks = first.acks(6)
    first.reader.cancel()
    lsn = max(ack["lsn"] for ack in acks)
    second = Stream(client, table, idempotency_key="job", key_start=1, resume_after_lsn=lsn)
    for number in range(1, 5):
        second.write(numbers([number]))
    acks = [ack for ack in second.finish() if ack["sequence"] >= 0 and ack["durability_level"] == "disk"]
    assert [ack.get("duplicate", False) for ack in acks] == [True, True, False, False]
    action(client, "Flush", name=table)
    assert sorted(lake.rows(server.data, table)["n"].to_pylist()) == [0, 1, 2, 3, 4]


def test_request_after_the_schema(client: flight.FlightClient, table: str) -> None:
    """A metadata-only message sets the defaults of the batches that follow it, also in the middle of a stream."""
    create(client, table)
    stream = Stream(client, table)
    stream.write(numbers([1]))
    assert [ack["durability_level"] for ack in stream.acks(2)] == ["memory", "disk"]
    stream.request(requested_durability="memory")
    stream.write(numbers([2]))
    stream.write(numbers([3]), requested_durability="object_storage")
    stream.write(numbers([4]))
    acks = stream.finish()
    assert {n: [ack["durability_level"] for ack in acks if ack["sequence"] == n] for n in (1, 2, 3)} == {
        1: ["memory"],
        2: ["memory", "disk", "object_storage"],
        3: ["memory"],
    }


def test_request_with_a_batch_overrides_for_that_batch(client: flight.FlightClient, table: str) -> None:
    """A WriteRequest on a batch holds for that batch alone; words are read whatever their case."""
    create(client, table)
    stream = Stream(client, table, requested_durability="MEMORY", acks="Each", future_field=[1])
    stream.write(numbers([1]))
    stream.write(numbers([2]), requested_durability="Object_Storage")
    stream.write(numbers([3]))
    acks = stream.finish()
    assert [len([ack for ack in acks if ack["sequence"] == n]) for n in range(3)] == [1, 3, 1]


def test_table_name_in_the_request(client: flight.FlightClient, table: str) -> None:
    """``table_name`` names the stream's table in place of the descriptor, but never another one per batch."""
    create(client, table)
    create(client, f"{table}_b")
    stream = Stream(client, table, table_name=f"{table}_b", requested_durability="iceberg_committed")
    stream.write(numbers([1]), table_name=f"default.{table}_b")
    stream.write(numbers([2]), table_name=table)
    acks = stream.finish()
    assert [ack["error"] is None for ack in acks if ack["durability_level"] == "memory"] == [True, False]
    assert _rows_of(client, f"{table}_b") == [1]
    assert _rows_of(client, table) == []


def _rows_of(client: flight.FlightClient, name: str) -> list[int]:
    found: list[int] = client.do_get(flight.Ticket(name.encode())).read_all()["n"].to_pylist()
    return found


T18_CASES = {
    "on the schema": ({"requested_durability": "object_storage"}, None, ["memory", "disk", "object_storage"]),
    "repeated on the batch": ({"requested_durability": "memory"}, {"requested_durability": "memory"}, ["memory"]),
    "other on the batch": ({"requested_durability": "object_storage"}, {"requested_durability": "memory"}, ["memory"]),
}


@pytest.mark.parametrize("case", T18_CASES)
def test_request_on_the_schema_message(
    server: ServerProcess, client: flight.FlightClient, table: str, case: str
) -> None:
    """On a schema message a WriteRequest sets the stream's defaults, unless the first batch repeats it (T18)."""
    on_schema, on_batch, first = T18_CASES[case]
    create(client, table)
    schema, one, two = write_stream(NUMBERS, [numbers([1]), numbers([2])])
    stream = RawStream(server.flight)
    stream.send(flight_data(schema, path=[table], metadata=on_schema))
    stream.send(flight_data(one, metadata=on_batch))
    stream.send(flight_data(two))
    acks = stream.finish()
    assert [ack["durability_level"] for ack in acks if ack["sequence"] == 0] == first
    repeated = on_schema == on_batch
    second = "disk" if repeated else "object_storage"
    assert [ack["durability_level"] for ack in acks if ack["sequence"] == 1] == list(tiers_to(second))


def test_key_on_schema_and_first_batch_is_the_batchs(
    server: ServerProcess, client: flight.FlightClient, table: str
) -> None:
    """A client that repeats its first batch's request on the schema gives that batch its own key (T18)."""
    create(client, table)
    schema, one = write_stream(NUMBERS, [numbers([1])])
    for duplicate in (False, True):
        stream = RawStream(server.flight)
        stream.send(flight_data(schema, path=[table], metadata={"idempotency_key": "k"}))
        stream.send(flight_data(one, metadata={"idempotency_key": "k"}))
        assert {ack.get("duplicate", False) for ack in stream.finish()} == {duplicate}
    probe = Stream(client, table, requested_durability="memory")
    probe.write(numbers([1]), idempotency_key="k")
    assert probe.finish()[0]["duplicate"] is True


def test_descriptor_repeated_on_every_message(server: ServerProcess, client: flight.FlightClient, table: str) -> None:
    """The descriptor may repeat; the schema may come again as long as it is the same (T12)."""
    create(client, table)
    schema, one = write_stream(NUMBERS, [numbers([1])])
    stream = RawStream(server.flight)
    for message in (None, schema, schema, one, schema, one):
        stream.send(flight_data(message, path=[table], metadata=b"" if message is None else None))
    assert [ack["sequence"] for ack in stream.finish() if ack["durability_level"] == "disk"] == [0, 1]


def test_two_part_descriptor(client: flight.FlightClient, table: str) -> None:
    """``[default, t]``, ``[default.t]`` and ``[t]`` are one table in a descriptor."""
    create(client, table)
    for path in ((table,), ("default", table), (f"default.{table}",)):
        stream = Stream(client, path, requested_durability="memory")
        stream.write(numbers([1]))
        (ack,) = stream.finish()
        assert ack["error"] is None


def test_wide_batches_share_a_connection_with_small_ones(client: flight.FlightClient, table: str) -> None:
    """Batches of megabytes and of one row on the same connection all arrive whole."""
    create(client, table)
    big, small = Stream(client, table), Stream(client, table)
    values = pa.array(range(500_000), pa.int64())
    for _ in range(5):
        big.write(pa.record_batch([values], schema=NUMBERS))
        small.write(numbers([1]))
        assert {ack["error"] for ack in small.acks(2)} == {None}
    assert [ack["rows"] for ack in big.finish()] == [500_000] * 10
    assert small.finish() == []
