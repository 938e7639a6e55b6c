"""The log's thread: one group at a time, without the GIL, errors by errno, and an end with its object."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest

from arka._core.framing import KIND_LOST, Frame, Group, crc_seed, verify_frame
from arka._core.logthread import LogThread

SEED = crc_seed(UUID(int=1), 2, 3)


def group(lsn: int, offset: int = 0, payload: bytes = b"x") -> Group:
    return Group([Frame(KIND_LOST, lsn, payload=payload, accepted_us=0)], offset, SEED)


def wait(thread: LogThread) -> None:
    ready, _, _ = select.select([thread.event_fd], [], [], 10)
    assert ready


def native_threads() -> list[str]:
    return [
        name
        for task in Path("/proc/self/task").iterdir()
        if (name := (task / "comm").read_text().strip()) == "arka-log"
    ]


def test_commits_in_turn(tmp_path: Path) -> None:
    """Groups come out as they went in; the event is there when one is done, and gone when it is taken back."""
    path = tmp_path / "log"
    thread = LogThread()
    with path.open("wb") as file:
        offset = 0
        for lsn in range(1, 200):
            one = group(lsn, offset, b"x" * lsn * 50)
            thread.begin(one, file.fileno())
            wait(thread)
            thread.finish()
            assert not select.select([thread.event_fd], [], [], 0)[0]
            assert verify_frame(path.read_bytes(), offset, SEED).lsn == lsn
            offset += one.size


def test_needs_no_gil(tmp_path: Path) -> None:
    """It is done while a call of Python's keeps the GIL."""

    class Poll(ctypes.Structure):
        _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))

    path = tmp_path / "log"
    thread = LogThread()
    with path.open("wb") as file:
        one = group(1, payload=b"x" * 1_000_000)
        thread.begin(one, file.fileno())
        asked = Poll(thread.event_fd, select.POLLIN, 0)
        # Of a PyDLL: called with the GIL held.
        assert ctypes.PyDLL(None).poll(ctypes.byref(asked), 1, 10_000) == 1
        thread.finish()
    assert path.stat().st_size == one.size


def test_error_names_errno_and_thread_goes_on(tmp_path: Path) -> None:
    """A descriptor that cannot be written costs its own group."""
    path = tmp_path / "log"
    path.write_bytes(b"")
    thread = LogThread()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        thread.begin(group(1), descriptor)
        wait(thread)
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
            thread.finish()
        assert caught.value.errno == errno.EBADF
    finally:
        os.close(descriptor)
    with path.open("wb") as file:
        thread.begin(group(2), file.fileno())
        wait(thread)
        thread.finish()
    assert verify_frame(path.read_bytes(), 0, SEED).lsn == 2


def test_a_collected_thread_has_written_its_group_whole(tmp_path: Path) -> None:
    """The collector may find thread and group in one cycle that nobody refers to: neither is cleared meanwhile."""
    path = tmp_path / "log"
    count, size = 1_000, 60_000

    def abandon(descriptor: int) -> None:
        frames = [
            Frame(KIND_LOST, lsn, payload=bytes([lsn % 251]) * size, accepted_us=0) for lsn in range(1, count + 1)
        ]
        holder = SimpleNamespace(thread=LogThread())
        holder.itself = holder
        holder.thread.begin(Group(frames, 0, SEED), descriptor)

    with path.open("wb") as file:
        abandon(file.fileno())
        gc.collect()
        reused = [b"\xee" * size for _ in range(count)]
    data = path.read_bytes()
    step = len(data) // count
    for lsn in range(1, count + 1):
        assert verify_frame(data, (lsn - 1) * step, SEED).lsn == lsn
        assert data[lsn * step - step + 128] == lsn % 251
    assert len(reused) == count


def test_refuses_two_at_a_time(tmp_path: Path) -> None:
    """A second group before the first was taken back, and a finish of none, are errors of the caller's."""
    thread = LogThread()
    with pytest.raises(RuntimeError, match="no group commit"):
        thread.finish()
    with (tmp_path / "log").open("wb") as file:
        thread.begin(group(1), file.fileno())
        with pytest.raises(RuntimeError, match="under way"):
            thread.begin(group(2), file.fileno())
        thread.finish()
    assert verify_frame((tmp_path / "log").read_bytes(), 0, SEED).lsn == 1, "finish waits"


def test_ends_with_its_object() -> None:
    """The thread and its descriptor are gone with the object; a fork's copy has no thread to wait for."""
    before = len(native_threads())
    thread = LogThread()
    assert len(native_threads()) == before + 1
    child = os.fork()
    if child == 0:
        del thread
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0
    descriptor = thread.event_fd
    del thread
    assert len(native_threads()) == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
