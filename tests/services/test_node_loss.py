"""A node's disk is lost, or its process is thought dead and wakes up: what the store holds goes on elsewhere (R10)."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import pyarrow.flight as flight
import pytest

from arka.exits import EXIT_FENCED
from arka.testing.backends import Backend, Components
from arka.testing.serverprocess import ServerProcess
from arka.testing.services import wait_for
from tests.process.clients import TIERS, Ack, Stream, action, connect, create, numbers
from tests.process.keyed import JOIN_TIMEOUT_S, KeyedWriter, Node, check_broken, create_tables
from tests.services import lake
from tests.services.reader import Reader

pytestmark = [pytest.mark.process, pytest.mark.slow]

#: Whoever takes a node over looks for two and a half of them whether its last process lives.
HEARTBEAT_S = 0.2
#: Long enough that only what asks for it, or a full object, is uploaded, and nothing but the first commit is made.
NEVER_S = 60
#: The least size of an object. Either batch is below it; both together are uploaded at once.
OBJECT_BYTES = 1 << 16
BEFORE, MEANWHILE = range(100, 5_600), range(5_600, 9_000)


def write_keyed(client: flight.FlightClient, table: str, values: range, durability: str) -> list[Ack]:
    """Write one value a batch, each with its key, and return the acks of the last tier, none of them an error."""
    stream = Stream(client, table, requested_durability=durability)
    for n in values:
        stream.write(numbers([n]), idempotency_key=f"k{n}")
    acks = stream.finish()
    assert [ack for ack in acks if ack["error"] is not None] == []
    last = [ack for ack in acks if ack["durability_level"] == durability]
    assert [ack["sequence"] for ack in last] == list(range(len(values)))
    return last


def lsns_of(acks: Sequence[Ack]) -> list[int]:
    return [ack["lsn"] for ack in acks]


def marks(client: flight.FlightClient, table: str, lsn: int) -> dict[str, int]:
    """Ask how far each tier is, as a client that was given ``lsn`` last does."""
    stream = Stream(client, table, None, resume_after_lsn=lsn)
    answer = stream.acks(4)
    stream.writer.begin(numbers([]).schema)
    stream.finish()
    return {ack["durability_level"]: ack["lsn"] for ack in answer}


def lose(server: ServerProcess) -> None:
    """End a server as a power switch would, and take its disk away."""
    server.kill()
    shutil.rmtree(server.data)


def test_disk_lost(backend: Backend, make_server: Callable[..., ServerProcess]) -> None:
    """Everything acked object_storage outlives SIGKILL and the disk: once, under its key, with its LSN.

    What only the disk had is not vouched for; sent again, it is a new write with an LSN above all that were given.
    """
    table = f"{backend.namespace}.lost"
    make = partial(make_server, backend, object_store__heartbeat_s=HEARTBEAT_S)
    first = make(object_store__linger_s=NEVER_S, iceberg__commit_interval_s=NEVER_S).start()
    with connect(first.location) as client:
        create(client, table)
        committed = range(10)
        lsns = lsns_of(write_keyed(client, table, committed, "disk"))
        action(client, "Flush", name=table)
        lsns += lsns_of(write_keyed(client, table, range(10, 20), "disk"))
        action(client, "Flush", name=table, durability="object_storage")
        stored = len(lsns)
        assert marks(client, table, lsns[-1]) == {
            **dict.fromkeys(TIERS[:3], lsns[-1]),
            "iceberg_committed": lsns[len(committed) - 1],
        }
        lsns += lsns_of(write_keyed(client, table, range(20, 30), "disk"))
        assert marks(client, table, lsns[-1])["object_storage"] == lsns[stored - 1]
    lose(first)
    second = make(data="second").start()
    with connect(second.location) as client:
        assert marks(client, table, lsns[5]) == dict.fromkeys(TIERS, lsns[5])
        found = marks(client, table, lsns[-1])
        assert {found[tier] for tier in TIERS[:3]} == {lsns[stored - 1]}
        assert lsns[len(committed) - 1] <= found["iceberg_committed"] <= lsns[stored - 1]
        again = write_keyed(client, table, range(40), "iceberg_committed")
    assert [ack["sequence"] for ack in again if ack.get("duplicate")] == list(range(stored))
    assert lsns_of(again[:stored]) == lsns[:stored]
    assert lsns[-1] < again[stored]["lsn"]
    assert lsns_of(again) == sorted(set(lsns_of(again)))
    second.stop()
    assert lake.numbers_in(backend, table) == list(range(40))


@pytest.mark.parametrize("name", [pytest.param("local-sqlite", marks=pytest.mark.long), "s3-rest"])
def test_disk_lost_under_load(components: Components, make_server: Callable[..., ServerProcess], name: str) -> None:
    """Clients that resume from what the handshake vouches for lose nothing, double nothing, and see no LSN twice."""
    backend = components.backend(name)
    table = f"{backend.namespace}.load"
    node = Node()
    writers = [
        KeyedWriter(node, number, table, durability, pad=str, pace_s=0.005, survives="object_storage")
        for number, durability in enumerate(("disk", "object_storage", "iceberg_committed"))
    ]

    def run(server: ServerProcess, count: int | None, gone: threading.Event) -> list[threading.Thread]:
        threads = [threading.Thread(target=writer.run, args=(server.location, count, gone)) for writer in writers]
        for thread in threads:
            thread.start()
        return threads

    server = make_server(backend, object_store__heartbeat_s=HEARTBEAT_S, iceberg__commit_interval_s=1).start()
    create_tables(server.location, [table])
    gone = threading.Event()
    threads = run(server, None, gone)
    # In the midst of it: some of what the last writer sent is in Iceberg, and some no further than the store.
    wait_acked(writers[2], "iceberg_committed", 20)
    server.kill()
    gone.set()
    join(threads)
    check_broken(writers)
    uncommitted = sum(told.tier == TIERS.index("object_storage") for told in writers[2].told.values())
    shutil.rmtree(server.data)
    node.begin_life()
    server = make_server(backend, data="second").start()
    join(run(server, 1, threading.Event()))
    check_broken(writers)
    assert [writer.status for writer in writers] == ["", "", ""]
    assert writers[2].duplicates >= uncommitted, "writes that the store had were taken for new"
    server.stop()
    wanted = [row for writer in writers for row in writer.rows()]
    assert Counter(lake.numbers_in(backend, table)) == Counter(wanted)


def wait_acked(writer: KeyedWriter, tier: str, count: int) -> None:
    """Wait until a writer has so many acks of a tier."""
    level = TIERS.index(tier)
    wait_for(lambda: sum(told.tier >= level for told in list(writer.told.values())) >= count, f"acks of {tier}")


def join(threads: Sequence[threading.Thread]) -> None:
    """Wait until all have ended."""
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive()


def test_frozen_owner_is_fenced_on_s3(components: Components, make_server: Callable[..., ServerProcess]) -> None:
    """A process that was frozen while another took its log over acks nothing that is lost, and exits as fenced.

    When it wakes up, its next heartbeat is far away: it uploads under its old epoch, S3 takes that, and only the
    look at the newest epoch before the ack shows what has happened (R10).
    """
    backend = components.backend("s3-postgres")
    table = f"{backend.namespace}.t"
    make = partial(make_server, backend, object_store__heartbeat_s=NEVER_S)
    first = make(object_store__linger_s=NEVER_S, object_store__bytes=OBJECT_BYTES).start()
    with connect(first.location) as client:
        create(client, table)
        kept = write_keyed(client, table, range(10), "disk")
        action(client, "Flush", name=table, durability="object_storage")
        stream = Stream(client, table, requested_durability="iceberg_committed")
        reader = Reader(stream)
        stream.write(numbers(BEFORE), idempotency_key="before")
        reader.wait("disk", 1)
        first.freeze()
        stream.write(numbers(MEANWHILE), idempotency_key="meanwhile")
        second = make("--take-over", data="second").start()
        with connect(second.location) as other:
            new = write_keyed(other, table, range(10, 20), "iceberg_committed")
        first.thaw()
        assert first.wait() == EXIT_FENCED, first.log_tail()
        reader.join()
    assert isinstance(reader.failure, flight.FlightUnavailableError)
    assert {ack["durability_level"] for ack in reader.acks if ack["error"] is None} <= {"memory", "disk"}
    assert {ack["code"] for ack in reader.acks if ack["error"] is not None} <= {"outcome_unknown"}
    assert max(lsns_of(reader.acks)) < new[0]["lsn"], "both processes gave LSNs of the same range"
    with connect(second.location) as client:
        # What the fenced process never acked far enough is sent again, by key.
        again = write_keyed(client, table, range(20), "iceberg_committed")
        stream = Stream(client, table, requested_durability="iceberg_committed")
        stream.write(numbers(BEFORE), idempotency_key="before")
        stream.write(numbers(MEANWHILE), idempotency_key="meanwhile")
        assert not any(ack.get("duplicate") for ack in stream.finish())
    assert all(ack["duplicate"] for ack in again)
    assert lsns_of(again) == lsns_of(kept + new)
    second.stop()
    assert lake.numbers_in(backend, table) == [*range(20), *BEFORE, *MEANWHILE]
