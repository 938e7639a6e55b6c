"""Bring the tables of a data directory that was moved or copied to the place where it is now (R29).

Owns: which files of a table hold paths, and writing them again with other ones: metadata, manifest lists, manifests and
position-delete files, for every snapshot that the table still has. Does not own which directory may be adopted
(``arka.storage.place``).

Nothing that exists is changed. All new files are written first; then one transaction of the catalog swaps every table's
pointer. Until that transaction is durable, the old state is whole.
"""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.io import FileIO
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV1,
    write_manifest_list,
)
from pyiceberg.table.metadata import TableMetadata, TableMetadataUtil
from pyiceberg.table.snapshots import Snapshot
from sqlalchemy import Connection, create_engine, inspect, text

from arka.errors import ConfigurationError
from arka.iceberg.avronames import PlainManifestWriter
from arka.iceberg.config import CatalogConfig
from arka.iceberg.deletes import PATH_ID
from arka.iceberg.fileio import WarehouseFileIO, batch_of, sync_directory
from arka.iceberg.manifests import DeleteManifestWriter, avro_codec
from arka.iceberg.specschema import spec_schema

#: Where pyiceberg's records keep what is changed here; its classes have no setters. A contract test holds them.
_PATH, _SIZE, _LOWER, _UPPER = 1, 5, 10, 11
_SUFFIX: Final = ".metadata.json"


@dataclass(frozen=True, slots=True)
class Move:
    """From where to where.

    Attributes:
        old: URL with which the paths begin that are to be changed, without a slash at its end.
        new: what they begin with now.
        others: further pairs of such URLs, for paths that begin with none before: of tables beside the warehouse.
    """

    old: str
    new: str
    others: tuple[tuple[str, str], ...] = ()

    def of(self, path: str) -> str:
        """The path now; one that lies elsewhere stays."""
        for old, new in ((self.old, self.new), *self.others):
            if path == old or path.startswith(old + "/"):
                return new + path[len(old) :]
        return path


def adopt(config: CatalogConfig, move: Move) -> list[str]:
    """Rewrite what holds paths for every table, and swap all pointers.

    Args:
        config: the catalog and the warehouse where they are now.
        move: from where they came.

    Returns:
        The names of the tables that were changed.

    Raises:
        ConfigurationError: the catalog is not a database, or a table has a form that cannot be written, or a file of
            it is not at the new place; the table is named.
        OSError: the disk refused, with the table's name; nothing is changed.

    Durability: all of it is durable on return; before the transaction nothing counts.
    """
    if config.is_rest:
        raise ConfigurationError("--adopt-warehouse needs a SQL catalog: a REST catalog alone knows its pointers")
    io = WarehouseFileIO(dict(config.properties))
    engine = create_engine(config.uri)
    try:
        with engine.begin() as connection:
            names = []
            for namespace, name, location in _pointers(connection):
                if move.of(location) == location:
                    continue
                made = _rewrite(io, move, f"{namespace}.{name}", location)
                _swap(connection, location, made)
                names.append(f"{namespace}.{name}")
            _move_namespaces(connection, move)
    finally:
        engine.dispose()
    # Indexes of keys name data files by their old paths; they are made again from the tables.
    shutil.rmtree(config.index_dir, ignore_errors=True)
    parent = Path(config.index_dir).parent
    if parent.is_dir():
        sync_directory(str(parent))
    return names


def _rewrite(io: FileIO, move: Move, name: str, location: str) -> str:
    """Rewrite a table's files; what is wrong with them is said with the table's name."""
    try:
        with batch_of(io):
            return _Table(io, move, name).rewrite(location)
    except ConfigurationError:
        raise
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"table {name} lay at {location} and cannot be written again with the paths of the new place: a file of "
            f"it is not there ({error}). Nothing is changed: bring its files from the old place or from a backup, or "
            "drop the table from the catalog, and start again"
        ) from error
    except OSError as error:
        raise OSError(error.errno, f"table {name} cannot be written at the new place: {error}") from error
    except Exception as error:
        raise ConfigurationError(
            f"{name} cannot be written again with the paths of the new place ({type(error).__name__}: {error}). "
            "Nothing is changed: go back to the old place, and mend or drop the table there"
        ) from error


