"""What a commit to a primary-key table changes: which rows die, and what that does to files.

Owns: this worker's view of a table's live files, the index of its keys, and turning a staged run of keys into the
delete files and removals of one snapshot. Does not own the index's files (``keyindex``), reading keys from the table
(``keyscan``), the snapshot (``producer``) nor whether the commit may happen (``commit``).

Invariant: a data file has at most one live delete file of Arka's, which names rows of it alone and is replaced by a
larger one, together with any that others wrote of it; a file whose rows are all dead goes with its delete files.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile, DataFileContent, ManifestContent, ManifestEntry, ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.typedef import Record

from arka import failpoints
from arka._core.runs import REMOVED, UNLESS_THERE, Run, RunDamaged
from arka.errors import ArkaError, ErrorCode, Unavailable
from arka.iceberg.config import CatalogConfig
from arka.iceberg.deletes import PATH_ID, DeadRows, LiveFile, write_deletes
from arka.iceberg.fileio import batch_of
from arka.iceberg.keybuild import BuildTerms, KeyBuild, forget_build
from arka.iceberg.keyindex import IndexUnusable, KeyIndex
from arka.iceberg.keyscan import KeyScan
from arka.iceberg.locations import table_locations
from arka.iceberg.manifests import ManifestMemory
from arka.iceberg.producer import StagedSnapshot, data_file, discard
from arka.iceberg.runfiles import check_of, map_run, numbers_of, table_secret
from arka.records import TableInfo
from arka.storage.ports import CatalogUnavailable, CommitJob, StagedFile, StagedFiles
from arka.tableproperties import SUMMARY_COMMIT_ID

#: What a live file's entries take in memory.
_FILE_BYTES: Final = 1_000
_PLACES: Final = pa.schema([pa.field("file", pa.uint32()), pa.field("row", pa.uint32())])


@dataclass(slots=True)
class _Files:
    """The live files of one snapshot.

    Attributes:
        manifest_list: the snapshot's; None for none.
        data: by path.
        deletes: the delete files of each data file, by its path: the path of each one's manifest and its sequence
            number, by its own.
    """

    manifest_list: str | None = None
    data: dict[str, LiveFile] = field(default_factory=dict)
    deletes: dict[str, dict[str, tuple[str, int]]] = field(default_factory=dict)

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
                self.deletes.setdefault(_only_target(file), {})[file.file_path] = manifest, entry.sequence_number or 0

    def deletes_of(self, path: str) -> tuple[str, ...]:
        """The delete files that apply to a live data file: one that is older than the file does not.

        Others may take a file out of the table, leave its delete file, and add the file again.
        """
        added = self.data[path].sequence_number
        return tuple(old for old, (_, number) in self.deletes.get(path, {}).items() if number >= added)


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
        gone: the data files that go, and those of the job that do not come.
        replaced: the data files whose delete files go.
        deleted: the positions in each new delete file, by its path.
    """

    added: list[DataFile]
    removed: dict[str, set[str]]
    run: str
    paths: list[str]
    gone: list[str]
    replaced: list[str]
    deleted: dict[str, pa.Array]


