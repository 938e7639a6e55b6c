"""What a commit to a primary-key table changes: which rows die, and what that does to files.

Owns: this worker's view of a table's live files, the index of its keys, and turning a staged run of keys into the
delete files and removals of one snapshot. Does not own the index's files (``keyindex``), reading keys from the table
(``keyscan``), the snapshot (``producer``) nor whether the commit may happen (``commit``).

Invariant: a data file has at most one live delete file, which names rows of it alone and is replaced by a larger one;
a file whose rows are all dead goes with its delete file.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile, DataFileContent, ManifestContent, ManifestEntry, ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.locations import load_location_provider
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.typedef import Record

from arka import failpoints
from arka._core.runs import REMOVED, UNLESS_THERE, Run, RunDamaged
from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.iceberg.config import CatalogConfig
from arka.iceberg.deletes import PATH_ID, DeadRows, LiveFile, write_deletes
from arka.iceberg.fileio import batch_of
from arka.iceberg.keyindex import IndexUnusable, KeyIndex
from arka.iceberg.keyscan import KeyScan
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.producer import StagedSnapshot, data_file, discard
from arka.iceberg.runfiles import check_of, map_run, numbers_of, table_secret
from arka.records import TableInfo
from arka.storage.ports import CommitJob, StagedFile, StagedFiles

#: What a live file's entries take in memory.
_FILE_BYTES: Final = 1_000
_PLACES: Final = pa.schema([pa.field("file", pa.uint32()), pa.field("row", pa.uint32())])


@dataclass(slots=True)
class _Files:
    """The live files of one snapshot.

    Attributes:
        manifest_list: the snapshot's; None for none.
        data: by path.
        deletes: by the path of the data file that they are of: path of the delete file, and of its manifest.
    """

    manifest_list: str | None = None
    data: dict[str, LiveFile] = field(default_factory=dict)
    deletes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, manifest: str, entries: Iterable[ManifestEntry]) -> None:
        """Take the live entries of a manifest in, in place of what was known of the same files."""
        for entry in entries:
            file = entry.data_file
            if file.content == DataFileContent.DATA:
                self.data[file.file_path] = LiveFile(
                    file.file_path,
                    manifest,
                    file.spec_id,
                    file.partition,
                    file.record_count,
                    entry.sequence_number or 0,
                )
            else:
                self.deletes[_only_target(file)] = (file.file_path, manifest)


def _only_target(file: DataFile) -> str:
    """The data file that a delete file is of.

    Raises:
        ArkaError: it is of several, or deletes by equality: not written by Arka.
    """
    lower, upper = ((bounds or {}).get(PATH_ID) for bounds in (file.lower_bounds, file.upper_bounds))
    if file.content != DataFileContent.POSITION_DELETES or lower is None or lower != upper:
        raise ArkaError(
            f"{file.file_path}: a delete file that others wrote, of more than one data file or by equality: "
            "rewrite the table's deletes into its data files first",
            code=ErrorCode.TABLE_STOPPED,
        )
    return bytes(lower).decode()


@dataclass(frozen=True, slots=True)
class Delta:
    """What a snapshot of a primary-key table does beside adding files.

    Attributes:
        added: data and delete files.
        removed: the paths of files that go, by the path of the manifest that names them.
        run: the run of new places, in the index's directory.
        paths: the data files that its numbers count.
        gone: the data files that go.
        deleted: the positions in each new delete file, by its path.
    """

    added: list[DataFile]
    removed: dict[str, set[str]]
    run: str
    paths: list[str]
    gone: list[str]
    deleted: dict[str, pa.Array]


class KeyedTable:
    """A primary-key table as this worker knows it, at the snapshot that it last saw.

    Attributes:
        key_check: tells the secret that its keys are hashed with from others.
    """

    def __init__(self, config: CatalogConfig, info: TableInfo) -> None:
        self._info = info
        self._secret = table_secret(config.index_dir, info.uuid)
        self._directory = os.path.join(config.index_dir, str(info.uuid))
        self.key_check = check_of(self._secret)
        self._index = KeyIndex(self._directory, info.uuid, self._secret)
        self._files = _Files()
        self._dead = DeadRows()

    def resolve(self, table: Table, job: CommitJob, memory: ManifestMemory) -> Delta:
        """Find out which rows a commit kills, and write the delete files for it.

        Args:
            table: at the metadata that the commit will be based on.
            job: its staged run names files by their order in the job.
            memory: what this worker remembers of the table's manifests.

        Raises:
            ArkaError: others wrote delete or data files that Arka cannot work with.
            Unavailable: the job's staged keys are gone or damaged: encode its frames again.
            OSError: the warehouse or the local disk failed.

        Durability: what was written to the warehouse is durable; the run is with ``stage``.
        """
        self._bring_to(table, memory)
        try:
            return self._resolve(table, job)
        except IndexUnusable:
            # Damage that shows only when it is read. What the table holds is the truth.
            self._rebuild(table)
            return self._resolve(table, job)

    def stage(self, job: CommitJob, delta: Delta) -> None:
        """Write down what the commit will add to the index, before the catalog is asked."""
        self._index.stage(job.commit_id, delta.run, delta.paths, delta.gone)

    def landed(self, staged: StagedSnapshot, delta: Delta) -> None:
        """Take a snapshot that has landed for the current one.

        Raises:
            OSError: the local disk failed. The commit has happened; this object is of no use any more.
            IndexUnusable: the index is damaged; the same holds.
        """
        for path in delta.gone:
            self._files.data.pop(path, None)
            self._files.deletes.pop(path, None)
        for manifest, entries in staged.entries.items():
            self._files.add(manifest, entries)
        self._files.manifest_list = staged.snapshot.manifest_list
        for path, positions in delta.deleted.items():
            self._dead.remember(path, positions)
        self._index.land(staged.snapshot.snapshot_id)

    @property
    def memory_bytes(self) -> int:
        """About what it takes, mapped runs aside."""
        files = len(self._files.data) + len(self._files.deletes)
        return self._index.memory_bytes + self._dead.memory_bytes + _FILE_BYTES * files

    def close(self) -> None:
        """Give files back."""
        self._index.close()

    # -- where it stands --------------------------------------------------------------------------

    def _bring_to(self, table: Table, memory: ManifestMemory) -> None:
        """Make files and index those of the table's current snapshot."""
        metadata = table.metadata
        current = metadata.current_snapshot()
        manifest_list = None if current is None else current.manifest_list
        if self._files.manifest_list != manifest_list or not self._index.is_open:
            self._files = _read_files(memory.manifests(metadata, table.io), memory, table, manifest_list)
        try:
            if not self._index.is_open:
                self._index.open()
            if self._index.settles(*_lineage(metadata)):
                return
        except IndexUnusable:
            pass
        self._rebuild(table)

    def _rebuild(self, table: Table) -> None:
        """Make the index from the table."""
        files = sorted(self._files.data.values(), key=lambda file: file.sequence_number)
        runs = KeyScan(table, self._info, self._secret, self._dead_of).write_runs(files, self._directory)
        self._index.begin(table.metadata.current_snapshot_id, [file.path for file in files], runs)

    def _dead_of(self, path: str, io: FileIO) -> pa.Array | None:
        """The positions of a live file's dead rows; None for none."""
        old = self._files.deletes.get(path)
        return None if old is None else self._dead.read(old[0], io)

    # -- what a commit does -----------------------------------------------------------------------

    def _resolve(self, table: Table, job: CommitJob) -> Delta:
        staged = job.staged
        run, files, rows = _read_staged(staged)
        before = self._index.find(run)
        had_row = pc.not_equal(before.files, pa.scalar(REMOVED, pa.uint32()))
        conditional = pc.and_(
            pc.greater_equal(rows, pa.scalar(UNLESS_THERE, pa.uint32())),
            pc.not_equal(files, pa.scalar(REMOVED, pa.uint32())),
        )
        # A row that holds only if there was none, and there was one, dies at once; of all others, what was before.
        stillborn = pc.and_(had_row, conditional)
        keep = None
        dead_new = pa.table({"file": [], "row": []}, schema=_PLACES)
        if pc.any(conditional).as_py():
            keep = pc.cast(pc.invert(stillborn), pa.uint8()).buffers()[1]
            # The bit is of the staged run alone.
            rows = pc.bit_wise_and(rows, pa.scalar(UNLESS_THERE - 1, pa.uint32()))
            dead_new = pa.table([files, rows], schema=_PLACES).filter(stillborn)
        killed = pa.table([before.files, before.rows], schema=_PLACES).filter(pc.and_not(had_row, stillborn))
        new = _Outcome(table, self._files, self._dead)
        try:
            with batch_of(table.io):
                for number, positions in _by_file(killed):
                    new.kill(self._index.path_of(number), positions)
                dead = dict(_by_file(dead_new))
                for number, file in enumerate(staged.files):
                    new.add(file, dead.get(number))
            failpoints.hit("commit.deletes")
            name = self._index.adopt(staged.keys, keep)
        except BaseException:
            discard(table.io, list(new.deleted))
            raise
        return Delta(new.added, new.removed, name, [file.path for file in staged.files], new.gone, new.deleted)


