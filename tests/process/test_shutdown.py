"""How a server begins and ends: in time, with exit code 0, whatever its clients do, and leaving nothing behind."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess, wait_gone

from . import lake
from .clients import Stream, action, connect, create, failure_of, numbers, tiers_to

pytestmark = pytest.mark.process

DRAIN_S = 2.0
#: What a process may take beyond its drain: interpreter exit on a busy machine.
EXIT_SLACK_S = 1.5
CONNECTIONS = 200


@contextmanager
def idle_streams(server: ServerProcess, table: str, count: int) -> Iterator[list[Stream]]:
    """Open this many connections with one DoExchange each, which say nothing after their first write."""
    with ExitStack() as stack:
        streams = []
        for number in range(count):
            stream = Stream(stack.enter_context(connect(server.location)), table, requested_durability="memory")
            stream.write(numbers([number]))
            streams.append(stream)
        for stream in streams:
            assert stream.ack()["error"] is None
        yield streams


def _rows_after_all(server: ServerProcess, table: str) -> list[int]:
    """Bring down what a short drain may have left in the log, and read the table."""
    server.start()
    with connect(server.location) as client:
        action(client, "Flush", name=table)
    server.stop()
    found: list[int] = lake.rows(server.data, table)["n"].to_pylist()
    return found


@pytest.mark.slow
def test_sigterm_with_two_hundred_idle_streams(make_server: Callable[..., ServerProcess]) -> None:
    """With 200 idle connections, each with an open DoExchange, SIGTERM ends the process within drain_s, code 0.

    The clients are told ``[unavailable]``, the number of threads has not followed that of the streams, and
    no worker is left.
    """
    server = make_server(server__drain_s=DRAIN_S).start()
    with connect(server.location) as client:
        create(client, "t")
    with idle_streams(server, "t", 10):
        few = server.threads()
    with idle_streams(server, "t", CONNECTIONS) as streams:
        many = server.threads()
        workers = server.descendants()
        assert workers
        began = time.monotonic()
        server.terminate()
        code = server.wait()
        took = time.monotonic() - began
        failures = [stream.failure() for stream in streams]
    assert code == 0, server.log_tail()
    assert took <= DRAIN_S + EXIT_SLACK_S, server.log_tail()
    assert [text for text in failures if "FlightUnavailableError" not in text or "[unavailable]" not in text] == []
    # Threads that wait for the disk or the catalog come and go; they do not follow the streams.
    assert many <= few + 20
    assert wait_gone(workers) == set()
    assert len(_rows_after_all(server, "t")) == 10 + CONNECTIONS


@pytest.mark.parametrize("kind", ["silent sockets", "half a preface", "idle channels", "open without a schema"])
def test_sigterm_with_clients_that_do_nothing(make_server: Callable[..., ServerProcess], kind: str) -> None:
    """Clients that are connected and say nothing, or stop in the middle of it, do not hold the process."""
    server = make_server(server__drain_s=DRAIN_S).start()
    with ExitStack() as stack:
        for _ in range(5):
            if kind in ("silent sockets", "half a preface"):
                opened = stack.enter_context(socket.create_connection(server.address))
                if kind == "half a preface":
                    opened.sendall(b"PRI * HTTP/2.0\r\n")
            else:
                client = stack.enter_context(connect(server.location))
                list(client.list_flights())
                if kind == "open without a schema":
                    stack.callback(Stream(client, "t", None).reader.cancel)
        began = time.monotonic()
        server.terminate()
        assert server.wait() == 0, server.log_tail()
        assert time.monotonic() - began <= DRAIN_S + EXIT_SLACK_S, server.log_tail()


def test_sigterm_during_writes(make_server: Callable[..., ServerProcess]) -> None:
    """A drain under load gives no ack that is not true and loses no write that was acked on disk."""
    server = make_server(server__drain_s=DRAIN_S).start()
    acked: list[int] = []
    failures: list[str] = []

    def run() -> None:
        with connect(server.location) as client:
            stream = Stream(client, "t", requested_durability="disk")
            try:
                for number in range(10_000_000):
                    stream.write(numbers([number]))
                    assert [ack["durability_level"] for ack in stream.acks(2)] == list(tiers_to("disk"))
                    acked.append(number)
            except flight.FlightError as error:
                failures.append(str(error))

    with connect(server.location) as client:
        create(client, "t")
    writer = threading.Thread(target=run)
    writer.start()
    while len(acked) < 50:
        time.sleep(0.01)
    server.terminate()
    assert server.wait() == 0, server.log_tail()
    writer.join(30)
    (failure,) = failures
    assert "[unavailable]" in failure
    found = _rows_after_all(server, "t")
    assert sorted(found)[: len(acked)] == acked
    assert len(found) == len(set(found)) <= len(acked) + 1


def test_drain_delivers_the_acks_that_come_in_time(make_server: Callable[..., ServerProcess]) -> None:
    """Writes whose last ack comes within the drain get it; after that the stream ends with ``[unavailable]``."""
    server = make_server(server__drain_s=5, iceberg__commit_interval_s=60).start()
    with connect(server.location) as client:
        create(client, "t")
        stream = Stream(client, "t", requested_durability="iceberg_committed")
        for number in range(10):
            stream.write(numbers([number]))
            stream.acks(2)
        # The first commit need not wait; those behind it are due in a minute, and the drain hurries them.
        server.terminate()
        levels = []
        with pytest.raises(flight.FlightUnavailableError, match=r"\[unavailable\]"):
            levels.extend(ack["durability_level"] for ack in stream.rest())
    assert levels.count("iceberg_committed") == 10
    assert server.wait() == 0


def test_second_signal_ends_at_once(make_server: Callable[..., ServerProcess]) -> None:
    """A second SIGTERM ends a server that still drains, and its workers with it."""
    server = make_server(server__drain_s=60).start()
    with connect(server.location) as client:
        create(client, "t")
        Stream(client, "t", requested_durability="memory").write(numbers([1]))
        workers = server.descendants()
        server.terminate()
        server.terminate()
        code = server.wait()
    assert code in (0, 128 + 15)
    assert wait_gone(workers) == set()


def test_no_worker_outlives_a_kill(make_server: Callable[..., ServerProcess]) -> None:
    """SIGKILL of the server ends its workers too (R15)."""
    server = make_server().start()
    with connect(server.location) as client:
        create(client, "t")
        stream = Stream(client, "t", requested_durability="disk")
        for number in range(100):
            stream.write(numbers([number]))
        stream.acks(1)
        workers = server.descendants()
        assert len(workers) >= 2
        server.kill()
    assert wait_gone(workers) == set()


def test_second_server_on_one_directory(make_server: Callable[..., ServerProcess]) -> None:
    """A second server on a data directory ends with an error that names the holder's pid; the first goes on."""
    first = make_server().start()
    second = make_server()
    second.spawn()
    assert second.wait() != 0
    assert f"held by the server with pid {first.pid}" in second.log_tail()
    assert "Traceback" not in second.log_tail()
    announced = first.announced()
    assert announced is not None
    assert announced["pid"] == first.pid
    with connect(first.location) as client:
        create(client, "t")
    first.stop()


