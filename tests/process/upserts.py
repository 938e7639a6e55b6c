"""Streams that upsert and delete the same keys while their server is killed again and again, against a dictionary.

    python -m tests.process.upserts [--seconds 300] [--seed 1] [--layout partitioned]

Eight writers have a DoExchange stream each on one primary-key table (each table, where several layouts are given).
Which of their writes came last is known from the LSNs in the acks alone, so the dictionary is made afterwards: from all
writes in the order of their LSNs. Checked at the end, when everything was sent to ``iceberg_committed`` and the server
has drained: each snapshot, scanned with plain pyiceberg, holds what the dictionary held after the snapshot's last LSN,
and five other engines read the same rows from the current one. Prints a line for the run and one for each table. The
seed settles what is written, and when there is a kill; how much is written until then is the machine's.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from arka.testing.serverprocess import ServerProcess, wait_gone
from tests import readers
from tests.process import lake
from tests.process.clients import TIERS, Stream, connect, create
from tests.process.keyed import (
    KeyedWriter,
    Node,
    check_broken,
    kill_the_start,
    send_the_rest,
    write_until_killed,
)

FIELDS = [("id", "int64!"), ("tenant", "utf8!"), ("region", "utf8"), ("stamp", "int64"), ("note", "utf8")]
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("tenant", pa.string(), nullable=False),
        ("region", pa.string()),
        ("stamp", pa.int64()),
        ("note", pa.string()),
    ]
)
COLUMNS = SCHEMA.names

TENANTS = ("", "a", "acme/eu=1", "Ähre", "日本", "🎈" * 20, "a\N{COMBINING DIAERESIS}", "x" * 200)
REGIONS = ("eu", "us west", "日/本", None)
NOTES = (None, "", "note", "long " * 50)

STREAMS = 8
#: Keys that there are; low ones are written far more often than high ones.
KEYS = 1200
#: One write in so many deletes; the last writer's all do, and it sends keys alone.
DELETES = 6
#: Writes of a stream that wait for their commit at a time, and the pause between two.
WINDOW = 64
PACE_S = 0.01
#: How long a served life lasts, in seconds, and a start that is killed before it serves.
LIFE_S = (0.5, 6.0)
START_S = 1.2
#: One start in so many is killed too, and before one in so many the index of keys is lost or damaged.
STARTS = 6
HARMS = 5
#: Ends only what hangs.
REST_TIMEOUT_S = 300.0
#: Every snapshot stays. Small segments, so that kills fall into rolls and checkpoints too.
SETTINGS = {
    "server.drain_s": 25,
    "wal.segment_bytes": 1 << 20,
    "wal.release_grace_s": 0,
    "object_store.linger_s": 0.01,
    "iceberg.commit_interval_s": 0.25,
    "iceberg.keep_snapshots": 1_000_000,
}

Row = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """What a table is like.

    Attributes:
        key: its key's columns.
        transforms: its partition fields, by column.
        merge: which upsert of a key stands.
    """

    key: tuple[str, ...]
    transforms: dict[str, str] = field(default_factory=dict)
    merge: str = "last"

    def create(self, location: str, table: str) -> None:
        """Make the table."""
        fields = [{"source_id": COLUMNS.index(name), "transform": how} for name, how in self.transforms.items()]
        with connect(location) as client:
            create(
                client,
                table,
                FIELDS,
                table_type="primary_key",
                primary_key=list(self.key),
                properties={"arka.merge": self.merge},
                partition_spec={"fields": fields},
            )

    def key_of(self, row: Row) -> Row:
        """The key of a row."""
        return tuple(row[COLUMNS.index(name)] for name in self.key)


LAYOUTS = {
    "partitioned": Layout(("id",), {"region": "Identity", "id": "Bucket(4)"}),
    "unpartitioned": Layout(("id",)),
    "strings": Layout(("tenant", "id"), {"region": "Identity", "tenant": "Truncate(1)"}),
    "first": Layout(("id",), {"region": "Identity"}, merge="first"),
}


@dataclass(frozen=True)
class Write:
    """One write; of a delete's rows, the keys count."""

    deletes: bool
    rows: list[Row]