class KeyedTable:
    """A primary-key table as this worker knows it, at the snapshot that it last saw.

    Attributes:
        key_check: tells how its keys are hashed from other ways (``runfiles.check_of``).
    """

    def __init__(self, config: CatalogConfig, info: TableInfo) -> None:
        self._info = info
        self._secret = table_secret(config.index_dir, info.uuid)
        self._directory = os.path.join(config.index_dir, str(info.uuid))
        self.key_check = check_of(self._secret, info.key_schema())
        self._index = KeyIndex(self._directory, info.uuid, self.key_check)
        self._files = _Files()
        self._dead = DeadRows()

    def resolve(self, table: Table, job: CommitJob, memory: ManifestMemory, terms: BuildTerms) -> Delta:
        """Find out which rows a commit kills, and write the delete files for it.

        Args:
            table: at the metadata that the commit will be based on.
            job: its staged run names files by their order in the job.
            memory: what this worker remembers of the table's manifests.
            terms: how much of an index may be made before the rest is left to the next job.

        Raises:
            ArkaError: others wrote delete or data files that Arka cannot work with.
            WorkUnfinished: the index is being made; the next job goes on with it.
            CatalogUnavailable: what was made of it is damaged; the next job begins anew.
            Unavailable: the job's staged keys are gone or damaged: encode its frames again.
            OSError: the warehouse or the local disk failed.

        Durability: what was written to the warehouse is durable; the run is with ``stage``.
        """
        self._bring_to(table, memory, terms)
        try:
            return self._resolve(table, job)
        except IndexUnusable:
            # Damage that shows only when it is read. What the table holds is the truth.
            self._rebuild(table, terms)
        try:
            return self._resolve(table, job)
        except IndexUnusable as error:
            # Just made from the table: it is the table that cannot be worked with, or the disk.
            forget_build(self._directory)
            what = f"{self._info.name}: its keys cannot be told from its files: {error}"
            raise ArkaError(what, code=ErrorCode.TABLE_STOPPED) from error

    def stage(self, job: CommitJob, delta: Delta) -> None:
        """Write down what the commit will add to the index, before the catalog is asked.

        Raises:
            CatalogUnavailable: the index was taken away or went on without this process: look again.
            OSError: the local disk failed.
        """
        try:
            self._index.stage(job.commit_id, delta.run, delta.paths, delta.gone)
        except IndexUnusable as error:
            self._index.close()
            raise CatalogUnavailable(f"{job.table.name}: {error}") from error

    def landed(self, staged: StagedSnapshot, delta: Delta) -> None:
        """Take a snapshot that has landed for the current one.

        Raises:
            OSError: the local disk failed. The commit has happened; this object is of no use any more.
            IndexUnusable: the index is damaged; the same holds.
        """
        for path in delta.gone:
            self._files.data.pop(path, None)
        for path in delta.replaced:
            self._files.deletes.pop(path, None)
        for manifest, entries in staged.entries.items():
            self._files.add(manifest, entries)
        self._files.manifest_list = staged.snapshot.manifest_list
        for path, positions in delta.deleted.items():
            self._dead.remember(path, positions)
        self._index.land(staged.snapshot.snapshot_id)
        # Others were not faster: what it was made of is of no use any more.
        forget_build(self._directory)

    @property
    def memory_bytes(self) -> int:
        """About what it takes, mapped runs aside."""
        files = len(self._files.data) + len(self._files.deletes)
        return self._index.memory_bytes + self._dead.memory_bytes + _FILE_BYTES * files

    def close(self) -> None:
        """Give files back."""
        self._index.close()

    # -- where it stands --------------------------------------------------------------------------

    def _bring_to(self, table: Table, memory: ManifestMemory, terms: BuildTerms) -> None:
        """Make files and index those of the table's current snapshot."""
        metadata = table.metadata
        current = metadata.current_snapshot()
        manifest_list = None if current is None else current.manifest_list
        if self._files.manifest_list != manifest_list:
            self._files = _read_files(memory.manifests(metadata, table.io), memory, table, manifest_list)
        lineage = _lineage(metadata)
        if not (self._settles(lineage) or self._settles(lineage, anew=True)):
            self._rebuild(table, terms)

    def _settles(self, lineage: _Lineage, *, anew: bool = False) -> bool:
        """Whether the index stands at the table's current snapshot, as it is open or as the disk has it.

        Args:
            lineage: of the table.
            anew: read what is on the disk: another worker may have gone on with it.
        """
        try:
            if anew:
                self._index.close()
            if not self._index.is_open:
                self._index.open()
            return self._index.settles(*lineage)
        except IndexUnusable:
            return False

    def _rebuild(self, table: Table, terms: BuildTerms) -> None:
        """Make the index from the table."""
        self._index.close()
        files = sorted(self._files.data.values(), key=lambda file: (file.sequence_number, file.path))
        scan = KeyScan(table, self._info, self._secret, self._dead)
        build = KeyBuild(self._directory, self.key_check, scan, terms)
        made = build.run([(file.path, self._files.deletes_of(file.path)) for file in files])
        try:
            self._index.begin(table.metadata.current_snapshot_id, made.files, made.run, made.shadowed)
        except RunDamaged as error:
            raise CatalogUnavailable(f"the index of keys has to be made again: {error}") from error

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
                dead_below = self._shadowed(run, stillborn, table.io)
                for number, positions in _by_file(killed):
                    path = self._index.path_of(number)
                    new.kill(path, *dead_below.pop(path, ()), positions)
                for path, shadowed in dead_below.items():
                    new.kill(path, *shadowed)
                dead = dict(_by_file(dead_new))
                for number, file in enumerate(staged.files):
                    new.add(file, dead.get(number))
            failpoints.hit("commit.deletes")
            name = self._index.adopt(staged.keys, keep)
        except BaseException:
            discard(table.io, list(new.deleted))
            raise
        paths = [file.path for file in staged.files]
        return Delta(new.added, new.removed, name, paths, new.gone, new.replaced, new.deleted)

    def _shadowed(self, run: Run, stillborn: pa.BooleanArray, io: FileIO) -> dict[str, list[pa.Array]]:
        """Find rows that others left under keys whose rows die: by data file, sorted int64."""
        found = self._index.find_shadowed(run)
        if not found.num_rows:
            return {}
        found = found.filter(pc.invert(stillborn.take(found.column("entry")))).select(_PLACES.names)
        rows: dict[str, list[pa.Array]] = {}
        for number, positions in _by_file(found):
            path = self._index.path_of_shadowed(number)
            if path is None or path not in self._files.data:
                continue
            for old in self._files.deletes_of(path):
                # Dead since an earlier write of its key: the index does not say so.
                positions = positions.filter(pc.invert(pc.is_in(positions, self._dead.read(old, io))))
            if len(positions):
                rows[path] = [positions]
        return rows


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
        self._locations = table_locations(table.metadata.location)
        self._files = files
        self._dead = dead
        self.added: list[DataFile] = []
        self.removed: dict[str, set[str]] = {}
        self.gone: list[str] = []
        self.replaced: list[str] = []
        self.deleted: dict[str, pa.Array] = {}

    def kill(self, path: str, *rows: pa.Array) -> None:
        """Kill rows of a live file; int64."""
        file = self._files.data.get(path)
        if file is None:
            raise IndexUnusable(f"the index names {path}, which the table does not have")
        for old, (manifest, _) in self._files.deletes.get(path, {}).items():
            # Also those that do not apply: beside a newer one nobody could tell.
            self._remove(old, manifest)
        before = [_rows_named(self._dead.read(old, self._io), file.rows) for old in self._files.deletes_of(path)]
        if len(before) > 1:
            before = [pc.unique(pa.concat_arrays(before))]
        self.replaced.append(path)
        positions = pa.concat_arrays([*before, *rows]).sort()
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
            self.gone.append(staged.path)
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


