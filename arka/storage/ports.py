"""What the tiers need from the world: a disk, an object store and an Iceberg catalog.

Owns: the protocols and the plain records that cross them. Each protocol has two implementations: the
real adapter beside this module and the simulated one in ``arka.testing``; one conformance suite holds
both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import UUID

from arka._core.framing import Group
from arka.lineage import NO_STARTS, CommitMark, Lineage
from arka.records import PartitionField, TableDefinition, TableInfo, TableName

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class ObjectExists(Exception):
    """A create-only put found the key taken."""


class StoreUnavailable(Exception):
    """A request failed in a way that may pass: timeout, 5xx, connection refused.

    The outcome of a put that raised this is unknown.
    """


class StoreRefused(StoreUnavailable):
    """The store turned the request down (credentials, permissions, no such bucket): a person has to act.

    At start it ends the process; later it is an outage like any other, since somebody may put it right.
    """


@dataclass(frozen=True, slots=True)
class ObjectMeta:
    """One object of a listing: key relative to the store's prefix, size in bytes."""

    key: str
    size: int


class ObjectStore(Protocol):
    """Keys to immutable bytes. All keys are relative to the prefix that the store was opened with."""

    @property
    def url(self) -> str:
        """Where the store is, for people."""
        ...

    async def put_new(self, key: str, parts: Sequence[Buffer]) -> None:
        """Create an object from ``parts`` joined; durable on return.

        Raises:
            ObjectExists: the key is taken (perhaps by an earlier attempt of ours whose response was lost).
            StoreUnavailable: outcome unknown.

        Cancellation: the object may or may not come to be.
        """
        ...

    async def get(self, key: str) -> bytes:
        """Read a whole object.

        Raises:
            KeyError: no such object.
            StoreUnavailable: it may pass.
        """
        ...

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """Read ``length`` bytes of an object from ``start``; fewer where it ends before.

        Raises:
            KeyError: no such object.
            StoreUnavailable: it may pass.
        """
        ...

    async def list_keys(self, prefix: str, *, start_after: str | None = None) -> list[ObjectMeta]:
        """List objects whose key begins with ``prefix``, in key order; read-after-write consistent.

        Raises:
            StoreUnavailable: it may pass.
        """
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that do not exist are no error.

        Raises:
            StoreUnavailable: some may be gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class CatalogTable:
    """A table as loaded from the catalog: its definition and where each log stands in it.

    Attributes:
        specs: all partition specs that it has, by id (R27); None if nobody looked.
    """

    info: TableInfo
    marks: tuple[CommitMark, ...]
    snapshot_id: int | None
    specs: Mapping[int, tuple[PartitionField, ...]] | None = None

    def committed_lsn(self, log_uuid: UUID) -> int:
        """The last LSN of ``log_uuid`` that the table holds; 0 for none."""
        return self.mark_of(log_uuid).committed_lsn

    def mark_of(self, log_uuid: UUID) -> CommitMark:
        """What the table remembers of ``log_uuid``; LSN 0 and epoch 0 where it never committed."""
        return next((mark for mark in self.marks if mark.log_uuid == log_uuid), CommitMark(log_uuid, 0, 0))


@dataclass(frozen=True, slots=True)
class Unusable:
    """A table that exists and that Arka cannot write.

    Attributes:
        name: its name.
        reason: why it cannot be written.
        spelled: whether Arka takes such a name. If not, the name alone may be what is wrong.
    """

    name: TableName
    reason: str
    spelled: bool = True


@dataclass(frozen=True, slots=True)
class CatalogListing:
    """The catalog's tables.

    Attributes:
        tables: those that could be loaded, sorted by name.
        unread: names of tables that exist and whose metadata could not be read: it is not known which they are.
        unusable: tables that exist and that Arka cannot write, by UUID.
    """

    tables: tuple[CatalogTable, ...]
    unread: frozenset[TableName] = frozenset()
    unusable: Mapping[UUID, Unusable] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SegmentSlice:
    """The frames of one table in one segment file.

    Attributes:
        path: the segment file.
        segment: its number; with the log's UUID and the epoch it seeds the frames' CRCs (R8).
        epoch: the epoch in the segment's header.
        offsets: native-endian unsigned 64-bit file offsets of batch frames, LSN order.
    """

    path: str
    segment: int
    epoch: int
    offsets: bytes


