"""Put staged files into one snapshot, exactly once (R15, R16).

Owns: the checks at every attempt, the attempts, and what an unknown outcome turns out to be. Does not own
what a snapshot consists of (``producer``) nor how a catalog swaps metadata (``sqlcatalog``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, cast

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException, NoSuchNamespaceError, NoSuchTableError
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table, TableProperties
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH
from pyiceberg.table.update import (
    AssertCurrentSchemaId,
    AssertDefaultSpecId,
    AssertRefSnapshotId,
    AssertTableUUID,
    TableRequirement,
)

from arka import failpoints
from arka.errors import ArkaError, ErrorCode
from arka.iceberg.align import misfit
from arka.iceberg.avronames import has_plain_names
from arka.iceberg.catalogs import catalog
from arka.iceberg.config import CatalogConfig
from arka.iceberg.control import check_format, describe, key_columns
from arka.iceberg.fileio import WarehouseFileIO
from arka.iceberg.garbage import Garbage
from arka.iceberg.keybuild import BuildTerms
from arka.iceberg.keyindex import IndexUnusable
from arka.iceberg.locations import REDIRECTING
from arka.iceberg.manifests import ManifestMemory, metadata_files
from arka.iceberg.marks import mark_in, mark_properties
from arka.iceberg.partition import partition_fields
from arka.iceberg.pointer import is_seen
from arka.iceberg.producer import (
    data_file,
    discard,
    expired_ids,
    snapshot_updates,
    stage_snapshot,
)
from arka.iceberg.rowdelta import Delta, KeyedTables
from arka.iceberg.schema import arrow_schema
from arka.iceberg.sight import check_files_here, check_same, look, on_change
from arka.iceberg.waiting import WaitingFiles, last_look
from arka.records import FIELD_ID_KEY, TableInfo, TableType, same_partitions
from arka.storage.ports import (
    CatalogConflict,
    CatalogUnavailable,
    CommitJob,
    CommitOutcome,
    CommitResult,
    SchemaMisfit,
    StagedFilesMissing,
)
from arka.tableproperties import (
    CLEANED,
    CLEANED_VALUE,
    SUMMARY_COMMIT_ID,
    SUMMARY_FIRST_LSN,
    SUMMARY_LAST_LSN,
    SUMMARY_LOG,
    cleaning,
)

#: Attempts against other writers before the table's committer pauses and asks again.
_ATTEMPTS: Final = 5

_memory = ManifestMemory()
_garbage = Garbage()
_keyed = KeyedTables()


@on_change
def _forget_all() -> None:
    """Begin again with what is there: files that this process wrote or read may be in no warehouse any more."""
    _memory.forget()
    _garbage.forget()
    _keyed.forget_all()


class MarkUnmoved:
    """A requirement of a commit: the mark still stands where the job began, under no newer epoch, and its specs exist.

    A SQL catalog evaluates it on the very metadata that its compare-and-swap replaces. A REST catalog
    cannot: there each move of the mark comes with a snapshot, so that the branch's head decides.
    """

    def __init__(self, job: CommitJob) -> None:
        self._job = job

    def validate(self, base_metadata: TableMetadata | None) -> None:
        """Check the metadata.

        Raises:
            CommitFailedException: the table is gone or has moved on.
        """
        if base_metadata is None or judge(base_metadata, self._job) is not None:
            raise CommitFailedException(f"table {self._job.table.name}: the mark has moved")
        if _lacking_spec(base_metadata, self._job) is not None:
            raise CommitFailedException(f"table {self._job.table.name}: a partition spec is gone")
        if reason := _misfit(base_metadata, self._job):
            raise CommitFailedException(f"table {self._job.table.name}: {reason}")


def _lacking_spec(metadata: TableMetadata, job: CommitJob) -> int | None:
    """The id of a partition spec that the job's files were written under and the table has no more; None for none.

    Others may remove a spec that no snapshot uses yet, and a later one may get its id.
    """
    there = metadata.specs()
    for number, fields in job.staged.specs.items():
        found = partition_fields(there[number]) if number in there else None
        if not same_partitions(found, fields):
            return number
    return None


def _misfit(metadata: TableMetadata, job: CommitJob) -> str:
    """Say why the job's files cannot be files of the table by now; empty if they can (R24, R27)."""
    return misfit(job.table.schema, arrow_schema(metadata.schema())) if job.staged.files else ""