def _pointers(connection: Connection) -> list[tuple[str, str, str]]:
    if not inspect(connection).has_table("iceberg_tables"):
        return []
    rows = connection.execute(text("SELECT table_namespace, table_name, metadata_location FROM iceberg_tables"))
    return [(str(row[0]), str(row[1]), str(row[2])) for row in rows if row[2]]


def _swap(connection: Connection, before: str, after: str) -> None:
    statement = text(
        "UPDATE iceberg_tables SET metadata_location = :after, previous_metadata_location = NULL "
        "WHERE metadata_location = :before"
    )
    if connection.execute(statement, {"before": before, "after": after}).rowcount != 1:
        raise ConfigurationError(f"the catalog's pointer to {before} changed meanwhile: stop what else uses it")


def _move_namespaces(connection: Connection, move: Move) -> None:
    """Move what namespaces say of places."""
    if not inspect(connection).has_table("iceberg_namespace_properties"):
        return
    rows = connection.execute(
        text("SELECT DISTINCT property_value FROM iceberg_namespace_properties WHERE property_value IS NOT NULL")
    )
    for (value,) in rows.fetchall():
        if move.of(value) != value:
            connection.execute(
                text("UPDATE iceberg_namespace_properties SET property_value = :after WHERE property_value = :before"),
                {"before": value, "after": move.of(value)},
            )


