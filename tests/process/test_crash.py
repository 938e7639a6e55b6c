"""What a client may rely on right after a SIGKILL: its acks, the resume handshake, its keys.

Kills at random instants are in ``test_kill_instants``, kills at each durable step in ``test_failpoints``.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import NUMBERS, Stream, action, check_order, connect, create, numbers, write_all

pytestmark = pytest.mark.process


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
