"""One attack against a server of its own: pairs of attack and control, a neighbour beside both, then SIGTERM.

Owns: which processes run when, and what was measured. Does not own the verdict nor the table (``verdicts``).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from arka.testing.serverprocess import ServerFailed, ServerProcess
from bench.harness import ROOT
from tests.attacks.attacker import Attack
from tests.attacks.wire import Wire

MIB = 1024 * 1024
#: Seconds of quiet around each attack and each control: what is left over of the last one goes by.
QUIET_S = 1.5
#: Seconds that a process of ours may take beyond its time; it only ends what hangs.
_GRACE_S = 60.0
#: How long a server is given to answer again after an attack; what it takes counts with the attack.
SETTLE_S = 60.0


@dataclass
class Pair:
    """An attack and the control beside it.

    Attributes:
        name: the attack's.
        cost: of the attack, as it said itself.
        attacked: what the neighbour saw beside the attack, by kind.
        controlled: the same beside the control.
    """

    name: str
    cost: dict[str, Any]
    attacked: dict[str, dict[str, Any]]
    controlled: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Measured:
    """What one attack did, or several, one after the other, to one server.

    Attributes:
        attack: which, or the one that runs while the server drains.
        pairs: attack and control, interleaved.
        quiet: what the neighbour saw before anything else ran.
        memory_bytes: the server's limits.memory_bytes.
        anonymous_bytes: RssAnon of the server's process at its highest, and before the attack.
        workers_bytes: of its workers, at the highest.
        descriptors: open files of the server at the highest.
        threads: at the highest.
        disk_bytes: what the data directory grew by.
        server_cpu_s: CPU of the server's process in the attacks.
        drain_s: server.drain_s.
        ended_s: seconds from SIGTERM, in the middle of an attack, to the exit; None when it had to be killed.
        died: the server's exit code, if it ended before SIGTERM.
        account: the neighbour's rows after a restart.
        complaints: lines of the log that no client may cause.
    """

    attack: Attack
    pairs: list[Pair] = field(default_factory=list)
    quiet: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory_bytes: int = 1024 * MIB
    anonymous_bytes: int = 0
    anonymous_before: int = 0
    workers_bytes: int = 0
    descriptors: int = 0
    threads: int = 0
    disk_bytes: int = 0
    server_cpu_s: float = 0.0
    drain_s: float = 10.0
    ended_s: float | None = None
    died: int | None = None
    account: dict[str, Any] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)


class Watch:
    """Samples a server's process every 50 ms and keeps the highest."""

    def __init__(self, server: ServerProcess) -> None:
        self.anonymous = self.workers = self.descriptors = self.threads = 0
        self._server = server
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stopped.wait(0.05):
            with suppress(OSError, IndexError):  # It ends meanwhile.
                self.anonymous = max(self.anonymous, anonymous_of(self._server.pid))
                self.threads = max(self.threads, self._server.threads())
                self.descriptors = max(self.descriptors, descriptors_of(self._server.pid))
                if number % 20 == 0:
                    self.workers = max(self.workers, sum(anonymous_of(pid) for pid in self._server.descendants()))
            number += 1

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self._thread.join()


def anonymous_of(pid: int) -> int:
    """A process's anonymous memory, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("\nRssAnon:")[2].split(maxsplit=1)[0]) * 1024


def descriptors_of(pid: int) -> int:
    """How many descriptors a process has open."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def cpu_of(pid: int) -> float:
    """CPU seconds of a process."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100
    return 0.0


def bytes_below(folder: Path) -> int:
    """What the files below a folder hold."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