class _Table:
    """One table's files."""

    def __init__(self, io: FileIO, move: Move, name: str) -> None:
        self._io = io
        self._move = move
        self._name = name
        # What was written already, by its old path: snapshots share manifests, and manifests delete files.
        self._manifests: dict[str, ManifestFile] = {}
        self._deletes: dict[str, tuple[str, int]] = {}

    def rewrite(self, location: str) -> str:
        """Rewrite the table's files; returns where its metadata is now."""
        here = self._move.of(location)
        with self._io.new_input(here).open() as source:
            data = source.read()
        fields = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        metadata = TableMetadataUtil.parse_obj(fields)
        if metadata.format_version > 2:
            raise ConfigurationError(
                f"{self._name} has format version {metadata.format_version}, which cannot be written: drop the table "
                "where it came from, or go back there"
            )
        snapshots = {snapshot.snapshot_id: snapshot for snapshot in metadata.snapshots}
        for entry in fields.get("snapshots", ()):
            if "manifest-list" in entry:
                entry["manifest-list"] = self._rewrite_list(metadata, snapshots[entry["snapshot-id"]])
        moved = self._move_values(fields)
        # Older metadata files name paths of the old place: there is no way back to them.
        moved["metadata-log"] = []
        folder, _, name = here.rpartition("/")
        version = name.partition("-")[0]
        number = int(version) + 1 if version.isdigit() else 1
        made = f"{folder}/{number:05d}-{uuid4()}{_SUFFIX}"
        self._write(made, json.dumps(moved).encode())
        return made

    def _move_values(self, value: Any) -> Any:
        """Move every string of metadata that is a path of the old place, in whatever field."""
        if isinstance(value, dict):
            return {key: self._move_values(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._move_values(inner) for inner in value]
        return self._move.of(value) if isinstance(value, str) else value

    def _rewrite_list(self, metadata: TableMetadata, snapshot: Snapshot) -> str:
        manifests = [self._rewrite_manifest(metadata, manifest) for manifest in self._list_of(snapshot)]
        made = _beside(self._move.of(snapshot.manifest_list), f"snap-{snapshot.snapshot_id}-0-{uuid4()}.avro")
        with write_manifest_list(
            format_version=metadata.format_version,
            output_file=self._io.new_output(made),
            snapshot_id=snapshot.snapshot_id,
            parent_snapshot_id=snapshot.parent_snapshot_id,
            sequence_number=snapshot.sequence_number,
            avro_compression=avro_codec(metadata),
        ) as writer:
            writer.add_manifests(manifests)
        return made

    def _list_of(self, snapshot: Snapshot) -> list[ManifestFile]:
        there = snapshot.model_copy(update={"manifest_list": self._move.of(snapshot.manifest_list)})
        return there.manifests(self._io)

    def _rewrite_manifest(self, metadata: TableMetadata, old: ManifestFile) -> ManifestFile:
        known = self._manifests.get(old.manifest_path)
        if known is not None:
            return known
        path = old.manifest_path
        # A copy: pyiceberg remembers what it read from a manifest list.
        old = ManifestFile(*(old[position] for position in range(len(old))))
        old[0] = self._move.of(path)
        entries = old.fetch_manifest_entry(self._io, discard_deleted=False)
        spec = metadata.specs()[old.partition_spec_id]
        output = self._io.new_output(_beside(self._move.of(path), f"{uuid4()}-m0.avro"))
        writer = self._writer(metadata, old, spec, output)
        with writer:
            for entry in entries:
                if entry.status != ManifestEntryStatus.DELETED or entry.data_file.content == DataFileContent.DATA:
                    self._rewrite_file(entry.data_file)
                writer.add_entry(entry)
        made = writer.to_manifest_file()
        # What the list says of a manifest stays as it was, but for where it lies and how long it is.
        old[0], old[1] = made.manifest_path, made.manifest_length
        self._manifests[path] = old
        return old

    def _writer(self, metadata: TableMetadata, old: ManifestFile, spec: Any, output: Any) -> Any:
        kind: type[ManifestWriterV1 | PlainManifestWriter | DeleteManifestWriter] = PlainManifestWriter
        if metadata.format_version == 1:
            kind = ManifestWriterV1
        elif old.content == ManifestContent.DELETES:
            kind = DeleteManifestWriter
        schema = spec_schema(metadata, spec, self._io, [old])
        return kind(spec, schema, output, old.added_snapshot_id or 0, avro_codec(metadata))

    def _rewrite_file(self, file: DataFile) -> None:
        """Move a data file's path; a position-delete file is rewritten, since paths stand in it."""
        if file.content != DataFileContent.POSITION_DELETES:
            file[_PATH] = self._move.of(file.file_path)
            return
        known = self._deletes.get(file.file_path)
        if known is None:
            if file.file_format != FileFormat.PARQUET:
                raise ConfigurationError(f"{self._name}: {file.file_path} cannot be written: it is not Parquet")
            known = self._deletes[file.file_path] = self._rewrite_deletes(self._move.of(file.file_path))
        file[_PATH], file[_SIZE] = known
        for bounds in (_LOWER, _UPPER):
            held = cast(dict[int, bytes] | None, file[bounds])
            if held and PATH_ID in held:
                # A bound that was cut short may end within the part that changes: without it readers open the file.
                moved = self._move.of(held[PATH_ID].decode(errors="surrogateescape"))
                file[bounds] = {**held, PATH_ID: moved.encode(errors="surrogateescape")}

    def _rewrite_deletes(self, here: str) -> tuple[str, int]:
        with self._io.new_input(here).open() as source:
            rows = pq.read_table(source)
        index = rows.schema.get_field_index("file_path")
        paths = rows.column(index).combine_chunks()
        if pa.types.is_dictionary(paths.type):
            paths = paths.dictionary_decode()
        moved = pa.array([self._move.of(path) for path in paths.to_pylist()], pa.string())
        field = rows.schema.field(index).with_type(pa.string())
        rows = rows.set_column(index, field, moved)
        # Iceberg wants them sorted by path, then position.
        rows = rows.take(pc.sort_indices(rows, sort_keys=[("file_path", "ascending"), ("pos", "ascending")]))
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, rows.schema, compression="zstd", store_schema=False) as writer:
            writer.write_table(rows)
        made = _beside(here, f"deletes-{uuid4()}.parquet")
        data = sink.getvalue()
        self._write(made, data)
        return made, data.size

    def _write(self, location: str, data: Any) -> None:
        with self._io.new_output(location).create() as stream:
            stream.write(data)


def _beside(path: str, name: str) -> str:
    return f"{path.rpartition('/')[0]}/{name}"


__all__ = ["Move", "adopt"]
