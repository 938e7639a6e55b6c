"""Replay a database's change stream into a primary-key table, lose the connection on the way, and end equal to it.

    arka-server &
    python examples/cdc.py [grpc://localhost:8815] [--changes FILE] [--offsets FILE]

The source is a SQLite database whose triggers record each change, as a change-data-capture tool does from a log: a
position, ``c``, ``u`` or ``d``, and the row before and after. The recording is a file of JSON lines. The replay
sends it as upserts and deletes, each batch under an idempotency key made of its place in the recording, and notes how
far the acks say that Iceberg has it. It is cut off in the middle once: the second run sends again what was not
acknowledged, under the same keys, so nothing is applied twice.

Nothing here imports Arka: any Arrow Flight client in any language does the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.flight as flight

TABLE = "customers"
COLUMNS = ("id", "name", "city", "credit")
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("name", pa.string()),
        pa.field("city", pa.string()),
        pa.field("credit", pa.int64()),
    ]
)
#: Most rows of a batch. Batches are cut the same way whenever a replay begins where one ended.
BATCH_ROWS = 64
CITIES = ("Aachen", "Basel", "Coimbra", "Dijon")


# -- the source -----------------------------------------------------------------------------------


def open_source() -> sqlite3.Connection:
    """Make a database that records its changes."""
    source = sqlite3.connect(":memory:")
    source.executescript(
        """
        CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, credit INTEGER);
        CREATE TABLE changes (position INTEGER PRIMARY KEY, op TEXT, before TEXT, after TEXT);
        """
    )
    for op, event, before, after in (
        ("c", "INSERT", "", "new"),
        ("u", "UPDATE", "old", "new"),
        ("d", "DELETE", "old", ""),
    ):
        images = [
            "json_object(" + ", ".join(f"'{name}', {side}.{name}" for name in COLUMNS) + ")" if side else "NULL"
            for side in (before, after)
        ]
        source.execute(
            f"CREATE TRIGGER on_{op} AFTER {event} ON customers BEGIN "
            f"INSERT INTO changes (op, before, after) VALUES ('{op}', {', '.join(images)}); END"
        )
    return source


def run_workload(source: sqlite3.Connection, transactions: int, seed: int) -> None:
    """Change the source: new customers, changed ones, some of them with another key, and ones that go."""
    rng = random.Random(seed)
    for _ in range(transactions):
        with source:
            for _ in range(rng.randint(1, 12)):
                number, city = rng.randrange(400), rng.choice(CITIES)
                match rng.randrange(10):
                    case 0 | 1 | 2 | 3:
                        row = (number, f"customer {number}", city, 0)
                        source.execute("INSERT INTO customers VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", row)
                    case 4 | 5 | 6:
                        change = "UPDATE customers SET credit = credit + ?, city = ? WHERE id = ?"
                        source.execute(change, (rng.randrange(-50, 100), city, number))
                    case 7:
                        move = "UPDATE OR IGNORE customers SET id = ? WHERE id = ?"
                        source.execute(move, (rng.randrange(400), number))
                    case _:
                        source.execute("DELETE FROM customers WHERE id = ?", (number,))


def record(source: sqlite3.Connection, path: Path) -> None:
    """Write the change stream to a file."""
    with path.open("w") as file:
        for position, op, before, after in source.execute("SELECT * FROM changes ORDER BY position"):
            images = {"before": before and json.loads(before), "after": after and json.loads(after)}
            file.write(json.dumps({"position": position, "op": op, **images}) + "\n")


def rows_of(source: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """What the source holds, by key."""
    return source.execute("SELECT id, name, city, credit FROM customers ORDER BY id").fetchall()


# -- from changes to writes -----------------------------------------------------------------------


class Step(NamedTuple):
    """One row that is written, or one key that is deleted."""

    operation: str
    row: dict[str, Any]


@dataclass
class Write:
    """Steps of one kind in a row: what one batch can hold.

    Attributes:
        source: names the recording. A database that goes on has a name of its own: a server id, a slot.
        first: the number of its first step in the recording; its idempotency key is made of both.
        operation: ``upsert`` or ``delete``.
        rows: in order; the last of a key stands.
    """

    source: str
    first: int
    operation: str
    rows: list[dict[str, Any]]

    @property
    def end(self) -> int:
        """The number of the step behind its last one."""
        return self.first + len(self.rows)

    @property
    def metadata(self) -> bytes:
        """The WriteRequest that goes with the batch."""
        return json.dumps({"operation": self.operation, "idempotency_key": f"{self.source}-{self.first}"}).encode()


def read_steps(path: Path) -> Iterator[Step]:
    """Turn a recording into steps. A change of the key is a delete of the old one and an upsert of the new one."""
    with path.open() as file:
        for line in file:
            change = json.loads(line)
            before, after = change["before"], change["after"]
            if before is not None and (after is None or after["id"] != before["id"]):
                yield Step("delete", before)
            if after is not None:
                yield Step("upsert", after)


def cut_writes(source: str, steps: list[Step], first: int) -> Iterator[Write]:
    """Cut steps from number ``first`` on into batches."""
    write: Write | None = None
    for number, step in enumerate(steps[first:], first):
        if write is not None and (write.operation != step.operation or len(write.rows) == BATCH_ROWS):
            yield write
            write = None
        if write is None:
            write = Write(source, number, step.operation, [])
        write.rows.append(step.row)
    if write is not None:
        yield write


# -- the replay -----------------------------------------------------------------------------------


class Replay:
    """Sends a recording, and knows how far it has come.

    Attributes:
        counts: writes and duplicates, in all runs.
    """

    def __init__(self, client: flight.FlightClient, changes: Path, offsets: Path) -> None:
        """Go on where the file of offsets says that an earlier replay ended."""
        self._client = client
        self._source = hashlib.sha256(changes.read_bytes()).hexdigest()[:12]
        self._steps = list(read_steps(changes))
        self._offsets = offsets
        self.counts: Counter[str] = Counter()

    @property
    def done(self) -> int:
        """How many steps Iceberg has."""
        return int(self._offsets.read_text()) if self._offsets.exists() else 0

    def run(self, *, cut_off_after: int | None = None) -> None:
        """Send everything that is not done.

        Args:
            cut_off_after: break the stream after so many writes, without waiting for their acks.
        """
        writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_path(TABLE))
        writer.write_metadata(json.dumps({"requested_durability": "iceberg_committed"}).encode())
        writer.begin(SCHEMA)
        sent: list[Write] = []
        reading = threading.Thread(target=self._read, args=(reader, sent))
        reading.start()
        for write in cut_writes(self._source, self._steps, self.done):
            if len(sent) == cut_off_after:
                reader.cancel()
                break
            sent.append(write)
            writer.write_with_metadata(pa.RecordBatch.from_pylist(write.rows, schema=SCHEMA), write.metadata)
        else:
            writer.done_writing()
        reading.join()
        self.counts["writes"] += len(sent)

    def _read(self, reader: Any, sent: list[Write]) -> None:
        """Read acks until the stream ends, and note what is committed."""
        try:
            for chunk in reader:
                ack = json.loads(chunk.app_metadata.to_pybytes())
                if ack["error"] is not None:
                    raise SystemExit(f"a write was refused: {ack}")
                if ack["durability_level"] == "memory":
                    self.counts["duplicates"] += ack.get("duplicate", False)
                elif ack["durability_level"] == "iceberg_committed":
                    self._note(sent[ack["sequence"]].end)
        except (pa.ArrowCancelled, flight.FlightCancelledError):
            # Cut off: what was acknowledged is noted, the rest is sent again.
            return

    def _note(self, done: int) -> None:
        """Remember in one step how far Iceberg has the recording; acks come in the order of the writes."""
        made = self._offsets.with_suffix(".new")
        made.write_text(str(done))
        made.replace(self._offsets)


def call(client: flight.FlightClient, action: str, **request: Any) -> Any:
    """Run a Flight action; bodies and results are JSON."""
    (result,) = client.do_action(flight.Action(action, json.dumps(request).encode()))
    return json.loads(result.body.to_pybytes())


def create_table(client: flight.FlightClient) -> None:
    """Create the table, partitioned by a column that changes: a customer who moves leaves the old partition."""
    names = {pa.int64(): "int64", pa.string(): "utf8"}
    fields = [{"name": field.name, "type": names[field.type], "nullable": field.nullable} for field in SCHEMA]
    call(
        client,
        "CreateTable",
        name=TABLE,
        schema_json=json.dumps({"fields": fields}),
        table_type="primary_key",
        primary_key="id",
        partition_spec={"fields": [{"source_id": COLUMNS.index("city"), "transform": "Identity"}]},
    )


def read_table(client: flight.FlightClient) -> list[tuple[Any, ...]]:
    """What Arka holds, by key."""
    found = client.do_get(flight.Ticket(TABLE.encode())).read_all().sort_by("id")
    return [tuple(row[name] for name in COLUMNS) for row in found.to_pylist()]


def main() -> int:
    """Record, replay in two runs, compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("location", nargs="?", default="grpc://localhost:8815")
    parser.add_argument("--changes", type=Path, help="where the recording goes; default: a temporary file")
    parser.add_argument("--offsets", type=Path, help="where the replay notes how far it is; default: beside it")
    parser.add_argument("--transactions", type=int, default=800)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, flight.FlightClient(options.location) as client:
        changes = options.changes or Path(folder, "changes.jsonl")
        source = open_source()
        run_workload(source, options.transactions, seed=7)
        record(source, changes)
        create_table(client)
        replay = Replay(client, changes, options.offsets or changes.with_suffix(".offset"))
        replay.run(cut_off_after=120)
        print(f"cut off behind {replay.counts['writes']} writes: {replay.done} steps are known to be in Iceberg")
        replay.run()
        call(client, "Flush", name=TABLE)
        kinds = Counter(json.loads(line)["op"] for line in changes.read_text().splitlines())
        ours, theirs = rows_of(source), read_table(client)
    print(f"changes: {', '.join(f'{count} {op}' for op, count in sorted(kinds.items()))}")
    print(f"writes: {replay.counts['writes']}, of which {replay.counts['duplicates']} had been seen")
    print(f"customers: {len(theirs)} in Arka, {len(ours)} in the source, {'equal' if ours == theirs else 'DIFFERENT'}")
    return 0 if ours == theirs else 1


if __name__ == "__main__":
    sys.exit(main())
