"""An ``arka-server`` process on embedded defaults, for the examples that bring their own server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType


class ServerFailed(Exception):
    """The server did not start, or ended on its own; the message ends with its last log lines."""


class LocalServer:
    """One server process with its data in a directory of the caller's.

    Attributes:
        data: the data directory.
        log: the file that has the server's output.
        location: where Flight listens, once started: ``grpc://127.0.0.1:PORT``.
    """

    def __init__(self, data: Path, *flags: str) -> None:
        self.data = data
        self.log = data.parent / f"{data.name}.log"
        self.location = ""
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 60) -> None:
        """Start the process and wait until it serves.

        Raises:
            ServerFailed: it ended, or was not ready after ``timeout_s``.
        """
        program = Path(sys.executable).with_name("arka-server")
        command = [
            str(program),
            "--data-dir",
            str(self.data),
            "--port",
            "0",
            "--http-port",
            "0",
            *self._flags,
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + timeout_s
        while not self._read_location():
            if self._process.poll() is not None:
                raise ServerFailed(f"arka-server ended with {self._process.returncode}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"arka-server was not ready after {timeout_s:g} s\n{self.log_tail()}")
            time.sleep(0.02)

    def stop(self, timeout_s: float = 30) -> int:
        """Ask the server to drain and return its exit code; kill it if it does not end.

        Raises:
            ServerFailed: it had to be killed.
        """
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ServerFailed(f"arka-server did not stop in {timeout_s:g} s\n{self.log_tail()}") from None

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the server's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _read_location(self) -> str:
        """Read where the server listens; nothing as long as ``server.json`` is another process's."""
        assert self._process is not None
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            ready = json.loads((self.data / "server.json").read_text())
            if ready["pid"] == self._process.pid:
                address = ready["flight"]
                self.location = address if "://" in address else f"grpc://{address}"
        return self.location

    def __enter__(self) -> LocalServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