def judge(metadata: TableMetadata, job: CommitJob) -> CommitResult | None:
    """Say how a commit ends on this metadata; None when it may go ahead (R15)."""
    if metadata.table_uuid != job.table.uuid:
        return CommitResult(CommitOutcome.TABLE_GONE, 0, None)
    mark = mark_in(metadata, job.log_uuid)
    if mark.epoch > job.epoch:
        return CommitResult(CommitOutcome.FENCED, mark.committed_lsn, metadata.current_snapshot_id)
    objection = job.lineage.objection(job.table.name, job.table.uuid, mark)
    if objection:
        return CommitResult(CommitOutcome.NOT_OURS, mark.committed_lsn, metadata.current_snapshot_id, detail=objection)
    if mark.committed_lsn >= job.staged.through_lsn:
        snapshot_id, named = _snapshot_of(metadata, job)
        return CommitResult(CommitOutcome.COMMITTED, mark.committed_lsn, snapshot_id, named=named)
    if mark.committed_lsn != job.staged.after_lsn:
        return CommitResult(CommitOutcome.RECUT, mark.committed_lsn, metadata.current_snapshot_id)
    return None


def commit(config: CatalogConfig, job: CommitJob) -> CommitResult:
    """Commit a job's files, or say why not.

    Args:
        config: the catalog.
        job: what to commit; the same job may come again after any error.

    Returns:
        A definite outcome.

    Raises:
        WarehouseChanged: catalog, warehouse or table folder are not the ones that the job began with, or files that
            the new metadata names are not there. The outcome is unknown (R28).
        StagedFilesMissing: the job's files are gone; nothing was committed, and the job can never be.
        CatalogUnavailable: the outcome is unknown, or other writers won every attempt; run the job again.
        WorkUnfinished: the index of the table's keys is being made; run the job again.
        SchemaMisfit: the files do not fit what others made of the table's columns since; nothing is committed.
        Exception: what the catalog or the warehouse raised before anything could have been committed.

    Durability: with COMMITTED, files, metadata and the catalog's pointer to it are durable.

    Source: R15, R16, R28.
    """
    check_same(job.staged.places)
    look(config, job.table.location)
    result, table = _run(config, job)
    if table is None or result.outcome is CommitOutcome.FENCED or result.committed_lsn <= job.staged.after_lsn:
        return result
    check_same(job.staged.places)
    if not is_seen(catalog(config), table, job, result.committed_lsn):
        return CommitResult(CommitOutcome.TABLE_GONE, 0, None)
    check_same(job.staged.places)
    if result.outcome is not CommitOutcome.COMMITTED:
        return result
    return replace(result, seen=check_files_here(metadata_files(table, _memory)))


def _run(config: CatalogConfig, job: CommitJob) -> tuple[CommitResult, Table | None]:
    """Do what ``commit`` does, but for the look at its end; returns the table as it is then, if there is one."""
    terms = BuildTerms(config.index_build_s, apart=config.apart)
    opened = catalog(config)
    identifier = tuple(job.table.name)
    for _ in range(_ATTEMPTS):
        table = _load(opened, identifier)
        if table is None:
            return CommitResult(CommitOutcome.TABLE_GONE, 0, None), None
        verdict = judge(table.metadata, job)
        seen = _seen(table, job)
        if verdict is not None:
            return replace(verdict, **seen), table
        try:
            return replace(_attempt(config, opened, table, job, terms), **seen), table
        except (CommitFailedException, NoSuchTableError):
            # Definitely not committed: look again at what the table has become.
            continue
        except _UnknownOutcome as error:
            resolved = _resolve(opened, identifier, job, error)
            return resolved, _load(opened, identifier)
    raise CatalogUnavailable(f"table {job.table.name}: other writers won {_ATTEMPTS} attempts in a row")


class _UnknownOutcome(Exception):
    """The catalog was asked and did not answer clearly."""


def _load(opened: Catalog, identifier: tuple[str, ...]) -> Table | None:
    try:
        table = opened.load_table(identifier)
    except (NoSuchTableError, NoSuchNamespaceError):
        return None
    except ValueError as error:
        # What lies there is no metadata: others may mend it, and no row is lost by waiting.
        raise CatalogUnavailable(f"table {'.'.join(identifier)}: its metadata cannot be read: {error}") from error
    if isinstance(table.io, WarehouseFileIO):
        table.io.confine(table.metadata.location)
    return table


def _seen(table: Table, job: CommitJob) -> dict[str, Any]:
    """Describe what an attempt has loaded, for the server to adopt (R27); nothing where it is another table."""
    if table.metadata.table_uuid != job.table.uuid:
        return {}
    try:
        return {"table": describe(table)}
    except CatalogConflict as error:
        return {"unusable": str(error)}


