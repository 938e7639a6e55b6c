"""Table properties that a client may set with CreateTable.

Owns: which properties are reserved, and which values Iceberg libraries would fail on later. A bad value
that is only met when a file is written would stop rows that were acknowledged long before (R17).

Source: Iceberg table configuration, https://iceberg.apache.org/docs/latest/configuration/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from arka.errors import InvalidRequest
from arka.records import MERGE

#: A primary-key table with this property set to ``null`` takes streams that lack nullable columns.
PARTIAL: Final = "arka.partial"
PARTIAL_NULL: Final = "null"
#: How rows are deleted: by files of positions, the one form that every Iceberg reader knows.
DELETE_MODE: Final = "arka.delete-mode"
#: Properties of primary-key tables alone.
KEYED_ONLY: Final = frozenset({PARTIAL, MERGE, DELETE_MODE})

_COUNT: Final = re.compile(r"[1-9][0-9]{0,17}\Z")
_FLAG: Final = re.compile(r"(?:true|false)\Z", re.IGNORECASE)
_METRICS: Final = re.compile(r"(?:none|counts|full|truncate\([1-9][0-9]{0,8}\))\Z", re.IGNORECASE)

_A_COUNT: Final = (_COUNT, "a whole number from 1")
_A_FLAG: Final = (_FLAG, "true or false")
_METRICS_MODE: Final = (_METRICS, "none, counts, truncate(N) or full")

#: What a value must look like, where a wrong one would be noticed too late.
_RULES: Final[dict[str, tuple[re.Pattern[str], str]]] = {
    PARTIAL: (re.compile(r"null\Z"), "null"),
    MERGE: (re.compile(r"(?:last|first)\Z"), "last or first"),
    DELETE_MODE: (re.compile(r"position\Z"), "position"),
    "format-version": (re.compile(r"2\Z"), "2"),
    "write.format.default": (re.compile(r"parquet\Z", re.IGNORECASE), "parquet"),
    "write.parquet.compression-codec": (
        re.compile(r"(?:zstd|gzip|snappy|lz4|brotli|uncompressed)\Z", re.IGNORECASE),
        "zstd, gzip, snappy, lz4, brotli or uncompressed",
    ),
    "write.parquet.compression-level": (
        re.compile(r"(?:[1-9]|1[0-9]|2[0-2])\Z"),
        "a whole number from 1 to 22",
    ),
    "write.avro.compression-codec": (re.compile(r"(?:gzip|zstd)\Z", re.IGNORECASE), "gzip or zstd"),
    "write.parquet.row-group-size-bytes": _A_COUNT,
    "write.parquet.row-group-limit": _A_COUNT,
    "write.parquet.page-size-bytes": _A_COUNT,
    "write.parquet.page-row-limit": _A_COUNT,
    "write.parquet.dict-size-bytes": _A_COUNT,
    "write.parquet.bloom-filter-max-bytes": _A_COUNT,
    "write.target-file-size-bytes": _A_COUNT,
    "write.summary.partition-limit": _A_COUNT,
    "write.metadata.previous-versions-max": _A_COUNT,
    "write.metadata.delete-after-commit.enabled": _A_FLAG,
    "write.object-storage.enabled": _A_FLAG,
    "write.object-storage.partitioned-paths": _A_FLAG,
    "commit.manifest.target-size-bytes": _A_COUNT,
    "commit.manifest.min-count-to-merge": _A_COUNT,
    "commit.manifest-merge.enabled": _A_FLAG,
    "history.expire.max-snapshot-age-ms": _A_COUNT,
    "history.expire.min-snapshots-to-keep": _A_COUNT,
    "write.metadata.metrics.default": _METRICS_MODE,
}
_METRICS_OF_COLUMN: Final = "write.metadata.metrics.column."

#: Properties that say where files go or which code handles them: the server's to decide.
_RESERVED: Final = (
    re.compile(r"arka\.", re.IGNORECASE),
    re.compile(r"write\.(?:data|metadata|folder-storage|object-storage)\.path\Z"),
    re.compile(r"write\.py-location-provider\.impl\Z|write\.location-provider\.impl\Z"),
    re.compile(r"py-io-impl\Z|io-impl\Z|py-catalog-impl\Z"),
    re.compile(r"commit\.retry\."),
    re.compile(r"schema\.name-mapping\.default\Z"),
)

#: Most bytes of all properties together: they are in each metadata file, which each commit writes.
_MAX_BYTES: Final = 64 * 1024


def check_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """Check the properties of a CreateTable request.

    Args:
        properties: names and values as the client gave them. Names that neither Arka nor an Iceberg
            library acts on pass as they are.

    Returns:
        A copy.

    Raises:
        InvalidRequest: naming the property, what was found and what is expected.
    """
    size = sum(len(key.encode()) + len(value.encode()) for key, value in properties.items())
    if size > _MAX_BYTES:
        raise InvalidRequest(f"properties: {size} bytes in all, at most {_MAX_BYTES} are legal")
    for key, value in properties.items():
        rule = _METRICS_MODE if key.startswith(_METRICS_OF_COLUMN) else _RULES.get(key)
        if rule is not None:
            pattern, expected = rule
            if not pattern.match(value):
                raise InvalidRequest(f"properties: {key!r} is {value!r}, expected {expected}")
        elif not key:
            raise InvalidRequest("properties: a property has no name")
        elif any(reserved.match(key) for reserved in _RESERVED):
            raise InvalidRequest(f"properties: {key!r} is the server's own and cannot be set; leave it out")
    return dict(properties)


__all__ = ["KEYED_ONLY", "PARTIAL", "PARTIAL_NULL", "check_properties"]