def _read_staged(staged: StagedFiles) -> tuple[Run, pa.UInt32Array, pa.UInt32Array]:
    """Map the staged run; returns it, and the file and row of each of its entries.

    All of it is read: whatever is damaged afterwards is the index.

    Raises:
        Unavailable: it is gone or damaged; the frames have to be encoded again.
    """
    try:
        run = map_run(staged.keys)
        files, rows = map(numbers_of, run.places())
    except (FileNotFoundError, RunDamaged) as error:
        raise Unavailable(f"{staged.keys} cannot be read, its keys have to be staged again: {error}") from error
    return run, files, rows


class _Outcome:
    """Gathers what dead rows do to files."""

    def __init__(self, table: Table, files: _Files, dead: DeadRows) -> None:
        self._io = table.io
        self._locations = load_location_provider(table.metadata.location, table.metadata.properties)
        self._files = files
        self._dead = dead
        self.added: list[DataFile] = []
        self.removed: dict[str, set[str]] = {}
        self.gone: list[str] = []
        self.deleted: dict[str, pa.Array] = {}

    def kill(self, path: str, positions: pa.Array) -> None:
        """Kill rows of a live file; sorted int64."""
        file = self._files.data.get(path)
        if file is None:
            raise IndexUnusable(f"the index names {path}, which the table does not have")
        old = self._files.deletes.get(path)
        if old is not None:
            self._remove(*old)
            before = self._dead.read(old[0], self._io)
            positions = pa.concat_arrays([before, positions]).sort()
        if len(positions) > 1 and pc.any(pc.equal(positions[1:], positions[:-1])).as_py():
            raise IndexUnusable(f"the index names a row of {path} that is dead already")
        if len(positions) == file.rows:
            self._remove(path, file.manifest)
            self.gone.append(path)
        else:
            self._write(file, positions)

    def add(self, staged: StagedFile, positions: pa.Array | None) -> None:
        """Add a new file, some of whose rows may be dead."""
        if positions is not None and len(positions) == staged.rows:
            # Nobody has seen it: it stays in the warehouse for the sweep.
            return
        made = data_file(staged)
        self.added.append(made)
        if positions is not None:
            partition = Record(*staged.partition)
            self._write(LiveFile(staged.path, "", staged.spec_id, partition, staged.rows, 0), positions)

    def _remove(self, path: str, manifest: str) -> None:
        self.removed.setdefault(manifest, set()).add(path)

    def _write(self, file: LiveFile, positions: pa.Array) -> None:
        made = write_deletes(self._io, self._locations, file, positions)
        self.added.append(made)
        self.deleted[made.file_path] = positions