@dataclass(frozen=True, slots=True)
class AcceptedSpec:
    """The partition spec that a table had when some of its writes were accepted (R27).

    Attributes:
        from_lsn: writes from this LSN on were accepted under it, until the next entry.
        spec_id: its id.
        fields: its fields; a source may be a column that the table no longer has.
    """

    from_lsn: int
    spec_id: int
    fields: tuple[PartitionField, ...]


@dataclass(frozen=True, slots=True)
class TableFrames:
    """The frames in ``(after_lsn, through_lsn]`` of one table, in the log: what an encode job is about.

    Attributes:
        table: the table at its current schema.
        schemas: IPC schema bytes by schema id, for each schema that the frames use (R24).
        log_uuid: the log.
        after_lsn: no frame has it or a lower one.
        through_lsn: none has a higher one.
        slices: where they are, in LSN order.
        size: their bytes in the log; 0 where nobody has counted.
        accepted: the specs that the frames were accepted under, by LSN; empty if all of them have ``table``'s.
        attempt: ends the name of each file that this attempt makes; fixed before it starts (R32).
        journal: the local file in which the attempt names its files before it makes them.
        without: LSNs of writes that a read leaves out: they are set aside (R32).
    """

    table: TableInfo
    schemas: dict[int, bytes]
    log_uuid: UUID
    after_lsn: int
    through_lsn: int
    slices: tuple[SegmentSlice, ...]
    size: int = 0
    accepted: tuple[AcceptedSpec, ...] = ()
    attempt: str = ""
    journal: str = ""
    without: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One Parquet file that is written and not yet in any snapshot.

    Attributes:
        path: URL as Iceberg will name it.
        partition: one value per partition field, in Iceberg's internal representation.
        rows: row count.
        size: file size in bytes.
        stats: keyword arguments of pyiceberg's DataFile that describe columns.
    """

    path: str
    partition: tuple[object, ...]
    spec_id: int
    rows: int
    size: int
    stats: dict[str, object]


#: Local places, each as path, device and inode: catalog file, warehouse, table folder (R28). Empty where none is local.
Places = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class StagedFiles:
    """What an encode job made; its commit covers ``(after_lsn, through_lsn]``.

    Attributes:
        through_lsn: the job's, or that of an earlier frame: a job of very many partitions ends sooner (R19).
        frames: how many of the job's frames are covered; counted where ``through_lsn`` is not the job's.
        took_s: seconds that the job took in its process; 0 where nobody has measured.
        specs: the partition specs of the files, by id: the commit looks whether the table has them (R27).
        places: what was looked at before the first file was written; the same must be there after the commit (R28).
        rows: in the files together.
        first_lsn: of the first write in them; 0 if there is none.
        keys: for a primary-key table the path of the run that says where each key's row now is (``arka._core.runs``),
            files by their number in ``files``; on the local disk.
        key_check: tells the secret that its hashes were made with from others.
        journals: of the attempts that made the files.
        notes: which of the table's properties could not be used for the files, and what was used instead.
        made_s: when the files were ready, in seconds of this machine's ``time.monotonic``.
    """

    after_lsn: int
    through_lsn: int
    files: tuple[StagedFile, ...]
    rows: int
    keys: str = ""
    key_check: bytes = b""
    notes: tuple[str, ...] = ()
    first_lsn: int = 0
    journals: tuple[str, ...] = ()
    places: Places = ()
    frames: int = 0
    took_s: float = 0.0
    specs: Mapping[int, tuple[PartitionField, ...]] = field(default_factory=dict)
    made_s: float = 0.0


@dataclass(frozen=True, slots=True)
class CommitJob:
    """Put staged files into one snapshot, if the table still stands at ``staged.after_lsn`` (R15).

    Attributes:
        repeated: whether an earlier attempt at the same job had no clear outcome.
        lineage: the starts of the log, of which the newest commits; without any a mark's token is not looked at.
    """

    table: TableInfo
    log_uuid: UUID
    epoch: int
    commit_id: UUID
    staged: StagedFiles
    repeated: bool = False
    lineage: Lineage = NO_STARTS


class CommitOutcome(Enum):
    """How a commit ended; every one of them is definite."""

    #: the table holds ``through_lsn``, by this commit or by an earlier attempt whose response was lost.
    COMMITTED = "committed"
    #: the table stands at another LSN (``committed_lsn``) than ``after_lsn``: discard, re-cut.
    RECUT = "recut"
    #: a newer epoch of this log has committed.
    FENCED = "fenced"
    #: the table's mark is not of this log as this process knows it (R29); ``detail`` says why.
    NOT_OURS = "not_ours"
    #: no table with this UUID under this name any more.
    TABLE_GONE = "table_gone"


@dataclass(frozen=True, slots=True)
class CommitResult:
    """The outcome, and where the table stands now.

    Attributes:
        outcome: how the commit ended.
        committed_lsn: the last LSN that the table holds.
        snapshot_id: the snapshot that holds it.
        table: the table as the attempt loaded it, for the server to adopt (R27); None where nothing was loaded.
        unusable: why Arka cannot write to what it loaded; empty if it can.
        named: whether a snapshot of the table is known to name the job's files; of COMMITTED alone.
        seen: whether all files of the table's current metadata were seen to be there after a commit (R28).
        detail: of NOT_OURS: why, and what to do.
    """

    outcome: CommitOutcome
    committed_lsn: int
    snapshot_id: int | None
    table: CatalogTable | None = None
    unusable: str = ""
    named: bool = False
    seen: bool = False
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReadJob:
    """Read a table as it was after some LSN (R25).

    Attributes:
        table: which; its schema at the catalog, not this one, decides the columns' types.
        log_uuid: the log whose LSNs are meant.
        columns: names of top-level columns, in the order wanted; None for all.
        limit: most rows; None for all.
        at_lsn: the last LSN that the answer may hold; None for the newest there is.
        tail: the frames that the newest snapshot may lack, up to ``at_lsn``; None for none.
        compression: of the answer's buffers, ``lz4`` or ``zstd``; None for none.
        lineage: the log's starts; no LSN of a mark that is not of them means anything here (R15).
        known_lsn: the last LSN that the asking process knew to be committed to the table when it asked (R20).
        recorded: the highest mark of the table that the data directory has seen, as of the start; None if none.
        waited: whether the reader named an LSN that the answer has to hold.
    """

    table: TableInfo
    log_uuid: UUID
    columns: tuple[str, ...] | None = None
    limit: int | None = None
    at_lsn: int | None = None
    tail: TableFrames | None = None
    compression: str | None = None
    lineage: Lineage = NO_STARTS
    known_lsn: int = 0
    recorded: CommitMark | None = None
    waited: bool = False

    @property
    def needs_mark(self) -> bool:
        """Whether the answer depends on the table's mark: an LSN is named, or rows wait."""
        return self.at_lsn is not None or self.waited or self.tail is not None

    def objection(self, mark: CommitMark) -> str:
        """Say why the mark that the table has of the log is not to be believed; empty if it is (R15, R20)."""
        # Invariant: the frames begin above what is known to be committed.
        known_lsn = max(self.known_lsn, 0 if self.tail is None else self.tail.after_lsn)
        return self.lineage.objection(self.table.name, self.table.uuid, mark, known_lsn, self.recorded)


