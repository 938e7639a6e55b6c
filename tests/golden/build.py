"""Build a golden data directory: what a server of an older commit leaves behind when it is killed.

    python -m tests.golden.build COMMIT

checks COMMIT out beside the tree, builds it, and lets its server take writes in three lives: one ends with a clean
stop, two with SIGKILL. At the end there are rows in every tier: committed, in the object store alone, on the disk
alone, and in memory (which the kill may lose). The directory and what it must hold are written as
``tests/golden/COMMIT.hex`` and ``tests/golden/COMMIT.json``.

Paths stand inside the directory, so it is always built and opened at ``place(COMMIT)``.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from arka import failpoints
from tests.process.clients import Stream, connect, create

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

EVENTS = pa.schema(
    [
        pa.field("n", pa.int64(), nullable=False),
        pa.field("at", pa.timestamp("us", tz="UTC")),
        pa.field("text", pa.string()),
    ]
)
USERS = pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.string())])

#: Small segments, so that the directory is small; no release, so that every life leaves its part of the log.
SETTINGS = {"ARKA_WAL_SEGMENT_BYTES": str(1 << 20)}
#: Nothing is committed in a life with this failpoint: the encoder waits before it fsyncs its first file.
NO_COMMITS = {"ARKA_FAILPOINTS": "encode.written=pause:3600"}
#: Nothing is uploaded for so long.
NO_UPLOADS = {"ARKA_OBJECT_STORE_LINGER_S": "60"}

_HEX_LINE = 96


def place(commit: str) -> Path:
    """Where the directory lies while it is built and while it is opened."""
    return Path(tempfile.gettempdir()).resolve() / f"arka-golden-{commit}"


def pack(folder: Path) -> str:
    """Turn a folder into lines of hexadecimal digits; the reverse of ``unpack``."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_socket():
                archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
    digits = lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME).hex()
    return "\n".join(digits[i : i + _HEX_LINE] for i in range(0, len(digits), _HEX_LINE)) + "\n"


def unpack(digits: str, folder: Path) -> None:
    """Make the folder that ``pack`` was given."""
    raw = lzma.decompress(bytes.fromhex(digits.replace("\n", "")))
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        archive.extractall(folder, filter="data")


@contextlib.contextmanager
def _server(tree: Path, data: Path, settings: dict[str, str]) -> Iterator[tuple[flight.FlightClient, subprocess.Popen]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ARKA_")}
    environment |= {"PYTHONPATH": str(tree)} | SETTINGS | settings
    if failpoints.TESTING in (tree / "arka" / "failpoints.py").read_text():
        # Commits before that one refuse the variable, and take failpoints without it.
        environment[failpoints.TESTING] = "1"
    program = "import sys; sys.argv[0] = 'arka-server'; from arka.programs import arka_server; arka_server()"
    flags = ["--data-dir", str(data), "--port", "0", "--http-port", "0"]
    with data.with_name("server.log").open("ab") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", program, *flags], cwd=tree, env=environment, stdout=log, stderr=log
        )
    try:
        announced = data / "server.json"
        while not announced.exists() or json.loads(announced.read_text())["pid"] != server.pid:
            assert server.poll() is None, f"the server ended with {server.returncode}: see {data.parent}/server.log"
            time.sleep(0.05)
        with connect(json.loads(announced.read_text())["flight"]) as client:
            yield client, server
    finally:
        server.kill()
        server.wait()


def _events(first: int, count: int) -> pa.RecordBatch:
    numbers = range(first, first + count)
    # A day apart: each write spans several partitions.
    at = [1_700_000_000_000_000 + n * 40_000_000_000 for n in numbers]
    text = [None if n % 7 == 0 else f"row {n}" for n in numbers]
    columns = [pa.array(numbers, pa.int64()), pa.array(at, pa.timestamp("us", tz="UTC")), pa.array(text, pa.string())]
    return pa.record_batch(columns, schema=EVENTS)


