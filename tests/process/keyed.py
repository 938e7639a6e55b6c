"""A client that keeps to the protocol through every crash: it resumes, sends again by key, and believes no ack.

It is the witness of the crash tests: what it sent is what Iceberg must hold in the end, and each ack is held
against what the acks before it, in this life of the server and in all earlier ones, have said.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from arka.testing.serverprocess import ServerFailed, ServerProcess

from . import lake
from .clients import TIERS, Ack, Stream, connect, create

#: Rows of a batch: a batch is there whole or not at all.
BATCH_ROWS = 4
SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("pad", pa.string())])
#: Ends only what hangs.
JOIN_TIMEOUT_S = 90.0


@dataclass
class Told:
    """What the acks have said of one write: its LSN, the last tier (-1 for none), and whether it outlived a crash."""

    lsn: int = 0
    tier: int = -1
    kept: bool = False


@dataclass
class Node:
    """What all clients of one log know together: who was given which LSN."""

    given: dict[int, tuple[int, int]] = field(default_factory=dict)
    #: The highest LSN that any life before this one gave.
    floor: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin_life(self) -> None:
        """The server was started again: what it gives from now on lies above all that was given."""
        self.floor = max(self.given, default=0)

    def note(self, lsn: int, writer: int, number: int) -> None:
        """Take an LSN that was given to a write for the first time."""
        with self.lock:
            assert lsn > self.floor, f"LSN {lsn} was given after {self.floor} by an earlier life"
            assert self.given.setdefault(lsn, (writer, number)) == (writer, number), f"LSN {lsn} was given twice"


class KeyedWriter:
    """Writes batches 0, 1, 2 … of its own, each with its key, in as many lives of the server as it takes.

    Attributes:
        schema: what its streams have.
        wishes: what else its streams say once, as fields of a WriteRequest.
        sent: how many batches were begun to be sent, in all lives.
        told: by number, what is known of each.
        duplicates: acks that said that a key had been seen.
        errors: error acks, in order; what a test did not expect must not be there.
        broken: rules that acks have broken.
    """

    schema = SCHEMA

    def __init__(
        self,
        node: Node,
        writer: int,
        table: str,
        durability: str,
        *,
        pad: Callable[[int], str] = str,
        window: int = 16,
        pace_s: float = 0,
        survives: str = "disk",
    ) -> None:
        """Say who it is.

        Args:
            node: what all writers of the log share.
            writer: its number; no other writer of the table has it.
            table: where it writes to.
            durability: what it asks for, and waits for.
            pad: makes the second column of row ``n``.
            window: batches that wait for their last ack at a time.
            pace_s: pause between two batches.
            survives: the first tier whose acks outlive the end of a life: ``object_storage`` where the disk goes too.
        """
        self.table = table
        self.durability = durability
        self.wishes: dict[str, Any] = {}
        self.sent = 0
        self.told: dict[int, Told] = {}
        self.duplicates = 0
        self.errors: list[Ack] = []
        self.broken: list[str] = []
        self.status = ""
        self._node = node
        self._writer = writer
        self._last = TIERS.index(durability)
        self._pad = pad
        self._window = window
        self._pace_s = pace_s
        self._survives = TIERS.index(survives)

    def rows(self) -> range:
        """The rows that Iceberg must hold in the end, if everything sent was accepted."""
        return range(self._row(0), self._row(self.sent))

    def batch(self, number: int) -> pa.RecordBatch:
        """Make a batch: always the same for the same number."""
        rows = range(self._row(number), self._row(number + 1))
        return pa.record_batch([pa.array(rows, pa.int64()), pa.array(map(self._pad, rows))], schema=SCHEMA)

    def send(self, stream: Stream, number: int) -> None:
        """Write a batch to a stream that gives it its key."""
        stream.write(self.batch(number))

    def on_disk(self) -> list[int]:
        """The rows of the writes that were acked on disk."""
        numbers = [number for number, told in self.told.items() if told.tier >= TIERS.index("disk")]
        return [row for number in numbers for row in range(self._row(number), self._row(number + 1))]

    def _row(self, number: int) -> int:
        return self._writer * 10_000_000 + number * BATCH_ROWS

    def run(self, location: str, count: int | None, gone: threading.Event) -> None:
        """Resume, send again, and write on until the server is gone or ``count`` batches were begun in all.

        With a count it half-closes then and reads to the end.
        """
        self.status = ""
        try:
            with connect(location) as client:
                self._write(client, count, gone)
        except (flight.FlightError, pa.ArrowException) as error:
            self.status = f"{type(error).__name__}: {error}"
        except StopIteration:
            self.status = "ended with OK before all acks"
        except AssertionError as error:
            self.broken.append(str(error))

    def _write(self, client: flight.FlightClient, count: int | None, gone: threading.Event) -> None:
        stream = Stream(client, self.table, None)
        known = max((told.lsn for told in self.told.values()), default=0)
        stream.request(requested_durability=self.durability, resume_after_lsn=known)
        first = self._first(stream.acks(4))
        stream.request(idempotency_key=f"writer-{self._writer}", key_start=first, **self.wishes)
        stream.writer.begin(self.schema)
        room = threading.Semaphore(self._window)
        reading = threading.Thread(target=self._read, args=(stream, first, room))
        reading.start()
        number = first
        try:
            while not gone.is_set() and (count is None or number < max(count, self.sent)):
                if not room.acquire(timeout=0.05):
                    continue
                self.sent = max(self.sent, number + 1)
                self.send(stream, number)
                number += 1
                gone.wait(self._pace_s)
            if count is not None:
                stream.writer.done_writing()
        finally:
            if gone.is_set() or count is not None:
                reading.join(JOIN_TIMEOUT_S)
            else:
                reading.join()
        stream.writer.close()

    def _first(self, handshake: Sequence[Ack]) -> int:
        """The first batch to send: without its last ack, or perhaps lost and not vouched for by the handshake."""
        assert [ack["sequence"] for ack in handshake] == [-1] * 4, handshake
        (safe,) = (ack["lsn"] for ack in handshake if ack["durability_level"] == self.durability)
        for number in range(self.sent):
            told = self.told.get(number, Told())
            may_be_lost = told.tier < self._survives and not told.kept and told.lsn > safe
            if told.tier < self._last or may_be_lost:
                return number
        return self.sent

    def _read(self, stream: Stream, first: int, room: threading.Semaphore) -> None:
        next_of = dict.fromkeys(range(len(TIERS)), 0)
        # Writes that an error ack has ended: tiers pass over them.
        ended: set[int] = set()
        reached: dict[int, int] = {}
        last_lsn = 0
        try:
            for ack in stream.rest():
                sequence, tier = ack["sequence"], TIERS.index(ack["durability_level"])
                if ack["error"] is not None:
                    assert sequence not in ended, f"{ack} came after an error ack"
                    ended.add(sequence)
                    self.errors.append(ack)
                    room.release()
                    continue
                while next_of[tier] in ended:
                    next_of[tier] += 1
                assert sequence == next_of[tier], f"{ack} came when sequence {next_of[tier]} was next of its tier"
                next_of[tier] += 1
                assert reached.get(sequence, -1) == tier - 1, f"{ack} came after tier {reached.get(sequence)}"
                reached[sequence] = tier
                if tier == 0 and not ack.get("duplicate"):
                    assert ack["lsn"] > last_lsn, f"{ack} came after LSN {last_lsn}"
                    last_lsn = ack["lsn"]
                self._take(ack, first + sequence, tier)
                if tier == self._last:
                    room.release()
        except (flight.FlightError, pa.ArrowException) as error:
            self.status = f"{type(error).__name__}: {error}"
        except AssertionError as error:
            self.broken.append(str(error))

    def _take(self, ack: Ack, number: int, tier: int) -> None:
        """Hold one ack against what was known of its write."""
        told = self.told.setdefault(number, Told())
        assert ack.get("code") is None, ack
        if ack.get("duplicate"):
            self.duplicates += 1
            if told.lsn not in (0, ack["lsn"]):
                # A crash took it with its memory ack; it was sent again and kept, and that life's acks were not read.
                assert told.tier < self._survives, f"{ack}: batch {number} was given LSN {told.lsn}"
                assert not told.kept, f"{ack}: batch {number} had outlived a crash with LSN {told.lsn}"
                assert ack["lsn"] > told.lsn, f"{ack}: batch {number} was given LSN {told.lsn} before"
                told.tier = -1
            # An earlier life gave it, and this one knows it: from its disk, or from the store.
            told.kept |= ack["lsn"] <= self._node.floor
        elif ack["lsn"] != told.lsn:
            assert told.tier < self._survives, f"{ack}: batch {number} was acked at tier {told.tier} and is lost"
            assert tier == 0, f"{ack}: batch {number} had LSN {told.lsn}"
            assert not told.kept, f"{ack}: batch {number} had outlived a crash and is lost"
            self._node.note(ack["lsn"], self._writer, number)
            told.tier = -1
        told.lsn = ack["lsn"]
        told.tier = max(told.tier, tier)


class OverwritingWriter(KeyedWriter):
    """Writes the same few keys of a primary-key table again and again; each fourth batch deletes those before it.

    It is the table's only writer, so the table must hold what its batches come to in their order.
    """

    #: Keys; more than a batch has, so that old rows lie in several files.
    KEYS = 10 * BATCH_ROWS

    def batch(self, number: int) -> pa.RecordBatch:
        """Make a batch; the ``pad`` of a row says which batch it is of."""
        keys = self._keys(number - 1 if self.deletes(number) else number)
        pads = [f"{number} {self._pad(key)}" for key in keys]
        return pa.record_batch([pa.array(keys, pa.int64()), pa.array(pads)], schema=SCHEMA)

    def send(self, stream: Stream, number: int) -> None:
        """Write a batch, and say what it does."""
        request = {"operation": "delete"} if self.deletes(number) else {}
        stream.write(self.batch(number), **request)

    def deletes(self, number: int) -> bool:
        """Whether a batch deletes."""
        return number % 4 == 3

    def _keys(self, number: int) -> list[int]:
        return [(number * BATCH_ROWS * 3 + row) % self.KEYS for row in range(BATCH_ROWS)]

    def expected(self) -> dict[int, str]:
        """What the table must hold in the end, if everything sent was accepted."""
        rows: dict[int, str] = {}
        for number in range(self.sent):
            for row in self.batch(number).to_pylist():
                if self.deletes(number):
                    rows.pop(row["n"], None)
                else:
                    rows[row["n"]] = row["pad"]
        return rows


def create_tables(location: str, names: Iterable[str], keyed: Iterable[str] = ()) -> None:
    """Make the tables that the writers write to, those in ``keyed`` with a primary key; those that exist stay."""
    with connect(location) as client:
        for name in names:
            create(client, name, [("n", "int64!"), ("pad", "utf8")])
        for name in keyed:
            create(client, name, [("n", "int64!"), ("pad", "utf8")], table_type="primary_key", primary_key="n")


def wait_dead_or_done(server: ServerProcess, threads: Sequence[threading.Thread], timeout_s: float) -> bool:
    """Wait until the server has died or all threads have ended; returns whether it has died."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.exit_code is not None:
            return True
        if not any(thread.is_alive() for thread in threads):
            return False
        time.sleep(0.01)
    return server.exit_code is not None