class UpsertWriter(KeyedWriter):
    """Upserts and deletes keys that all writers share: always the same write for the same number."""

    schema = SCHEMA

    def __init__(self, node: Node, writer: int, layout: str, seed: int, *, keys_alone: bool) -> None:
        """Say who it is.

        Args:
            node: what all writers of the log share.
            writer: its number; no other writer of the log has it.
            layout: of its table, and the table's name.
            seed: what it writes depends on this, its number, and the layout.
            keys_alone: whether its stream has the key's columns alone, and deletes.
        """
        super().__init__(node, writer, layout, "iceberg_committed", window=WINDOW, pace_s=PACE_S)
        self._layout = LAYOUTS[layout]
        self._seed = seed
        self._keys_alone = keys_alone
        if keys_alone:
            self.schema = pa.schema([SCHEMA.field(name) for name in self._layout.key])
            self.wishes = {"operation": "delete"}

    def write(self, number: int) -> Write:
        """Make a write."""
        pick = random.Random(f"{self._seed}/{self._writer}/{number}")
        deletes = self._keys_alone or pick.randrange(DELETES) == 0
        # Now and then none, and now and then many.
        size = pick.choice((1, 1, 2, 5, 10, 10, 20, 40) if pick.random() < 0.98 else (0, 400))
        if self._keys_alone:
            size = min(size, 5)
        stamps = count((self._writer << 32 | number) << 10)
        return Write(deletes, [self._row(pick, next(stamps)) for _ in range(size)])

    def _row(self, pick: random.Random, stamp: int) -> Row:
        key = int(KEYS * pick.random() ** 2)
        if len(self._layout.key) > 1:
            number, tenant = key // len(TENANTS), TENANTS[key % len(TENANTS)]
        else:
            number, tenant = key, pick.choice(TENANTS)
        return number, tenant, pick.choice(REGIONS), stamp, pick.choice(NOTES)

    def batch(self, number: int) -> pa.RecordBatch:
        """Make the batch of a write."""
        rows = self.write(number).rows
        columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
        named = dict(zip(COLUMNS, columns, strict=True))
        arrays = [pa.array(named[item.name], item.type) for item in self.schema]
        return pa.record_batch(arrays, schema=self.schema)

    def send(self, stream: Stream, number: int) -> None:
        """Say of a write that it deletes, unless the stream has said so."""
        if self.write(number).deletes and not self._keys_alone:
            stream.write(self.batch(number), operation="delete")
        else:
            stream.write(self.batch(number))


class Model:
    """What a table must hold: a dictionary, and writes in the order of their LSNs."""

    def __init__(self, layout: Layout) -> None:
        self.rows: dict[Row, Row] = {}
        self._layout = layout

    def apply(self, write: Write) -> None:
        """Do a write."""
        for row in write.rows:
            key = self._layout.key_of(row)
            if write.deletes:
                self.rows.pop(key, None)
            elif self._layout.merge == "last":
                self.rows[key] = row
            else:
                self.rows.setdefault(key, row)

    def check(self, found: Sequence[dict[str, Any]], where: str) -> None:
        """Compare row by row.

        Raises:
            AssertionError: other rows were found, or one twice; names a few.
        """
        rows = [tuple(row[name] for name in COLUMNS) for row in found]
        by_key = {self._layout.key_of(row): row for row in rows}
        wrong = [key for key in by_key.keys() | self.rows.keys() if by_key.get(key) != self.rows.get(key)]
        few = [f"{key}: found {by_key.get(key)}, not {self.rows.get(key)}" for key in sorted(wrong)[:3]]
        assert not wrong, f"{where}: {len(wrong)} keys of {len(self.rows)}: {'; '.join(few)}"
        assert len(rows) == len(by_key), f"{where}: {len(rows)} rows of {len(by_key)} keys"


