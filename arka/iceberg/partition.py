"""Partition specs: from a client's request, to plain records, and to the folder of a data file.

Owns: which spec a table gets and how a partition is spelled in a path. Does not own the values
(``arka._core.transforms``).

Source: Iceberg table spec, "Partitioning".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from pyiceberg.partitioning import PARTITION_FIELD_ID_START, PartitionSpec
from pyiceberg.partitioning import PartitionField as IcebergPartitionField
from pyiceberg.schema import Schema
from pyiceberg.transforms import IdentityTransform, UnknownTransform, VoidTransform, parse_transform
from pyiceberg.typedef import Record

from arka._core import transforms
from arka.iceberg.schema import field_id
from arka.records import PartitionField, PartitionRequest, TableInfo
from arka.storage.ports import CatalogConflict

#: Most characters of one partition folder's name; file systems take 255 bytes, and the names are ASCII.
_FOLDER_CHARACTERS: Final = 200


def new_partition_spec(schema: Schema, requests: Sequence[PartitionRequest]) -> PartitionSpec:
    """Make the spec of a table that does not exist yet.

    Args:
        schema: of the same table; a source index counts its columns from 0.
        requests: fields in spec order, with canonical transform spellings. Their ids are advice: catalogs
            number partition fields from 1000 in spec order.

    Raises:
        CatalogConflict: naming the field whose source, transform or name cannot be.
    """
    columns = {column.name: column.field_id for column in schema.fields}
    fields: list[IcebergPartitionField] = []
    for position, request in enumerate(requests):
        if not 0 <= request.source_index < len(schema.fields):
            raise CatalogConflict(
                f"Partition field {request.name!r}: no column {request.source_index}, "
                f"the schema has {len(schema.fields)}"
            )
        source = schema.fields[request.source_index]
        try:
            transform = parse_transform(request.transform)
            known = str(transform) == request.transform and not isinstance(transform, UnknownTransform | VoidTransform)
            possible = known and transform.can_transform(source.field_type)
        except ValueError as error:
            raise CatalogConflict(f"Partition field {request.name!r}: {error}") from error
        if not possible:
            raise CatalogConflict(
                f"Partition field {request.name!r}: {request.transform} cannot be taken of column "
                f"{source.name!r} of type {source.field_type}"
            )
        same_name = columns.get(request.name)
        if same_name is not None and not (isinstance(transform, IdentityTransform) and same_name == source.field_id):
            raise CatalogConflict(f"Partition field {request.name!r} has the name of a column")
        for other in fields:
            if other.name == request.name:
                raise CatalogConflict(f"Two partition fields are named {request.name!r}")
            if other.source_id == source.field_id and other.transform == transform:
                raise CatalogConflict(f"Partition fields {other.name!r} and {request.name!r} are the same")
        fields.append(
            IcebergPartitionField(
                source_id=source.field_id,
                field_id=PARTITION_FIELD_ID_START + position,
                transform=transform,
                name=request.name,
            )
        )
    return PartitionSpec(*fields)


def partition_fields(spec: PartitionSpec) -> tuple[PartitionField, ...]:
    """Turn a spec into plain records."""
    return tuple(
        PartitionField(field.source_id, field.field_id, field.name, str(field.transform)) for field in spec.fields
    )


def partition_spec(fields: Iterable[PartitionField], spec_id: int) -> PartitionSpec:
    """Rebuild a spec from plain records."""
    return PartitionSpec(
        *(
            IcebergPartitionField(
                source_id=field.source_id,
                field_id=field.field_id,
                transform=parse_transform(field.transform),
                name=field.name,
            )
            for field in fields
        ),
        spec_id=spec_id,
    )


def split_fields(table: TableInfo) -> list[tuple[int, transforms.Transform]]:
    """Return column index and transform of each field of a table's spec.

    Raises:
        ValueError: a source is no top-level column, or a transform is not one of Iceberg's seven.
    """
    columns = {field_id(column): index for index, column in enumerate(table.schema)}
    missing = [field.name for field in table.partition if field.source_id not in columns]
    if missing:
        raise ValueError(f"partition fields without a top-level source column: {', '.join(missing)}")
    return [(columns[field.source_id], transforms.parse_transform(field.transform)) for field in table.partition]


class PartitionFolder:
    """A partition as pyiceberg's location providers take it: something with a path."""

    def __init__(self, spec: PartitionSpec, schema: Schema, values: tuple[object, ...]) -> None:
        self._spec = spec
        self._schema = schema
        self._values = values

    def to_path(self) -> str:
        """Spell the partition as ``name=value/name=value``, percent-encoded."""
        path = self._spec.partition_to_path(Record(*self._values), self._schema)
        return "/".join(_short(part) for part in path.split("/"))


def _short(part: str) -> str:
    """Keep a folder's name below what file systems take; readers take values from manifests, not from paths."""
    if len(part) <= _FOLDER_CHARACTERS:
        return part
    digest = hashlib.sha256(part.encode()).hexdigest()[:32]
    return f"{part[: _FOLDER_CHARACTERS - len(digest) - 1]}-{digest}"


__all__ = ["PartitionFolder", "new_partition_spec", "partition_fields", "partition_spec", "split_fields"]
