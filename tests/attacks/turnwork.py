"""A whole server in this process, whose event loop counts the work of each step that a task takes.

Between two points at which others may run, a task of trio's thread takes one step. Counted are the calls that it makes
(of Python and of C functions), the bytes that it receives, and the rows that it decodes itself instead of in a thread.
Beside these stand the counts of the readers' own budget (``arka.flight.turns``). None of it depends on how fast the
machine is; how long the longest step took is kept beside, for people.

Owns: counting. Does not own what is sent (the ``over_*`` modules) nor the bounds (``test_turn_work``).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

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
        rows: rows decoded on trio's thread.
        events: events of one reader's turn.
        headers: header blocks of one reader's turn.
        units: units of one reader's turn.
        seconds: wall time, for people only.
    """

    calls: int = 0
    received_bytes: int = 0
    rows: int = 0
    events: int = 0
    headers: int = 0
    units: int = 0
    seconds: float = 0.0
    by: str = ""


class StepCounter(trio.abc.Instrument):
    """Counts each step of each task of one trio run."""

    def __init__(self) -> None:
        self.most = StepWork()
        self.factories: list[ConnectionFactory] = []
        self.calls = self.received_bytes = self.rows = 0
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
        self.calls = self.received_bytes = self.rows = 0
        self._began = time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """A step has ended."""
        most = self.most
        if self.calls > most.calls:
            most.calls, most.by = self.calls, task.name
        most.received_bytes = max(most.received_bytes, self.received_bytes)
        most.rows = max(most.rows, self.rows)
        most.seconds = max(most.seconds, time.perf_counter() - self._began)

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
    """Tell a counter of connections, received bytes and decoded rows."""
    made, receive, decode = ConnectionFactory.__init__, SocketChannel.receive, BatchDecoder.decode

    def make(self: ConnectionFactory, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options)
        counter.factories.append(self)

    async def count_bytes(self: SocketChannel, splitter: Any) -> int:
        size = await receive(self, splitter)
        counter.received_bytes += size
        return size

    def count_rows(self: BatchDecoder, *arguments: Any, **options: Any) -> Any:
        decoded = decode(self, *arguments, **options)
        if threading.get_ident() == counter.thread:
            counter.rows += decoded.rows
        return decoded

    ConnectionFactory.__init__ = make  # type: ignore[method-assign]
    SocketChannel.receive = count_bytes  # type: ignore[method-assign]
    BatchDecoder.decode = count_rows  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConnectionFactory.__init__ = made  # type: ignore[method-assign]
        SocketChannel.receive = receive  # type: ignore[method-assign]
        BatchDecoder.decode = decode  # type: ignore[method-assign]


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
