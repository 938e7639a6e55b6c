"""Values that Arrow can hold and an Iceberg table's files, statistics or partitions cannot (R17).

Owns: the whole list of them, in ``Storable``. A write that passes has nothing left in its values that the
encoder or a commit could refuse after the ack.

| value | what would fail after the ack | where it is caught |
|---|---|---|
| null in a required field, at any depth | the Parquet writer refuses the file | ``_core.ipc``, ``convert`` |
| the same under a null parent | likewise, though nobody sees it | ``convert`` puts a value there |
| null in a key column | no row can be found again | key columns are required |
| null map key or entry | Arrow refuses to build the array | ``_core.ipc`` |
| date, timestamp outside years 1 to 9999 | statistics, partition paths: calendars | here |
| what ``truncate[W]`` takes below its type's least value | the partition value overflows | here |
| time of day outside [0, 24 h) | no Iceberg time | ``validate(full=True)`` |
| decimal with more digits than its precision | statistics refuse it | ``validate(full=True)`` |
| bytes that are not UTF-8 in a string | statistics cannot be written | ``validate(full=True)`` |
| offsets that fall or leave the data | reading the array | ``validate(full=True)`` |
| null counts that deny the bitmap | rows appear or vanish | ``_core.ipc`` |
| empty struct, two fields of one name, no Iceberg type | catalog, Parquet writer | CreateTable |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from arka._core.transforms import Transform, parse_transform
from arka.flight.convert import invalid_batch, map_as_list
from arka.flight.layout import Range
from arka.records import FIELD_ID_KEY, TableInfo

_DAY_US: Final = 86_400_000_000
#: 0001-01-01 and 9999-12-31 in days since 1970-01-01: what calendars of SQL and of Python can say.
_FIRST_DAY: Final = -719_162
_LAST_DAY: Final = 2_932_896
_DAYS: Final = (_FIRST_DAY, _LAST_DAY)
_MICROS: Final = (_FIRST_DAY * _DAY_US, (_LAST_DAY + 1) * _DAY_US - 1)


class Storable:
    """What the values of one kind of frame must be like, beyond their types.

    Args:
        schema: the frame's; fields carry their ids.
        table: its partition fields name columns by their ids.

    Attributes:
        ranges: by path, the least and greatest value of a field, in its integer representation.
    """

    def __init__(self, schema: pa.Schema, table: TableInfo) -> None:
        self.ranges: dict[str, Range] = {}
        self._truncations: list[tuple[int, Transform]] = []
        #: whether a batch must go through ``check`` even if its integers are all within ``ranges``.
        self.always = False
        for field in schema:
            self._collect(field.name, field.type)
        self._collect_truncations(schema, table)

    def _collect(self, path: str, type_: pa.DataType) -> None:
        types = pa.types
        if types.is_date32(type_):
            self.ranges[path] = _DAYS
        elif types.is_timestamp(type_):
            self.ranges[path] = _MICROS
        elif types.is_struct(type_):
            for child in type_:
                self._collect(f"{path}.{child.name}", child.type)
        elif types.is_list(type_):
            self._collect(f"{path}.element", type_.value_type)
        elif types.is_map(type_):
            self._collect(f"{path}.key", type_.key_type)
            self._collect(f"{path}.value", type_.item_type)

    def _collect_truncations(self, schema: pa.Schema, table: TableInfo) -> None:
        ids = [(field.metadata or {}).get(FIELD_ID_KEY) for field in schema]
        for partition in table.partition:
            transform = parse_transform(partition.transform)
            source = str(partition.source_id).encode()
            if transform.name != "truncate" or transform.parameter is None or source not in ids:
                continue
            column = ids.index(source)
            field = schema.field(column)
            self._truncations.append((column, transform))
            if pa.types.is_integer(field.type):
                # floor(v / W) * W must not fall below the type's least value.
                limit: int = 2 ** (field.type.bit_width - 1)
                least = -(limit // transform.parameter) * transform.parameter
                other = self.ranges.get(field.name, (-limit, 0))[0]
                self.ranges[field.name] = (max(least, other), limit - 1)
            elif pa.types.is_decimal(field.type):
                self.always = True

    def check(self, batch: pa.RecordBatch) -> None:
        """Check a batch's values, each one that can be seen.

        Args:
            batch: in ``schema``, valid in Arrow's sense.

        Raises:
            InvalidRequest: ``invalid_batch``, naming the field, the value and what is legal.
        """
        for column, transform in self._truncations:
            try:
                transform.check_values(batch.column(column))
            except ValueError as error:
                raise invalid_batch(batch.schema.field(column).name, str(error)) from error
        for field, array in zip(batch.schema, batch.columns, strict=True):
            for path, leaf in visible_leaves(array, field.name):
                if path in self.ranges and not pa.types.is_integer(leaf.type):
                    self._check_leaf(path, leaf)

    def _check_leaf(self, path: str, leaf: pa.Array) -> None:
        least, greatest = self.ranges[path]
        whole = leaf.view(pa.int32() if leaf.type.bit_width == 32 else pa.int64())
        found = pc.min_max(whole)
        for bound in (found["min"].as_py(), found["max"].as_py()):
            if bound is None or least <= bound <= greatest:
                continue
            unit = "days" if pa.types.is_date32(leaf.type) else "microseconds"
            raise invalid_batch(path, f"holds {bound} {unit} since 1970, expected a time from 0001-01-01 to 9999-12-31")


def visible_leaves(array: pa.Array, path: str) -> Iterator[tuple[str, pa.Array]]:
    """Yield the leaves of an array with their paths: values that a null parent hides are nulls or gone."""
    types = pa.types
    if types.is_struct(array.type):
        for field, child in zip(array.type, array.flatten(), strict=True):
            yield from visible_leaves(child, f"{path}.{field.name}")
    elif types.is_map(array.type):
        entries = map_as_list(array).flatten()
        yield from visible_leaves(entries.field(0), f"{path}.key")
        yield from visible_leaves(entries.field(1), f"{path}.value")
    elif types.is_list(array.type):
        yield from visible_leaves(array.flatten(), f"{path}.element")
    else:
        yield path, array


__all__ = ["Storable", "visible_leaves"]
