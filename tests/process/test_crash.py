"""SIGKILL in the middle of streams: what was acked on disk is in Iceberg exactly once, nothing is doubled."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess, wait_gone

from . import lake
from .clients import NUMBERS, Ack, Stream, action, check_order, connect, create, numbers, write_all

pytestmark = [pytest.mark.process, pytest.mark.slow]

ROUNDS = 20
#: Rows of a batch: a batch is there whole or not at all.
BATCH_ROWS = 3
#: Batches that a writer has on their way.
WINDOW = 200


class Writer:
    """Writes batches 0, 1, 2 … until its server is gone, and remembers what it was told of each.

    Attributes:
        sent: how many batches were begun to be sent, in all rounds.
        on_disk: those that were acked on disk.
        given: the LSN that each was first acked with, one entry for each time.
    """

    def __init__(self, table: str) -> None:
        self.table = table
        self.sent = 0
        self.on_disk: set[int] = set()
        self.given: list[tuple[int, int]] = []
        self.failures: list[str] = []

    def open(self, client: flight.FlightClient) -> tuple[Stream, int]:
        """Open a stream; returns it with the number of its first batch."""
        return Stream(client, self.table, requested_durability="disk"), self.sent

    def take(self, ack: Ack, number: int) -> None:
        """Take one ack of a batch."""
        assert ack["error"] is None, ack
        if ack["durability_level"] == "disk":
            self.on_disk.add(number)
        elif not ack.get("duplicate"):
            self.given.append((ack["lsn"], number))

    def run(self, location: str, gone: threading.Event, progress: threading.Event) -> None:
        """Write until the server is gone."""
        with connect(location) as client:
            stream, first = self.open(client)
            room = threading.Semaphore(WINDOW)
            reading = threading.Thread(target=self._read, args=(stream, first, room, gone, progress))
            reading.start()
            number = first
            try:
                while not gone.is_set():
                    room.acquire(timeout=0.05)
                    self.sent = max(self.sent, number + 1)
                    stream.write(numbers(range(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)))
                    number += 1
            except (flight.FlightError, pa.ArrowException) as error:
                self._note(error, gone)
            reading.join()

    def _read(
        self, stream: Stream, first: int, room: threading.Semaphore, gone: threading.Event, progress: threading.Event
    ) -> None:
        try:
            while True:
                ack = stream.ack()
                if ack["sequence"] >= 0:
                    self.take(ack, first + ack["sequence"])
                    if ack["durability_level"] == "disk":
                        room.release()
                        progress.set()
        except (flight.FlightError, pa.ArrowException) as error:
            self._note(error, gone)
        except (StopIteration, AssertionError) as error:
            self.failures.append(repr(error))

    def _note(self, error: Exception, gone: threading.Event) -> None:
        # The connection breaks a moment after the kill was asked for, never before.
        if not gone.wait(5):
            self.failures.append(repr(error))


class KeyedWriter(Writer):
    """Sends again, with the same keys, what it has no disk ack for (protocol 3.3)."""

    def open(self, client: flight.FlightClient) -> tuple[Stream, int]:
        first = next(number for number in range(self.sent + 1) if number not in self.on_disk)
        last_lsn = max((lsn for lsn, _ in self.given), default=0)
        stream = Stream(client, self.table, idempotency_key="job", key_start=first, resume_after_lsn=last_lsn)
        return stream, first


def test_twenty_kills(make_server: Callable[..., ServerProcess]) -> None:
    """Every row acked on disk is in Iceberg exactly once after 20 SIGKILLs under load; no row is there twice.

    Rows that were never acked are there at most once, whole batches only; a writer that sends them again with
    its keys has each of its rows exactly once. No LSN is given twice.
    """
    pick = random.Random(20)
    server = make_server(iceberg__commit_interval_s=0.1, server__drain_s=20)
    plain, keyed = Writer("plain"), KeyedWriter("keyed")
    workers: set[int] = set()
    for number in range(ROUNDS):
        server.start()
        if number == 0:
            with connect(server.location) as client:
                create(client, "plain")
                create(client, "keyed", partition_spec=_bucketed())
        gone, progress = threading.Event(), threading.Event()
        threads = [
            threading.Thread(target=writer.run, args=(server.location, gone, progress)) for writer in (plain, keyed)
        ]
        for thread in threads:
            thread.start()
        assert progress.wait(30), server.log_tail()
        gone.wait(pick.uniform(0, 0.5))
        workers |= server.descendants()
        server.kill()
        gone.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert plain.failures + keyed.failures == [], server.log_tail()
    # The next process starts at once: workers that outlived their parent would commit into its epoch.
    assert wait_gone(workers) == set()
    server.start()
    with connect(server.location) as client:
        _resend_the_rest(client, keyed)
    server.stop()

    found = Counter(lake.rows(server.data, "plain")["n"].to_pylist())
    acked = {number * BATCH_ROWS + row for number in plain.on_disk for row in range(BATCH_ROWS)}
    assert acked - found.keys() == set(), "acked on disk and not in Iceberg"
    assert [row for row, times in found.items() if times > 1] == [], "more than once in Iceberg"
    assert all(row < plain.sent * BATCH_ROWS for row in found)
    assert set(Counter(row // BATCH_ROWS for row in found).values()) == {BATCH_ROWS}, "half a batch is in Iceberg"

    resent = Counter(lake.rows(server.data, "keyed")["n"].to_pylist())
    assert resent == Counter(range(keyed.sent * BATCH_ROWS))

    given = Counter(lsn for lsn, _ in plain.given + keyed.given)
    assert [lsn for lsn, times in given.items() if times > 1] == [], "given twice"
    assert len(plain.on_disk) > ROUNDS


def _resend_the_rest(client: flight.FlightClient, keyed: KeyedWriter) -> None:
    stream, first = keyed.open(client)
    stream.acks(4)
    for number in range(first, keyed.sent):
        stream.write(numbers(range(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)))
    for ack in stream.finish():
        keyed.take(ack, first + ack["sequence"])
    assert keyed.on_disk == set(range(keyed.sent))


def _bucketed() -> dict[str, Any]:
    return {"spec_id": 0, "fields": [{"source_id": 0, "name": "n_bucket", "transform": "bucket[3]"}]}


def test_kill_right_after_the_ack(make_server: Callable[..., ServerProcess]) -> None:
    """A server killed the moment it has acked on disk has the write after a restart, and in order behind it."""
    server = make_server(server__drain_s=20).start()
    with connect(server.location) as client:
        create(client, "t")
        stream = Stream(client, "t", requested_durability="disk")
        stream.write(numbers([1]))
        lsn = stream.acks(2)[1]["lsn"]
        server.kill()
    server.start()
    with connect(server.location) as client:
        (after, *_) = check_order(write_all(client, "t", [numbers([2])]), "iceberg_committed", 1)
        assert after > lsn
        assert sorted(client.do_get(flight.Ticket(b"t")).read_all()["n"].to_pylist()) == [1, 2]
    server.stop()


def test_resume_after_a_kill_is_capped(make_server: Callable[..., ServerProcess]) -> None:
    """After a crash, a handshake never vouches for an LSN above what is on disk, and keys of lost writes are free."""
    server = make_server(server__drain_s=20).start()
    with connect(server.location) as client:
        create(client, "t")
        lsns = check_order(write_all(client, "t", [numbers([1])], "disk"), "disk", 1)
        server.kill()
    server.start()
    with connect(server.location) as client:
        # The client claims to have been given a later LSN: that write is lost, so W stays below it.
        stream = Stream(client, "t", None, resume_after_lsn=lsns[0] + 1000)
        handshake = stream.acks(4)
        assert {ack["sequence"] for ack in handshake} == {-1}
        assert max(ack["lsn"] for ack in handshake) < lsns[0] + 1000
        assert next(ack["lsn"] for ack in handshake if ack["durability_level"] == "disk") >= lsns[0]
        stream.writer.begin(NUMBERS)
        stream.finish()
    server.stop()


def test_keys_survive_a_kill(make_server: Callable[..., ServerProcess]) -> None:
    """A key is known after a crash as far as its write survived, before and after it was committed."""
    server = make_server(server__drain_s=20).start()
    with connect(server.location) as client:
        create(client, "t")
        stream = Stream(client, "t", requested_durability="disk")
        stream.write(numbers([1]), idempotency_key="committed")
        (lsn,) = {ack["lsn"] for ack in stream.acks(2)}
        action(client, "Flush", name="t")
        stream.write(numbers([2]), idempotency_key="on disk")
        stream.acks(2)
        server.kill()
    server.start()
    with connect(server.location) as client:
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        stream.write(numbers([1]), idempotency_key="committed")
        stream.write(numbers([2]), idempotency_key="on disk")
        acks = stream.finish()
        assert [ack.get("duplicate") for ack in acks] == [True] * 8
        assert {ack["lsn"] for ack in acks if ack["sequence"] == 0} == {lsn}
    server.stop()
    assert sorted(lake.rows(server.data, "t")["n"].to_pylist()) == [1, 2]


def test_restart_after_a_drain(make_server: Callable[..., ServerProcess]) -> None:
    """A clean stop leaves nothing to do: the next start goes on above every LSN that was given."""
    server = make_server(server__drain_s=20).start()
    with connect(server.location) as client:
        create(client, "t")
        before = check_order(write_all(client, "t", [numbers([n]) for n in range(3)], "memory"), "memory", 3)
    server.stop()
    assert sorted(lake.rows(server.data, "t")["n"].to_pylist()) == [0, 1, 2]
    server.start()
    with connect(server.location) as client:
        after = check_order(write_all(client, "t", [numbers([3])]), "iceberg_committed", 1)
        assert after[0] > before[-1]
    server.stop()
    assert sorted(lake.rows(server.data, "t")["n"].to_pylist()) == [0, 1, 2, 3]