class Answer(Protocol):
    """Takes the messages of one read, in order; each method waits while there is no room."""

    async def tail_copied(self) -> None:
        """Take note that the log's frames are no longer needed; called once, before the first message."""
        ...

    async def begin(self, header: bytes, body_bytes: int) -> None:
        """Begin a message: its flatbuffer, and how many bytes of body ``add`` will bring."""
        ...

    async def add(self, part: bytes) -> None:
        """Take the next bytes of the message's body; never none."""
        ...


class CatalogUnavailable(Exception):
    """The catalog or the warehouse did not answer; whether a commit happened is unknown (R16)."""


class DeadlineMissed(CatalogUnavailable):
    """A job's worker was killed because the job finished nothing for too long."""


class UnwritableRows(Exception):
    """The rows of an encode job cannot be turned into files, because of their own data.

    Never raised for a disk, a network, a lack of memory or a worker that died (R32).
    """


class SchemaMisfit(Exception):
    """Rows that wait, or files that were written, do not fit what others made of the table's columns.

    That is no fault of the rows: they are held back until others mend the table, and none is set aside (R24, R27).
    """


class WorkUnfinished(CatalogUnavailable):
    """A job has done a part of its work and goes on with it when it is run again."""


class WarehouseChanged(CatalogUnavailable):
    """Catalog or warehouse are gone, or not the ones that a request began with; its outcome is unknown (R28)."""


class CatalogRestored(WarehouseChanged):
    """An SQLite catalog lost or changed its log files while this process had it open.

    The process must end without closing the database: closing would write what it remembers over the restored file.
    """


