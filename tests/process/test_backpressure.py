"""Backpressure: without room ``write_batch`` waits, everything else goes on, and order is kept (R23, R36)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.options import MIB
from arka.testing.serverprocess import ServerProcess

from .clients import CALL_TIMEOUT_S, Ack, Stream, action, connect, create

pytestmark = pytest.mark.process

BINARY = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("data", pa.binary())])
FIELDS = [("id", "int64!"), ("data", "binary")]
#: More than any disk has: the server has no room from the start.
NO_ROOM = 1 << 50


def rows(number: int, size: int) -> pa.RecordBatch:
    return pa.record_batch([pa.array([number]), pa.array([bytes(size)])], schema=BINARY)


class Sender:
    """A client that writes as fast as it may in one thread and reads acks in another."""

    def __init__(self, location: str, table: str, count: int, size: int, **request: Any) -> None:
        self.sent = 0
        self.acks: list[Ack] = []
        self.failure = ""
        self._client = connect(location)
        self._stream = Stream(self._client, table, BINARY, requested_durability="disk", **request)
        self._threads = [
            threading.Thread(target=self._write, args=(count, size), daemon=True),
            threading.Thread(target=self._read, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _write(self, count: int, size: int) -> None:
        try:
            for number in range(count):
                self._stream.write(rows(number, size))
                self.sent += 1
            self._stream.writer.done_writing()
        except (flight.FlightError, pa.ArrowException) as error:
            self.failure = str(error)

    def _read(self) -> None:
        try:
            self.acks.extend(self._stream.rest())
        except (flight.FlightError, pa.ArrowException) as error:
            self.failure = str(error)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(CALL_TIMEOUT_S)
            assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize(
    "keyed", [pytest.param(False, marks=pytest.mark.long), True], ids=["append-only", "primary-key"]
)
def test_a_small_log_slows_writers_down(make_server: Callable[..., ServerProcess], keyed: bool) -> None:
    """Streams of several times ``limits.disk_bytes``: nothing is refused, and all is in order."""
    server = make_server(
        limits__disk_bytes=64 * MIB, wal__release_grace_s=0, iceberg__commit_interval_s=0.1, limits__stall_s=300
    ).start()
    key = {"table_type": "primary_key", "primary_key": ["id"]} if keyed else {}
    with connect(server.location) as client:
        create(client, "t", FIELDS, **key)
        large = [Sender(server.location, "t", 150, MIB, idempotency_key=f"large{n}") for n in range(1)]
        small = [Sender(server.location, "t", 300, 500, idempotency_key=f"small{n}") for n in range(3)]
        for sender in (*large, *small):
            sender.join()
            assert sender.failure == ""
            told = [ack for ack in sender.acks if ack["durability_level"] == "disk"]
            assert [ack["error"] for ack in sender.acks if ack["error"]] == []
            assert [ack["sequence"] for ack in told] == list(range(sender.sent))
            lsns = [ack["lsn"] for ack in told]
            assert lsns == sorted(set(lsns))
        assert "disk.refusing" not in server.log.read_text()
        action(client, "Flush", name="t")
    server.stop()


def test_nothing_but_writes_waits_for_room(make_server: Callable[..., ServerProcess]) -> None:
    """While ``write_batch`` blocks, other requests are answered, and DescribeTable says why; a drain does not wait.

    Streams that are held back end with UNAVAILABLE; none of their waiting writes was taken or refused.
    """
    server = make_server(limits__disk_free_bytes=NO_ROOM, limits__stall_s=3000, server__drain_s=30).start()
    with connect(server.location) as client:
        create(client, "t", FIELDS)
        senders = [Sender(server.location, "t", 40, size) for size in (MIB, 100)]
        assert "disk_free_bytes" in action(client, "DescribeTable", name="t")["holding_back"]
        create(client, "other", FIELDS)
        assert action(client, "ListTables") == ["default.other", "default.t"]
        server.stop()
        for sender in senders:
            sender.join()
            assert "unavailable" in sender.failure.lower()
            assert sender.acks == []
        assert senders[0].sent < 40


def test_writes_are_refused_at_last(make_server: Callable[..., ServerProcess]) -> None:
    """After ``limits.stall_s`` without room every write is refused, large or small, through either RPC."""
    server = make_server(limits__disk_free_bytes=NO_ROOM, limits__stall_s=6).start()
    with connect(server.location) as client:
        create(client, "t", FIELDS)
        senders = [Sender(server.location, "t", 40, MIB), Sender(server.location, "t", 40, 100)]
        put = _Put(client, 40)
        for sender in senders:
            sender.join()
            assert sender.failure == ""
            assert [(ack["sequence"], ack["code"]) for ack in sender.acks] == [(n, "overloaded") for n in range(40)]
            assert "limits.stall_s" in sender.acks[0]["error"]
        assert put.join() == ["overloaded"] * 40
    assert "disk.refusing" in server.log.read_text()
    server.stop()


class _Put:
    """The same through DoPut."""

    def __init__(self, client: flight.FlightClient, count: int) -> None:
        self._writer, self._reader = client.do_put(flight.FlightDescriptor.for_path("t"), BINARY)
        self._codes: list[str] = []
        self._count = count
        self._threads = [threading.Thread(target=self._write), threading.Thread(target=self._read)]
        for thread in self._threads:
            thread.start()

    def _write(self) -> None:
        for number in range(self._count):
            self._writer.write_batch(rows(number, 100_000))
        self._writer.done_writing()

    def _read(self) -> None:
        while (found := self._reader.read()) is not None:
            self._codes.append(json.loads(found.to_pybytes())["code"])

    def join(self) -> list[str]:
        for thread in self._threads:
            thread.join(CALL_TIMEOUT_S)
        self._writer.close()
        return self._codes