@dataclass
class Figures:
    """What a run came to for one table."""

    writes: int = 0
    upserts: int = 0
    deletes: int = 0
    duplicates: int = 0
    rows: int = 0
    snapshots: int = 0
    checked: int = 0
    engines: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A run and what it came to.

    Args:
        folder: for the data directory.
        layouts: the tables, by the names in ``LAYOUTS``.
        seed: of everything that is chosen.
        streams: the writers of each table; the last of them deletes by keys alone.
        life_s: bounds of how long a served life lasts, in seconds.
    """

    folder: Path
    layouts: Sequence[str]
    seed: int
    streams: int = STREAMS
    life_s: tuple[float, float] = LIFE_S
    kills: int = 0
    starts_killed: int = 0
    indexes_harmed: int = 0
    lost: int = 0
    tables: dict[str, Figures] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """All of it for people: a line for the run, and one for each table."""
        lines = [
            f"seed {self.seed}: {self.kills} kills, {self.starts_killed} of them during a start, "
            f"{self.indexes_harmed} indexes lost or damaged; {self.lost} writes lost before the disk and sent again"
        ]
        lines += [
            f"{name}: {self.streams} streams, {it.writes} writes with {it.upserts} upserts and {it.deletes} deletes, "
            f"{it.duplicates} acks for duplicates; {it.rows} rows at the end; equal in {it.checked} of {it.snapshots} "
            f"snapshots in pyiceberg, and at the end in {', '.join(it.engines)}"
            for name, it in self.tables.items()
        ]
        return lines

    def run(self, *, seconds: float = 0, kills: int | None = None, snapshots: int | None = None) -> None:
        """Write, kill, write the rest, and check.

        Args:
            seconds: how long writes go on.
            kills: end after so many kills instead.
            snapshots: check so many of a table at most, spread evenly; None for all of them.

        Raises:
            AssertionError: an ack broke a rule, or what a reader finds differs from the dictionary.
        """
        pick = random.Random(self.seed)
        node = Node()
        writers = [
            UpsertWriter(node, number, layout, self.seed, keys_alone=number % self.streams == self.streams - 1)
            for number, layout in enumerate(layout for layout in self.layouts for _ in range(self.streams))
        ]
        server = ServerProcess(self.folder / "data", SETTINGS)
        workers: set[int] = set()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end if kills is None else self.kills < kills:
                node.begin_life()
                workers |= self._live(server, writers, pick)
                check_broken(writers)
            assert wait_gone(workers) == set()
            node.begin_life()
            server.start()
            send_the_rest(server, writers, REST_TIMEOUT_S)
            server.stop()
        finally:
            server.kill()
        self.lost = len(node.given.keys() - {told.lsn for writer in writers for told in writer.told.values()})
        self._check({name: lake.load(server.data, name) for name in self.layouts}, writers, snapshots)

    def _live(self, server: ServerProcess, writers: Sequence[UpsertWriter], pick: random.Random) -> set[int]:
        """Let the server live once, and perhaps not long enough to serve; returns the processes below it."""
        self.kills += 1
        first = self.kills == 1
        if not first and pick.randrange(HARMS) == 0:
            self.indexes_harmed += 1
            harm_index(server.data / "keyindex", pick)
        if not first and pick.randrange(STARTS) == 0:
            self.starts_killed += 1
            kill_the_start(server, pick.uniform(0, START_S))
            return set()
        server.start()
        if first:
            for layout in self.layouts:
                LAYOUTS[layout].create(server.location, layout)
        running = [partial(writer.run, server.location, None) for writer in writers]
        return write_until_killed(server, running, pick.uniform(*self.life_s))

    def _check(self, tables: Mapping[str, Table], writers: Sequence[UpsertWriter], most: int | None) -> None:
        """Hold what readers find in the tables, whose server has drained, against dictionaries."""
        models = {}
        for name, table in tables.items():
            models[name] = Model(LAYOUTS[name])
            mine = [writer for writer in writers if writer.table == name]
            self.tables[name] = check_snapshots(table, models[name], mine, most)
        for engine in readers.ENGINES:
            found = readers.read(engine, *[table.metadata_location for table in tables.values()])
            for name, rows in zip(tables, found, strict=True):
                models[name].check(rows, f"{name} in {engine}")
                self.tables[name].engines.append(engine)


def harm_index(folder: Path, pick: random.Random) -> None:
    """Lose all indexes of a node, or flip a bit in a file of one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if not files or pick.randrange(2):
        shutil.rmtree(folder, ignore_errors=True)
        return
    path = pick.choice(files)
    data = bytearray(path.read_bytes())
    data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
    path.write_bytes(data)


