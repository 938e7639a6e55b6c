"""Manifests: written per spec, remembered, and merged before there are many of them.

Owns: the manifest files of a commit and what one worker remembers of a table's manifest list. Does not own
snapshots (``producer``) nor the removal of files (``garbage``).

Each commit adds a manifest. Left alone, a manifest list would grow by one entry per commit and commit ten
thousand would write ten thousand of them. So manifests are merged in tiers, as a log-structured merge tree
does: as soon as there are ``MERGE_AT`` manifests of a tier, they become one of the next.

Source: Iceberg table spec, "Manifests", "Manifest Lists" and "Sequence Number Inheritance".
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Final, cast
from uuid import UUID, uuid4

from pyiceberg.avro.codecs import AvroCompressionCodec
from pyiceberg.io import FileIO
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
)
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata

from arka.iceberg.avronames import PlainManifestWriter
from arka.iceberg.locations import table_locations
from arka.iceberg.specschema import UnknownSourceColumn, spec_schema
from arka.iceberg.tableoptions import avro_codec_name
from arka.storage.ports import FilesMissing

#: Manifests of one tier, and of one spec, that are merged into one.
MERGE_AT: Final = 32
#: Entries from which a manifest is left as it is: rewriting more would take too long for one commit
#: (some 0.1 ms per entry).
COLD_ENTRIES: Final = MERGE_AT * MERGE_AT
#: Entries of one manifest of delete files: more are rewritten each time one of them is replaced.
DELETE_ENTRIES: Final = 128
#: Sequence number of a manifest until its manifest list is written.
_UNASSIGNED: Final = -1
#: Tables whose manifest list one worker remembers.
_REMEMBERED_TABLES: Final = 256
#: Entries of young manifests that one worker remembers, a few kB each.
_REMEMBERED_ENTRIES: Final = 4_096


class ManifestMemory:
    """What one worker remembers of the manifests it wrote, so that the next commit need not read them.

    Manifests and manifest lists are written once under unique names: what was written under a location is
    what a reader would find there. Entries are kept with their sequence numbers assigned.
    """

    def __init__(self) -> None:
        self._lists: OrderedDict[UUID, tuple[str, list[ManifestFile]]] = OrderedDict()
        self._entries: OrderedDict[str, list[ManifestEntry]] = OrderedDict()
        self._entry_count = 0

    def forget(self) -> None:
        """Forget everything: what was written may be in no warehouse any more."""
        self._lists.clear()
        self._entries.clear()
        self._entry_count = 0

    def knows_current(self, metadata: TableMetadata) -> bool:
        """Say whether the table's current snapshot is the one that ``remember`` was last told of."""
        current = metadata.current_snapshot()
        known = self._lists.get(metadata.table_uuid)
        return current is not None and known is not None and known[0] == current.manifest_list

    def manifests(self, metadata: TableMetadata, io: FileIO) -> list[ManifestFile]:
        """Return the live manifests of the current snapshot, from memory or from the warehouse."""
        current = metadata.current_snapshot()
        if current is None:
            return []
        if self.knows_current(metadata):
            return self._lists[metadata.table_uuid][1]
        return [m for m in current.manifests(io) if m.has_added_files() or m.has_existing_files()]

    def entries(self, manifest: ManifestFile, io: FileIO) -> list[ManifestEntry]:
        """Return the live entries of a manifest, from memory or from the warehouse."""
        known = self._entries.get(manifest.manifest_path)
        return manifest.fetch_manifest_entry(io) if known is None else known

    def remember(self, table_uuid: UUID, manifest_list: str, manifests: list[ManifestFile]) -> None:
        """Keep the manifests of a snapshot that has landed; those of which nothing lives are its own alone."""
        self._lists[table_uuid] = (
            manifest_list,
            [m for m in manifests if m.has_added_files() or m.has_existing_files()],
        )
        self._lists.move_to_end(table_uuid)
        while len(self._lists) > _REMEMBERED_TABLES:
            self._lists.popitem(last=False)

    def remember_entries(self, location: str, entries: list[ManifestEntry]) -> None:
        """Keep the entries of a manifest that will be merged before long."""
        self._entries[location] = entries
        self._entry_count += len(entries)
        while self._entry_count > _REMEMBERED_ENTRIES:
            _, dropped = self._entries.popitem(last=False)
            self._entry_count -= len(dropped)

    def forget_entries(self, location: str) -> None:
        """Drop the entries of a manifest that is in no current manifest list any more."""
        self._entry_count -= len(self._entries.pop(location, ()))


