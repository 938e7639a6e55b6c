"""Column statistics of a data file, from its Parquet footer: sizes, counts, bounds.

Owns: what a manifest says of a file's columns, and that no value can make it fail (R17): a bound that cannot be told
is left out, and readers open the file instead of skipping it. Does not own the file (``parquet``).

Bounds never lie. An upper bound that is cut is raised to the next text or the next bytes; where there is none, there
is no bound. A row group without bounds, for values that are too long for a footer, takes its column's away: those of
the other row groups would not cover it.

Source: Iceberg table spec, "Manifests: Data File Fields" and "Appendix D: Single-value serialization".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import pyarrow.parquet as pq
from pyiceberg.conversions import to_bytes
from pyiceberg.io.pyarrow import (
    ID2ParquetPathVisitor,
    MetricModeTypes,
    StatisticsCollector,
    compute_statistics_plan,
)
from pyiceberg.schema import Schema, pre_order_visit
from pyiceberg.types import BinaryType, DecimalType, DoubleType, FloatType, StringType
from pyiceberg.utils.decimal import unscaled_to_decimal

_LAST_CODE_POINT: Final = 0x10FFFF
#: Code points that are no characters: UTF-8 has no bytes for them.
_SURROGATES: Final = range(0xD800, 0xE000)
_LAST_BYTE: Final = 0xFF
_WITH_BOUNDS: Final = (MetricModeTypes.TRUNCATE, MetricModeTypes.FULL)


class ColumnMetrics:
    """What is kept of each column of one schema, under one set of properties.

    Args:
        schema: of the files.
        properties: which metrics are kept; legal ones (``tableoptions.FileOptions.metrics``).

    Attributes:
        paths: the leaf columns in the file's order, as Parquet names them.
    """

    def __init__(self, schema: Schema, properties: dict[str, str]) -> None:
        # By position, not by name: names with dots can be equal to the paths of nested columns.
        leaves = pre_order_visit(schema, ID2ParquetPathVisitor())
        plan = compute_statistics_plan(schema, properties)
        self.paths = [leaf.parquet_path for leaf in leaves]
        self._columns = [plan[leaf.field_id] for leaf in leaves]

    def of(self, footer: pq.FileMetaData) -> dict[str, Any]:
        """Say what a manifest is to say of a file.

        Args:
            footer: of a file with this schema.

        Returns:
            Keyword arguments of pyiceberg's ``DataFile``.
        """
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        made: dict[str, Any] = {
            "record_count": footer.num_rows,
            "column_sizes": {},
            "value_counts": {},
            "null_value_counts": {},
            "nan_value_counts": {},
            "lower_bounds": {},
            "upper_bounds": {},
            "split_offsets": sorted(_offset_of(group.column(0)) for group in groups if group.num_columns),
        }
        for position, column in enumerate(self._columns):
            self._add(made, column, [group.column(position) for group in groups])
        return made

    def _add(self, made: dict[str, Any], column: StatisticsCollector, chunks: Sequence[Any]) -> None:
        number = column.field_id
        made["column_sizes"][number] = sum(chunk.total_compressed_size for chunk in chunks)
        if column.mode.type is MetricModeTypes.NONE:
            return
        made["value_counts"][number] = sum(chunk.num_values for chunk in chunks)
        statistics = [chunk.statistics for chunk in chunks if chunk.is_stats_set]
        if len(statistics) < len(chunks) or not all(found.has_null_count for found in statistics):
            return
        made["null_value_counts"][number] = sum(found.null_count for found in statistics)
        if column.mode.type in _WITH_BOUNDS:
            for name, bound in zip(("lower_bounds", "upper_bounds"), _bounds_of(column, chunks), strict=True):
                if bound is not None:
                    made[name][number] = bound


def _offset_of(chunk: Any) -> int:
    """Where a column chunk begins."""
    data: int = chunk.data_page_offset
    return min(data, chunk.dictionary_page_offset) if chunk.has_dictionary_page else data


def _bounds_of(column: StatisticsCollector, chunks: Sequence[Any]) -> tuple[bytes | None, bytes | None]:
    """Return a column's bounds as manifests have them; None for one that cannot be told."""
    kind, length = column.iceberg_type, column.mode.length
    try:
        pairs = []
        for chunk in chunks:
            found = chunk.statistics
            if found.has_min_max:
                pairs.append(_pair(kind, found))
            elif found.null_count < chunk.num_values and not isinstance(kind, FloatType | DoubleType):
                # Values too long for a footer. Floats that are all NaN have no bounds, and need none.
                return None, None
        if not pairs:
            return None, None
        lower, upper = min(low for low, _ in pairs), max(high for _, high in pairs)
        if isinstance(kind, StringType | BinaryType):
            lower, upper = lower[:length], upper_bound(upper, length)
        return to_bytes(kind, lower), None if upper is None else to_bytes(kind, upper)
    except Exception:
        # Whatever it is: rows are committed without bounds rather than not at all (R17).
        return None, None


def _pair(kind: Any, found: Any) -> tuple[Any, Any]:
    if isinstance(kind, DecimalType) and found.physical_type != "FIXED_LEN_BYTE_ARRAY":
        return unscaled_to_decimal(found.min_raw, kind.scale), unscaled_to_decimal(found.max_raw, kind.scale)
    return found.min, found.max


def upper_bound(value: Any, length: int | None) -> Any:
    """Cut a text or bytes so that what is left is not below any value that the whole was not below.

    Args:
        value: str or bytes.
        length: most characters or bytes; None for all.

    Returns:
        The bound; None where there is none of that length.
    """
    if length is None or len(value) <= length:
        return value
    if isinstance(value, bytes):
        kept = value[:length].rstrip(bytes([_LAST_BYTE]))
        return kept[:-1] + bytes([kept[-1] + 1]) if kept else None
    text = value[:length].rstrip(chr(_LAST_CODE_POINT))
    if not text:
        return None
    following = ord(text[-1]) + 1
    return text[:-1] + chr(_SURROGATES.stop if following in _SURROGATES else following)


__all__ = ["ColumnMetrics", "upper_bound"]
