"""A whole server in this process, whose event loop counts the work of each step that a task takes.

Between two points at which others may run, a task of trio's thread takes one step. Counted are the calls that it makes
(of Python and of C functions), the bytes that it receives and sends, and what it reads itself instead of in a thread:
rows, bytes of JSON, fields of schemas. A C function counts as one call, however much it reads. Beside these stand the
counts of the readers' own budget (``arka.flight.turns``). None of it depends on how fast the machine is; how long the
longest step took is kept beside, for people.

Owns: counting. Does not own what is sent (the ``over_*`` modules) nor the bounds (``test_turn_work``).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import trio

from arka.flight import decode, exchange
from arka.flight.channels import SocketChannel
from arka.flight.decode import BatchDecoder
from arka.flight.http2 import ConnectionFactory
from arka.server import Address, serve
from arka.settings import load_settings
from arka.testing.serverprocess import variable_of

#: Ends what hangs.
HANG_S = 120.0


@dataclass
class StepWork:
    """The most of each kind that one step has done, and the task that did it.

    Attributes:
        calls: function calls.
        received_bytes: bytes taken from sockets.
        sent_bytes: bytes written to sockets.
        rows: rows decoded on trio's thread.
        json_bytes: bytes of JSON parsed there.
        fields: columns of schemas read there.
        messages: FlightData messages that a stream's RPC takes.
        events: events of one reader's turn.
        headers: header blocks of one reader's turn.
        units: units of one reader's turn.
        steps: how many steps there were, for people only.
        seconds: wall time of the longest, for people only.
        by: the task with the most calls.
    """

    calls: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    rows: int = 0
    json_bytes: int = 0
    fields: int = 0
    messages: int = 0
    events: int = 0
    headers: int = 0
    units: int = 0
    steps: int = 0
    seconds: float = 0.0
    by: str = ""


#: What a counter counts itself, in each step.
_COUNTED = ("calls", "received_bytes", "sent_bytes", "rows", "json_bytes", "fields", "messages")


class StepCounter(trio.abc.Instrument):
    """Counts each step of each task of one trio run."""

    def __init__(self) -> None:
        self.most = StepWork()
        self.factories: list[ConnectionFactory] = []
        self.calls = 0
        self.now = dict.fromkeys(_COUNTED, 0)
        self.thread: int | None = None
        self._began = 0.0

    def before_run(self) -> None:
        """Begin to count calls in this thread."""
        self.thread = threading.get_ident()
        sys.setprofile(self._profile)

    def after_run(self) -> None:
        """Stop counting."""
        sys.setprofile(None)

    def _profile(self, _frame: object, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            self.calls += 1

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step begins."""
        del task
        self.now = dict.fromkeys(_COUNTED, 0)
        self.calls = 0
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step has ended."""
        most = self.most
        self.now["calls"] = self.calls
        if self.calls > most.calls:
            most.by = task.name
        for name, count in self.now.items():
            if count > getattr(most, name):
                setattr(most, name, count)
        most.steps += 1
        most.seconds = max(most.seconds, time.perf_counter() - self._began)

    def add(self, name: str, count: int) -> None:
        """Count something that this thread does; what others do is not the loop's."""
        if threading.get_ident() == self.thread:
            self.now[name] += count

    def settle(self) -> bool:
        """Wait until no connection is open any more; returns whether that came."""
        deadline = time.monotonic() + HANG_S
        while any(factory.connections for factory in self.factories):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def take(self) -> StepWork:
        """Give what was counted since the last call."""
        taken, self.most = self.most, StepWork()
        for factory in self.factories:
            counts = factory.turns
            taken.events = max(taken.events, counts.most_events)
            taken.headers = max(taken.headers, counts.most_headers)
            taken.units = max(taken.units, counts.most_units)
            counts.most_events = counts.most_headers = counts.most_units = 0
        return taken