class Process:
    """A module of this package as a process, which answers in JSON lines."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"tests.attacks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Say a line and wait for the answer."""
        stdin = self._pipe(self._process.stdin)
        stdin.write(line + "\n")
        stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Wait for the next line.

        Raises:
            RuntimeError: the process ended without one.
        """
        line = self._pipe(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"a process of the harness ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def finish(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the end; gives what it cost, the last line."""
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return {"sent": 0, "connections": 0, "cpu_s": 0.0, "outcomes": {}, "failed": "it did not end"}
        found: dict[str, Any] = json.loads(out.splitlines()[-1]) if out.strip() else {"failed": "it said nothing"}
        return found

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def kill(self) -> None:
        """End it, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


def run_attacks(
    attacks: Sequence[Attack],
    *,
    drained: Attack,
    seconds: float,
    settings: dict[str, str] | None = None,
    folder: Path | None = None,
    control: bool = True,
    say: Any = None,
) -> Measured:
    """Run attacks one after the other against a server of their own, a control after each.

    Args:
        attacks: which; one several times for several pairs.
        drained: the one that runs when the server gets SIGTERM.
        seconds: of each attack.
        settings: of the server, by key; the attacks' own go before them.
        folder: where the server's data goes; None for a folder that is deleted.
        control: whether the control runs at all.
        say: called with what happens.
    """
    chosen = dict(settings or {})
    for attack in attacks:
        chosen |= attack.settings
    measured = Measured(drained)
    measured.memory_bytes = _bytes(chosen.get("limits.memory_bytes", "1GiB"))
    measured.drain_s = float(chosen.get("server.drain_s", "10"))
    own = folder is None
    folder = folder or Path(tempfile.mkdtemp(prefix="arka-attack-"))
    server = ServerProcess(folder / "data", chosen)
    tell = say or (lambda _: None)
    try:
        server.start()
        with Process("neighbour", server.location) as neighbour:
            neighbour.answer()
            _measure(measured, server, neighbour, attacks, seconds=seconds, control=control, tell=tell)
            measured.complaints = complaints_of(server.log)
            tell("a restart, and the neighbour's rows")
            server.kill()
            restarted = ServerProcess(folder / "data", chosen)
            try:
                restarted.start()
                measured.account = neighbour.ask(f"stop {restarted.location}")
            except (ServerFailed, RuntimeError) as error:
                measured.account = {"failed": str(error)[:2000]}
            finally:
                restarted.kill()
    finally:
        server.kill()
        if own:
            shutil.rmtree(folder, ignore_errors=True)
    return measured


def _measure(
    measured: Measured,
    server: ServerProcess,
    neighbour: Process,
    attacks: Sequence[Attack],
    *,
    seconds: float,
    control: bool,
    tell: Any,
) -> None:
    time.sleep(QUIET_S)
    measured.quiet = neighbour.ask("window attack")
    measured.anonymous_before = anonymous_of(server.pid)
    disk_before = bytes_below(server.data)
    watch = Watch(server)
    try:
        for number, attack in enumerate(attacks, 1):
            tell(f"{attack.name}, {number} of {len(attacks)}")
            with Process("attacker", *_arguments(attack, server, seconds)) as process:
                cost = process.answer()
                neighbour.ask("window attack")
                cpu_before = cpu_of(server.pid)
                if "begun" in cost:
                    cost = process.finish(seconds + _GRACE_S)
            # What the server still has to do for the attack counts with the attack.
            settle(server)
            pair = Pair(attack.name, cost, neighbour.ask("window quiet"))
            measured.pairs.append(pair)
            measured.server_cpu_s += cpu_of(server.pid) - cpu_before
            measured.disk_bytes = max(measured.disk_bytes, bytes_below(server.data) - disk_before)
            if server.exit_code is not None:
                break
            time.sleep(QUIET_S)
            if control:
                tell("its control")
                neighbour.ask("window control")
                _control(server, cost, seconds)
                pair.controlled = neighbour.ask("window quiet")
                time.sleep(QUIET_S)
        if server.exit_code is not None:
            measured.died = server.exit_code
            return
        tell("SIGTERM in the middle")
        with Process("attacker", *_arguments(measured.attack, server, seconds + 2 + measured.drain_s)) as last:
            last.answer()
            time.sleep(min(2.0, seconds / 2))
            started = time.monotonic()
            if server.exit_code is not None:
                measured.died = server.exit_code
                return
            server.terminate()
            with suppress(ServerFailed):
                code = server.wait(measured.drain_s * 2 + 10)
                measured.ended_s = time.monotonic() - started
                if code:
                    measured.died = code
            last.kill()
    finally:
        watch.stop()
        measured.anonymous_bytes = watch.anonymous
        measured.workers_bytes = watch.workers
        measured.descriptors = watch.descriptors
        measured.threads = watch.threads


def settle(server: ServerProcess) -> bool:
    """Wait until the server answers a PING on a new connection; returns whether it did."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and server.exit_code is None:
        with suppress(OSError):
            on = Wire(server.address, lambda: time.monotonic() < deadline, source="127.0.0.1")
            answered = on.ping() is not None
            on.close()
            if answered:
                return True
        time.sleep(0.2)
    return False


def _arguments(attack: Attack, server: ServerProcess, seconds: float) -> tuple[str, ...]:
    return (attack.name, server.flight, "--seconds", f"{seconds:g}")


def _control(server: ServerProcess, cost: dict[str, Any], seconds: float) -> None:
    arguments = ("--sent", str(cost.get("sent", 0)), "--cpu", f"{cost.get('cpu_s', 0.0):.3f}")
    with Process("control", server.flight, *arguments, "--seconds", f"{seconds:g}") as process:
        process.finish(seconds + _GRACE_S)


#: Events that only a fault of the server's own writes; docs/operations.md lists all.
_FAULTS = ("connection.failed", "rpc.failed", "server.failed", "Traceback", "incident")


def complaints_of(log: Path) -> list[str]:
    """Lines of a log that no client may cause, the first of each fault."""
    found: dict[str, str] = {}
    with suppress(FileNotFoundError), log.open(errors="replace") as lines:
        for line in lines:
            for fault in _FAULTS:
                if fault in line:
                    found.setdefault(fault, line.strip()[:300])
    return list(found.values())


def _bytes(text: str) -> int:
    for suffix, factor in (("KiB", 1024), ("MiB", MIB), ("GiB", 1024 * MIB)):
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    return int(text)