def test_server_json_means_ready(make_server: Callable[..., ServerProcess]) -> None:
    """``server.json`` appears once the server serves, demo tables and all, and goes when it stops."""
    server = make_server("--demo-tables", server__drain_s=DRAIN_S)
    server.spawn()
    while server.announced() is None:
        assert server.exit_code is None, server.log_tail()
        time.sleep(0.001)
    announced = server.announced()
    assert announced is not None
    assert announced["pid"] == server.pid
    with connect(str(announced["flight"])) as client:
        assert json.loads(next(iter(client.do_action(flight.Action("ListTables", b"")))).body.to_pybytes()) == [
            "default.events",
            "default.users",
        ]
    # Said right after the file appeared, before any request was answered.
    assert "server.ready" in server.log.read_text()
    server.stop()
    assert server.announced() is None


def test_server_json_of_a_killed_server(make_server: Callable[..., ServerProcess]) -> None:
    """What a killed server announced is gone or another's before the next one announces itself."""
    server = make_server().start()
    killed = server.pid
    server.kill()
    server.start()
    announced = server.announced()
    assert announced is not None
    assert announced["pid"] == server.pid != killed
    server.stop()


def test_port_taken(make_server: Callable[..., ServerProcess]) -> None:
    """A port that is taken is an error for people, and leaves nothing running."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = make_server("--port", str(port))
        server.spawn()
        assert server.wait() != 0
    assert f"127.0.0.1:{port}" in server.log_tail()
    assert "Traceback" not in server.log_tail()
    assert server.announced() is None


def test_new_calls_during_the_drain(make_server: Callable[..., ServerProcess]) -> None:
    """While a server drains and after it has ended, a new call is UNAVAILABLE, never a hang or another error."""
    server = make_server(server__drain_s=DRAIN_S).start()
    seen: list[str] = []
    with connect(server.location) as client:
        create(client, "t")
        stream = Stream(client, "t", requested_durability="memory")
        stream.write(numbers([1]))
        stream.ack()
        server.terminate()
        while server.exit_code is None:
            with connect(server.location) as other:
                try:
                    list(other.list_flights(b"", flight.FlightCallOptions(timeout=5)))
                except flight.FlightError as error:
                    seen.append(type(error).__name__)
        seen.append(failure_of(create, client, "u").partition(":")[0])
    assert server.exit_code == 0
    assert set(seen) == {"FlightUnavailableError"}


def test_console_script_says_its_version() -> None:
    """``arka-server --version`` answers without starting anything."""
    program = Path(sys.executable).with_name("arka-server")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert "arka" in done.stdout.lower()