def metadata_files(table: Table, memory: ManifestMemory) -> list[str]:
    """List the files that a table's current state consists of, data files aside.

    Raises:
        FilesMissing: the manifest list is not there, so that what it names cannot be known.
    """
    files = [table.metadata_location]
    current = table.metadata.current_snapshot()
    if current is not None:
        files.append(current.manifest_list)
        try:
            files += (manifest.manifest_path for manifest in memory.manifests(table.metadata, table.io))
        except FileNotFoundError as error:
            raise FilesMissing(current.manifest_list) from error
    return files


class ManifestBuilder:
    """Writes the manifests of one snapshot.

    Args:
        table: at the metadata that the commit will be based on.
        snapshot_id: of the new snapshot.
        sequence_number: of the new snapshot.
        memory: what this worker remembers.

    Attributes:
        written: locations of the files made so far.
        merged_away: manifests of the parent that the new snapshot does without.
        entries: the live entries of each manifest that was written, by its location.
        removed: the files that the new snapshot does without.
    """

    def __init__(self, table: Table, snapshot_id: int, sequence_number: int, memory: ManifestMemory) -> None:
        self._table = table
        self._metadata = table.metadata
        self._snapshot_id = snapshot_id
        self._sequence_number = sequence_number
        self._memory = memory
        self._provider = table_locations(table.metadata.location)
        self._attempt = uuid4()
        self.written: list[str] = []
        self.merged_away: list[ManifestFile] = []
        self.entries: dict[str, list[ManifestEntry]] = {}
        self.removed: list[DataFile] = []

    def build(
        self, files: Iterable[DataFile], parents: Sequence[ManifestFile], removed: Mapping[str, Container[str]]
    ) -> list[ManifestFile]:
        """Return the manifests of the new snapshot: of ``files``, and of the parent with some merged.

        Args:
            files: data and delete files that are added.
            parents: the manifests of the snapshot before.
            removed: the paths of files that go, by the path of the manifest that names them.
        """
        data: dict[int, list[ManifestEntry]] = defaultdict(list)
        deletes: dict[int, list[ManifestEntry]] = defaultdict(list)
        for file in files:
            (data if file.content == DataFileContent.DATA else deletes)[file.spec_id].append(
                ManifestEntry.from_args(
                    status=ManifestEntryStatus.ADDED,
                    snapshot_id=self._snapshot_id,
                    sequence_number=None,
                    file_sequence_number=None,
                    data_file=file,
                )
            )
        rewritten: list[ManifestFile] = []
        before: dict[int, list[ManifestFile]] = defaultdict(list)
        kept: list[ManifestFile] = []
        for manifest in parents:
            if manifest.manifest_path not in removed:
                kept.append(manifest)
                continue
            self.merged_away.append(manifest)
            entries = self._without(manifest, removed[manifest.manifest_path])
            if manifest.content == ManifestContent.DATA:
                rewritten.append(self._write(manifest.partition_spec_id, entries, [manifest]))
            else:
                # Together with the new ones, so that delete manifests stay few.
                deletes[manifest.partition_spec_id] += entries
                before[manifest.partition_spec_id].append(manifest)
        added = [self._write(spec_id, entries, parents) for spec_id, entries in sorted(data.items())]
        for spec_id, entries in sorted(deletes.items()):
            for start in range(0, len(entries), DELETE_ENTRIES):
                part = entries[start : start + DELETE_ENTRIES]
                added.append(self._write(spec_id, part, before[spec_id] or parents, deletes=True))
        return added + rewritten + self._merge(kept)

    def _without(self, manifest: ManifestFile, gone: Container[str]) -> list[ManifestEntry]:
        """Return a manifest's entries for the new snapshot, those that go as deleted."""
        entries = []
        for entry in self._memory.entries(manifest, self._table.io):
            if entry.data_file.file_path in gone:
                self.removed.append(entry.data_file)
                entries.append(self._carried(entry, ManifestEntryStatus.DELETED, self._snapshot_id))
            else:
                entries.append(self._existing(entry))
        return entries

    def _merge(self, parents: Sequence[ManifestFile]) -> list[ManifestFile]:
        """Merge each tier of the parent's data manifests that is full."""
        tiers: dict[tuple[int, int], list[ManifestFile]] = defaultdict(list)
        for manifest in parents:
            # Without counts nobody knows what a manifest would cost; delete manifests are kept few by ``build``.
            if manifest.content == ManifestContent.DATA and _entry_count(manifest) < COLD_ENTRIES:
                tier = 0 if _entry_count(manifest) < MERGE_AT else 1
                tiers[manifest.partition_spec_id, tier].append(manifest)
        made: dict[str, ManifestFile | None] = {}
        for (spec_id, _), manifests in tiers.items():
            if len(manifests) < MERGE_AT:
                continue
            try:
                self._schema_of(spec_id, manifests)
            except UnknownSourceColumn:
                # Nobody can say the type of its partition values: these manifests stay as they are.
                continue
            entries = [self._existing(e) for m in manifests for e in self._memory.entries(m, self._table.io)]
            made.update({m.manifest_path: None for m in manifests})
            made[manifests[0].manifest_path] = self._write(spec_id, entries, manifests)
            self.merged_away += manifests
        kept = (made.get(manifest.manifest_path, manifest) for manifest in parents)
        return [manifest for manifest in kept if manifest is not None]

    @classmethod
    def _existing(cls, entry: ManifestEntry) -> ManifestEntry:
        """Carry an entry over: who added it stays as it was."""
        return cls._carried(entry, ManifestEntryStatus.EXISTING, entry.snapshot_id)

    @staticmethod
    def _carried(entry: ManifestEntry, status: ManifestEntryStatus, snapshot_id: int | None) -> ManifestEntry:
        """Make an entry of an earlier one; when its file was added stays as it was."""
        return ManifestEntry.from_args(
            status=status,
            snapshot_id=snapshot_id,
            sequence_number=entry.sequence_number,
            file_sequence_number=entry.file_sequence_number,
            data_file=entry.data_file,
        )

    def _schema_of(self, spec_id: int, others: Sequence[ManifestFile]) -> Schema:
        """Return the schema for manifests of a spec; the headers of ``others`` of that spec may help."""
        of_spec = (manifest for manifest in others if manifest.partition_spec_id == spec_id)
        return spec_schema(self._metadata, self._metadata.specs()[spec_id], self._table.io, of_spec)

    def _write(
        self, spec_id: int, entries: list[ManifestEntry], others: Sequence[ManifestFile], *, deletes: bool = False
    ) -> ManifestFile:
        schema = self._schema_of(spec_id, others)
        location = self._provider.new_metadata_location(f"{self._attempt}-m{len(self.written)}.avro")
        self.written.append(location)
        with (DeleteManifestWriter if deletes else PlainManifestWriter)(
            spec=self._metadata.specs()[spec_id],
            schema=schema,
            output_file=self._table.io.new_output(location),
            snapshot_id=self._snapshot_id,
            avro_compression=avro_codec(self._metadata),
        ) as writer:
            for entry in entries:
                writer.add_entry(entry)
        manifest = writer.to_manifest_file()
        manifest.sequence_number = self._sequence_number
        if manifest.min_sequence_number == _UNASSIGNED:
            manifest.min_sequence_number = self._sequence_number
        for entry in entries:
            # Written as null, so that a retry could inherit another number; known from here on.
            if entry.sequence_number is None:
                entry.sequence_number = self._sequence_number
                entry.file_sequence_number = self._sequence_number
        live = [entry for entry in entries if entry.status != ManifestEntryStatus.DELETED]
        self.entries[location] = live
        if len(live) < MERGE_AT:
            self._memory.remember_entries(location, live)
        return manifest


class DeleteManifestWriter(PlainManifestWriter):
    """Writes a manifest of delete files, which pyiceberg can only read."""

    def content(self) -> ManifestContent:
        """Say what the manifest list shall say."""
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


def avro_codec(metadata: TableMetadata) -> AvroCompressionCodec:
    """Return the codec of a table's manifests and manifest lists."""
    return cast(AvroCompressionCodec, avro_codec_name(metadata.properties))


def _entry_count(manifest: ManifestFile) -> int:
    counts = (manifest.added_files_count, manifest.existing_files_count, manifest.deleted_files_count)
    return COLD_ENTRIES if None in counts else sum(cast(tuple[int, int, int], counts))


__all__ = [
    "COLD_ENTRIES",
    "DELETE_ENTRIES",
    "MERGE_AT",
    "DeleteManifestWriter",
    "ManifestBuilder",
    "ManifestMemory",
    "avro_codec",
    "metadata_files",
]
