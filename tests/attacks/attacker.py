"""What an attack is, and the process that runs one: its time, its connections, what it sent and what it was told.

Owns: the registry of attacks, and an attack's cost to itself. Does not own any attack (the ``over_*`` modules) nor
what it does to others (``harness``).

Run one by hand against a server:  python -m tests.attacks.attacker headers-unknown 127.0.0.1:8815 --seconds 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from typing import Any, Final

from tests.attacks import wire
from tests.attacks.wire import Wire
from tests.transport.peer import grpc_message, proto_field

_NUMBER = re.compile(r"[0-9]+")
#: How long an attack may prepare: make tables and fill them.
PREPARE_S = 60.0
#: The families, in the order of the table.
FAMILIES = ("http2", "grpc", "flight", "ipc", "json", "reads", "actions", "storage")
#: gRPC statuses by number, as far as the server uses them.
STATUSES = {
    0: "OK",
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    16: "UNAUTHENTICATED",
}


#: A gRPC status.
_UNAVAILABLE: Final = 14


class Attacker:
    """What an attack has in hand.

    Attributes:
        seconds: how long it may take.
        outcomes: what the server answered, and how often.
        connections: sockets that were opened.
        begun_at: when its time began, on the monotonic clock.
    """

    def __init__(
        self,
        address: tuple[str, int],
        seconds: float,
        source: str = wire.ATTACKER_ADDRESS,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.address = address
        self.seconds = seconds
        self.source = source
        self.outcomes: Counter[str] = Counter()
        self.connections = 0
        self.stopped = threading.Event()
        self.begun_at: float | None = None
        # What an attack prepares takes none of its time.
        self._ends_at = time.monotonic() + PREPARE_S
        self._on_begin = on_begin
        self._wires: list[Wire] = []
        self._sockets: list[socket.socket] = []
        self._raw_bytes = 0
        self._names = count()
        self._locked = threading.Lock()

    # -- time ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """What is needed is there: the attack's time begins."""
        if self.begun_at is None:
            self.begun_at = time.monotonic()
            self._ends_at = self.begun_at + self.seconds
            self._on_begin()

    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self._ends_at and not self.stopped.is_set()

    def pause(self, seconds: float) -> bool:
        """Wait, at most to the end; returns ``goes_on``."""
        self.stopped.wait(max(0.0, min(seconds, self._ends_at - time.monotonic())))
        return self.goes_on()

    def hold(self) -> None:
        """Keep what is open until the end."""
        while self.pause(0.5):
            pass

    def rounds(self, most: int | None = None) -> Iterator[int]:
        """Count while there is time."""
        for number in count() if most is None else range(most):
            if not self.goes_on():
                return
            yield number

    def together(self, threads: int, run: Callable[[int], None]) -> None:
        """Run something in several threads; errors of sockets end a thread, others are raised."""
        failed: list[BaseException] = []

        def guarded(number: int) -> None:
            try:
                run(number)
            except OSError as error:
                self.outcomes[f"{type(error).__name__}"] += 1
            except BaseException as error:
                failed.append(error)

        started = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join(max(1.0, self._ends_at - time.monotonic() + 5))
        if failed:
            raise failed[0]

    # -- connections --------------------------------------------------------------------------------

    def wire(self, **options: Any) -> Wire:
        """Open an HTTP/2 connection from the attacker's address."""
        opened = Wire(self.address, self.goes_on, source=self.source, **options)
        with self._locked:
            self.connections += 1
            self._wires.append(opened)
        return opened

    def socket(self) -> socket.socket | None:
        """Open a bare connection; None when it was refused."""
        try:
            opened = wire.connect(self.address, self.source)
        except OSError as error:
            self.outcomes[f"connect: {type(error).__name__}"] += 1
            return None
        with self._locked:
            self.connections += 1
            self._sockets.append(opened)
        return opened

    def send(self, target: socket.socket, payload: bytes) -> bool:
        """Write on a bare connection; returns whether it went out."""
        try:
            target.settimeout(1)
            target.sendall(payload)
        except OSError as error:
            self.outcomes[f"send: {type(error).__name__}"] += 1
            return False
        self._raw_bytes += len(payload)
        return True

    @property
    def sent(self) -> int:
        """Bytes sent on all connections."""
        with self._locked:
            return self._raw_bytes + sum(opened.sent for opened in self._wires)

    def close(self) -> None:
        """Close all connections."""
        self.stopped.set()
        for opened in self._wires:
            opened.close()
        for opened in self._sockets:
            opened.close()

    # -- what attacks have in common ------------------------------------------------------------------

    def note(self, outcome: tuple[int | None, str]) -> tuple[int | None, str]:
        """Count how a call ended."""
        status, message = outcome
        word = "none" if status is None else STATUSES.get(status, str(status))
        # Numbers differ from answer to answer; what was refused does not.
        self.outcomes[word if status == 0 else f"{word} {_NUMBER.sub('#', message[:60])}"] += 1
        return outcome

    def name(self) -> str:
        """A table name that no other attack of this run has."""
        return f"attack_{int(time.time() * 1000) % 10**9}_{next(self._names)}"

    def action(self, on: Wire, kind: str, body: Any = b"", *, note: bool = True) -> tuple[int | None, str]:
        """Run an action to its end."""
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        ended = on.outcome(on.call("DoAction", action_message(kind, payload)))
        return self.note(ended) if note else ended

    def create(self, on: Wire, fields: list[tuple[str, str]], name: str | None = None, **more: Any) -> str:
        """Create a table; returns its name.

        Raises:
            RuntimeError: it was refused, so that the attack would say nothing.
        """
        name = name or self.name()
        columns = [
            {"name": column, "type": kind.removesuffix("!"), "nullable": not kind.endswith("!")}
            for column, kind in fields
        ]
        request = {"name": name, "schema_json": {"fields": columns}, **more}
        ended = self.action(on, "CreateTable", request, note=False)
        while ended[0] == _UNAVAILABLE and "[overloaded]" in ended[1] and self.pause(0.1):
            # What an attack before this one left running has to end first.
            ended = self.action(on, "CreateTable", request, note=False)
        if ended[0] != 0 and self.goes_on():
            raise RuntimeError(f"CreateTable: {ended}")
        return name