def _by_file(places: pa.Table) -> Iterator[tuple[int, pa.Array]]:
    """Group places: each file's number, and its rows, sorted int64."""
    if not places.num_rows:
        return
    ordered = places.combine_chunks().sort_by([("file", "ascending"), ("row", "ascending")]).combine_chunks()
    rows = ordered.column("row").combine_chunks().cast(pa.int64())
    ends = pc.run_end_encode(ordered.column("file").combine_chunks())
    start = 0
    for number, end in zip(ends.values.to_pylist(), ends.run_ends.to_pylist(), strict=True):
        yield number, rows[start:end]
        start = end


def _lineage(metadata: TableMetadata) -> tuple[int | None, int | None, str | None]:
    """The current snapshot, its parent, and the commit that made it."""
    current = metadata.current_snapshot()
    if current is None:
        return None, None, None
    commit_id = None if current.summary is None else current.summary.get("arka.commit-id")
    return current.snapshot_id, current.parent_snapshot_id, commit_id


def _read_files(
    manifests: Iterable[ManifestFile], memory: ManifestMemory, table: Table, manifest_list: str | None
) -> _Files:
    files = _Files(manifest_list)
    for manifest in manifests:
        if manifest.content in (ManifestContent.DATA, ManifestContent.DELETES):
            files.add(manifest.manifest_path, memory.entries(manifest, table.io))
    return files


class KeyedTables:
    """The primary-key tables that this worker commits to: what it knows of them is kept within a limit.

    A table that had to be closed is opened again from the disk, and its live files are read from its manifests.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[object, KeyedTable] = OrderedDict()

    def get(self, config: CatalogConfig, info: TableInfo, key_check: bytes) -> KeyedTable:
        """Return a table as it was last known.

        Args:
            config: where indexes lie.
            info: the table.
            key_check: of the staged keys that are to be looked for.

        Raises:
            Unavailable: these were hashed with a secret that is gone: the directory was removed meanwhile.
            OSError: the local disk failed.
        """
        key = (config.index_dir, info.uuid)
        found = self._open.pop(key, None)
        used = sum(table.memory_bytes for table in self._open.values())
        used += 0 if found is None else found.memory_bytes
        while self._open and used > config.index_bytes:
            _, old = self._open.popitem(last=False)
            used -= old.memory_bytes
            old.close()
        if found is not None and found.key_check != key_check:
            found.close()
            found = None
        found = found or KeyedTable(config, info)
        if found.key_check != key_check:
            raise Unavailable(f"{info.name}: {config.index_dir} was removed; its keys have to be staged again")
        self._open[key] = found
        return found

    def forget(self, config: CatalogConfig, info: TableInfo) -> None:
        """Begin anew with a table at its next commit: from what is on the disk."""
        found = self._open.pop((config.index_dir, info.uuid), None)
        if found is not None:
            found.close()


__all__ = ["Delta", "KeyedTable", "KeyedTables"]