def kill_the_start(server: ServerProcess, after_s: float) -> None:
    """Start the server and kill it a moment later, wherever it is then."""
    server.spawn()
    with contextlib.suppress(ServerFailed):
        code = server.wait(after_s)
        raise AssertionError(f"the start ended with exit code {code}\n{server.log_tail()}")
    server.kill()


def write_until_killed(
    server: ServerProcess, writers: Iterable[Callable[[threading.Event], None]], after_s: float
) -> set[int]:
    """Let writers run, each in a thread of its own, kill the server a while later, and wait for their end.

    Returns:
        The processes below the server as they were before its end.
    """
    gone = threading.Event()
    threads = [threading.Thread(target=write, args=(gone,)) for write in writers]
    for thread in threads:
        thread.start()
    gone.wait(after_s)
    workers = server.descendants()
    server.kill()
    gone.set()
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive()
    return workers


def send_the_rest(server: ServerProcess, writers: Sequence[KeyedWriter], timeout_s: float = JOIN_TIMEOUT_S) -> None:
    """Let writers send again what has not had its last ack, and nothing new."""
    gone = threading.Event()
    threads = [threading.Thread(target=writer.run, args=(server.location, writer.sent, gone)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), server.log_tail()
    check_broken(writers)
    assert [writer.status for writer in writers] == [""] * len(writers), server.log_tail()


def check_broken(writers: Iterable[KeyedWriter]) -> None:
    """Check that no ack has broken a rule, and that none was an error."""
    writers = list(writers)
    broken = [rule for writer in writers for rule in writer.broken]
    assert broken == [], broken
    assert [ack for writer in writers for ack in writer.errors] == []


def check_overwritten(server: ServerProcess, writer: OverwritingWriter) -> int:
    """Check with plain pyiceberg that a primary-key table holds what its writer's batches come to."""
    found = lake.rows(server.data, writer.table).to_pylist()
    rows = {row["n"]: row["pad"] for row in found}
    assert len(rows) == len(found), f"{writer.table}: a key has more than one row"
    expected = writer.expected()
    assert {key: rows.get(key, "")[:12] for key in expected} == {key: pad[:12] for key, pad in expected.items()}
    assert rows == expected
    return len(rows)


def check_iceberg(server: ServerProcess, writers: Sequence[KeyedWriter]) -> int:
    """Check with plain pyiceberg that the tables hold what was sent, each row once; returns how many rows.

    To be called when the server has drained after everything was sent to its last ack.
    """
    total = 0
    for table in sorted({writer.table for writer in writers}):
        found = Counter(lake.column(server.data, table, "n"))
        wanted = {row for writer in writers if writer.table == table for row in writer.rows()}
        acked = {row for writer in writers if writer.table == table for row in writer.on_disk()}
        assert sorted(acked - found.keys())[:10] == [], f"{table}: acked on disk and not in Iceberg"
        assert [row for row, times in found.items() if times > 1][:10] == [], f"{table}: more than once in Iceberg"
        assert sorted(wanted ^ found.keys())[:10] == [], f"{table}: sent and not there, or there and never sent"
        total += len(found)
    return total