@contextmanager
def _watched(counter: StepCounter) -> Iterator[None]:
    """Tell a counter of connections, and of what is received, sent and read."""
    patches = ExitStack()

    def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Put ``wrapper`` in front of a function; it gets that as its first argument."""
        inner = getattr(owner, name)
        patches.enter_context(mock.patch.object(owner, name, wraps_with(inner, wrapper)))

    def make(inner: Callable[..., None], self: ConnectionFactory, *arguments: Any, **options: Any) -> None:
        inner(self, *arguments, **options)
        counter.factories.append(self)

    async def count_received(inner: Callable[..., Any], *arguments: Any) -> int:
        size: int = await inner(*arguments)
        counter.add("received_bytes", size)
        return size

    def count_sent(inner: Callable[..., Any], self: SocketChannel, left: list[bytes | memoryview]) -> None:
        before = sum(map(len, left))
        inner(self, left)
        counter.add("sent_bytes", before - sum(map(len, left)))

    def count_sent_now(inner: Callable[..., Any], self: SocketChannel, parts: Any) -> Any:
        rest = inner(self, parts)
        counter.add("sent_bytes", sum(map(len, parts)) - sum(map(len, rest)))
        return rest

    def count_rows(inner: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        decoded = inner(*arguments, **options)
        counter.add("rows", decoded.rows)
        return decoded

    def count_json(inner: Callable[..., Any], data: Any, *arguments: Any, **options: Any) -> Any:
        counter.add("json_bytes", len(data))
        return inner(data, *arguments, **options)

    def count_fields(inner: Callable[..., Any], header: bytes) -> Any:
        found = inner(header)
        counter.add("fields", len(found[0]))
        return found

    async def count_message(inner: Callable[..., Any], *arguments: Any) -> Any:
        counter.add("messages", 1)
        return await inner(*arguments)

    with patches:
        wrap(ConnectionFactory, "__init__", make)
        wrap(SocketChannel, "receive", count_received)
        wrap(SocketChannel, "receive_into", count_received)
        wrap(SocketChannel, "send_now", count_sent_now)
        wrap(SocketChannel, "_send_some", count_sent)
        wrap(BatchDecoder, "decode", count_rows)
        wrap(msgspec.json, "decode", count_json)
        wrap(exchange, "parse_write_request", count_json)
        wrap(exchange, "read_schema", count_fields)
        wrap(decode, "read_schema", count_fields)
        wrap(exchange.Exchange, "handle", count_message)
        yield


def wraps_with(inner: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """A function, also a method, that calls ``wrapper`` with ``inner`` before its own arguments."""
    if iscoroutinefunction(inner):

        async def run_async(*arguments: Any, **options: Any) -> Any:
            return await wrapper(inner, *arguments, **options)

        return run_async

    def run(*arguments: Any, **options: Any) -> Any:
        return wrapper(inner, *arguments, **options)

    return run


@contextmanager
def counted_server(folder: Path) -> Iterator[tuple[tuple[str, int], StepCounter]]:
    """Run a server in a thread of this process; gives its address and what counts."""
    wished = {
        "server.data_dir": str(folder / "data"),
        "server.port": "0",
        "server.http_port": "0",
        "server.drain_s": "5",
        "limits.memory_bytes": "64MiB",
        "log.level": "warning",
    }
    settings = load_settings(environment={variable_of(key): value for key, value in wished.items()}).settings
    counter = StepCounter()
    ready: dict[str, Any] = {}
    started = threading.Event()

    async def run() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:

            async def begin(*, task_status: trio.TaskStatus[Address]) -> None:
                await serve(settings, stop=stop, task_status=task_status)

            address = await nursery.start(begin)
            ready.update(address=(address.host, address.port), stop=stop, token=trio.lowlevel.current_trio_token())
            started.set()

    def main() -> None:
        try:
            trio.run(run, instruments=[counter])
        except BaseException as error:
            ready["error"] = error
        finally:
            started.set()

    with _watched(counter):
        thread = threading.Thread(target=main, name="counted-server")
        thread.start()
        assert started.wait(HANG_S), "the server did not start"
        if "error" in ready:
            raise ready["error"]
        try:
            yield ready["address"], counter
        finally:
            ready["token"].run_sync_soon(ready["stop"].set)
            thread.join(HANG_S)
        assert not thread.is_alive(), "the server did not stop"
        if "error" in ready:
            raise ready["error"]
