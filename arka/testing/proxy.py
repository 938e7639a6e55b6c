"""A TCP proxy that breaks chosen requests: the answer of a catalog is lost before or after the catalog has acted.

Owns: the listening socket and the connections through it. Knows nothing of HTTP or SQL beyond the bytes that it
is told to look for. Runs in threads of its own, beside clients that block; for tests.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Final, Self

_HOST: Final = "127.0.0.1"
_CHUNK_BYTES: Final = 1 << 16
#: Ends only what hangs: how long a connection waits for the server's answer.
_ANSWER_TIMEOUT_S: Final = 60.0


class Cut(Enum):
    """What happens to a request, in the order of how far it gets."""

    #: refused by ``Rule.answer``; the server never sees it.
    ANSWER = "answer"
    #: the connection is cut; the server never sees it.
    BEFORE = "before"
    #: the server never sees it, and the connection stays open without an answer.
    SWALLOW = "swallow"
    #: the server acts and answers; the connection is cut instead.
    AFTER = "after"
    #: the server acts and answers; the connection stays open without that answer.
    SILENCE = "silence"


@dataclass
class Rule:
    """Breaks the next ``times`` requests that contain ``match``.

    Attributes:
        match: bytes of a request's first packet: ``b"POST /v1/"``, ``b"COMMIT"``.
        cut: what happens to it.
        times: how often it still does; nothing afterwards.
        answer: sent back for ``Cut.ANSWER``, before the connection is closed.
        then: called at each cut, with the client still waiting: what others do in between.
        done: set when ``times`` has come down to 0 and ``then`` has returned.
        held: requests that are left without an answer now, their clients waiting.
    """

    match: bytes
    cut: Cut
    times: int = 1
    answer: bytes = b""
    then: Callable[[], object] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    held: int = 0


def http_answer(status: str) -> bytes:
    """An HTTP response without a body, such as ``503 Service Unavailable``."""
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


class CuttingProxy:
    """Passes connections on to a server, except for the requests that a rule breaks.

    Attributes:
        port: where it listens.
        failures: what went wrong in a rule's ``then``; empty unless a test is broken.
    """

    def __init__(self, server_port: int) -> None:
        """Listen at once.

        Args:
            server_port: the server's port on loopback; asked anew for each connection.
        """
        self._server_port = server_port
        self._listener = socket.create_server((_HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def break_next(
        self,
        match: bytes,
        cut: Cut,
        *,
        times: int = 1,
        answer: bytes = b"",
        then: Callable[[], object] | None = None,
    ) -> Rule:
        """Break the next requests that contain ``match``; see ``Rule``."""
        rule = Rule(match, cut, times, answer, then)
        with self._lock:
            self._rules.append(rule)
        return rule

    def cut_all(self) -> None:
        """Cut every connection that is open now."""
        with self._lock:
            held = tuple(self._open)
        for one in held:
            _shut(one)

    def close(self) -> None:
        """Close the listener and every connection."""
        _shut(self._listener)
        self._listener.close()
        self.cut_all()
        self._accepting.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Pass one connection's bytes on, both ways, until a side closes or a rule cuts it."""
        with client:
            try:
                server = socket.create_connection((_HOST, self._server_port))
            except OSError:
                return
            with server:
                with self._lock:
                    self._open |= {client, server}
                connection = _Connection(client, server)
                back = threading.Thread(target=connection.pass_answers, daemon=True)
                back.start()
                try:
                    self._pass_requests(connection)
                finally:
                    _shut(server)
                    _shut(client)
                    back.join()
                    with self._lock:
                        self._open -= {client, server}

    def _pass_requests(self, connection: _Connection) -> None:
        while data := _receive(connection.client):
            rule = self._matching(data)
            if rule is None:
                if not _send(connection.server, data):
                    return
                continue
            connection.hold_answer()
            if rule.cut not in (Cut.AFTER, Cut.SILENCE):
                # At once: what the server had begun for this connection, a transaction say, must end before others act.
                _shut(connection.server)
            elif not _send(connection.server, data) or not self._pass_rest(connection):
                return
            self._act(rule)
            if rule.cut is Cut.ANSWER:
                _send(connection.client, rule.answer)
            if rule.cut in (Cut.SWALLOW, Cut.SILENCE):
                with self._lock:
                    rule.held += 1
                # Until the client gives up.
                while _receive(connection.client):
                    pass
                with self._lock:
                    rule.held -= 1
            return

    def _pass_rest(self, connection: _Connection) -> bool:
        """Pass on what is left of a request until its answer has come; False: it never did."""
        connection.client.settimeout(0.01)
        try:
            for _ in range(int(_ANSWER_TIMEOUT_S / 0.01)):
                if connection.answered.is_set():
                    return True
                try:
                    data = connection.client.recv(_CHUNK_BYTES)
                except TimeoutError:
                    continue
                if not data or not _send(connection.server, data):
                    return False
        except OSError:
            return False
        finally:
            connection.client.settimeout(None)
        return False

    def _matching(self, data: bytes) -> Rule | None:
        with self._lock:
            for rule in self._rules:
                if rule.times > 0 and rule.match in data:
                    rule.times -= 1
                    return rule
        return None

    def _act(self, rule: Rule) -> None:
        if rule.then is not None:
            try:
                rule.then()
            except BaseException as error:
                self.failures.append(error)
        if rule.times == 0:
            rule.done.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Connection:
    """The two sides of one connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.answered = threading.Event()
        self._held = False

    def hold_answer(self) -> None:
        """Keep what the server says from now on from the client."""
        self._held = True

    def pass_answers(self) -> None:
        """Pass the server's bytes on until it closes, or a rule holds them."""
        while data := _receive(self.server):
            if self._held:
                self.answered.set()
            elif not _send(self.client, data):
                return
        if not self._held:
            _shut(self.client)


def _receive(from_: socket.socket) -> bytes:
    try:
        return from_.recv(_CHUNK_BYTES)
    except OSError:
        return b""


def _send(to: socket.socket, data: bytes) -> bool:
    try:
        to.sendall(data)
    except OSError:
        return False
    return True


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


__all__ = ["Cut", "CuttingProxy", "Rule", "http_answer"]
