"""The next snapshot of a table: manifests, manifest list, summary, and the oldest snapshots that go for it.

Owns: what a commit writes into the warehouse before the catalog is asked, and the updates that the
catalog is asked for. Does not own whether the commit may happen (``commit``).

pyiceberg's producers re-apply and deep-copy all metadata some eighteen times per commit and write every
file under the default spec. This one works on one metadata object, remembers the manifests it wrote, and
groups files by their own spec.

Source: Iceberg table spec, "Snapshots", "Manifests" and "Manifest Lists".
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import uuid4

from pyiceberg.io import FileIO
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestEntry,
    ManifestFile,
    write_manifest_list,
)
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import (
    Operation,
    Snapshot,
    SnapshotSummaryCollector,
    Summary,
    update_snapshot_summaries,
)
from pyiceberg.table.update import (
    AddSnapshotUpdate,
    RemovePropertiesUpdate,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
    TableUpdate,
)
from pyiceberg.typedef import Record

from arka.errors import InternalError
from arka.iceberg.fileio import batch_of
from arka.iceberg.locations import table_locations
from arka.iceberg.manifests import ManifestBuilder, ManifestMemory, avro_codec
from arka.iceberg.specschema import UnknownSourceColumn, spec_schema
from arka.iceberg.tableoptions import expires_files, max_snapshot_age_ms, min_snapshots, stated_snapshot_age_ms
from arka.iceberg.timestamps import newest_ms, next_ms, now_ms
from arka.storage.ports import StagedFile


@dataclass(frozen=True, slots=True)
class StagedSnapshot:
    """A snapshot that is written and not yet in the table.

    Attributes:
        snapshot: as the table will know it.
        manifests: what its manifest list names, sequence numbers assigned.
        merged_away: manifests of its parent that it does without.
        removed: locations of data and delete files of its parent that it does without.
        entries: the live entries of its own manifests, by their locations.
        written: locations of the files that exist only for it.
    """

    snapshot: Snapshot
    manifests: list[ManifestFile]
    merged_away: list[ManifestFile]
    removed: list[str]
    entries: dict[str, list[ManifestEntry]]
    written: list[str]


def data_file(staged: StagedFile) -> DataFile:
    """Turn a staged file into what manifests hold."""
    stats: dict[str, Any] = staged.stats
    made = DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=staged.path,
        file_format=FileFormat.PARQUET,
        partition=Record(*staged.partition),
        file_size_in_bytes=staged.size,
        sort_order_id=None,
        equality_ids=None,
        key_metadata=None,
        **stats,
    )
    # from_args drops a spec_id without a word.
    made.spec_id = staged.spec_id
    return made


def expired_ids(metadata: TableMetadata, keep: int) -> list[int]:
    """Choose the snapshots that go when one more comes.

    Args:
        metadata: of the table before the commit.
        keep: snapshots of branch main to leave, the new one included, >= 2; the branch's own retention and the table's
            ``history.expire.min-snapshots-to-keep`` can raise it.

    Returns:
        Ids, oldest first; none with ``gc.enabled=false`` (R29). Never the current one, a tag's, what another
        branch than main can reach, nor one of main that is younger than the branch's ``max-snapshot-age-ms``, or
        than the table's ``history.expire.max-snapshot-age-ms`` where the branch says nothing and the table does. One
        that nothing reaches, such as one that others staged, goes when it is older than the latter, or its default.
    """
    if not expires_files(metadata.properties):
        return []
    main = metadata.refs.get(MAIN_BRANCH)
    keep = max(keep, min_snapshots(metadata.properties), (main and main.min_snapshots_to_keep) or 1)
    protected = {metadata.current_snapshot_id}
    for name, ref in metadata.refs.items():
        protected.add(ref.snapshot_id)
        if name != MAIN_BRANCH and ref.snapshot_ref_type == SnapshotRefType.BRANCH:
            protected |= _ancestors(metadata, ref.snapshot_id)
    history = _ancestors(metadata, metadata.current_snapshot_id)
    now = max(newest_ms(metadata), now_ms())
    # Without a word of the owner's the number alone counts: a commit a second would keep 432,000 for the default.
    stated_ms = [main.max_snapshot_age_ms if main else None, stated_snapshot_age_ms(metadata.properties)]
    main_age_ms = next((age for age in stated_ms if age is not None), -1)
    other_age_ms = max_snapshot_age_ms(metadata.properties)
    surplus = len(history) + 1 - keep
    expired = []
    for snapshot in sorted(metadata.snapshots, key=lambda s: (s.sequence_number or 0, s.timestamp_ms)):
        if snapshot.snapshot_id in protected:
            continue
        age_ms = now - snapshot.timestamp_ms
        if snapshot.snapshot_id not in history:
            goes = age_ms > other_age_ms
        else:
            goes = surplus > 0 and age_ms > main_age_ms
            surplus -= goes
        if goes:
            expired.append(snapshot.snapshot_id)
    return expired


def _ancestors(metadata: TableMetadata, snapshot_id: int | None) -> set[int]:
    """A snapshot and what it follows, as far as the table has it."""
    found: set[int] = set()
    while snapshot_id is not None and snapshot_id not in found:
        snapshot = metadata.snapshot_by_id(snapshot_id)
        if snapshot is None:
            break
        found.add(snapshot_id)
        snapshot_id = snapshot.parent_snapshot_id
    return found


def stage_snapshot(
    table: Table,
    files: Sequence[DataFile],
    memory: ManifestMemory,
    notes: Mapping[str, str],
    removed: Mapping[str, Container[str]] = MappingProxyType({}),
) -> StagedSnapshot:
    """Write the manifests and the manifest list of a snapshot that follows the current one.

    Args:
        table: the table, at the metadata that the commit will be based on.
        files: data and delete files that are added. May be empty: with nothing removed, the snapshot then differs from
            its parent in its summary alone.
        memory: what this worker remembers of the table's manifests.
        notes: further entries of the snapshot summary.
        removed: the paths of files that are taken out, by the path of the manifest that names them.

    Raises:
        OSError: the warehouse refused.

    Durability: everything written is durable on return if the table's file access is.
    """
    metadata = table.metadata
    snapshot_id = metadata.new_snapshot_id()
    sequence_number = metadata.next_sequence_number()
    builder = ManifestBuilder(table, snapshot_id, sequence_number, memory)
    written = builder.written
    try:
        with batch_of(table.io):
            manifests = builder.build(files, memory.manifests(metadata, table.io), removed)
            provider = table_locations(metadata.location)
            location = provider.new_metadata_location(f"snap-{snapshot_id}-0-{uuid4()}.avro")
            written.append(location)
            with write_manifest_list(
                format_version=metadata.format_version,
                output_file=table.io.new_output(location),
                snapshot_id=snapshot_id,
                parent_snapshot_id=metadata.current_snapshot_id,
                sequence_number=sequence_number,
                avro_compression=avro_codec(metadata),
            ) as writer:
                writer.add_manifests(manifests)
    except BaseException:
        discard(table.io, written)
        raise
    snapshot = Snapshot(  # type: ignore[call-arg] # by name, as pyiceberg does
        snapshot_id=snapshot_id,
        parent_snapshot_id=metadata.current_snapshot_id,
        manifest_list=location,
        sequence_number=sequence_number,
        timestamp_ms=next_ms(metadata),
        summary=_summary(metadata, files, builder.removed, notes),
        schema_id=metadata.current_schema_id,
    )
    removed_paths = [file.file_path for file in builder.removed]
    return StagedSnapshot(snapshot, manifests, builder.merged_away, removed_paths, builder.entries, written)


def snapshot_updates(
    metadata: TableMetadata,
    staged: StagedSnapshot,
    properties: Mapping[str, str],
    keep_snapshots: int,
    removed_properties: Sequence[str] = (),
) -> tuple[TableUpdate, ...]:
    """List what the catalog must apply, in one transaction: snapshot, branch, properties, expiry."""
    main = metadata.refs.get(MAIN_BRANCH)
    if (main.snapshot_id if main else None) != metadata.current_snapshot_id:
        raise InternalError(
            f"table {metadata.table_uuid}: branch main is at snapshot {main and main.snapshot_id}, "
            f"current-snapshot-id is {metadata.current_snapshot_id}"
        )
    updates: tuple[TableUpdate, ...] = (
        AddSnapshotUpdate(snapshot=staged.snapshot),
        SetSnapshotRefUpdate(  # type: ignore[call-arg]
            snapshot_id=staged.snapshot.snapshot_id,
            ref_name=MAIN_BRANCH,
            type=SnapshotRefType.BRANCH,
            # The branch's own retention is its owner's: setting a ref replaces all of it.
            min_snapshots_to_keep=main.min_snapshots_to_keep if main else None,
            max_snapshot_age_ms=main.max_snapshot_age_ms if main else None,
            max_ref_age_ms=main.max_ref_age_ms if main else None,
        ),
        SetPropertiesUpdate(updates=dict(properties)),
    )
    if removed_properties:
        updates += (RemovePropertiesUpdate(removals=list(removed_properties)),)
    expired = expired_ids(metadata, keep_snapshots)
    if expired:
        updates += (RemoveSnapshotsUpdate(snapshot_ids=expired),)  # type: ignore[call-arg]
    return updates


def discard(io: FileIO, locations: Sequence[str]) -> None:
    """Delete files that nothing refers to; what cannot be deleted is left for the sweep."""
    for location in locations:
        with contextlib.suppress(OSError):
            io.delete(location)


def _summary(
    metadata: TableMetadata, files: Sequence[DataFile], removed: Sequence[DataFile], notes: Mapping[str, str]
) -> Summary:
    collector = SnapshotSummaryCollector()
    specs = metadata.specs()
    schemas = {number: _known_schema(metadata, specs[number]) for number in {f.spec_id for f in (*files, *removed)}}
    for file in files:
        collector.add_file(file, schema=schemas[file.spec_id], partition_spec=specs[file.spec_id])
    for file in removed:
        collector.remove_file(file, schema=schemas[file.spec_id], partition_spec=specs[file.spec_id])
    adds_data = any(file.content == DataFileContent.DATA for file in files)
    appends = not removed and all(file.content == DataFileContent.DATA for file in files)
    operation = Operation.APPEND if appends else Operation.OVERWRITE if adds_data else Operation.DELETE
    parent = metadata.current_snapshot()
    return update_snapshot_summaries(
        Summary(operation=operation, **collector.build(), **notes),
        parent.summary if parent is not None else None,
    )


def _known_schema(metadata: TableMetadata, spec: PartitionSpec) -> Schema:
    """A spec's schema for the text of a summary, which needs no types."""
    try:
        return spec_schema(metadata, spec)
    except UnknownSourceColumn:
        return metadata.schema()


__all__ = [
    "StagedSnapshot",
    "data_file",
    "discard",
    "expired_ids",
    "snapshot_updates",
    "stage_snapshot",
]
