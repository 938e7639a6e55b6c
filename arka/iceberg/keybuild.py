"""Make the index of a primary-key table from the table, over as many jobs as it takes.

Owns: the runs of an index that is being made, and the note on the disk of which there are. Does not own reading keys
(``keyscan``) nor the finished index (``keyindex``).

Keys are read into *parts*: runs of the keys of files that lie beside each other in the table's order. Neighbours of
like size are merged as they come, all of them at the end. Each step is noted, so that a job that ran out of time, or
died, leaves its work to the next. A part holds as long as its files are in the table with the same dead rows, whatever
else others do to the table meanwhile.

A table has one row for each key as far as Arka writes it. Where others added a row under a key that was there, the
newest counts; older ones are kept in *shadowed* runs, so that they die with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
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
from arka._core.runs import Run, RunDamaged, merge_runs, write_run
from arka.iceberg.fileio import make_directory, write_durable
from arka.iceberg.keyscan import KeyScan
from arka.iceberg.runfiles import map_run, new_name, new_run, open_run, packed
from arka.storage.ports import CatalogUnavailable

#: Entries of a part as it is read; 48 bytes each while they are sorted.
_PART_ENTRIES: Final = 4_000_000
#: A part is merged with the one before it if that has no more than so many times its entries.
_MERGE_AT: Final = 2
_NOTE: Final = "building"
_CRC_BYTES: Final = 4

#: A data file's path, and those of its delete files.
Source = tuple[str, tuple[str, ...]]
#: Hashes of keys, the number of the file that their rows are in, and the rows.
_Keys = tuple[pa.FixedSizeBinaryArray, int, pa.UInt32Array]


class _Part(msgspec.Struct, frozen=True):
    #: What it was made of; file numbers count from the first.
    sources: list[Source]
    run: str
    entries: int
    #: Runs of older rows of its keys, and the base of their file numbers.
    shadowed: list[tuple[str, int]]


class _Note(msgspec.Struct, frozen=True):
    check: bytes
    parts: list[_Part]


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """What ``KeyIndex.begin`` takes.

    Attributes:
        files: the data files that entries name.
        runs: names of the runs of keys.
        shadowed: names of the runs of older rows, each with the base of its file numbers.
    """

    files: list[str]
    runs: list[str]
    shadowed: list[tuple[str, int]]


class KeyBuild:
    """Makes an index.

    Args:
        directory: the index's; whatever it holds that is not this work is removed.
        check: says how keys are hashed (``runfiles.check_of``).
        scan: reads keys.
        seconds: after so many, the rest is left to another job.
    """

    def __init__(self, directory: str, check: bytes, scan: KeyScan, seconds: float) -> None:
        self._directory = directory
        self._check = check
        self._scan = scan
        self._until = time.monotonic() + seconds
        self._parts: list[_Part] = []
        # Of an earlier job, by their first file; taken over when their turn comes.
        self._earlier: dict[str, _Part] = {}
        self._read: list[_Keys] = []
        self._reading: list[Source] = []

    def run(self, sources: Sequence[Source]) -> BuiltIndex:
        """Read what was not read yet.

        Args:
            sources: the live data files, the oldest first.

        Raises:
            CatalogUnavailable: not in this job; the next one goes on from here.
            ArkaError: a file does not have the key's columns by field id.
            OSError: the warehouse or the local disk failed.

        Durability: the runs are durable on return.
        """
        make_directory(self._directory)
        self._take_earlier(sources)
        at = read = 0
        while at < len(sources):
            earlier = self._earlier.pop(sources[at][0], None)
            if earlier is not None and earlier.sources == list(sources[at : at + len(earlier.sources)]):
                self._end_part()
                read = 0
                self._add(earlier)
                at += len(earlier.sources)
                continue
            hashes, rows = self._scan.read(*sources[at])
            self._read.append((hashes, len(self._reading), rows))
            self._reading.append(sources[at])
            at += 1
            late = time.monotonic() >= self._until
            read += len(hashes)
            if late or read >= _PART_ENTRIES:
                read = 0
                self._end_part()
            if late and at < len(sources):
                raise CatalogUnavailable(f"the index of keys is being made: {at} of {len(sources)} files are read")
        self._end_part()
        if len(self._parts) > 1:
            self._merge(len(self._parts))
        for part in self._parts:
            return BuiltIndex([path for path, _ in part.sources], [part.run], part.shadowed)
        return BuiltIndex([], [], [])

    def _take_earlier(self, sources: Sequence[Source]) -> None:
        """Find what an earlier job left of use, and remove all else."""
        there = set(sources)
        for part in self._noted():
            if there.issuperset(part.sources) and self._is_whole(part):
                self._earlier[part.sources[0][0]] = part
        kept = {_NOTE} | {name for part in self._earlier.values() for name in _files_of(part)}
        self._unlink(name for name in os.listdir(self._directory) if name not in kept)

    def _noted(self) -> list[_Part]:
        """Read which parts there are; none if that cannot be told."""
        try:
            data = Path(self._path(_NOTE)).read_bytes()
        except FileNotFoundError:
            return []
        body = data[_CRC_BYTES:]
        if not body or crc32c(body) != int.from_bytes(data[:_CRC_BYTES], "little"):
            return []
        try:
            note = msgspec.msgpack.decode(body, type=_Note)
        except msgspec.MsgspecError:
            # Of another version.
            return []
        return note.parts if note.check == self._check else []

    def _is_whole(self, part: _Part) -> bool:
        """Whether a part's files can be mapped; damage inside them is noticed when they are merged."""
        try:
            for name in _files_of(part):
                map_run(self._path(name))
        except (FileNotFoundError, RunDamaged):
            return False
        return True

    def _end_part(self) -> None:
        """Write what was read as a part."""
        if not self._reading:
            return
        joined = b"".join(packed(hashes) for hashes, _, _ in self._read)
        verdicts = pa.array(settle(joined, bytes(sum(len(keys[0]) for keys in self._read)), first=False), pa.uint8())
        stands = pc.not_equal(verdicts, DROPPED)
        run = new_run(self._directory, partial(_write, self._read, stands))
        entries = pc.sum(stands).as_py() or 0
        shadowed = []
        if entries < len(stands):
            others = pc.invert(stands)
            shadowed = [(new_run(self._directory, partial(_write, self._read, others, shadowed=True)), 0)]
        part = _Part(self._reading, run, entries, shadowed)
        self._read, self._reading = [], []
        self._add(part)

    def _add(self, part: _Part) -> None:
        """Note a part, and merge it with those before it while they are of like size."""
        self._parts.append(part)
        self._note()
        while len(self._parts) > 1 and self._parts[-2].entries <= _MERGE_AT * self._parts[-1].entries:
            self._merge(2)

    def _merge(self, count: int) -> None:
        """Make one part of the last ones."""
        parts = self._parts[-count:]
        bases = [sum(len(before.sources) for before in parts[:number]) for number in range(count)]
        try:
            runs = [self._map(part, base) for part, base in zip(parts, bases, strict=True)]
            name, under = new_name(), new_name()
            with open_run(self._directory, name) as to, open_run(self._directory, under) as to_shadowed:
                entries, shadowed_entries = merge_runs(to, runs[::-1], keep_removed=False, shadowed_fd=to_shadowed)
        except (FileNotFoundError, RunDamaged) as error:
            self._unlink(os.listdir(self._directory))
            raise CatalogUnavailable(f"the index of keys has to be made from the start: {error}") from error
        shadowed = [
            (name, base + first) for part, first in zip(parts, bases, strict=True) for name, base in part.shadowed
        ]
        if shadowed_entries:
            shadowed.append((under, 0))
        else:
            self._unlink([under])
        self._parts[-count:] = [_Part([s for part in parts for s in part.sources], name, entries, shadowed)]
        self._note()
        self._unlink(part.run for part in parts)

    def _note(self) -> None:
        """Write down which parts there are."""
        made = self._path(f"{_NOTE}.new")
        body = msgspec.msgpack.encode(_Note(self._check, [*self._parts, *self._earlier.values()]))
        write_durable(made, crc32c(body).to_bytes(_CRC_BYTES, "little") + body, overwrite=True)
        os.rename(made, self._path(_NOTE))

    def _map(self, part: _Part, base: int) -> Run:
        return map_run(self._path(part.run), base)

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _unlink(self, names: Iterator[str] | list[str]) -> None:
        for name in names:
            with suppress(OSError):
                os.unlink(self._path(name))


def _files_of(part: _Part) -> list[str]:
    return [part.run, *(name for name, _ in part.shadowed)]


def _write(keys: list[_Keys], chosen: pa.BooleanArray, descriptor: int, *, shadowed: bool = False) -> None:
    """Write a run of some of the entries."""
    parts = []
    start = 0
    for hashes, number, rows in keys:
        mine = chosen.slice(start, len(hashes))
        parts.append((packed(hashes.filter(mine)), number, packed(rows.filter(mine))))
        start += len(hashes)
    write_run(descriptor, parts, shadowed=shadowed)


__all__ = ["BuiltIndex", "KeyBuild", "Source"]
