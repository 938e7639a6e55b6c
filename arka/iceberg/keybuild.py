"""Make the index of a primary-key table from the table, over as many jobs as it takes.

Owns: the directory of an index that is being made: the parts that were read, and the note of which there are. Does not
own reading keys (``keyscan``) nor the finished index (``keyindex``).

Keys are read into *parts*: runs of the keys of files that lie beside each other in the table's order. Each is noted, so
that a job that ran out of time, or died, leaves its work to the next; at the end all are merged into the index. A part
holds as long as its files are in the table with the same dead rows, whatever else others do to the table meanwhile.
Parts stay until the index has served a commit: should others be faster, only what they changed is read again. They are
given up where merging them does not come to an end, for whatever is wrong with them.

A table has one row for each key as far as Arka writes it. Where others added a row under a key that was there, the
newest counts; older ones are kept in a *shadowed* run, so that they die with it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from arka._core.framing import crc32c
from arka._core.rowkeys import DROPPED, settle
from arka._core.runs import RunDamaged, merge_runs, write_run
from arka.iceberg.fileio import make_directory, write_durable
from arka.iceberg.keyscan import KeyScan
from arka.iceberg.runfiles import map_run, new_name, new_run, open_run, packed
from arka.storage.ports import CatalogUnavailable, WorkUnfinished

#: Entries of a part as it is read; 48 bytes each while they are sorted.
_PART_ENTRIES: Final = 4_000_000
#: Entries of several parts that are merged where other tables wait; more are merged apart.
_MERGE_HERE: Final = 4_000_000
#: Parts that are merged at a time: each is mapped, and the kernel bounds how many maps a process has.
_MERGE_PARTS: Final = 256
#: Attempts at a merge before its parts are given up.
_MERGES: Final = 3
#: The directory of parts, in that of the index.
_PARTS: Final = "building"
_NOTE: Final = "note"
_CRC_BYTES: Final = 4

#: A data file's path, and those of its delete files.
Source = tuple[str, tuple[str, ...]]
#: Hashes of keys, the number of the file that their rows are in, and the rows.
_Keys = tuple[pa.FixedSizeBinaryArray, int, pa.UInt32Array]


class _Part(msgspec.Struct, frozen=True):
    #: What it was made of; file numbers count from the first.
    sources: list[Source]
    #: The names of its run, and of that of older rows of its keys; empty for none.
    run: str
    entries: int
    shadowed: str


class _Note(msgspec.Struct, frozen=True):
    check: bytes
    parts: list[_Part]
    #: Merges of just these parts that have begun.
    merges: int = 0


class BuildTerms:
    """How much of an index one job may make, over all of its attempts.

    Args:
        seconds: so long; or as long as the job took before it came to that, if that is longer: whatever a job costs,
            half of it goes into what it is for.
        apart: whether no other table waits for this job.

    Attributes:
        apart: the same.
    """

    def __init__(self, seconds: float, *, apart: bool) -> None:
        self.apart = apart
        self._seconds = seconds
        self._began = time.monotonic()
        self._until: float | None = None

    def start(self) -> None:
        """Say that keys are read from now on; the first call counts."""
        if self._until is None:
            now = time.monotonic()
            self._until = now + max(self._seconds, now - self._began)

    @property
    def over(self) -> bool:
        """Whether the rest is the next job's."""
        assert self._until is not None
        return time.monotonic() >= self._until


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """What ``KeyIndex.begin`` takes.

    Attributes:
        files: the data files that entries name.
        run: the name of the run of keys.
        shadowed: the name of the run of older rows; empty for none.
    """

    files: list[str]
    run: str
    shadowed: str


