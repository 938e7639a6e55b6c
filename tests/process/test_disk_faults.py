"""A disk that fails: clients hear what nobody can know, the process ends, and the next one has every ack (R6)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from arka.testing.serverprocess import STOP_TIMEOUT_S, ServerFailed, ServerProcess

from .clients import TIERS
from .keyed import KeyedWriter, Node, check_broken, check_iceberg, create_tables

pytestmark = [pytest.mark.process, pytest.mark.slow]

PAD = "arka" * 4096
SETTINGS = {
    "server__drain_s": 20,
    "wal__segment_bytes": 1 << 20,
    "iceberg__commit_interval_s": 0.1,
}
JOIN_TIMEOUT_S = 60.0


def _writers(node: Node) -> list[KeyedWriter]:
    return [
        KeyedWriter(node, number, ("left", "right")[number % 2], durability, pad=lambda _: PAD, pace_s=0.002)
        for number, durability in enumerate(TIERS[1:])
    ]


def _run(server: ServerProcess, writers: list[KeyedWriter], *, to_the_end: bool) -> None:
    """Let all writers write until the server is gone, or until everything sent has its last ack."""
    gone = threading.Event()
    threads = [
        threading.Thread(target=writer.run, args=(server.location, writer.sent if to_the_end else None, gone))
        for writer in writers
    ]
    for thread in threads:
        thread.start()
    if not to_the_end:
        assert server.wait(JOIN_TIMEOUT_S) == 1, server.log_tail()
        gone.set()
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive(), server.log_tail()


_long = partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wal.group_written=eio@20", "Input/output error (injected at failpoint wal.group_written)"),
        _long("wal.group_begin=enospc@20", "No space left on device"),
        _long("wal.header_written=eio@3", "Input/output error (injected at failpoint wal.header_written)"),
        _long("wal.segment_renamed=eio@3", "Input/output error (injected at failpoint wal.segment_renamed)"),
        _long("wal.segment_begin=enospc@3", "No space left on device (injected at failpoint wal.segment_begin)"),
        _long("wal.footer_synced=eio@2", "Input/output error (injected at failpoint wal.footer_synced)"),
    ],
)
def test_failed_log(make_server: Callable[..., ServerProcess], fault: str, said: str) -> None:
    """A write or fsync of the log that fails, of a group or in a segment roll, poisons the log.

    Each write above the disk watermark gets one ``outcome_unknown``, none is called lost; the streams end with a
    status, the process with exit code 1. The next process has every write that was acked on disk, and what the
    clients send again by key is there exactly once.
    """
    server = make_server(**SETTINGS).start()
    node = Node()
    writers = _writers(node)
    create_tables(server.location, ("left", "right"))
    server.stop()

    server.failpoints = fault
    server.start()
    _run(server, writers, to_the_end=False)
    log = server.log.read_text()
    assert said in log
    assert "disk.poisoned" in log
    assert "restart the server" in server.log_tail(3), server.log_tail()
    assert "Traceback" not in log
    unknown = [ack for writer in writers for ack in writer.errors]
    # What comes behind the failure is refused for good and has no LSN; what was on its way is unknown.
    assert {ack["code"] for ack in unknown} <= {"outcome_unknown", "unavailable"}, unknown
    assert any(ack["code"] == "outcome_unknown" for ack in unknown), server.log_tail()
    for writer in writers:
        assert writer.broken == []
        assert writer.status != "", "the stream ended with OK"
        assert not (writer.durability == "disk" and {a["lsn"] for a in writer.errors} & _acked(writer))
        writer.errors.clear()

    server.failpoints = ""
    node.begin_life()
    server.start()
    _run(server, writers, to_the_end=True)
    server.stop()
    check_broken(writers)
    assert check_iceberg(server, writers) == sum(len(writer.rows()) for writer in writers)


def _acked(writer: KeyedWriter) -> set[int]:
    """The LSNs that were acked on disk."""
    return {told.lsn for told in writer.told.values() if told.tier >= TIERS.index("disk")}


@pytest.mark.parametrize(
    "fault",
    [
        _long("logstate.slot_written=eio@1"),
        _long("logstate.slot_written=eio@3"),
        _long("whole.synced=eio@1"),
        "recovery.copy_written=enospc",
    ],
)
def test_failed_start(make_server: Callable[..., ServerProcess], fault: str) -> None:
    """A disk that fails in a start, in the log's state or in recovery, ends that start with a line that says so.

    Nothing is served and nothing is lost: the next start, on a disk that works, has every ack.
    """
    server = make_server(**SETTINGS).start()
    node = Node()
    writers = _writers(node)
    create_tables(server.location, ("left", "right"))
    gone = threading.Event()
    threads = [threading.Thread(target=writer.run, args=(server.location, None, gone)) for writer in writers]
    for thread in threads:
        thread.start()
    while not all(_acked(writer) for writer in writers):
        assert server.exit_code is None, server.log_tail()
        gone.wait(0.01)
    server.kill()
    gone.set()
    for thread in threads:
        thread.join(JOIN_TIMEOUT_S)
        assert not thread.is_alive()
    check_broken(writers)

    server.failpoints = fault
    server.spawn()
    assert server.wait(STOP_TIMEOUT_S) == 1, server.log_tail()
    assert "injected at failpoint" in server.log_tail(1), server.log_tail()
    with pytest.raises(ServerFailed):
        server.stop()

    server.failpoints = ""
    node.begin_life()
    server.start()
    _run(server, writers, to_the_end=True)
    server.stop()
    check_broken(writers)
    assert check_iceberg(server, writers) == sum(len(writer.rows()) for writer in writers)


def test_unknown_failpoint(make_server: Callable[..., ServerProcess]) -> None:
    """A failpoint that does not exist ends the start with exit code 2 and the names that do."""
    server = make_server()
    server.failpoints = "wal.group=kill"
    server.spawn()
    assert server.wait() == 2
    assert "unknown failpoint 'wal.group'; known are start.disk_id, " in server.log_tail()
