"""The commands of ``docs/recovery.md``, run from the page's own text: every row is there once (R38)."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from arka.testing.serverprocess import ServerFailed, ServerProcess
from arka.wal.segment import HEADER_BYTES

from . import lake
from .clients import NUMBERS, Stream, action, connect, create, numbers, write_all

pytestmark = pytest.mark.process

PAGE = Path(__file__).parents[2] / "docs" / "recovery.md"
TABLES = ("t", "p")
ARKA = Path(sys.executable).with_name("arka")


def commands(section: str) -> list[str]:
    """The command lines of one section of the page."""
    found = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert found is not None, f"{PAGE} has no section {section!r}"
    return [line for block in re.findall(r"```sh\n(.*?)```", found[1], re.S) for line in block.splitlines()]


def follow(
    section: str,
    make: Callable[..., ServerProcess],
    server: ServerProcess,
    *,
    codes: tuple[int, ...] = (0,),
    since_backup: Callable[[], None] = lambda: None,
    **places: object,
) -> tuple[str, ServerProcess]:
    """Run a section's commands; in the end a server runs.

    Args:
        section: its heading.
        make: makes a server with the flags that the page names.
        server: has the data directory; does not run, but for a backup.
        codes: exit codes that the section speaks of.
        since_backup: called once the page's backup was made.
        places: what the page's words in capitals stand for.

    Returns:
        What the commands printed, and the server.
    """
    said = ""
    for line in commands(section):
        for name, value in {**places, "DATA_DIR": server.data}.items():
            line = line.replace(name, str(value))
        if "TIME" in line:
            (aside,) = server.data.glob("wal.discarded-*")
            line = line.replace("TIME", aside.name.removeprefix("wal.discarded-"))
        if "LSN" in line:
            (lsn,) = re.findall(r"up to LSN (\d+)", said)
            line = line.replace("LSN", lsn)
        program, *arguments = line.replace("URL", server.location).split()
        if program == "arka-server":
            assert arguments[:2] == ["--data-dir", str(server.data)]
            server = make(*arguments[2:], data=server.data.name, iceberg__commit_interval_s=0.1).start()
            continue
        command = [ARKA if program == "arka" else program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        said += done.stdout + done.stderr
        assert done.returncode in codes, (line, done.returncode, said)
        if arguments[0] == "backup":
            since_backup()
    return said, server


def refusal(make: Callable[..., ServerProcess], *flags: str, **more: str) -> str:
    """What a server says that does not start."""
    refused = make(*flags, **more)
    with pytest.raises(ServerFailed):
        refused.start()
    return refused.log_tail(5)


def fill(server: ServerProcess) -> None:
    """Make a table of each kind, with rows 0 to 4."""
    with connect(server.location) as client:
        create(client, "t")
        create(client, "p", primary_key="n", table_type="primary_key")
        for name in TABLES:
            write_all(client, name, [numbers([n]) for n in range(5)])


def flush(server: ServerProcess) -> None:
    """Wait until Iceberg has everything."""
    with connect(server.location) as client:
        for name in TABLES:
            action(client, "Flush", name=name)


def rows(server: ServerProcess, name: str) -> list[int]:
    found: list[int] = lake.rows(server.data, name)["n"].to_pylist()
    return sorted(found)


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so; the timeout only ends what hangs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def write_at_disk(server: ServerProcess, name: str, values: range, *, keyed: bool = False) -> None:
    """Write rows that reach the disk and, where nothing is uploaded, no further."""
    with connect(server.location) as client:
        stream = Stream(client, name, NUMBERS, requested_durability="disk")
        for value in values:
            stream.write(numbers([value]), **({"idempotency_key": f"k{value}"} if keyed else {}))
        assert [ack for ack in stream.finish() if ack["error"]] == []


#: Nothing gets further than the disk.
DISK_ONLY = {"object_store__linger_s": 60, "iceberg__commit_interval_s": 60}


def test_process(make_server: Callable[..., ServerProcess]) -> None:
    """A process that is killed: what the disk has is there after the start."""
    server = make_server(**DISK_ONLY).start()
    with connect(server.location) as client:
        create(client, "t")
        create(client, "p", primary_key="n", table_type="primary_key")
    for name in TABLES:
        write_at_disk(server, name, range(5))
    server.kill()
    _, server = follow("The process", make_server, server)
    flush(server)
    for name in TABLES:
        assert rows(server, name) == list(range(5))


def test_file_of_the_log(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A damaged segment: what the store has comes back, what only the log has is sent by its key, each row once."""
    server = make_server(iceberg__commit_interval_s=0.1).start()
    fill(server)
    server.stop()
    late = make_server(**DISK_ONLY).start()
    for name in TABLES:
        write_at_disk(late, name, range(5, 9), keyed=True)
    late.kill()
    segment = min((server.data / "wal").glob("segment-*.wal"))
    data = bytearray(segment.read_bytes())
    data[HEADER_BYTES + 100] ^= 1
    segment.write_bytes(data)
    assert "damaged at byte" in refusal(make_server)
    said, server = follow("A file of the log", make_server, server, codes=(0, 3), OUT=tmp_path / "out")
    assert "8 writes acked at disk" in said
    assert (tmp_path / "out" / "salvage.json").exists()
    flush(server)
    for name in TABLES:
        assert rows(server, name) == list(range(9))