class KeyBuild:
    """Makes an index.

    Args:
        index: the index's directory. The parts lie in one of their own in it; the index that is there is of no use any
            more and removed.
        check: says how keys are hashed (``runfiles.check_of``).
        scan: reads keys.
        terms: how much of it may be done now.
    """

    def __init__(self, index: str, check: bytes, scan: KeyScan, terms: BuildTerms) -> None:
        self._index = index
        self._directory = os.path.join(index, _PARTS)
        self._check = check
        self._scan = scan
        self._terms = terms
        self._parts: list[_Part] = []
        # Of an earlier job, by their first file; taken over when their turn comes.
        self._earlier: dict[str, _Part] = {}
        self._merges = 0
        self._read: list[_Keys] = []
        self._reading: list[Source] = []

    def run(self, sources: Sequence[Source]) -> BuiltIndex:
        """Read what was not read yet, and make runs for the index of it.

        Args:
            sources: the live data files, the oldest first.

        Raises:
            WorkUnfinished: not in this job; the next one goes on from here.
            CatalogUnavailable: parts are gone or damaged; the next job begins anew.
            ArkaError: a file does not have the key's columns by field id.
            OSError: the warehouse or the local disk failed.

        Durability: the runs are durable on return, their names with the index's directory.
        """
        make_directory(self._directory)
        _remove_files(self._index, kept=())
        self._take_earlier(sources)
        self._terms.start()
        at = read = 0
        while at < len(sources):
            earlier = self._earlier.pop(sources[at][0], None)
            if earlier is not None and earlier.sources == list(sources[at : at + len(earlier.sources)]):
                self._end_part()
                read = 0
                self._parts.append(earlier)
                at += len(earlier.sources)
                continue
            hashes, rows = self._scan.read(*sources[at])
            self._read.append((hashes, len(self._reading), rows))
            self._reading.append(sources[at])
            at += 1
            late = self._terms.over
            read += len(hashes)
            if late or read >= _PART_ENTRIES:
                read = 0
                self._end_part()
            if late and at < len(sources):
                raise WorkUnfinished(f"the index of keys is being made: {at} of {len(sources)} files are read")
        self._end_part()
        return self._make_index()

    def _take_earlier(self, sources: Sequence[Source]) -> None:
        """Find what an earlier job left of use, and remove all else."""
        there = set(sources)
        note = self._noted()
        if note.merges < _MERGES:
            self._merges = note.merges
            self._earlier = {part.sources[0][0]: part for part in note.parts if there.issuperset(part.sources)}
        kept = {_NOTE} | {name for part in self._earlier.values() for name in _runs_of(part)}
        _remove_files(self._directory, kept)

    def _noted(self) -> _Note:
        """Read which parts there are; none if that cannot be told."""
        none = _Note(self._check, [])
        try:
            data = Path(self._path(_NOTE)).read_bytes()
        except OSError:
            # None, or none that can be read; another one is written over it.
            return none
        body = data[_CRC_BYTES:]
        if not body or crc32c(body) != int.from_bytes(data[:_CRC_BYTES], "little"):
            return none
        try:
            note = msgspec.msgpack.decode(body, type=_Note)
        except msgspec.MsgspecError:
            # Of another version.
            return none
        return note if note.check == self._check else none

    def _end_part(self) -> None:
        """Write what was read as a part, and note it."""
        if not self._reading:
            return
        joined = b"".join(packed(hashes) for hashes, _, _ in self._read)
        verdicts = pa.array(settle(joined, bytes(sum(len(keys[0]) for keys in self._read)), first=False), pa.uint8())
        stands = pc.not_equal(verdicts, DROPPED)
        run = new_run(self._directory, partial(_write, self._read, stands))
        shadowed = ""
        if not pc.all(stands).as_py():
            shadowed = new_run(self._directory, partial(_write, self._read, pc.invert(stands), shadowed=True))
        self._parts.append(_Part(self._reading, run, pc.sum(stands).as_py() or 0, shadowed))
        self._read, self._reading = [], []
        self._merges = 0
        self._note()

    def _make_index(self) -> BuiltIndex:
        """Make the index's runs of all parts."""
        if len(self._parts) > 1:
            if not self._terms.apart and sum(part.entries for part in self._parts) > _MERGE_HERE:
                raise WorkUnfinished("the index of keys is being made: all files are read, their keys are to be merged")
            self._merges += 1
            self._note()
        try:
            while len(self._parts) > _MERGE_PARTS:
                starts = range(0, len(self._parts), _MERGE_PARTS)
                joined = [self._join(self._parts[start : start + _MERGE_PARTS]) for start in starts]
                replaced = [name for part in self._parts for name in _runs_of(part)]
                self._parts = joined
                self._note()
                self._unlink(replaced)
            made = self._parts[0] if len(self._parts) == 1 else self._join(self._parts)
            for name in _runs_of(made):
                os.link(self._path(name), os.path.join(self._index, name))
        except (FileNotFoundError, RunDamaged) as error:
            forget_build(self._index)
            raise CatalogUnavailable(f"the index of keys has to be made from the start: {error}") from error
        return BuiltIndex([path for path, _ in made.sources], made.run, made.shadowed)

    def _join(self, parts: list[_Part]) -> _Part:
        """Make one part of several."""
        name, shadowed, under = new_name(), new_name(), new_name()
        runs, older = [], []
        base = 0
        for part in parts:
            runs.append(map_run(self._path(part.run), base))
            if part.shadowed:
                older.append(map_run(self._path(part.shadowed), base))
            base += len(part.sources)
        with open_run(self._directory, name) as to, open_run(self._directory, under) as to_under:
            entries, hidden = merge_runs(to, runs[::-1], keep_removed=False, shadowed_fd=to_under)
        if hidden:
            older.append(map_run(self._path(under)))
        if older:
            new_run(self._directory, partial(merge_runs, runs=older, keep_removed=False, shadowed=True), shadowed)
        self._unlink([under])
        return _Part([source for part in parts for source in part.sources], name, entries, shadowed if older else "")

    def _note(self) -> None:
        """Write down which parts there are."""
        made = self._path(f"{_NOTE}.new")
        body = msgspec.msgpack.encode(_Note(self._check, [*self._parts, *self._earlier.values()], self._merges))
        write_durable(made, crc32c(body).to_bytes(_CRC_BYTES, "little") + body, overwrite=True)
        os.rename(made, self._path(_NOTE))

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(OSError):
                os.unlink(self._path(name))


def forget_build(index: str) -> None:
    """Remove the parts of an index that has served a commit, or cannot; what cannot be removed is left."""
    shutil.rmtree(os.path.join(index, _PARTS), ignore_errors=True)


def _remove_files(directory: str, kept: Container[str]) -> None:
    """Remove the files of a directory; what cannot be removed is left."""
    for name in os.listdir(directory):
        if name not in kept:
            with suppress(OSError):
                os.unlink(os.path.join(directory, name))


def _runs_of(part: _Part) -> list[str]:
    return [name for name in (part.run, part.shadowed) if name]


def _write(keys: list[_Keys], chosen: pa.BooleanArray, descriptor: int, *, shadowed: bool = False) -> None:
    """Write a run of some of the entries."""
    parts = []
    start = 0
    for hashes, number, rows in keys:
        mine = chosen.slice(start, len(hashes))
        parts.append((packed(hashes.filter(mine)), number, packed(rows.filter(mine))))
        start += len(hashes)
    write_run(descriptor, parts, shadowed=shadowed)


__all__ = ["BuildTerms", "BuiltIndex", "KeyBuild", "Source", "forget_build"]
