"""SIGKILLs at instants that nobody chose, under load of all durabilities: nothing is lost, doubled or reordered.

The seed of the instants is printed; ``KILL_SEED`` in the environment sets it, ``KILLS`` how many the long form has.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerProcess, wait_gone

from . import lake
from .clients import TIERS, Stream, action, connect, create
from .keyed import (
    BATCH_ROWS,
    SCHEMA,
    KeyedWriter,
    Node,
    check_broken,
    check_iceberg,
    kill_the_start,
    send_the_rest,
    write_until_killed,
)

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(900)]

SEED = int(os.environ.get("KILL_SEED", "20"))
LONG_KILLS = int(os.environ.get("KILLS", "50"))
#: How long a served life lasts at most, in seconds, and a start that is killed before it serves.
LIFE_S = 0.8
START_S = 1.2
#: One start in so many is killed too.
STARTS = 6
#: Small segments, so that instants fall into rolls, checkpoints and deletions too.
SETTINGS = {
    "server__drain_s": 20,
    "wal__segment_bytes": 1 << 20,
    "wal__release_grace_s": 0,
    "object_store__linger_s": 0.01,
    "iceberg__commit_interval_s": 0.1,
}
JOIN_TIMEOUT_S = 90.0


@dataclass
class PlainWriter:
    """Writes without keys and never again: each of its batches is there once or not at all."""

    sent: int = 0
    on_disk: set[int] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def run(self, location: str, gone: threading.Event) -> None:
        """Write until the server is gone."""
        try:
            with connect(location) as client:
                stream, first = Stream(client, "plain", SCHEMA, requested_durability="disk"), self.sent
                reading = threading.Thread(target=self._read, args=(stream, first))
                reading.start()
                try:
                    while not gone.wait(0.003):
                        self.sent += 1
                        rows = range((self.sent - 1) * BATCH_ROWS, self.sent * BATCH_ROWS)
                        pads = pa.array(["plain"] * BATCH_ROWS)
                        stream.write(pa.record_batch([pa.array(rows, pa.int64()), pads], schema=SCHEMA))
                finally:
                    gone.wait()
                    reading.join(JOIN_TIMEOUT_S)
        except (flight.FlightError, pa.ArrowException):
            return

    def _read(self, stream: Stream, first: int) -> None:
        with contextlib.suppress(flight.FlightError, pa.ArrowException):
            for ack in stream.rest():
                if ack["error"] is not None:
                    self.broken.append(str(ack))
                elif ack["durability_level"] == "disk":
                    self.on_disk.add(first + ack["sequence"])


@pytest.mark.parametrize("wanted", [6, pytest.param(LONG_KILLS, marks=pytest.mark.long, id="long")])
def test_kills_at_any_instant(make_server: Callable[..., ServerProcess], wanted: int) -> None:
    """After many SIGKILLs, some of them during the start from the one before, the sources and Iceberg are equal.

    Four keyed writers, one for each durability, resume as protocol 3.3 says: each of their rows is in Iceberg once.
    A writer without keys has all rows that were acked on disk there once, and its others at most once, in whole
    batches. LSNs rise over all lives. No worker process outlives its server (R15).
    """
    print(f"KILL_SEED={SEED} KILLS={wanted}")
    pick = random.Random(SEED)
    server = make_server(**SETTINGS)
    node = Node()
    pads = ["arka" * length for length in (1, 16, 1024, 4096)]
    keyed = [
        KeyedWriter(
            node,
            number,
            ("left", "right")[number % 2],
            durability,
            pad=lambda row: pads[row // BATCH_ROWS % len(pads)],
            window=200,
            pace_s=0.002,
        )
        for number, durability in enumerate(TIERS)
    ]
    plain = PlainWriter()
    workers: set[int] = set()
    kills = starts_killed = 0
    while kills < wanted:
        node.begin_life()
        if kills and pick.randrange(STARTS) == 0:
            kill_the_start(server, pick.uniform(0, START_S))
            kills, starts_killed = kills + 1, starts_killed + 1
            continue
        server.start()
        if kills == 0:
            with connect(server.location) as client:
                for table in ("left", "right", "plain"):
                    create(client, table, [("n", "int64!"), ("pad", "utf8")])
        writing = [partial(writer.run, server.location, None) for writer in keyed]
        workers |= write_until_killed(server, [*writing, partial(plain.run, server.location)], pick.uniform(0, LIFE_S))
        kills += 1
        check_broken(keyed)
        assert plain.broken == []
    # Each next process starts at once: workers that outlived their parent would commit into its epoch.
    assert wait_gone(workers) == set()

    node.begin_life()
    server.start()
    send_the_rest(server, keyed)
    with connect(server.location) as client:
        action(client, "Flush", name="plain")
    server.stop()
    total = check_iceberg(server, keyed)
    found = _check_plain(server, plain)
    sent = sum(writer.sent for writer in keyed)
    print(
        f"{kills} kills, {starts_killed} of them during a start; {sent} keyed writes and {plain.sent} without keys, "
        f"{sum(writer.duplicates for writer in keyed)} acks for duplicates, {total + found} rows in Iceberg, "
        f"{len(node.given)} LSNs up to {max(node.given)}"
    )
    assert sent > kills


def _check_plain(server: ServerProcess, plain: PlainWriter) -> int:
    found = Counter(lake.column(server.data, "plain", "n"))
    acked = {number * BATCH_ROWS + row for number in plain.on_disk for row in range(BATCH_ROWS)}
    assert acked - found.keys() == set(), "acked on disk and not in Iceberg"
    assert [row for row, times in found.items() if times > 1] == [], "more than once in Iceberg"
    assert all(row < plain.sent * BATCH_ROWS for row in found)
    assert set(Counter(row // BATCH_ROWS for row in found).values()) == {BATCH_ROWS}, "half a batch is in Iceberg"
    return len(found)
