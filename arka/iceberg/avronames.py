"""Names in the Avro files that Arka writes: letters, digits and underscores of ASCII alone.

Owns: how a partition field's name becomes an Avro name. Does not own what a manifest holds (``manifests``).

pyiceberg leaves every Unicode letter and digit as it is, and readers whose Avro library keeps to the specification
refuse the file. The original name stands beside the Avro name, as Iceberg's libraries write it; readers find fields by
their ids.

Source: Avro specification, "Names"; Iceberg table spec, "Avro" (appendix A): ``iceberg-field-name``.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from pyiceberg.avro.codecs import AVRO_CODEC_KEY, CODEC_MAPPING_ICEBERG_TO_AVRO
from pyiceberg.avro.file import (
    _SCHEMA_KEY,
    MAGIC,
    META_SCHEMA,
    AvroFileHeader,
    AvroOutputFile,
)
from pyiceberg.avro.resolver import construct_writer
from pyiceberg.manifest import DEFAULT_READ_VERSION, ManifestEntry, ManifestWriterV2
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema, visit
from pyiceberg.types import NestedField, StructType
from pyiceberg.utils.schema_conversion import ConvertSchemaToAvro

#: A name that every Avro library takes.
_PLAIN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_LEGAL: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
_ORIGINAL: Final = "iceberg-field-name"


def avro_name(name: str) -> str:
    """Escape a name: a leading digit gets an underscore, any other character becomes ``_x`` and its code point.

    Returns:
        A name that matches ``[A-Za-z_][A-Za-z0-9_]*``. Two names may become the same one.
    """
    if _PLAIN.match(name):
        return name
    escaped = "".join(c if c in _LEGAL else f"_x{ord(c):X}" for c in name)
    return escaped if _PLAIN.match(escaped) else f"_{escaped}"


def has_plain_names(spec: PartitionSpec) -> bool:
    """Say whether every partition field's name is an Avro name as it is."""
    return all(_PLAIN.match(field.name) for field in spec.fields)


class _PlainNames(ConvertSchemaToAvro):
    """Converts a schema with Avro names of ASCII that differ within each record."""

    def field(self, field: NestedField, field_result: Any) -> Any:
        """Convert a field."""
        made: Any = super().field(field.model_copy(update={"name": "_"}), field_result)
        made["name"] = avro_name(field.name)
        if made["name"] != field.name:
            made[_ORIGINAL] = field.name
        return made

    def struct(self, struct: StructType, field_results: list[Any]) -> Any:
        """Convert a record; of two names that are escaped to the same one the later takes its field's id."""
        taken: set[str] = {field.name for field in struct.fields if _PLAIN.match(field.name)}
        for field, made in zip(struct.fields, field_results, strict=True):
            if _ORIGINAL not in made:
                continue
            name = made["name"]
            while name in taken:
                name = f"{name}_r{field.field_id}"
            taken.add(name)
            made["name"] = name
        return super().struct(struct, field_results)


class PlainAvroFile(AvroOutputFile[ManifestEntry]):
    """An Avro file whose header holds plain names."""

    def _write_header(self) -> None:
        codec = self.metadata[AVRO_CODEC_KEY]
        meta = {
            **self.metadata,
            _SCHEMA_KEY: json.dumps(avro_schema(self.file_schema, self.schema_name)),
            AVRO_CODEC_KEY: CODEC_MAPPING_ICEBERG_TO_AVRO.get(codec, codec),
        }
        construct_writer(META_SCHEMA).write(self.encoder, AvroFileHeader(MAGIC, meta, self.sync_bytes))


class PlainManifestWriter(ManifestWriterV2):
    """Writes a manifest of data files with plain names."""

    def new_writer(self) -> AvroOutputFile[ManifestEntry]:
        """Open the file."""
        return PlainAvroFile(
            output_file=self._output_file,
            file_schema=self._with_partition(self.version),
            record_schema=self._with_partition(DEFAULT_READ_VERSION),
            schema_name="manifest_entry",
            metadata=self._meta,
        )


def avro_schema(schema: Schema, name: str) -> Any:
    """Convert a schema to Avro with plain names.

    Args:
        schema: the Iceberg schema.
        name: of the outermost record.
    """
    return visit(schema, _PlainNames(name))


__all__ = ["PlainManifestWriter", "avro_name", "avro_schema", "has_plain_names"]