def _users(ids: list[int], word: str) -> pa.RecordBatch:
    return pa.record_batch([pa.array(ids, pa.int64()), pa.array([f"{word} {i}" for i in ids])], schema=USERS)


class _Writes:
    """The writes of all lives, and what must be found of them."""

    def __init__(self) -> None:
        self.events: list[int] = []
        self.perhaps: list[int] = []
        self.users: dict[int, str] = {}
        self.keys: dict[str, dict[str, Any]] = {}
        self.last_lsn = 0

    def life(self, client: flight.FlightClient, number: int, tier: str) -> None:
        """Write to both tables and wait for the acks of a tier."""
        first = number * 1000
        batches = [_events(first + 20 * i, 20) for i in range(3)]
        self._write(client, "events", batches, tier, f"events-{number}")
        self.events += range(first, first + 60)
        ids = list(range(number * 10, number * 10 + 15))
        self._write(client, "users", [_users(ids, f"life {number}")], tier, f"users-{number}")
        self.users |= {i: f"life {number} {i}" for i in ids}
        gone = ids[3:6]
        self._write(client, "users", [_users(gone, "-")], tier, f"gone-{number}", operation="delete")
        for i in gone:
            del self.users[i]

    def _write(self, client: flight.FlightClient, table: str, batches: list, tier: str, key: str, **more: str) -> None:
        stream = Stream(client, table, batches[0].schema, requested_durability=tier, idempotency_key=key, **more)
        for batch in batches:
            stream.write(batch)
        acks = stream.finish()
        assert not [ack for ack in acks if ack["error"] is not None], acks
        reached = {ack["sequence"]: ack["lsn"] for ack in acks if ack["durability_level"] == tier}
        assert len(reached) == len(batches)
        for sequence, lsn in reached.items():
            self.keys[f"{key}#{sequence}"] = {"table": table, "lsn": lsn, **more}
        self.last_lsn = max(self.last_lsn, *reached.values())

    def lost_perhaps(self, client: flight.FlightClient) -> None:
        """Write without waiting for more than the memory ack, right before a kill."""
        stream = Stream(client, "events", EVENTS, requested_durability="memory")
        stream.write(_events(9000, 5))
        self.last_lsn = max(self.last_lsn, stream.ack()["lsn"])
        self.perhaps += range(9000, 9005)


def build(commit: str, tree: Path) -> None:
    """Build the directory with the code in ``tree``, and write both files."""
    folder = place(commit)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    data = folder / "data"
    writes = _Writes()
    with _server(tree, data, {}) as (client, server):
        fields = [("n", "int64!"), ("at", "timestamp[us, tz=UTC]"), ("text", "utf8")]
        day = {"spec_id": 1, "fields": [{"source_id": 1, "field_id": 1000, "name": "day", "transform": "Day"}]}
        create(client, "events", fields, partition_spec=day)
        create(client, "users", [("id", "int64!"), ("name", "utf8")], table_type="primary_key", primary_key="id")
        writes.life(client, 0, "iceberg_committed")
        writes.life(client, 1, "iceberg_committed")
        server.terminate()
        assert server.wait(60) == 0
    with _server(tree, data, NO_COMMITS) as (client, _):
        writes.life(client, 2, "object_storage")
    with _server(tree, data, NO_COMMITS | NO_UPLOADS) as (client, _):
        writes.life(client, 3, "disk")
        writes.lost_perhaps(client)
    expected = {
        "events": sorted(writes.events),
        "events_perhaps": writes.perhaps,
        "users": {str(i): name for i, name in sorted(writes.users.items())},
        "keys": writes.keys,
        "last_lsn": writes.last_lsn,
    }
    (HERE / f"{commit}.hex").write_text(pack(data))
    (HERE / f"{commit}.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder)


def main() -> None:
    """Build the directory of the commit named on the command line."""
    commit = sys.argv[1]
    with tempfile.TemporaryDirectory(prefix="arka-history-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", tree, commit], cwd=ROOT, check=True)
        try:
            subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=tree, check=True)
            build(commit, tree)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