def _attempt(config: CatalogConfig, opened: Catalog, table: Table, job: CommitJob, terms: BuildTerms) -> CommitResult:
    check_format(table)
    gone = _lacking_spec(table.metadata, job)
    if gone is not None:
        raise CatalogConflict(
            f"others removed partition spec {gone} of {job.table.name}, which files were written under: they are "
            "written again under one that the table has"
        )
    if reason := _misfit(table.metadata, job):
        raise SchemaMisfit(f"{reason}: files that were written before that are written again")
    specs = {file.spec_id for file in job.staged.files}
    appends = job.table.table_type is TableType.APPEND_ONLY
    plain = has_plain_names(table.metadata.spec())
    if config.stock_commit and appends and plain and specs <= {table.metadata.default_spec_id}:
        snapshot_id = _stock_append(config, opened, table, job)
    else:
        snapshot_id = _commit_own(config, opened, table, job, terms)
    return CommitResult(CommitOutcome.COMMITTED, job.staged.through_lsn, snapshot_id, named=True)


def _commit_own(config: CatalogConfig, opened: Catalog, table: Table, job: CommitJob, terms: BuildTerms) -> int:
    base = table.metadata
    delta: Delta | None = None
    written: list[str] = []
    added: list[DataFile]
    try:
        if job.table.table_type is TableType.PRIMARY_KEY:
            # On what the commit is based on: the table may have been handed over meanwhile.
            job.table.check_owner(job.log_uuid, base.properties)
            _check_key(job.table, base)
            keyed = _keyed.get(config, job.table, job.staged.key_check)
            delta = keyed.resolve(table, job, _memory, terms)
            written += delta.deleted
            added = delta.added
            staged = stage_snapshot(table, added, _memory, _notes(job), delta.removed)
            written += staged.written
            keyed.stage(job, delta)
        else:
            added = [data_file(file) for file in job.staged.files]
            staged = stage_snapshot(table, added, _memory, _notes(job))
            written += staged.written
    except BaseException:
        # The catalog was not asked: nothing will ever name them.
        discard(table.io, written)
        raise
    failpoints.hit("commit.manifests")
    properties, removed = _property_changes(job, base.properties)
    updates = snapshot_updates(base, staged, properties, config.keep_snapshots, removed)
    requirements: tuple[TableRequirement, ...] = (
        AssertTableUUID(uuid=base.table_uuid),
        AssertRefSnapshotId(ref=MAIN_BRANCH, snapshot_id=base.current_snapshot_id),  # type: ignore[call-arg]
    )
    if config.is_rest:
        # It cannot look at the specs; the default one has to be another before one that is used can be removed.
        requirements += (
            AssertDefaultSpecId(default_spec_id=base.default_spec_id),  # type: ignore[call-arg]
            AssertCurrentSchemaId(current_schema_id=base.current_schema_id),  # type: ignore[call-arg]
        )
    else:
        requirements += (cast(TableRequirement, MarkUnmoved(job)),)
    waiting = WaitingFiles(table.io, job, added, written)
    try:
        with last_look(opened, waiting):
            response = opened.commit_table(table, requirements, updates)
    except (CommitFailedException, NoSuchTableError, StagedFilesMissing):
        discard(table.io, written)
        raise
    except Exception as error:
        # Nothing is deleted: the commit may have landed or may land yet.
        raise _UnknownOutcome(_describe(error)) from error
    failpoints.hit("commit.swapped")
    # Before anything is deleted for it: only what is certainly ours is (R29).
    check_same(job.staged.places)
    consecutive = _memory.knows_current(base)
    _memory.remember(base.table_uuid, staged.snapshot.manifest_list, staged.manifests)
    for manifest in staged.merged_away:
        _memory.forget_entries(manifest.manifest_path)
    if delta is not None:
        try:
            keyed.landed(staged, delta)
        except (OSError, IndexUnusable):
            # The commit has happened whatever this disk says; the next one begins with what it finds there.
            _keyed.forget(config, job.table)
        if config.apart:
            # Its next commit is another process's; the runs that that one merges away shall not stay mapped here.
            _keyed.forget(config, job.table)
    _garbage.landed(base, response.metadata, staged.merged_away, staged.removed, consecutive=consecutive)
    _garbage.collect(base.table_uuid, table.io)
    _garbage.replaced(base, response.metadata, response.metadata_location, table.io)
    table.metadata, table.metadata_location = response.metadata, response.metadata_location
    failpoints.hit("commit.response")
    return staged.snapshot.snapshot_id