def check_snapshots(table: Table, model: Model, writers: Sequence[UpsertWriter], most: int | None) -> Figures:
    """Check what plain pyiceberg finds in the snapshots of a table.

    Args:
        table: as plain pyiceberg loads it.
        model: without rows; at the end it has those that the table must have.
        writers: all that have written to it, each write to ``iceberg_committed``.
        most: check so many snapshots at most; None for all.

    Raises:
        AssertionError: what is found differs.
    """
    figures = Figures()
    history = _history(writers, figures)
    snapshots = sorted(table.snapshots(), key=_last_lsn)
    figures.snapshots = len(snapshots)
    done = 0
    for snapshot in _spread(snapshots, most):
        while done < len(history) and history[done][0] <= _last_lsn(snapshot):
            model.apply(history[done][1])
            done += 1
        found = table.scan(snapshot_id=snapshot.snapshot_id).to_arrow().to_pylist()
        model.check(found, f"{table.name()}: snapshot {snapshot.snapshot_id}, through LSN {_last_lsn(snapshot)}")
        figures.checked += 1
    assert done == len(history), f"{len(history) - done} writes have LSNs beyond the last snapshot's"
    assert snapshots[-1].snapshot_id == table.metadata.current_snapshot_id
    figures.rows = len(model.rows)
    return figures


def _history(writers: Sequence[UpsertWriter], figures: Figures) -> list[tuple[int, Write]]:
    """All writes by their LSNs, in order."""
    history: dict[int, Write] = {}
    for writer in writers:
        for number in range(writer.sent):
            told, write = writer.told[number], writer.write(number)
            assert told.tier == TIERS.index("iceberg_committed")
            assert history.setdefault(told.lsn, write) is write, f"LSN {told.lsn} was given twice"
            figures.writes += 1
            figures.deletes += len(write.rows) if write.deletes else 0
            figures.upserts += len(write.rows) if not write.deletes else 0
        figures.duplicates += writer.duplicates
    return sorted(history.items())


def _last_lsn(snapshot: Snapshot) -> int:
    assert snapshot.summary is not None
    return int(snapshot.summary["arka.lsn-last"])


def _spread(snapshots: Sequence[Snapshot], most: int | None) -> list[Snapshot]:
    """Choose so many, evenly, the first and the last among them."""
    if most is None or len(snapshots) <= most:
        return list(snapshots)
    last = len(snapshots) - 1
    return [snapshots[number] for number in sorted({last * at // (most - 1) for at in range(most)})]


def main(arguments: Sequence[str]) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long writes go on")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="may be given several times")
    parser.add_argument("--snapshots", type=int, help="check so many at most, >= 2, spread evenly; default: all")
    given = parser.parse_args(arguments)
    # Not a TemporaryDirectory: a run that fails leaves what shows why.
    folder = Path(tempfile.mkdtemp(prefix="arka-upserts-"))
    print(f"in {folder}", flush=True)
    run = Run(folder, given.layout or ["partitioned"], given.seed)
    run.run(seconds=given.seconds, snapshots=given.snapshots)
    shutil.rmtree(folder)
    print("\n".join(run.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
