"""The index of a primary-key table: in which row of which data file each key lies.

Owns: the runs that make up the index, the journal that says which, and that the index stands where the table's current
snapshot stands. Does not own the runs' format (``arka._core.runs``) nor what becomes of dead rows
(``arka.iceberg.rowdelta``), nor the making of run files (``runfiles``).

An index lies on the local disk and nowhere in memory but for 0.05 bytes a key: runs are mapped, and the kernel keeps
of them what is used. It can be made from the table, so nothing that is promised rests on it; but a wrong row would be
deleted if it were wrong, so every byte has a checksum and it is valid for one snapshot only. A commit is written
down twice: with what it will add before the catalog is asked, and as landed when it has answered. A process that died
in between left the first, and the table's snapshot says with the commit's id whether it came true.

The journal is a row of records, each behind its length and checksum; the first is a whole state. A torn last record is
as if it had not been written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from uuid import UUID

import msgspec
import pyarrow as pa
from typing_extensions import Buffer

from arka import failpoints
from arka._core.framing import crc32c
from arka._core.runs import Run, RunDamaged, copy_run, find_rows, find_shadowed, merge_runs
from arka.iceberg.fileio import sync_directory, write_durable
from arka.iceberg.runfiles import map_run, new_name, new_run, numbers_of

#: A run is merged with those newer than it once they are together more than this share of it.
_MERGE_SHARE: Final = 1 / 3
#: The journal is written anew when it is longer than this and than so many of its first record.
_JOURNAL_BYTES: Final = 1 << 20
_JOURNAL_STATES: Final = 4
#: What runs and file names take in memory.
_KEYS_PER_BYTE: Final = 16
_FILE_BYTES: Final = 250
_LENGTH_BYTES: Final = 4
_CRC_BYTES: Final = 4


class IndexUnusable(Exception):
    """What is on the disk is no index of the table as it is: it has to be made from the table."""


class _State(msgspec.Struct, tag="state", frozen=True):
    table: str
    check: bytes
    snapshot_id: int | None
    #: The data files that entries may name, by their number.
    files: dict[int, str]
    next_file: int
    #: The newest first: name, and the base of its file numbers.
    runs: list[tuple[str, int]]
    #: Runs of rows that others left under keys of newer rows, in the same form.
    shadowed: list[tuple[str, int]] = msgspec.field(default_factory=list)


class _Staged(msgspec.Struct, tag="staged", frozen=True):
    commit_id: str
    parent_id: int | None
    run: str
    paths: list[str]
    #: Files that the commit takes out of the table.
    gone: list[str]


class _Landed(msgspec.Struct, tag="landed", frozen=True):
    commit_id: str
    snapshot_id: int


class _Merged(msgspec.Struct, tag="merged", frozen=True):
    #: How many of the newest runs became one.
    count: int
    run: str


_Record: TypeAlias = _State | _Staged | _Landed | _Merged
_decoder: Final = msgspec.msgpack.Decoder(_Record)


_SHADOWED: Final = pa.schema([pa.field(name, pa.uint32()) for name in ("entry", "file", "row")])


@dataclass(frozen=True, slots=True)
class Places:
    """Where the keys of a run lie, in the run's order; file numbers are the index's.

    Attributes:
        files: the file of each key's row, ``runs.REMOVED`` where it has none; uint32.
        rows: the row in it; uint32.
    """

    files: pa.Array
    rows: pa.Array


class KeyIndex:
    """The index of one table, open in one process.

    Args:
        directory: its own; made if it is missing.
        table_uuid: the table.
        check: says how its keys are hashed (``runfiles.check_of``).

    Attributes:
        is_open: whether it says where it stands and may be asked.
    """

    def __init__(self, directory: str, table_uuid: UUID, check: bytes) -> None:
        self._directory = directory
        self._table = str(table_uuid)
        self._check = check
        self._snapshot_id: int | None = None
        self._files: dict[int, str] = {}
        self._next_file = 0
        self._runs: list[tuple[str, Run]] = []
        self._shadowed: list[tuple[str, Run]] = []
        self._staged: _Staged | None = None
        # A run that was adopted and is in no record yet.
        self._adopted: str | None = None
        # How long the journal is, 0 for an index that is not open. Its file is opened for each record: a worker may
        # have many tables.
        self._journal_bytes = self._state_bytes = 0

    # -- opening ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Read the journal and map the runs.

        Raises:
            IndexUnusable: there is no usable index.
            OSError: the disk failed.
        """
        try:
            data = Path(self._path("journal")).read_bytes()
        except OSError as error:
            # Also where the disk cannot read it: made anew, it is written elsewhere.
            raise IndexUnusable(f"there is no index that can be read: {error}") from error
        records, end = _parse(data)
        if not records or not isinstance(state := records[0][0], _State):
            raise IndexUnusable("the index's journal does not begin with a state")
        if state.table != self._table or state.check != self._check:
            raise IndexUnusable(f"the index is of table {state.table}, or its keys were hashed in another way")
        self._state_bytes = records[0][1]
        names = self._replay(state, [record for record, _ in records[1:]])
        try:
            self._runs = [(name, self._map(name, base)) for name, base in names]
            self._shadowed = [(name, self._map(name, base)) for name, base in state.shadowed]
            os.truncate(self._path("journal"), end)
        except (OSError, RunDamaged) as error:
            raise IndexUnusable(f"a file of the index cannot be read: {error}") from error
        self._journal_bytes = end
        self._sweep()

    def begin(self, snapshot_id: int | None, files: Sequence[str], run: str, shadowed: str) -> None:
        """Make it a new index, whatever it was.

        Args:
            snapshot_id: the snapshot it stands at; None for a table without one.
            files: the data files that entries name: number 0, 1 and so on.
            run: the name of a finished run in the directory.
            shadowed: the name of a run of rows that others left under keys of newer rows; empty for none.

        Raises:
            OSError: the disk failed.
            RunDamaged: a run is none.

        Durability: durable on return.
        """
        self.close()
        self._snapshot_id = snapshot_id
        self._files = dict(enumerate(files))
        self._next_file = len(files)
        self._staged = None
        self._runs = [(run, self._map(run, 0))]
        self._shadowed = [(shadowed, self._map(shadowed, 0))] if shadowed else []
        self._rewrite()
        self._sweep()

    def close(self) -> None:
        """Give maps back; the object is of no use until ``open`` or ``begin``."""
        self._journal_bytes = 0
        self._runs = []
        self._shadowed = []

    def _replay(self, state: _State, records: Iterable[_Record]) -> list[tuple[str, int]]:
        """Go through the journal; returns the runs."""
        runs = list(state.runs)
        self._snapshot_id, self._files, self._next_file = state.snapshot_id, dict(state.files), state.next_file
        self._staged = None
        for record in records:
            match record:
                case _Staged():
                    self._staged = record
                case _Landed() if self._staged is not None and self._staged.commit_id == record.commit_id:
                    runs.insert(0, (self._staged.run, self._take_files(self._staged)))
                    self._snapshot_id, self._staged = record.snapshot_id, None
                case _Merged():
                    runs[: record.count] = [(record.run, 0)]
                case _:
                    raise IndexUnusable(f"the index's journal has a record where it cannot be: {record}")
        return runs

    def _take_files(self, staged: _Staged) -> int:
        """Number a commit's files; returns the first number."""
        base = self._next_file
        self._files.update(enumerate(staged.paths, base))
        self._next_file += len(staged.paths)
        if staged.gone:
            gone = set(staged.gone)
            self._files = {number: path for number, path in self._files.items() if path not in gone}
        return base

    # -- what it says -----------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """See above."""
        return self._journal_bytes > 0

    @property
    def memory_bytes(self) -> int:
        """About what it takes in memory, mapped runs aside."""
        return sum(len(run) for _, run in self._runs) // _KEYS_PER_BYTE + _FILE_BYTES * len(self._files)

    def path_of(self, number: int) -> str:
        """The data file with a number.

        Raises:
            IndexUnusable: there is none: the index is wrong.
        """
        path = self._files.get(number)
        if path is None:
            raise IndexUnusable(f"the index names data file {number}, which it does not know")
        return path

    def path_of_shadowed(self, number: int) -> str | None:
        """The data file with a number; None if the table does not have it any more."""
        return self._files.get(number)

    def find(self, run: Run) -> Places:
        """Find the rows of a run's keys.

        Raises:
            IndexUnusable: a block of it is damaged.
        """
        try:
            files, rows = find_rows(run, [mapped for _, mapped in self._runs])
        except RunDamaged as error:
            raise IndexUnusable(str(error)) from error
        return Places(numbers_of(files), numbers_of(rows))

    def find_shadowed(self, run: Run) -> pa.Table:
        """Find the rows that others left under a run's keys beside those of ``find``; some may be dead or gone.

        Returns:
            ``entry``, the number of the run's entry, ``file`` and ``row``; all uint32.

        Raises:
            IndexUnusable: a block of it is damaged.
        """
        try:
            found = [find_shadowed(run, shadowed) for _, shadowed in self._shadowed]
        except RunDamaged as error:
            raise IndexUnusable(str(error)) from error
        tables = [pa.table(list(map(numbers_of, columns)), schema=_SHADOWED) for columns in found]
        return pa.concat_tables([_SHADOWED.empty_table(), *tables])

    def settles(self, snapshot_id: int | None, parent_id: int | None, commit_id: str | None) -> bool:
        """Make it stand at a table's current snapshot if that is where it stands or the staged commit led.

        Args:
            snapshot_id: the table's current snapshot; None for none.
            parent_id: that snapshot's parent.
            commit_id: the commit that made it, as its summary says.

        Returns:
            Whether it stands there now.
        """
        if snapshot_id == self._snapshot_id:
            return True
        staged = self._staged
        if staged is None or snapshot_id is None or staged.commit_id != commit_id:
            return False
        if not staged.parent_id == parent_id == self._snapshot_id:
            return False
        self.land(snapshot_id)
        return True

    # -- commits ----------------------------------------------------------------------------------

    def adopt(self, path: str, keep: Buffer | None = None) -> str:
        """Take a finished run into the directory; returns its name there.

        Args:
            path: of the run, durable, on the same file system. It stays: the commit may be tried again.
            keep: a byte an entry, 0 for those that are left out; None for all of them.

        Raises:
            IndexUnusable: the directory is gone, with all that the index is.
            OSError: the disk failed.

        Durability: the run is durable on return; its name is with the next record.
        """
        if self._adopted is not None:
            # Of an attempt that did not get as far as its record.
            self._unlink([self._adopted])
        name = self._adopted = new_name()
        if keep is not None:
            return new_run(self._directory, lambda descriptor: copy_run(descriptor, map_run(path), keep), name)
        try:
            os.link(path, self._path(name))
        except FileNotFoundError as error:
            raise IndexUnusable(f"the index's directory is gone: {error}") from error
        return name

    def stage(self, commit_id: UUID, run: str, paths: Sequence[str], gone: Sequence[str]) -> None:
        """Write down what a commit will add, before the catalog is asked.

        Args:
            commit_id: as the snapshot's summary will say.
            run: what ``adopt`` returned; its file numbers count from ``paths``.
            paths: the data files that the commit adds.
            gone: the data files that it takes out.

        Raises:
            OSError: the disk failed.
            IndexUnusable: the journal is not as it was left.

        Durability: durable on return.
        """
        before, self._staged = self._staged, _Staged(str(commit_id), self._snapshot_id, run, list(paths), list(gone))
        sync_directory(self._directory)
        self._append(self._staged)
        self._adopted = None
        failpoints.hit("index.staged")
        self._shorten()
        if before is not None:
            # An attempt that did not come to anything, or one of this very commit, with the same entries.
            self._unlink([before.run])

    def land(self, snapshot_id: int) -> None:
        """Take what was staged for true: its commit is the table's current snapshot. Merges runs where that is due.

        Raises:
            OSError: the disk failed; the next ``open`` finds out what is true.
            IndexUnusable: a block of it is damaged, what was staged is gone or damaged, or the journal is not as it
                was left.
        """
        staged = self._staged
        assert staged is not None
        try:
            run = self._map(staged.run, self._next_file)
        except (FileNotFoundError, RunDamaged) as error:
            raise IndexUnusable(f"the run of a commit that has landed cannot be read: {error}") from error
        self._append(_Landed(staged.commit_id, snapshot_id))
        self._take_files(staged)
        self._runs.insert(0, (staged.run, run))
        self._snapshot_id, self._staged = snapshot_id, None
        failpoints.hit("index.landed")
        self._merge()
        self._shorten()

    def _merge(self) -> None:
        """Make one run of the newest ones as long as they are together more than a share of the next."""
        count, size = 1, len(self._runs[0][1])
        while count < len(self._runs) and size >= _MERGE_SHARE * len(self._runs[count][1]):
            size += len(self._runs[count][1])
            count += 1
        if count == 1:
            return
        merged = [run for _, run in self._runs[:count]]
        keep_removed = count < len(self._runs)
        try:
            name = new_run(self._directory, lambda fd: merge_runs(fd, merged, keep_removed=keep_removed))
        except RunDamaged as error:
            raise IndexUnusable(str(error)) from error
        sync_directory(self._directory)
        failpoints.hit("index.merging")
        self._append(_Merged(count, name))
        failpoints.hit("index.merged")
        replaced = [old for old, _ in self._runs[:count]]
        self._runs[:count] = [(name, self._map(name, 0))]
        self._unlink(replaced)

    # -- files ------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _map(self, name: str, base: int) -> Run:
        return map_run(self._path(name), base)

    def _append(self, record: _Record) -> None:
        data = _frame(record)
        try:
            descriptor = os.open(self._path("journal"), os.O_WRONLY)
        except FileNotFoundError as error:
            raise IndexUnusable(f"the index's journal is gone: {error}") from error
        try:
            size = os.fstat(descriptor).st_size
            if size != self._journal_bytes:
                # Another worker went on with the table, or the journal was replaced.
                raise IndexUnusable(f"the index's journal has {size} bytes, {self._journal_bytes} were left")
            try:
                written = 0
                while written < len(data):
                    # The second one of a disk that became full says so.
                    written += os.pwrite(descriptor, data[written:], self._journal_bytes + written)
                os.fdatasync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, self._journal_bytes)
                raise
        finally:
            os.close(descriptor)
        self._journal_bytes += len(data)

    def _shorten(self) -> None:
        """Begin the journal anew where it has become long: of commits, or of attempts at one that fail for long."""
        if self._journal_bytes > max(_JOURNAL_BYTES, _JOURNAL_STATES * self._state_bytes):
            self._rewrite()

    def _rewrite(self) -> None:
        """Begin the journal anew with the state as it is."""
        runs, shadowed = ([(name, run.base) for name, run in made] for made in (self._runs, self._shadowed))
        data = _frame(_State(self._table, self._check, self._snapshot_id, self._files, self._next_file, runs, shadowed))
        self._state_bytes = len(data)
        if self._staged is not None:
            data += _frame(self._staged)
        made = self._path("journal.new")
        write_durable(made, data, overwrite=True)
        os.rename(made, self._path("journal"))
        sync_directory(self._directory)
        self._journal_bytes = len(data)

    def _sweep(self) -> None:
        """Remove what nothing names: of commits and merges that did not come to an end. Directories are others'."""
        kept = {"journal", *(name for name, _ in [*self._runs, *self._shadowed])}
        if self._staged is not None:
            kept.add(self._staged.run)
        with os.scandir(self._directory) as entries:
            self._unlink([entry.name for entry in entries if entry.name not in kept and entry.is_file()])

    def _unlink(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.unlink(self._path(name))


def _frame(record: _Record) -> bytes:
    body = msgspec.msgpack.encode(record)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + crc32c(body).to_bytes(_CRC_BYTES, "little") + body


def _parse(data: bytes) -> tuple[list[tuple[_Record, int]], int]:
    """Read records, each with its size, up to the first that is none; returns them and where they end."""
    records: list[tuple[_Record, int]] = []
    at = 0
    while len(data) - at >= _LENGTH_BYTES + _CRC_BYTES:
        size = int.from_bytes(data[at : at + _LENGTH_BYTES], "little")
        start = at + _LENGTH_BYTES + _CRC_BYTES
        body = data[start : start + size]
        if len(body) < size or crc32c(body) != int.from_bytes(data[at + _LENGTH_BYTES : start], "little"):
            break
        try:
            records.append((_decoder.decode(body), start + size - at))
        except msgspec.MsgspecError:
            break
        at = start + size
    return records, at


__all__ = ["IndexUnusable", "KeyIndex", "Places"]