def _check_key(info: TableInfo, metadata: TableMetadata) -> None:
    """Check that others have not made other columns the key: rows would be doubled.

    Raises:
        ArkaError: ``table_stopped``.
    """
    schema = metadata.schema()
    now = key_columns(schema, metadata.properties)
    try:
        ids = {str(schema.find_field(column).field_id).encode() for column in now}
    except ValueError:
        ids = set()
    if ids != {field.metadata[FIELD_ID_KEY] for field in info.key_schema()}:
        raise ArkaError(
            f"{info.name}: others changed its primary key from {list(info.key_columns)} to {list(now)}: change it back",
            code=ErrorCode.TABLE_STOPPED,
        )


def _stock_append(config: CatalogConfig, opened: Catalog, table: Table, job: CommitJob) -> int:
    base = table.metadata
    # pyiceberg's retry stages the same files again on other metadata without our checks: never. The setting is in this
    # process's copy alone (R30), and without what chooses folders and classes.
    kept = {name: value for name, value in base.properties.items() if not REDIRECTING.match(name)}
    table.metadata = base.model_copy(update={"properties": {**kept, TableProperties.COMMIT_NUM_RETRIES: "0"}})
    added = [data_file(file) for file in job.staged.files]
    transaction = table.transaction()
    with transaction.update_snapshot(snapshot_properties=_notes(job)).fast_append() as append:
        for file in added:
            append.append_data_file(file)
    properties, removed = _property_changes(job, base.properties)
    transaction.set_properties(properties)
    if removed:
        transaction.remove_properties(*removed)
    expired = expired_ids(table.metadata, config.keep_snapshots)
    try:
        with last_look(opened, WaitingFiles(table.io, job, added, ())):
            transaction.commit_transaction()
    except (CommitFailedException, NoSuchTableError, StagedFilesMissing):
        raise
    except Exception as error:
        raise _UnknownOutcome(_describe(error)) from error
    snapshot_id = cast(int, table.metadata.current_snapshot_id)
    _garbage.replaced(base, table.metadata, table.metadata_location, table.io)
    if expired:
        # A commit of its own; the next one tries again.
        with contextlib.suppress(CommitFailedException):
            committed = table.metadata
            table.maintenance.expire_snapshots().by_ids(expired).commit()
            _garbage.replaced(committed, table.metadata, table.metadata_location, table.io)
    return snapshot_id


def _resolve(opened: Catalog, identifier: tuple[str, ...], job: CommitJob, error: _UnknownOutcome) -> CommitResult:
    """Find out from freshly loaded metadata whether a commit happened (R16)."""
    try:
        table = _load(opened, identifier)
    except Exception as failure:
        raise CatalogUnavailable(
            f"table {job.table.name}: outcome of a commit unknown ({error}), and the catalog does not "
            f"answer: {_describe(failure)}"
        ) from failure
    if table is None:
        return CommitResult(CommitOutcome.TABLE_GONE, 0, None)
    verdict = judge(table.metadata, job)
    if verdict is not None:
        return replace(verdict, **_seen(table, job))
    # Perhaps the catalog still works on it; the branch's head keeps a second attempt from doubling rows.
    raise CatalogUnavailable(f"table {job.table.name}: the commit has not happened: {error}") from error


def _notes(job: CommitJob) -> dict[str, str]:
    notes = {
        SUMMARY_LOG: str(job.log_uuid),
        SUMMARY_LAST_LSN: str(job.staged.through_lsn),
        SUMMARY_COMMIT_ID: str(job.commit_id),
    }
    if job.staged.first_lsn:
        # LSNs are the log's: those between two commits of a table may be other tables'.
        notes[SUMMARY_FIRST_LSN] = str(job.staged.first_lsn)
    return notes


def _property_changes(job: CommitJob, properties: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what a commit sets and what it removes: the mark, and once what older releases wrote (R15, R30)."""
    token = job.lineage.token_for(job.table.uuid, job.epoch, job.staged.through_lsn)
    made = mark_properties(job.log_uuid, job.staged.through_lsn, job.epoch, token)
    removed = cleaning(properties)
    if removed is None:
        return made, ()
    return {**made, CLEANED: CLEANED_VALUE}, removed


def _snapshot_of(metadata: TableMetadata, job: CommitJob) -> tuple[int | None, bool]:
    """Find the snapshot that an earlier attempt of this job made; else the current one holds its rows.

    Returns:
        The snapshot, and whether it is known to name the job's files.
    """
    for snapshot in reversed(metadata.snapshots):
        if snapshot.summary is not None and snapshot.summary.get(SUMMARY_COMMIT_ID) == str(job.commit_id):
            return snapshot.snapshot_id, True
    return metadata.current_snapshot_id, False


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


__all__ = ["MarkUnmoved", "commit", "judge"]