def action_message(kind: str, body: bytes) -> bytes:
    """A DoAction request with its gRPC prefix."""
    return grpc_message(proto_field(1, kind.encode()) + proto_field(2, body))


Run = Callable[[Attacker], None]


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        name: its function's, with dashes.
        family: what it goes over.
        rule: which rule of docs/transport.md or docs/durability.md forbids what it tries.
        what: what it tries to buy: the docstring's first paragraph.
        run: the attack.
        prepares: it calls ``begin`` itself, once what it needs is there.
        settings: of the server, where the defaults would take too long to show anything.
    """

    name: str
    family: str
    rule: str
    what: str
    run: Run
    prepares: bool = False
    settings: dict[str, str] = field(default_factory=dict)


#: Every attack by name, in the order of the table; filled by ``load``.
ATTACKS: dict[str, Attack] = {}


def attack(rule: str, *, prepares: bool = False, **settings: str) -> Callable[[Run], Run]:
    """Register an attack.

    Args:
        rule: what forbids it.
        prepares: it calls ``begin`` itself.
        settings: by key, with ``__`` for the dot.
    """

    def register(function: Run) -> Run:
        name = function.__name__.replace("_", "-")
        family = function.__module__.rpartition(".over_")[2]
        what = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
        keys = {key.replace("__", "."): value for key, value in settings.items()}
        ATTACKS[name] = Attack(name, family, rule, what, function, prepares, keys)
        return function

    return register


def load() -> dict[str, Attack]:
    """Import all families; returns every attack by name."""
    for family in FAMILIES:
        import_module(f"tests.attacks.over_{family}")
    return ATTACKS


def raise_descriptors() -> None:
    """Let this process hold as many sockets as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_s() -> float:
    """CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("address", help="host:port")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    raise_descriptors()
    host, _, port = options.address.rpartition(":")
    chosen = load()[options.name]
    cpu_before = 0.0

    def begun() -> None:
        nonlocal cpu_before
        cpu_before = cpu_s()
        sys.stdout.write('{"begun": true}\n')
        sys.stdout.flush()

    attacker = Attacker((host, int(port)), options.seconds, on_begin=begun)
    # Asked to stop, it says what it cost all the same.
    signal.signal(signal.SIGTERM, lambda *_: attacker.stopped.set())
    failed = ""
    try:
        if not chosen.prepares:
            attacker.begin()
        chosen.run(attacker)
    except OSError as error:
        attacker.outcomes[f"ended by {type(error).__name__}"] += 1
    except RuntimeError as error:
        failed = str(error)
    finally:
        attacker.close()
    if attacker.begun_at is None and not failed:
        failed = "it never began"
    cost = {
        "sent": attacker.sent,
        "connections": attacker.connections,
        "cpu_s": cpu_s() - cpu_before,
        "seconds": time.monotonic() - (attacker.begun_at or time.monotonic()),
        "outcomes": dict(attacker.outcomes.most_common(4)),
        "failed": failed,
    }
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(cost) + "\n")
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    # As an imported module: the attacks register with that one.
    from tests.attacks import attacker as _attacker

    sys.exit(_attacker.main())