class StagedFilesMissing(CatalogUnavailable):
    """A file that waits for its commit is gone or was cut off. Nothing was committed: write the rows again.

    Args:
        location: its URL.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location

    def __str__(self) -> str:
        return f"the file {self.location}, which waits for its commit, is gone or has another size"


class FilesMissing(WarehouseChanged):
    """A file that a table's current metadata names is not there.

    Args:
        location: its URL.
    """

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location

    def __str__(self) -> str:
        return f"the file {self.location} is gone, and the table's current metadata needs it"


class TableExists(Exception):
    """CreateTable found another table under the name."""


class TableMissing(Exception):
    """No such table."""


class CatalogConflict(Exception):
    """A definition cannot be a table, or a table is not one that Arka can write; the message is for the client."""


class Catalog(Protocol):
    """The Iceberg catalog and the workers that encode and commit.

    All calls may raise CatalogUnavailable. Cancellation: a call that was running in a worker may still
    happen there unless it says otherwise.
    """

    async def create_table(self, definition: TableDefinition, location_suffix: str) -> CatalogTable:
        """Create a table whose location ends in ``-<location_suffix>`` (8 hex digits); makes the namespace.

        Raises:
            TableExists: the name is taken.
            CatalogConflict: the definition cannot be an Iceberg table.
        """
        ...

    async def drop_table(self, name: TableName, uuid: UUID, *, purge: bool) -> None:
        """Drop the table if it is still the one with this UUID; with ``purge`` delete its files too.

        Raises:
            TableMissing: no table with that UUID under that name.
        """
        ...

    async def forget_others(self, tables: frozenset[UUID]) -> None:
        """Remove what is kept on this node's disk of all tables but these; nobody may be committing.

        What cannot be removed is left.
        """
        ...

    async def load_table(self, name: TableName) -> CatalogTable:
        """Load one table, fresh.

        Raises:
            TableMissing: no such table.
        """
        ...

    async def list_tables(self) -> CatalogListing:
        """Load every table of every namespace; one that cannot be read keeps no other out."""
        ...

    async def encode(self, job: TableFrames, *, fresh: bool = False) -> StagedFiles:
        """Write the job's rows as Parquet into the warehouse; durable on return.

        It may write the first frames alone, one at least, and says so in ``StagedFiles.through_lsn`` (R19).

        What a failed attempt wrote is deleted, now or later; the same holds for files that no commit names in the end.

        Args:
            job: which rows.
            fresh: in a worker process that has done nothing else.

        Raises:
            DataCorruption: a frame's CRC does not hold (R9).
            DeadlineMissed: it finished no file for too long.
            UnwritableRows: the rows' own data cannot be written (R32).
            SchemaMisfit: rows lack what others made required, or do not fit a type that others gave a column.
        """
        ...

    async def commit(self, job: CommitJob) -> CommitResult:
        """Commit staged files; see CommitOutcome. Durable on return of COMMITTED.

        Raises:
            SchemaMisfit: others changed the table's columns since the files were written, so that they cannot be its
                files: write them again.
        """
        ...

    async def look_at(self, table: TableInfo) -> None:
        """Look for the files of a table's current metadata: metadata file, manifest list, manifests (R28).

        Raises:
            FilesMissing: one is not there.
            TableMissing: no such table.
        """
        ...

    async def scan(self, job: ReadJob, answer: Answer) -> int:
        """Send a table's rows to ``answer`` as Arrow messages: a snapshot's, and frames above it.

        The first message is the schema; its metadata says which snapshot it was (``arka.snapshot-id``) and how far each
        log is in it; both come from one metadata file (R25). Frames that it holds already are left out. The frames must
        be in the log until ``answer.tail_copied``. The answer's methods are called from the caller's task.

        Returns:
            The number of rows.

        Raises:
            TableMissing: no such table.
            InvalidRequest: a column that the table does not have.
            ArkaError: ``out_of_range``: ``at_lsn`` lies below the newest snapshot and no retained one ends there.
            DataCorruption: a frame's CRC does not hold (R9).
            Exception: what a method of ``answer`` raised.

        Cancellation: whatever reads for the answer has ended, or was killed.
        """
        ...


class Warehouse(Protocol):
    """The mark by which a warehouse is known again, and what this node's disk knows of it (R28, R29)."""

    @property
    def url(self) -> str:
        """The warehouse, for people."""
        ...

    async def read_marker(self) -> UUID | None:
        """Return the UUID in the warehouse's marker; None where there is no marker.

        Raises:
            CatalogUnavailable: the warehouse does not answer, or what lies there is no marker.
        """
        ...

    async def make_marker(self, uuid: UUID) -> UUID | None:
        """Make the marker, and the warehouse's folder; one that is there already stands.

        Returns:
            The UUID in the marker; None where nothing may be written at the top of the warehouse.

        Raises:
            CatalogUnavailable: the warehouse does not answer; the marker may be there.

        Durability: durable on return.
        """
        ...

    async def known(self) -> UUID | None:
        """Return the UUID of the warehouse that this disk's log was joined to; None if it never was."""
        ...

    async def know(self, uuid: UUID) -> None:
        """Remember it; durable on return."""
        ...


