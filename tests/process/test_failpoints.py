"""A real server killed at each failpoint, one after the other: nothing is lost, doubled or reordered."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka import failpoints
from arka.storage.disk import PosixDisk
from arka.testing.serverprocess import START_TIMEOUT_S, ServerProcess
from arka.wal.scan import SegmentScan
from arka.wal.segment import SegmentHeader, parse_segment_name

from .clients import TIERS, Stream, action, connect, create, numbers
from .keyed import (
    KeyedWriter,
    Node,
    OverwritingWriter,
    check_broken,
    check_iceberg,
    check_overwritten,
    create_tables,
    wait_dead_or_done,
)

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(400)]

TABLES = ("left", "right")
#: One with a primary key.
KEYED = "users"
#: Two of a batch's rows fill 32 KiB: a segment of 1 MiB holds some sixteen batches.
PAD = "arka" * 4096
#: Pause of a writer between two batches: four of them fill a segment in a few hundredths of a second.
PACE_S = 0.01
#: Batches after which a writer stops, in a life that is to end with SIGTERM.
BATCHES_TO_STOP = 4
#: Ends only what hangs: a life whose failpoint is never hit.
LIFE_TIMEOUT_S = 60.0
SETTINGS = {
    "server__drain_s": 20,
    "wal__segment_bytes": 1 << 20,
    "wal__release_grace_s": 0,
    "object_store__bytes": 128 << 10,
    "object_store__linger_s": 0.01,
    # Else objects that are put and deleted would be heartbeats.
    "object_store__heartbeat_s": 600,
    "iceberg__commit_interval_s": 0.1,
    "iceberg__keep_snapshots": 5,
}

#: The names that a life under load is killed at, with the hit: late enough for acks of all tiers to be on their way.
UNDER_LOAD = (
    ("wal.group_begin", 9),
    ("wal.group_written", 9),
    ("wal.group_synced", 9),
    ("wal.spare_allocated", 2),
    ("wal.footer_synced", 1),
    ("wal.segment_begin", 2),
    ("wal.segment_allocated", 2),
    ("wal.header_written", 2),
    ("wal.header_synced", 2),
    ("wal.segment_renamed", 2),
    ("seal.copy_written", 2),
    ("seal.copy_synced", 1),
    ("wal.segment_named", 2),
    ("store.staged", 6),
    ("store.linked", 6),
    ("store.named", 6),
    ("objects.begin", 3),
    ("objects.put", 3),
    ("objects.verified", 3),
    ("objects.advanced", 3),
    ("create.recorded", 1),
    ("catalog.create", 1),
    ("catalog.created", 1),
    ("create.done", 1),
    ("drop.recorded", 1),
    ("catalog.drop", 1),
    ("catalog.dropped", 1),
    ("catalog.purged", 1),
    ("drop.done", 1),
    ("drop.noted", 1),
    ("encode.written", 3),
    ("encode.synced", 3),
    ("encode.keys", 3),
    ("commit.deletes", 3),
    ("index.staged", 3),
    ("commit.manifests", 3),
    ("commit.metadata", 4),
    ("commit.swapped", 3),
    ("index.landed", 3),
    ("index.merging", 2),
    ("index.merged", 2),
    ("commit.response", 3),
    ("commit.recorded", 3),
    ("commit.answered", 3),
    ("commit.advanced", 3),
    ("release.begin", 1),
    ("release.checkpoint", 1),
    ("release.segments_forgotten", 1),
    ("release.segment_unlinked", 1),
    ("release.segment_removed", 1),
    ("release.retired", 1),
    ("store.deleted", 4),
    ("release.deleted", 1),
)
#: In a very first start.
FIRST_START = (
    ("start.disk_id", 1),
    ("store.linked", 1),
    ("epoch.begin", 1),
    ("epoch.taken", 1),
    ("epoch.block_put", 1),
    ("epoch.block_reserved", 1),
    ("whole.written", 1),
    ("whole.synced", 1),
    ("logstate.created", 1),
    ("wal.opened", 1),
    ("start.recovered", 1),
    ("epoch.start_recorded", 1),
)
#: In a start after a kill under load: the log has a tail.
RECOVERY = (
    ("logstate.slot_written", 1),
    ("logstate.slot_synced", 1),
    ("logstate.slot_written", 3),
    ("logstate.slot_synced", 3),
    ("epoch.taken", 1),
    ("recovery.cleaned", 1),
    ("recovery.torn_kept", 1),
    ("recovery.copy_written", 1),
    ("recovery.copy_synced", 1),
    ("recovery.copy_renamed", 1),
    ("recovery.copy_named", 1),
    ("recovery.replaced_removed", 1),
    ("recovery.original_unlinked", 1),
    ("recovery.original_removed", 1),
    ("whole.synced", 1),
    ("whole.renamed", 1),
    ("recovery.marked", 1),
    ("wal.opened", 1),
    ("start.recovered", 1),
    ("epoch.start_recorded", 1),
)
#: At SIGTERM.
STOP = (
    ("stop.drained", 1),
    ("stop.begin_seal", 1),
    ("stop.marked", 1),
    ("stop.sealed", 1),
)
PARTS = 9
FIRST_PARTS = 3
#: Tails that a recovery's failpoint may need: one that the kill has caught sealed or empty asks less of recovery.
TAILS = 8
#: How long a tail is written, in seconds.
TAIL_S = 0.3
TORN = b"\xa5" * 512


def test_every_failpoint_has_a_life() -> None:
    """No failpoint is left out below: each of the registry's is killed at."""
    asked = {name for name, _ in (*UNDER_LOAD, *FIRST_START, *RECOVERY, *STOP)}
    assert asked == {point.name for point in failpoints.ALL}


