"""A disk that fills up: new writes are refused before it is full, what was accepted goes all the way (R23)."""

from __future__ import annotations

import base64
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arka.testing.serverprocess import ServerProcess

from .clients import TIERS, action, connect
from .keyed import BATCH_ROWS, KeyedWriter, Node, check_iceberg, create_tables

pytestmark = [pytest.mark.process, pytest.mark.slow]

DISK_MIB = 96
#: Left free beside what is owed: metadata, manifests, and the last blocks of many files.
FREE_MIB = 6
#: Ends only what hangs.
TIMEOUT_S = 90.0


def noise(row: int) -> str:
    """Text that no codec makes much smaller: the warehouse takes almost as many bytes as the log."""
    return base64.b85encode(random.Random(row).randbytes(4096)).decode()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with 96 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "arka-test", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no mount command: a small file system cannot be made")
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    # Lazily: a process that failed to die in time must not leave the mount behind for ever.
    subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=30)


def test_overloaded_before_full(make_server: Callable[..., ServerProcess], small_disk: Path) -> None:
    """With log, store and warehouse on one file system that fills up, writes get ``overloaded`` before it is full.

    Every write that was accepted gets all its acks meanwhile, nothing ever meets ENOSPC, and once there is room
    again the same process accepts by itself what it had refused.
    """
    server = make_server(
        data="disk/data",
        server__drain_s=30,
        wal__segment_bytes=1 << 20,
        wal__release_grace_s=0,
        limits__disk_free_bytes=FREE_MIB << 20,
        limits__stall_s=1,
        limits__memory_bytes=16 << 20,
        iceberg__commit_interval_s=0.1,
    ).start()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((DISK_MIB // 3) << 20))
    node = Node()
    writers = [
        KeyedWriter(node, number, ("left", "right")[number % 2], durability, pad=noise, window=64)
        for number, durability in enumerate(("disk", "iceberg_committed"))
    ]
    create_tables(server.location, ("left", "right"))
    gone = threading.Event()
    threads = [threading.Thread(target=writer.run, args=(server.location, 10_000, gone)) for writer in writers]
    for thread in threads:
        thread.start()
    _wait(lambda: all(writer.errors for writer in writers), server)
    # Writes are refused now, one after the other; the rest of what was accepted comes down.
    gone.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), server.log_tail()
    for writer in writers:
        assert writer.broken == []
        assert writer.status == "", server.log_tail()
        assert {ack["code"] for ack in writer.errors} == {"overloaded"}
        assert {ack["lsn"] for ack in writer.errors} == {0}
        assert {TIERS[told.tier] for told in writer.told.values()} == {writer.durability}
        assert writer.told, "nothing was accepted before the disk was full"
    refused = sum(writer.sent - len(writer.told) for writer in writers)
    assert refused == sum(len(writer.errors) for writer in writers)
    _wait_committed(server)

    ballast.unlink()
    _wait(lambda: "disk.accepting" in server.log.read_text(), server)
    for writer in writers:
        # What was refused left no key: it is accepted now, beside a few more.
        writer.sent = min(writer.sent, max(writer.told) + 20)
        writer.errors.clear()
        writer.run(server.location, writer.sent, threading.Event())
        assert (writer.broken, writer.errors, writer.status) == ([], [], ""), server.log_tail()
        assert len(writer.told) == writer.sent
    log = server.log.read_text()
    server.stop()
    assert "No space left" not in log
    assert "Traceback" not in log
    rows = check_iceberg(server, writers)
    print(f"{rows} rows, {refused} batches of {BATCH_ROWS} rows refused; {log.count('disk.refusing')} times full")


def _wait_committed(server: ServerProcess) -> None:
    """Wait until everything that was accepted is in Iceberg, on the full disk."""
    with connect(server.location) as client:
        for table in ("left", "right"):
            action(client, "Flush", name=table)


def _wait(condition: Callable[[], bool], server: ServerProcess) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert server.exit_code is None, server.log_tail()
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.02)
