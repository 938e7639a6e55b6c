"""Failpoints: named places beside the durable steps where a test can kill the server or fail a call.

Owns: the names, what the variable ``ARKA_FAILPOINTS`` asks for, and doing it. Does not own the steps. For tests
only: it is no setting, and a server without the variable pays one check of a global at each place. A server that has it
starts only if ``ARKA_TESTING`` is ``1`` too, so that no stray variable makes one kill itself.

``ARKA_FAILPOINTS`` is a list of ``name=action[@n]`` with commas between: the n-th hit of that place in one process
(the first without ``@n``) does the action, the hits before and after it do nothing. Actions:
    ``kill``           SIGKILL of the *server*; a worker process that hits it takes the server with it
    ``eio``, ``enospc``  the call at that place fails with this errno; not where trio's own thread passes
    ``pause:SECONDS``  whoever passes waits there; its thread or task alone, never the whole server
An unknown name or action is an error at the start. ``ALL`` lists the places.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from arka.errors import ConfigurationError

VARIABLE: Final = "ARKA_FAILPOINTS"
#: ``1``: the process is a test's, and may be told to kill itself.
TESTING: Final = "ARKA_TESTING"

_ERRORS: Final = {"eio": errno.EIO, "enospc": errno.ENOSPC}
#: How long whoever asked for the server's death waits for it, in seconds: it must not pass the place.
_DEATH_S: Final = 60.0


class Place(Enum):
    """Whose thread passes a failpoint."""

    #: A thread of the server's that may block, or trio's before it serves.
    THREAD = "thread"
    #: A worker process; each counts its own hits.
    WORKER = "worker"
    #: Trio's thread: no errors, and pauses are trio's.
    TRIO = "trio"


@dataclass(frozen=True, slots=True)
class Failpoint:
    """One place, and what is true when it is passed: what has just become durable, or is about to."""

    name: str
    place: Place
    durable: str


_THREAD, _WORKER, _TRIO = Place

ALL: Final = (
    # The start, in its order.
    Failpoint("start.disk_id", _THREAD, "the data directory has its identity"),
    Failpoint("logstate.slot_written", _THREAD, "a slot of the log's state is written, not fsynced"),
    Failpoint("logstate.slot_synced", _THREAD, "a slot of the log's state is fsynced: one of two"),
    Failpoint("epoch.begin", _TRIO, "nothing of the new epoch: its object is about to be put"),
    Failpoint("epoch.taken", _TRIO, "the new epoch is in the store, its first LSN block is not"),
    Failpoint("epoch.block_put", _TRIO, "a block of LSNs is in the store, the epoch was not read again"),
    Failpoint("epoch.block_reserved", _TRIO, "a block of LSNs is in the store and ours"),
    Failpoint("logstate.created", _THREAD, "a new log's state is on disk, no segment is"),
    Failpoint("recovery.cleaned", _THREAD, "unfinished files are removed"),
    Failpoint("recovery.replaced_removed", _THREAD, "the original of an earlier, killed recovery's copy is removed"),
    Failpoint("recovery.torn_kept", _THREAD, "the torn bytes are copied aside, the tail is as it was"),
    Failpoint("recovery.copy_written", _THREAD, "the tail's copy is written, not fsynced"),
    Failpoint("recovery.copy_synced", _THREAD, "the tail's copy is fsynced, without its name"),
    Failpoint("recovery.copy_renamed", _THREAD, "the tail's copy has its name, the folder is not fsynced"),
    Failpoint("recovery.copy_named", _THREAD, "the tail's copy is durable beside its original"),
    Failpoint("recovery.original_unlinked", _THREAD, "the original is unlinked, the folder is not fsynced"),
    Failpoint("recovery.original_removed", _THREAD, "the tail's copy has taken its original's place"),
    Failpoint("recovery.marked", _THREAD, "recovery's seal mark is on disk"),
    Failpoint("wal.opened", _THREAD, "the seal mark says that the log is open, no LSN was given"),
    Failpoint("start.recovered", _TRIO, "the log is recovered, its state on disk has the new epoch and ceiling"),
    Failpoint("epoch.start_recorded", _TRIO, "the store knows that this epoch's disk has all of the log"),
    # Whole files that take the place of others: log state, seal mark, torn bytes.
    Failpoint("whole.written", _THREAD, "a whole file is written beside the old one, not fsynced"),
    Failpoint("whole.synced", _THREAD, "a whole file is fsynced beside the old one"),
    Failpoint("whole.renamed", _THREAD, "a whole file has its name, the folder is not fsynced"),
    # Group commits.
    Failpoint("wal.group_begin", _THREAD, "nothing of the group: it is about to be written"),
    Failpoint("wal.group_written", _THREAD, "a group, or a footer, is written, not fsynced"),
    Failpoint("wal.group_synced", _THREAD, "a group is on disk, nobody was told"),
    # Segments.
    Failpoint("wal.spare_allocated", _THREAD, "the next segment's room is allocated"),
    Failpoint("wal.footer_synced", _THREAD, "a segment is sealed, the next does not exist"),
    Failpoint("wal.segment_begin", _THREAD, "nothing of the next segment: it is about to be made"),
    Failpoint("wal.segment_allocated", _THREAD, "the next segment's file is there, empty"),
    Failpoint("wal.header_written", _THREAD, "the next segment's header is written, not fsynced"),
    Failpoint("wal.header_synced", _THREAD, "the next segment's header is fsynced, it has no name"),
    Failpoint("wal.segment_renamed", _THREAD, "the next segment has its name, the folder is not fsynced"),
    Failpoint("wal.segment_named", _THREAD, "the next segment is durable and empty"),
    Failpoint("seal.copy_written", _THREAD, "one copy of the changed seal mark is written, not fsynced"),
    Failpoint("seal.copy_synced", _THREAD, "one copy of the changed seal mark is fsynced"),
    # The object store; the first three are a folder's.
    Failpoint("store.staged", _THREAD, "an object's bytes are fsynced, without their name"),
    Failpoint("store.linked", _THREAD, "an object has its name, the folder is not fsynced"),
    Failpoint("store.named", _THREAD, "an object is durable, the put has not returned"),
    Failpoint("objects.begin", _TRIO, "nothing of a WAL object: it is about to be put"),
    Failpoint("objects.put", _TRIO, "a WAL object is in the store, the epoch was not read since"),
    Failpoint("objects.verified", _TRIO, "WAL objects are in the store and ours, the mark has not risen"),
    Failpoint("objects.advanced", _TRIO, "the object_storage mark has risen, acks are due"),
    # Letting go of the log.
    Failpoint("release.begin", _TRIO, "nothing of a checkpoint: it is about to be put"),
    Failpoint("release.checkpoint", _TRIO, "a checkpoint is in the store, its segments are on disk"),
    Failpoint("release.segments_forgotten", _THREAD, "the seal mark names the segments that stay, all are there"),
    Failpoint("release.segment_unlinked", _THREAD, "a segment is unlinked, the folder is not fsynced"),
    Failpoint("release.segment_removed", _THREAD, "a segment is gone for good, its objects are there"),
    Failpoint("release.retired", _TRIO, "all segments that may go are gone, their objects are there"),
    Failpoint("store.deleted", _THREAD, "an object is deleted"),
    Failpoint("release.deleted", _TRIO, "segments and objects that may go are gone"),
    # Creating and dropping tables.
    Failpoint("create.recorded", _TRIO, "the CREATE record is on disk, the catalog was not called"),
    Failpoint("catalog.create", _WORKER, "nothing of the new table: the catalog is about to be called"),
    Failpoint("catalog.created", _WORKER, "the catalog has the new table, the server was not told"),
    Failpoint("create.done", _TRIO, "the catalog has the new table, the client was not told"),
    Failpoint("drop.recorded", _TRIO, "the DROP record is on disk, the catalog was not called"),
    Failpoint("catalog.drop", _WORKER, "the catalog is about to be asked for the drop"),
    Failpoint("catalog.dropped", _WORKER, "the catalog has dropped the table, its files may be there"),
    Failpoint("catalog.purged", _WORKER, "a purged table's files are gone, the server was not told"),
    Failpoint("drop.done", _TRIO, "the catalog has dropped the table, no record says so"),
    Failpoint("drop.noted", _TRIO, "the record of the done drop waits for the disk"),
    # Iceberg.
    Failpoint("encode.written", _WORKER, "a data file is written, not fsynced"),
    Failpoint("encode.synced", _WORKER, "a job's data files are durable, nothing names them"),
    Failpoint("encode.keys", _WORKER, "a primary-key job's staged run has its bytes, not its name"),
    Failpoint("commit.deletes", _WORKER, "delete files are durable, nothing names them"),
    Failpoint("index.staged", _WORKER, "the index knows what a commit will add, the catalog was not asked"),
    Failpoint("commit.manifests", _WORKER, "manifests and their list are durable, nothing names them"),
    Failpoint("commit.metadata", _WORKER, "a metadata file is durable, the catalog names the old one"),
    Failpoint("commit.swapped", _WORKER, "the catalog names the new metadata, garbage was not collected"),
    Failpoint("index.landed", _WORKER, "a commit is done and the index says so, its runs are not merged"),
    Failpoint("index.merging", _WORKER, "runs of the index are merged into one, the index names the old ones"),
    Failpoint("index.merged", _WORKER, "the index names the merged run, the old ones are there"),
    Failpoint("commit.response", _WORKER, "a commit is done, the server was not told"),
    Failpoint("commit.recorded", _TRIO, "the disk knows what a commit has done, the table's mark has not risen"),
    Failpoint("commit.answered", _TRIO, "a commit is done, the table's mark has not risen"),
    Failpoint("commit.advanced", _TRIO, "the table's iceberg_committed mark has risen, acks are due"),
    # A clean stop.
    Failpoint("stop.drained", _TRIO, "everything accepted is committed, the log is not sealed"),
    Failpoint("stop.begin_seal", _THREAD, "the last group is on disk, the log is not sealed"),
    Failpoint("stop.marked", _THREAD, "the seal mark says that the log was closed"),
    Failpoint("stop.sealed", _TRIO, "the log is sealed, the process runs"),
)  # fmt: skip

_PLACES: Final = {point.name: point.place for point in ALL}


@dataclass(frozen=True, slots=True)
class _Armed:
    """What one failpoint does at its n-th hit."""

    action: str
    pause_s: float
    number: int
    hits: itertools.count[int]
    server_pid: int

    def is_due(self) -> bool:
        return next(self.hits) == self.number

    def act(self, name: str) -> None:
        """Kill, or fail."""
        if self.action == "kill":
            _say(f"failpoint {name}, hit {self.number}: the server with pid {self.server_pid} is killed")
            os.kill(self.server_pid, signal.SIGKILL)
            time.sleep(_DEATH_S)
        if self.action in _ERRORS:
            number = _ERRORS[self.action]
            _say(f"failpoint {name}, hit {self.number}: the call fails with {self.action}")
            raise OSError(number, f"{os.strerror(number)} (injected at failpoint {name})")


#: None where no failpoint is set; what ``hit`` looks at first.
_armed: Mapping[str, _Armed] | None = None


def hit(name: str) -> None:
    """Pass a place in a thread or a worker; does nothing unless the variable asks for it.

    Args:
        name: one of ``ALL``.

    Raises:
        OSError: the one that was asked for.
    """
    if _armed is not None:
        _act(name, time.sleep)


async def reach(name: str) -> None:
    """Pass a place on trio's thread; does nothing, and is no checkpoint, unless the variable asks for it.

    Cancellation: ends a pause.
    """
    if _armed is not None:
        await _act_in_trio(name)


def armed() -> bool:
    """Whether any failpoint is set: where passing one takes a detour."""
    return _armed is not None


def wished(environment: Mapping[str, str]) -> str:
    """Return what the environment asks for; empty for nothing.

    Raises:
        ConfigurationError: it asks for failpoints, and this is no test.
    """
    text = environment.get(VARIABLE, "").strip()
    if text and environment.get(TESTING) != "1":
        raise ConfigurationError(
            f"{VARIABLE} is set: it makes a server kill itself or fail, for tests alone. Unset it; a test sets "
            f"{TESTING}=1 beside it"
        )
    return text


def arm(text: str, *, server_pid: int) -> None:
    """Set the failpoints of this process.

    Args:
        text: the variable's value; empty for none.
        server_pid: the process that ``kill`` kills.

    Raises:
        ConfigurationError: an unknown name or action, or an action that the place does not have.
    """
    global _armed
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    _armed = dict(_parse(entry, server_pid) for entry in entries) or None
    if _armed is not None:
        _say(f"failpoints are set in the process with pid {os.getpid()}: {text}")


def _parse(entry: str, server_pid: int) -> tuple[str, _Armed]:
    name, _, wish = entry.partition("=")
    place = _PLACES.get(name)
    if place is None:
        raise ConfigurationError(f"{VARIABLE}: unknown failpoint {name!r}; known are {', '.join(_PLACES)}")
    wish, at, number = wish.partition("@")
    action, colon, pause = wish.partition(":")
    try:
        count = int(number) if at else 1
        pause_s = float(pause) if colon else 0.0
    except ValueError:
        raise ConfigurationError(f"{VARIABLE}: {entry!r}: expected name=action[:SECONDS][@n]") from None
    if action not in ("kill", "pause", *_ERRORS) or bool(colon) != (action == "pause") or count < 1 or pause_s < 0:
        raise ConfigurationError(f"{VARIABLE}: {entry!r}: expected kill, eio, enospc or pause:SECONDS, and @n from 1")
    if place is Place.TRIO and action in _ERRORS:
        raise ConfigurationError(f"{VARIABLE}: {entry!r}: {name} is on trio's own thread: kill or pause")
    return name, _Armed(action, pause_s, count, itertools.count(1), server_pid)


def _act(name: str, sleep: Callable[[float], None]) -> None:
    assert _armed is not None
    point = _armed.get(name)
    if point is not None and point.is_due():
        point.act(name)
        sleep(point.pause_s)


async def _act_in_trio(name: str) -> None:
    # Here, so that workers need not load it.
    import trio

    assert _armed is not None
    point = _armed.get(name)
    if point is not None and point.is_due():
        point.act(name)
        await trio.sleep(point.pause_s)


def _say(line: str) -> None:
    """Write a line of its own to stderr: in workers nobody has set up logging, and a kill waits for nothing."""
    os.write(2, f"{line}\n".encode())


__all__ = ["ALL", "TESTING", "VARIABLE", "Failpoint", "Place", "arm", "armed", "hit", "reach", "wished"]
