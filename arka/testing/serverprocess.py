"""A real ``arka-server`` process on a data directory of the caller's, ended by its pid whatever happens.

Owns: the process, its log file and what it announces in ``server.json``. For tests and benchmarks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

from arka import failpoints
from arka.testing.processes import descendants, memory_of, wait_gone

#: These end only what hangs.
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0


class ServerFailed(AssertionError):
    """The server did not do what it was asked for; the message ends with its last log lines."""


class ServerProcess:
    """One server process, which can be started again on the same data.

    Attributes:
        data: the data directory.
        log: the file that gets the output of every start.
        flight: where Flight listens, as ``host:port``; set by ``start``.
        failpoints: what ``ARKA_FAILPOINTS`` says to the next process; empty for none.
        program: what is run.
        cwd: its working directory; None for the caller's.
        variables: more variables of its environment.
        umask: its umask; -1 for the caller's.
    """

    def __init__(self, data: Path, settings: Mapping[str, object] | None = None, *flags: str) -> None:
        """Say what is to be started.

        Args:
            data: the data directory; its parent gets the log.
            settings: by key (``server.drain_s``, ``iceberg.catalog.s3.region``), handed over as variables. No
                others of the caller's environment reach the server.
            flags: more command line arguments.
        """
        self.data = data
        self.log = data.with_name(f"{data.name}.log")
        self.flight = ""
        self.failpoints = ""
        self.program = Path(sys.executable).with_name("arka-server")
        self.cwd: Path | None = None
        self.variables: dict[str, str] = {}
        self.umask = -1
        self._flags = flags
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("ARKA_")}
        for key, value in (settings or {}).items():
            self._environment[variable_of(key)] = str(value)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process of the last start."""
        return self._running.pid

    @property
    def location(self) -> str:
        """Where Flight listens, as a Flight location."""
        return f"grpc://{self.flight}"

    @property
    def address(self) -> tuple[str, int]:
        """Where Flight listens, for a socket."""
        host, _, port = self.flight.rpartition(":")
        return host, int(port)

    @property
    def exit_code(self) -> int | None:
        """The exit code, or None while the process runs."""
        return self._running.poll()

    def spawn(self) -> None:
        """Start the process without waiting for anything."""
        ports = ("--port", "0", "--http-port", "0")
        wished = {failpoints.VARIABLE: self.failpoints, failpoints.TESTING: "1"} if self.failpoints else {}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self.program), "--data-dir", str(self.data), *ports, *self._flags],
                cwd=self.cwd,
                env=self._environment | wished | self.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=self.umask,
            )

    def start(self) -> ServerProcess:
        """Start the process and wait until it serves.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        self.spawn()
        return self.wait_ready()

    def wait_ready(self) -> ServerProcess:
        """Wait until the process that was spawned last serves.

        Raises:
            ServerFailed: it ended, or was not ready in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while (ready := self.announced()) is None or ready["pid"] != self.pid:
            if self.exit_code is not None:
                raise ServerFailed(f"exit code {self.exit_code} at the start\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"not ready after {START_TIMEOUT_S:g} s\n{self.log_tail()}")
            time.sleep(0.01)
        self.flight = str(ready["flight"]).removeprefix("grpc://")
        return self

    def terminate(self) -> None:
        """Ask the process to drain, without waiting."""
        self._running.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for the end of the process and return its exit code.

        Raises:
            ServerFailed: it did not end in time; it still runs.
        """
        try:
            return self._running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"still running after {timeout_s:g} s\n{self.log_tail()}") from None

    def stop(self) -> None:
        """Drain, and insist on exit code 0.

        Raises:
            ServerFailed: it ended otherwise, or had ended before.
        """
        if self.exit_code is not None:
            raise ServerFailed(f"it went away with exit code {self.exit_code}\n{self.log_tail()}")
        self.terminate()
        code = self.wait()
        if code != 0:
            raise ServerFailed(f"exit code {code} after SIGTERM\n{self.log_tail()}")

    def kill(self) -> None:
        """End the process as a power switch would, if it runs."""
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def announced(self) -> dict[str, object] | None:
        """Read ``server.json``; None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, object] = json.loads((self.data / "server.json").read_text())
            return found
        return None

    def log_tail(self, lines: int = 50) -> str:
        """The last lines of the log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def threads(self) -> int:
        """Count the threads of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("\nThreads:")[2].split(maxsplit=1)[0])

    def descendants(self) -> set[int]:
        """The processes below this one that run now: workers and what they need."""
        return descendants(self.pid)

    def memory(self, *, workers: bool = True) -> tuple[int, int]:
        """What the server, with its workers, holds now: anonymous and all resident memory, in bytes (R9)."""
        return memory_of({self.pid, *(self.descendants() if workers else ())})

    def freeze(self) -> None:
        """Let the process do nothing while its connections stay (SIGSTOP); its workers run on."""
        self._running.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo ``freeze``."""
        self._running.send_signal(signal.SIGCONT)

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server was not started"
        return self._process

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.stop()
        finally:
            self.kill()


def variable_of(key: str) -> str:
    """The environment variable of a setting; of one of a pass-through table too (docs/configuration.md)."""
    table, _, rest = key.partition(".")
    name, _, entry = rest.partition(".")
    variable = f"ARKA_{table}_{name}"
    if entry:
        variable += "__" + entry.replace(".", "__").replace("-", "_")
    return variable.upper()


__all__ = ["START_TIMEOUT_S", "STOP_TIMEOUT_S", "ServerFailed", "ServerProcess", "variable_of", "wait_gone"]
