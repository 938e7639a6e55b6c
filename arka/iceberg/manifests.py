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
from collections.abc import Iterable, Sequence
from typing import Final, cast
from uuid import UUID, uuid4

from pyiceberg.avro.codecs import AvroCompressionCodec
from pyiceberg.io import FileIO
from pyiceberg.manifest import (
    DataFile,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    write_manifest,
)
from pyiceberg.table import Table, TableProperties
from pyiceberg.table.locations import load_location_provider
from pyiceberg.table.metadata import TableMetadata

#: Manifests of one tier, and of one spec, that are merged into one.
MERGE_AT: Final = 32
#: Entries from which a manifest is left as it is: rewriting more would take too long for one commit
#: (some 0.1 ms per entry).
COLD_ENTRIES: Final = MERGE_AT * MERGE_AT
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
        """Keep the manifests of a snapshot that has landed."""
        self._lists[table_uuid] = (manifest_list, manifests)
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
    """

    def __init__(self, table: Table, snapshot_id: int, sequence_number: int, memory: ManifestMemory) -> None:
        self._table = table
        self._metadata = table.metadata
        self._snapshot_id = snapshot_id
        self._sequence_number = sequence_number
        self._memory = memory
        self._provider = load_location_provider(table.metadata.location, table.metadata.properties)
        self._attempt = uuid4()
        self.written: list[str] = []
        self.merged_away: list[ManifestFile] = []

    def build(self, files: Iterable[DataFile], parents: Sequence[ManifestFile]) -> list[ManifestFile]:
        """Return the manifests of the new snapshot: of ``files``, and of the parent with some merged."""
        by_spec: dict[int, list[ManifestEntry]] = defaultdict(list)
        for file in files:
            by_spec[file.spec_id].append(
                ManifestEntry.from_args(
                    status=ManifestEntryStatus.ADDED,
                    snapshot_id=self._snapshot_id,
                    sequence_number=None,
                    file_sequence_number=None,
                    data_file=file,
                )
            )
        added = [self._write(spec_id, entries) for spec_id, entries in sorted(by_spec.items())]
        return added + self._merge(parents)

    def _merge(self, parents: Sequence[ManifestFile]) -> list[ManifestFile]:
        """Merge each tier of the parent's data manifests that is full."""
        tiers: dict[tuple[int, int], list[ManifestFile]] = defaultdict(list)
        for manifest in parents:
            # Without counts nobody knows what a manifest would cost; delete manifests are not ours to write.
            if manifest.content == ManifestContent.DATA and _entry_count(manifest) < COLD_ENTRIES:
                tier = 0 if _entry_count(manifest) < MERGE_AT else 1
                tiers[manifest.partition_spec_id, tier].append(manifest)
        made: dict[str, ManifestFile | None] = {}
        for (spec_id, _), manifests in tiers.items():
            if len(manifests) < MERGE_AT:
                continue
            entries = [self._existing(e) for m in manifests for e in self._memory.entries(m, self._table.io)]
            made.update({m.manifest_path: None for m in manifests})
            made[manifests[0].manifest_path] = self._write(spec_id, entries)
            self.merged_away += manifests
        kept = (made.get(manifest.manifest_path, manifest) for manifest in parents)
        return [manifest for manifest in kept if manifest is not None]

    @staticmethod
    def _existing(entry: ManifestEntry) -> ManifestEntry:
        """Carry an entry over: who added it, and when, stays as it was."""
        return ManifestEntry.from_args(
            status=ManifestEntryStatus.EXISTING,
            snapshot_id=entry.snapshot_id,
            sequence_number=entry.sequence_number,
            file_sequence_number=entry.file_sequence_number,
            data_file=entry.data_file,
        )

    def _write(self, spec_id: int, entries: list[ManifestEntry]) -> ManifestFile:
        location = self._provider.new_metadata_location(f"{self._attempt}-m{len(self.written)}.avro")
        self.written.append(location)
        with write_manifest(
            format_version=self._metadata.format_version,
            spec=self._metadata.specs()[spec_id],
            schema=self._metadata.schema(),
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
        if len(entries) < MERGE_AT:
            self._memory.remember_entries(location, entries)
        return manifest


def avro_codec(metadata: TableMetadata) -> AvroCompressionCodec:
    """Return the codec of a table's manifests and manifest lists."""
    # Iceberg's names for codecs; pyiceberg's writers translate them, whatever their annotations say.
    codec = metadata.properties.get(
        TableProperties.WRITE_AVRO_COMPRESSION, TableProperties.WRITE_AVRO_COMPRESSION_DEFAULT
    )
    return cast(AvroCompressionCodec, codec)


def _entry_count(manifest: ManifestFile) -> int:
    counts = (manifest.added_files_count, manifest.existing_files_count, manifest.deleted_files_count)
    return COLD_ENTRIES if None in counts else sum(cast(tuple[int, int, int], counts))


__all__ = ["COLD_ENTRIES", "MERGE_AT", "ManifestBuilder", "ManifestMemory", "avro_codec"]
