"""The schema under which manifests of a partition spec are written (R17, R27).

Owns: where the types of a spec's source columns come from. Does not own what a manifest holds (``manifests``).

A spec outlives its source columns: others may remove a field from the default spec and then drop the column. Files of
the old spec stay, and their partition values have a type still. It follows from the source column as the newest schema
has it that knows the column.

Source: Iceberg table spec, "Partition Evolution" and "Schema Evolution".
"""

from __future__ import annotations

from collections.abc import Iterable

from pyiceberg.avro.file import AvroFile
from pyiceberg.io import FileIO
from pyiceberg.manifest import DEFAULT_READ_VERSION, MANIFEST_ENTRY_SCHEMAS, ManifestEntry, ManifestFile
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.types import NestedField


class UnknownSourceColumn(ValueError):
    """No schema knows the source column of a partition field, so that nobody can say the type of its values."""


def spec_schema(
    metadata: TableMetadata, spec: PartitionSpec, io: FileIO | None = None, manifests: Iterable[ManifestFile] = ()
) -> Schema:
    """Return a schema that has all source columns of a spec.

    Args:
        metadata: of the table.
        spec: one of its specs.
        io: the warehouse; needed with ``manifests``.
        manifests: manifests of the spec. Each has in its header the schema under which it was written; they are read
            only where the metadata knows a column no more, since others removed old schemas.

    Returns:
        The current schema where it has them all, else the newest that has; else the current one and, behind its
        columns, the missing ones under names of their own.

    Raises:
        UnknownSourceColumn: no schema has one of them.
        OSError: the warehouse refused.
    """
    current = metadata.schema()
    sources = {field.source_id for field in spec.fields}
    if _has(current, sources):
        return current
    older = sorted(metadata.schemas, key=lambda schema: schema.schema_id, reverse=True)
    for schema in older:
        if _has(schema, sources):
            return schema
    found: dict[int, NestedField] = {}
    for schema in older:
        _take(schema, sources, found)
    if io is not None and not sources <= found.keys():
        for manifest in manifests:
            written = _schema_of(manifest, io)
            if written is not None:
                _take(written, sources, found)
            if sources <= found.keys():
                break
    missing = sorted(sources - found.keys())
    if missing:
        raise UnknownSourceColumn(
            f"no schema of table {metadata.table_uuid} has column {missing[0]}, by which files of partition spec "
            f"{spec.spec_id} are partitioned"
        )
    there = _ids(current)
    # A dropped column's name may be another column's today.
    lost = [
        field.model_copy(update={"name": f"dropped_{number}", "required": False})
        for number, field in sorted(found.items())
        if number not in there
    ]
    return Schema(*current.fields, *lost, schema_id=current.schema_id)


def _ids(schema: Schema) -> frozenset[int]:
    return frozenset(schema.field_ids)


def _has(schema: Schema, sources: set[int]) -> bool:
    return sources <= _ids(schema)


def _take(schema: Schema, sources: set[int], found: dict[int, NestedField]) -> None:
    """Add the columns that are not found yet."""
    for number in (sources & _ids(schema)) - found.keys():
        found[number] = schema.find_field(number)


def _schema_of(manifest: ManifestFile, io: FileIO) -> Schema | None:
    """The schema in a manifest's header; None if there is none that can be read."""
    with AvroFile[ManifestEntry](
        io.new_input(manifest.manifest_path), MANIFEST_ENTRY_SCHEMAS[DEFAULT_READ_VERSION]
    ) as reader:
        text = reader.header.meta.get("schema")
    try:
        return None if text is None else Schema.model_validate_json(text)
    except ValueError:
        return None


__all__ = ["UnknownSourceColumn", "spec_schema"]