def _rows_named(positions: pa.Array, rows: int) -> pa.Array:
    """The rows of a file that a delete file names: others may name one twice, or one that is not there."""
    in_order = not pc.any(pc.less_equal(positions[1:], positions[:-1])).as_py()
    if in_order and (not len(positions) or 0 <= positions[0].as_py() <= positions[-1].as_py() < rows):
        return positions
    there = pc.and_(pc.greater_equal(positions, 0), pc.less(positions, rows))
    return pc.unique(positions.filter(there))


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


#: A table's current snapshot, its parent, and the commit that made it.
_Lineage: TypeAlias = tuple[int | None, int | None, str | None]


def _lineage(metadata: TableMetadata) -> _Lineage:
    """The current snapshot, its parent, and the commit that made it."""
    current = metadata.current_snapshot()
    if current is None:
        return None, None, None
    commit_id = None if current.summary is None else current.summary.get(SUMMARY_COMMIT_ID)
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
            Unavailable: these were hashed in another way: the directory with the secret was removed meanwhile, or
                others changed the table's key.
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
            raise Unavailable(
                f"{info.name}: {config.index_dir} was removed, or the key changed; its keys have to be staged again"
            )
        self._open[key] = found
        return found

    def forget(self, config: CatalogConfig, info: TableInfo) -> None:
        """Begin anew with a table at its next commit: from what is on the disk."""
        found = self._open.pop((config.index_dir, info.uuid), None)
        if found is not None:
            found.close()

    def forget_all(self) -> None:
        """Begin again with every table at its next commit."""
        while self._open:
            self._open.popitem()[1].close()


__all__ = ["Delta", "KeyedTable", "KeyedTables"]
