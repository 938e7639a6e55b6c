"""No number of readers, however slow or impatient, holds up writes, other readers or the end (T27)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.flight import messages
from arka.flight.grpc import message_prefix
from arka.testing.serverprocess import ServerProcess

from .clients import action, connect, create, failure_of, numbers, write_all

#: More than the buffers of an answer, its pipe and its socket hold together.
ROWS = 4_000_000
OTHER = "127.0.0.2"


class Reader:
    """DoGet calls on a bare connection, whose windows open only as far as it is told to."""

    def __init__(self, server: ServerProcess, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection(server.address, timeout=60, source_address=(host, 0))
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.connection.initiate_connection()
        self.received = 0
        self.status: dict[int, str] = {}
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.connection.data_to_send())

    def get(self, **ticket: Any) -> int:
        """Ask for a table; returns the stream."""
        stream = self.connection.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "http"), (":authority", "test"), (":path", messages.SERVICE + "DoGet")]
        self.connection.send_headers(stream, [*head, ("te", "trailers"), ("content-type", "application/grpc")])
        request = messages.build("Ticket", ticket=json.dumps(ticket).encode())
        self.connection.send_data(stream, message_prefix(len(request)) + request, end_stream=True)
        self.flush()
        return stream

    def reset(self, stream: int) -> None:
        self.connection.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self.flush()

    def pull(self, *, credit: bool = True) -> None:
        """Take what comes next, and open the windows for as much again if asked to."""
        for event in self.connection.receive_data(self.socket.recv(1 << 20)):
            if isinstance(event, h2.events.DataReceived):
                self.received += len(event.data)
                if credit and event.flow_controlled_length:
                    self.connection.increment_flow_control_window(event.flow_controlled_length)
                    # The stream may have ended with what came along.
                    with contextlib.suppress(h2.exceptions.StreamClosedError):
                        self.connection.increment_flow_control_window(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.TrailersReceived):
                fields = dict(event.headers)
                self.status[event.stream_id] = fields["grpc-status"] + " " + fields.get("grpc-message", "")
        self.flush()

    def end_of(self, stream: int, *, credit: bool = True) -> str:
        while stream not in self.status:
            self.pull(credit=credit)
        return self.status[stream]


@contextmanager
def readers(server: ServerProcess, count: int, host: str = "127.0.0.1") -> Iterator[list[Reader]]:
    """Open connections; closed in the end, whatever they have asked for."""
    opened = [Reader(server, host) for _ in range(count)]
    try:
        yield opened
    finally:
        for reader in opened:
            reader.socket.close()


def _fill(client: flight.FlightClient, rows: int = ROWS) -> None:
    create(client, "t")
    write_all(client, "t", [numbers(range(start, start + 500_000)) for start in range(0, rows, 500_000)])
    action(client, "Flush", name="t")


def _spilled(server: ServerProcess) -> list[Path]:
    return list((server.data / "spill").iterdir())


def _open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(pid: int) -> dict[int, str]:
    """The processes below one, with their state."""
    found: dict[int, tuple[int, str]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[int(entry)] = (int(fields[1]), fields[0])
    below: dict[int, str] = {}
    todo = [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, (its_parent, _) in found.items() if its_parent == parent]
        below.update((child, found[child][1]) for child in children)
        todo += children
    return below


def test_readers_do_not_refuse_writers(make_server: Callable[..., ServerProcess]) -> None:
    """40 readers in a loop: each write gets each of its acks, and a drain ends amid the reads, with nothing left."""
    server = make_server(server__drain_s=10).start()
    with connect(server.location) as client:
        _fill(client, 1_000_000)
        stop = threading.Event()
        whole = []

        def read() -> None:
            with connect(server.location) as own:
                while not stop.is_set():
                    try:
                        whole.append(own.do_get(flight.Ticket(b"t")).read_all().num_rows)
                    except (pa.ArrowException, OSError, flight.FlightError):
                        # The drain.
                        return

        threads = [threading.Thread(target=read, daemon=True) for _ in range(40)]
        for thread in threads:
            thread.start()
        create(client, "w")
        for number in range(30):
            write_all(client, "w", [numbers([number])])
        _wait(lambda: len(whole) > 5)
        server.terminate()
        assert server.wait() == 0
        stop.set()
        for thread in threads:
            thread.join(60)
        assert set(whole) == {1_000_000}
        assert _spilled(server) == []
        assert "refusing" not in server.log_tail(1000)


def test_readers_that_do_not_read(make_server: Callable[..., ServerProcess]) -> None:
    """Clients of one address with closed windows hold neither the turn of another address, nor writes or actions."""
    with make_server(limits__message_stall_s=600) as server, connect(server.location) as client:
        _fill(client)
        with readers(server, 20) as stuck, readers(server, 2, OTHER) as others:
            for reader in stuck:
                reader.get(table_name="t")
            for reader in others:
                assert reader.end_of(reader.get(table_name="t", columns=["n"])).startswith("0")
                assert reader.received > ROWS * 8
            assert action(client, "DescribeTable", name="t")["name"] == "default.t"
            write_all(client, "t", [numbers([1])])
        # Gone without a word: what they waited for goes as well.
        assert client.do_get(flight.Ticket(b"t")).read_all().num_rows == ROWS + 1
        _wait(lambda: not _spilled(server))


def test_slow_readers_end_where_others_wait(make_server: Callable[..., ServerProcess]) -> None:
    """The same address: clients below the least rate lose their answers, and the one that reads gets its turn (T25)."""
    with make_server(limits__message_stall_s=600) as server, connect(server.location) as client:
        _fill(client)
        with readers(server, 3) as slow:
            streams = [reader.get(table_name="t") for reader in slow]
            for reader in slow:
                while reader.received < 1_000:
                    reader.pull(credit=False)
            assert client.do_get(flight.Ticket(b"t")).read_all().num_rows == ROWS
            # One of the three was enough; nobody waits for what the others hold.
            for reader, stream in zip(slow, streams, strict=True):
                reader.socket.settimeout(0.5)
                with contextlib.suppress(TimeoutError):
                    assert "min_bytes_per_s" in reader.end_of(stream, credit=False)
            assert any(reader.status for reader in slow)


def test_answers_that_nobody_wants(make_server: Callable[..., ServerProcess]) -> None:
    """Reads that are reset at once leave no process, pipe, descriptor or place behind."""
    with make_server() as server, connect(server.location) as client:
        _fill(client, 1_000_000)
        assert client.do_get(flight.Ticket(b"t")).read_all().num_rows == 1_000_000
        before = _open_files(server.pid)
        with readers(server, 10) as impatient:
            for _ in range(20):
                for reader in impatient:
                    reader.reset(reader.get(table_name="t"))
        _wait(lambda: not _spilled(server))
        assert client.do_get(flight.Ticket(b"t")).read_all().num_rows == 1_000_000
        # Each of the reader processes has a few descriptors of its own.
        _wait(lambda: _open_files(server.pid) <= before + 20)
        assert "Z" not in _children(server.pid).values()


def test_too_many_reads_wait(make_server: Callable[..., ServerProcess]) -> None:
    """Beyond a peer's places a read is refused at once, be it that it waits for an LSN; another peer's is answered."""
    with make_server(limits__reads_waiting=8, limits__read_wait_s=600) as server, connect(server.location) as client:
        create(client, "t")
        write_all(client, "t", [numbers(range(10))])
        with readers(server, 1) as (mine,), readers(server, 1, OTHER) as (other,):
            streams = [mine.get(table_name="t", wait_for_lsn=1_000_000) for _ in range(50)]
            while len(mine.status) < 46:
                mine.pull()
            assert all("overloaded" in status for status in mine.status.values())
            assert other.end_of(other.get(table_name="t")).startswith("0")
            waiting = [stream for stream in streams if stream not in mine.status]
            assert len(waiting) == 4
            mine.reset(waiting[0])
            assert mine.end_of(mine.get(table_name="t")).startswith("0")


def test_a_reader_process_that_dies(make_server: Callable[..., ServerProcess]) -> None:
    """Whatever kills it costs its read alone, which says so; the next one is answered (R9)."""
    with make_server(limits__message_stall_s=600) as server, connect(server.location) as client:
        _fill(client)
        processes = _children(server.pid)
        with readers(server, 1) as (reader,):
            stream = reader.get(table_name="t")
            _wait(lambda: bool(_spilled(server)) and len(_children(server.pid)) > len(processes))
            while reader.received < 1_000:
                reader.pull(credit=False)
            (process,) = _children(server.pid).keys() - processes.keys()
            os.kill(process, signal.SIGKILL)
            reader.connection.increment_flow_control_window(1 << 30)
            reader.connection.increment_flow_control_window(1 << 30, stream)
            reader.flush()
            assert reader.end_of(stream, credit=False).startswith("14")
        assert client.do_get(flight.Ticket(b"t")).read_all().num_rows == ROWS


def test_a_table_dropped_while_it_is_read(make_server: Callable[..., ServerProcess]) -> None:
    """A read whose files are purged ends with an error that says why, or had all of them open."""
    with make_server(limits__message_stall_s=600) as server, connect(server.location) as client:
        _fill(client)
        with readers(server, 1) as (reader,):
            stream = reader.get(table_name="t")
            while reader.received < 1_000:
                reader.pull(credit=False)
            action(client, "DropTable", name="t", purge=True)
            reader.connection.increment_flow_control_window(1 << 30)
            reader.connection.increment_flow_control_window(1 << 30, stream)
            reader.flush()
            status = reader.end_of(stream, credit=False)
            assert status.startswith("0") or ("Table not found" in status and "dropped" in status)
        assert "Table not found" in failure_of(client.do_get, flight.Ticket(b"t"))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (["n"] * 10_000, "names 10000 columns, default.t has 1"),
        (["x" * 900_000], "have 900000 characters"),
        (["n", "n"], "each once"),
        ([f"c{number}" for number in range(1000)], "No such column"),
    ],
    ids=["ten thousand", "a long one", "twice", "unknown"],
)
def test_columns_that_cannot_be(
    server: ServerProcess, client: flight.FlightClient, columns: list[str], reason: str
) -> None:
    """The list of columns that a waiting read holds is bounded; an error has a part of it (T27)."""
    create(client, "t")
    ticket = flight.Ticket(json.dumps({"table_name": "t", "columns": columns}).encode())
    failure = failure_of(lambda: client.do_get(ticket).read_all())
    assert reason in failure
    assert len(failure) < 10_000


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_nothing_but_the_schema(server: ServerProcess, client: flight.FlightClient, compression: str) -> None:
    """A limit of 0 gives the schema alone, whatever is in the table."""
    create(client, "t")
    write_all(client, "t", [numbers(range(10))])
    ticket = {"table_name": "t", "limit": 0, "compression": compression}
    found = client.do_get(flight.Ticket(json.dumps(ticket).encode())).read_all()
    assert (found.schema.names, found.num_rows) == (["n"], 0)