class DiskFile(Protocol):
    """A file open for reading and writing. Blocking: used only inside a job given to ``Disk.run``.

    All methods may raise OSError. After one that writes or fsyncs did, nothing may be concluded about the
    file's unsynced bytes, whatever later calls say (R6).
    """

    @property
    def path(self) -> Path:
        """Where it was opened; ``Disk.rename`` does not change it."""
        ...

    def write(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write ``parts`` joined at ``offset``; the file grows if they reach beyond its end."""
        ...

    def sync(self) -> None:
        """Make the file's bytes and its size durable; not its name (``Disk.sync_directory``)."""
        ...

    def commit(self, group: Group) -> None:
        """Seal a group, write it at its offset and make it durable, in one step."""
        ...

    def release_tail(self, offset: int) -> None:
        """Give the blocks from ``offset`` on back, if the file system can.

        The file keeps its length, so that whoever has mapped it is safe (R9), and reads as zeros there.
        """
        ...

    def close(self) -> None:
        """Close it; what was not synced may be lost in a crash. A second call does nothing."""
        ...


class Disk(Protocol):
    """The local file system, as far as the log needs it.

    All methods but ``run`` and ``commit`` block: they are called only inside a job given to ``run``, and may raise
    OSError.
    """

    async def run(self, job: Callable[[], T]) -> T:
        """Run a blocking job, which may call the other methods, without holding trio's thread up.

        Returns:
            What the job returns; raises what it raises.

        Cancellation: before the job begins it does not run; once it runs it is finished first, and its
        result is returned although a cancellation waits.
        """
        ...

    async def commit(self, file: DiskFile, group: Group) -> None:
        """Do what ``file.commit(group)`` does, without holding trio's thread up; one at a time.

        Raises:
            OSError: it failed.

        Cancellation: before it begins nothing is written; once begun it is finished, and this returns normally.
        """
        ...

    def make_directory(self, directory: Path) -> None:
        """Make a directory and its missing parents, durably; one that exists is no error."""
        ...

    def list_names(self, directory: Path) -> list[str]:
        """List the regular files of a directory, and links to such, by name, sorted; a missing directory is empty."""
        ...

    def create(self, path: Path, size: int) -> DiskFile:
        """Create a file of ``size`` zeros whose blocks are set aside already.

        Raises:
            FileExistsError: the name is taken.
            OSError: ENOSPC and others; the file may exist then.
        """
        ...

    def open(self, path: Path) -> DiskFile:
        """Open a file that exists.

        Raises:
            FileNotFoundError: it does not.
        """
        ...

    def map(self, path: Path) -> memoryview:
        """Map a whole file for reading; it must not be shortened while the view lives (R9).

        Raises:
            FileNotFoundError: it does not exist.
        """
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Rename within one directory, replacing ``new``; atomic, durable by ``sync_directory``."""
        ...

    def remove(self, path: Path) -> None:
        """Unlink a file; durable by ``sync_directory``. One that does not exist is no error."""
        ...

    def sync_directory(self, directory: Path) -> None:
        """Make the creations, renames and removals in ``directory`` durable."""
        ...

    def free_bytes(self, directory: Path) -> int:
        """How many bytes may still be written to the file system that holds ``directory``."""
        ...


__all__ = [
    "AcceptedSpec",
    "Buffer",
    "Catalog",
    "CatalogConflict",
    "CatalogListing",
    "CatalogTable",
    "CatalogUnavailable",
    "CommitJob",
    "CommitMark",
    "CommitOutcome",
    "CommitResult",
    "DeadlineMissed",
    "Disk",
    "DiskFile",
    "FilesMissing",
    "ObjectExists",
    "ObjectMeta",
    "ObjectStore",
    "Places",
    "SchemaMisfit",
    "SegmentSlice",
    "StagedFile",
    "StagedFiles",
    "StoreRefused",
    "StoreUnavailable",
    "TableExists",
    "TableFrames",
    "TableMissing",
    "Unusable",
    "UnwritableRows",
    "Warehouse",
    "WarehouseChanged",
    "WorkUnfinished",
]