class Lives:
    """One data directory, and the lives of the servers on it."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.node = Node()
        self.has_tables = False
        self.writers = [
            KeyedWriter(self.node, number, TABLES[number % 2], durability, pad=lambda _: PAD, pace_s=PACE_S)
            for number, durability in enumerate(TIERS)
        ]
        self.overwriter = OverwritingWriter(
            self.node, len(TIERS), KEYED, "iceberg_committed", pad=lambda _: "", pace_s=PACE_S
        )
        self.writers.append(self.overwriter)

    def start(self) -> bool:
        """Start the server; returns whether it got as far as to serve."""
        self.node.begin_life()
        self.server.spawn()
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.server.exit_code is None:
            ready = self.server.announced()
            if ready is not None and ready["pid"] == self.server.pid:
                self.server.flight = str(ready["flight"]).removeprefix("grpc://")
                return True
            assert time.monotonic() < deadline, self.server.log_tail()
            time.sleep(0.005)
        return False

    def live(self, name: str, number: int) -> None:
        """Have a life that ends at the ``number``-th hit of a failpoint, and check that it does."""
        self.server.failpoints = f"{name}=kill@{number}"
        if self.start():
            stops = name.startswith("stop.")
            with self._load(stops=stops) as threads:
                dead = wait_dead_or_done(self.server, threads, LIFE_TIMEOUT_S)
                if not dead:
                    if stops:
                        self.server.terminate()
                    # Connections break a moment before a process that is killed can be waited for.
                    dead = wait_dead_or_done(self.server, [threading.current_thread()], LIFE_TIMEOUT_S)
            check_broken(self.writers)
            assert dead, f"{name} was not hit {number} times\n{self.server.log_tail()}"
        self._check_hit(name, number)

    def recover(self, name: str, number: int, *, torn: bool = False) -> None:
        """Have a start that dies in recovery, from a tail that a kill under load has left.

        Args:
            name: the failpoint.
            number: which hit of it.
            torn: whether the tail is to have torn bytes behind its last frame.
        """
        for _ in range(TAILS):
            self.server.failpoints = f"{name}=kill@{number}"
            if (not torn or tear(self.server.data)) and not self.start():
                self._check_hit(name, number)
                return
            # The tail was sealed, or without a frame, and its recovery had less to do: make another.
            if torn:
                self.server.failpoints = ""
                assert self.start()
            with self._load(stops=False):
                wait_dead_or_done(self.server, [threading.current_thread()], TAIL_S)
        raise AssertionError(f"{name} was not hit {number} times\n{self.server.log_tail()}")

    def _check_hit(self, name: str, number: int) -> None:
        assert self.server.wait() == -signal.SIGKILL
        assert f"failpoint {name}, hit {number}: the server with pid {self.server.pid}" in self.server.log_tail()
        check_broken(self.writers)

    @contextlib.contextmanager
    def _load(self, *, stops: bool) -> Iterator[list[threading.Thread]]:
        """Run all clients; a server that lives on behind it is killed.

        Args:
            stops: whether they stop by themselves after a few batches.
        """
        gone = threading.Event()
        threads = [threading.Thread(target=self._tend_tables, args=(not stops,))]
        for writer in self.writers:
            target = writer.sent + BATCHES_TO_STOP if stops else None
            threads.append(threading.Thread(target=writer.run, args=(self.server.location, target, gone)))
        if not self.has_tables:
            # They are there before the writers ask for them, unless the server dies at it.
            with contextlib.suppress(flight.FlightError, pa.ArrowException):
                create_tables(self.server.location, TABLES, [KEYED])
                self.has_tables = True
        for thread in threads:
            thread.start()
        try:
            yield threads
        finally:
            self.server.kill()
            gone.set()
            for thread in threads:
                thread.join(LIFE_TIMEOUT_S)
                assert not thread.is_alive()

    def finish(self) -> int:
        """Let everything that was sent get its last ack, drain, and hold Iceberg against it; returns the rows."""
        self.server.failpoints = ""
        assert self.start(), self.server.log_tail()
        create_tables(self.server.location, TABLES, [KEYED])
        gone = threading.Event()
        threads = [
            threading.Thread(target=writer.run, args=(self.server.location, writer.sent, gone))
            for writer in self.writers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIFE_TIMEOUT_S)
            assert not thread.is_alive(), self.server.log_tail()
        self._check_dropped()
        self.server.stop()
        check_broken(self.writers)
        assert [writer.status for writer in self.writers] == [""] * len(self.writers), self.server.log_tail()
        rows = check_overwritten(self.server, self.overwriter)
        return rows + check_iceberg(self.server, [writer for writer in self.writers if writer is not self.overwriter])

    def _tend_tables(self, again: bool) -> None:
        """Create a table, write to it, drop it, until the server is gone."""
        with contextlib.suppress(flight.FlightError, pa.ArrowException), connect(self.server.location) as client:
            while True:
                create(client, "extra")
                stream = Stream(client, "extra", requested_durability="disk")
                stream.write(numbers([1]))
                stream.acks(2)
                action(client, "DropTable", name="extra", purge=True)
                if not again:
                    return

    def _check_dropped(self) -> None:
        """A table that was dropped stays dropped: one made under its name again has no rows."""
        with connect(self.server.location) as client:
            create(client, "extra")
            action(client, "DropTable", name="extra", purge=True)
            assert create(client, "extra")["created"]
            assert client.do_get(flight.Ticket(b"extra")).read_all().num_rows == 0
            assert action(client, "ListTables") == [
                "default.extra",
                "default.left",
                "default.right",
                f"default.{KEYED}",
            ]


def tear(data: Path) -> bool:
    """Put bytes that are no frame behind the last one of the log's tail, as a write cut short would.

    Returns:
        Whether there was an unsealed tail with a frame in it.
    """
    number, name = max((parse_segment_name(path.name) or 0, path) for path in (data / "wal").iterdir())
    if not number:
        return False
    mapped = PosixDisk().map(name)
    header = SegmentHeader.from_bytes(str(name), mapped)
    scan = SegmentScan(str(name), mapped, header.log_uuid, number)
    for _ in scan.frames():
        pass
    if scan.footer is not None or not scan.first_lsn or scan.end + len(TORN) > len(mapped):
        return False
    with name.open("r+b") as file:
        file.seek(scan.end)
        file.write(TORN)
    return True


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, FIRST_PARTS))])
def test_killed_in_its_first_start(make_server: Callable[..., ServerProcess], part: int) -> None:
    """A first start killed at any of its steps leaves what the next start goes on from."""
    lives = Lives(make_server(**SETTINGS))
    for name, number in FIRST_START[part::FIRST_PARTS]:
        lives.live(name, number)
    lives.live("wal.group_synced", 15)
    assert lives.finish() > 0


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, PARTS))])
def test_killed_under_load_and_at_a_stop(make_server: Callable[..., ServerProcess], part: int) -> None:
    """Killed at every durable step under load and of a clean stop.

    In the end plain pyiceberg finds each row that was sent, once; no write that was acked on disk was ever lost,
    no LSN was given twice, and acks came in order in every life.
    """
    lives = Lives(make_server(**SETTINGS))
    for name, number in (*UNDER_LOAD[part::PARTS], *STOP[part::PARTS]):
        lives.live(name, number)
    assert lives.finish() > 0


@pytest.mark.long
def test_killed_again_in_recovery(make_server: Callable[..., ServerProcess]) -> None:
    """Killed under load, and then again at every durable step of the start that recovers from it."""
    lives = Lives(make_server(**SETTINGS))
    lives.live("wal.group_synced", 9)
    for name, number in RECOVERY:
        lives.recover(name, number, torn=name == "recovery.torn_kept")
    assert lives.finish() > 0
    assert list((lives.server.data / "wal").glob("*.torn-*")), "nothing was torn"