def test_disk_or_node(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A disk that is gone, with the rest elsewhere: what the store has comes back on an empty directory."""
    places = {
        "STORE": f"file://{tmp_path}/objects",
        "CATALOG": f"sqlite:///{tmp_path}/catalog.db",
        "WAREHOUSE": f"file://{tmp_path}/warehouse",
    }
    flags = ("--object-store", places["STORE"], "--catalog-uri", places["CATALOG"], "--warehouse", places["WAREHOUSE"])
    server = make_server(*flags, iceberg__commit_interval_s=60).start()
    with connect(server.location) as client:
        create(client, "t")
        create(client, "p", primary_key="n", table_type="primary_key")
        for name in TABLES:
            write_all(client, name, [numbers([n]) for n in range(5)], "object_storage")
    server.kill()
    shutil.rmtree(server.data)
    _, server = follow("The disk or the node", make_server, server, **places)
    flush(server)
    for name in TABLES:
        assert sorted(lake.column(tmp_path, name, "n")) == list(range(5))


def test_catalog_or_warehouse(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A catalog that is gone: the backup comes back, and what the log holds since is sent again, each row once."""
    server = make_server(iceberg__commit_interval_s=0.1).start()
    fill(server)

    def lose() -> None:
        for name in TABLES:
            write_at_disk(server, name, range(5, 9))
        server.kill()
        (server.data / "catalog.db").unlink()

    said, restored = follow(
        "The catalog or the warehouse", make_server, server, since_backup=lose, BACKUP=tmp_path / "backup"
    )
    assert "8 writes acked at disk" in said
    flush(restored)
    for name in TABLES:
        assert rows(restored, name) == list(range(9))


def lose_the_store(
    make_server: Callable[..., ServerProcess], late_values: dict[str, range], *, keyed: bool = False
) -> ServerProcess:
    """Fill tables, write rows that only the disk has then, and lose the object store; no server runs afterwards."""
    server = make_server(iceberg__commit_interval_s=0.1).start()
    fill(server)
    server.stop()
    late = make_server(**DISK_ONLY).start()
    for name, values in late_values.items():
        write_at_disk(late, name, values, keyed=keyed)
    late.kill()
    shutil.rmtree(server.data / "objects")
    return server


@pytest.mark.parametrize("keyed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_object_store(make_server: Callable[..., ServerProcess], keyed: bool) -> None:
    """A store that is gone: what Iceberg holds is left out, what only the disk holds is sent again, each row once."""
    server = lose_the_store(make_server, {"t": range(5, 9)}, keyed=keyed)
    assert "holds no epoch of node" in refusal(make_server)
    said, server = follow("The object store", make_server, server)
    assert "left out: 10 writes that their table's own mark says are in it" in said
    with connect(server.location) as client:
        write_all(client, "t", [numbers([9])])
    assert rows(server, "t") == list(range(10))
    assert rows(server, "p") == list(range(5))
    server.stop()


@pytest.mark.long
def test_object_store_and_a_primary_key_table(make_server: Callable[..., ServerProcess]) -> None:
    """A store that is gone: the new log becomes the table's owner as the refusal says, and each row is there once."""
    server = lose_the_store(make_server, {"p": range(4, 9)}, keyed=True)
    discard, _, resubmit = commands("The object store")
    subprocess.run([ARKA, *discard.replace("DATA_DIR", str(server.data)).split()[1:]], check=True, timeout=120)
    server = make_server(iceberg__commit_interval_s=0.1).start()
    with connect(server.location) as client:
        stream = Stream(client, "p", NUMBERS)
        stream.write(numbers([9]))
        assert "The identity of a log" in str([ack["error"] for ack in stream.finish()])
    server.stop()
    verify = [ARKA, "wal", "verify", server.data]
    said = subprocess.run(verify, check=True, timeout=120, capture_output=True, text=True).stdout
    (log_uuid,) = re.findall(r"log ([0-9a-f-]{36})", said)[:1]
    with lake.load(server.data, "p").transaction() as transaction:
        transaction.set_properties({"arka.owner": f"arka-0 {log_uuid}"})
    server.start()
    (aside,) = server.data.glob("wal.discarded-*")
    resubmit = resubmit.replace("DATA_DIR/wal.discarded-TIME", str(aside)).replace("URL", server.location)
    subprocess.run([ARKA, *resubmit.split()[1:]], check=True, timeout=120)
    with connect(server.location) as client:
        write_all(client, "p", [numbers([9])])
    assert rows(server, "p") == list(range(10))
    assert rows(server, "t") == list(range(5))
    server.stop()


@pytest.mark.long
def test_new_object_store(make_server: Callable[..., ServerProcess]) -> None:
    """A store that is gone while the disk has all that is needed: both kinds of tables go on, each row once."""
    server = lose_the_store(make_server, dict.fromkeys(TABLES, range(5, 9)))
    assert "--new-store" in refusal(make_server)
    _, server = follow("A new object store", make_server, server)
    with connect(server.location) as client:
        for name in TABLES:
            acks = write_all(client, name, [numbers([9])])
            assert min(ack["lsn"] for ack in acks) >= 1 << 32
    for name in TABLES:
        assert rows(server, name) == list(range(10))


def test_data_file(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A data file that is gone: reads name it, writes of both kinds of tables go on; put back, each row is there."""
    server = make_server(iceberg__commit_interval_s=0.1).start()
    fill(server)
    for name in TABLES:
        path = min(server.data.glob(f"warehouse/default/{name}-*/data/*.parquet"))
        copy = tmp_path / f"{name}.parquet"
        shutil.copy(path, copy)
        path.unlink()
        with connect(server.location) as client:
            with pytest.raises((flight.FlightError, pa.ArrowException), match=path.name):
                client.do_get(flight.Ticket(name.encode())).read_all()
            write_all(client, name, [numbers([5])])
            assert action(client, "DescribeTable", name=name)["state"] == "active"
            follow("A data file", make_server, server, COPY=copy, FILE=path)
            read = client.do_get(flight.Ticket(name.encode())).read_all()
        assert sorted(read["n"].to_pylist()) == rows(server, name) == list(range(6))


@pytest.mark.parametrize("damage", ["damaged", pytest.param("gone", marks=pytest.mark.long)])
def test_object_of_one_table(make_server: Callable[..., ServerProcess], tmp_path: Path, damage: str) -> None:
    """A parked object that is damaged or gone: its table stops and says so, others go on; put back, it goes on too."""
    small = {"iceberg__commit_interval_s": 0.1, "wal__segment_bytes": 1 << 20, "wal__release_grace_s": 0}
    server = make_server(**small).start()
    fill(server)
    with connect(server.location) as client, closing(sqlite3.connect(server.data / "catalog.db")) as catalog:
        create(client, "other")
        row = catalog.execute("SELECT * FROM iceberg_tables WHERE table_name = 't'").fetchone()
        catalog.execute("DELETE FROM iceberg_tables WHERE table_name = 't'")
        catalog.commit()
        stream = Stream(client, "t", NUMBERS, requested_durability="disk")
        for value in range(5, 9):
            stream.write(numbers([value]))
        stream.finish()
        objects = server.data / "objects"
        wait_for(lambda: list(objects.glob("*/parked/*/*")), "parked")
        # The log lets go of them behind a checkpoint.
        for _ in range(4):
            write_all(client, "other", [numbers(range(100_000))])
        wait_for(lambda: list(objects.glob("*/checkpoint/*/*")), "a checkpoint")
        server.kill()
        catalog.execute(f"INSERT INTO iceberg_tables VALUES ({', '.join('?' * len(row))})", row)
        catalog.commit()
    parked = min(objects.glob("*/parked/*/*"))
    copy = tmp_path / "copy"
    shutil.copy(parked, copy)
    parked.unlink()
    if damage == "damaged":
        parked.write_bytes(copy.read_bytes()[:-100] + bytes(100))
    server.start()
    with connect(server.location) as client:
        wait_for(lambda: action(client, "DescribeTable", name="t")["state"] == "stopped", "stopped")
        reason = action(client, "DescribeTable", name="t")["reason"]
        assert parked.name in reason
        assert "restart the server" in reason
        write_all(client, "other", [numbers([-1])])
    assert rows(server, "other")[0] == -1
    server.kill()
    _, server = follow("An object of one table", make_server, server, COPY=copy, OBJECT=parked)
    with connect(server.location) as client:
        write_all(client, "t", [numbers([9])])
    assert rows(server, "t") == list(range(10))


def test_path(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A directory that was moved: adopted, it has every row and takes more."""
    server = make_server(iceberg__commit_interval_s=0.1).start()
    fill(server)
    server.stop()
    server.data.rename(tmp_path / "moved")
    assert "--adopt-warehouse" in refusal(make_server, data="moved")
    _, server = follow("The path", make_server, make_server(data="moved"))
    with connect(server.location) as client:
        for name in TABLES:
            write_all(client, name, [numbers([5])])
    for name in TABLES:
        assert rows(server, name) == list(range(6))


def test_copy_of_a_data_directory(make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """What the copy that does not go on accepted comes to the one that does, and nothing is there twice."""
    outside = {
        "iceberg__catalog_uri": f"sqlite:///{tmp_path}/catalog.db",
        "iceberg__warehouse": f"file://{tmp_path}/warehouse",
    }
    server = make_server(iceberg__commit_interval_s=0.1, **outside).start()
    fill(server)
    server.stop()
    shutil.copytree(server.data, tmp_path / "other")
    assert "is a copy of" in refusal(make_server, data="other", **outside)
    other = make_server("--take-over", data="other", **DISK_ONLY, **outside).start()
    for name in TABLES:
        write_at_disk(other, name, range(5, 8), keyed=True)
    server = make_server(iceberg__commit_interval_s=0.1, **outside).start()
    with connect(server.location) as client:
        for name in TABLES:
            write_all(client, name, [numbers([n]) for n in (8, 9)])
    other.stop()
    other = make_server("--take-over", data="other", **outside).start()
    with connect(other.location) as client:
        for name in TABLES:
            assert "nother copy of this data directory" in action(client, "DescribeTable", name=name)["reason"]
    other.stop()
    follow("A copy of a data directory", make_server, server, OTHER_DIR=other.data)
    flush(server)
    server.stop()
    for name in TABLES:
        # The catalog lies beside the data directory, as an embedded one lies in it.
        found = lake.column(tmp_path, name, "n")
        assert sorted(found) == list(range(10))


def test_page_has_no_other_commands() -> None:
    """Whatever the page tells people to run is run by a test of this file."""
    sections = {line for line in re.findall(r"^## (.*)$", PAGE.read_text(), re.M) if commands(line)}
    assert sections == set(re.findall(r'follow\(\s*"(.*?)"', Path(__file__).read_text()))
