"""What a table's properties say about its files and snapshots, with a safe fallback for each (R17, R32).

Owns: the one place where a property's text becomes a value that a writer acts on. Does not own which properties a
client may set (``arka.flight.properties``) nor what is written (``parquet``, ``manifests``, ``producer``).

Properties belong to the catalog: others may set anything. Rows were acknowledged before a value was looked at, so a
value that cannot be used never stops them: the default is used instead, and ``notes`` says so.

Source: Iceberg table configuration, https://iceberg.apache.org/docs/latest/configuration/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyiceberg.table import TableProperties

from arka.iceberg.locations import REDIRECTING

#: Codecs of Parquet files that every reader of ``tests/readers.py`` has: by Iceberg's name, pyarrow's.
_CODECS: Final = {
    "zstd": "zstd",
    "gzip": "gzip",
    "snappy": "snappy",
    "lz4": "lz4",
    "lz4_raw": "lz4",
    "brotli": "brotli",
    "uncompressed": "none",
    "none": "none",
}
#: The levels that each codec takes; the others take none.
_LEVELS: Final = {"zstd": range(1, 23), "gzip": range(1, 10), "brotli": range(12)}
#: Codecs of manifests that every reader has, by Iceberg's name and pyiceberg's: DuckDB and Sail do not read zstd.
_AVRO_CODECS: Final = {"gzip": "gzip", "deflate": "gzip", "uncompressed": "null", "null": "null", "none": "null"}

#: Rows of a row group; pyiceberg's default.
_ROW_GROUP_ROWS: Final = 1_048_576
#: What counts may be: below, files become absurdly large or slow to write; above, the encoder's numbers end.
_ROW_GROUP_RANGE: Final = range(1_024, 2**24 + 1)
_PAGE_BYTES_RANGE: Final = range(4_096, 2**26 + 1)
_PAGE_ROWS_RANGE: Final = range(128, 2**24 + 1)
_DICTIONARY_RANGE: Final = range(1_024, 2**26 + 1)

_NUMBER: Final = re.compile(r"[0-9]{1,18}\Z")
_METRICS: Final = re.compile(r"\s*(?:none|counts|full|truncate\([1-9][0-9]{0,8}\))\s*\Z", re.IGNORECASE | re.ASCII)
_METRICS_PREFIX: Final = f"{TableProperties.METRICS_MODE_COLUMN_CONF_PREFIX}."


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How a table's Parquet files are written.

    Attributes:
        parquet: keyword arguments of pyarrow's ``ParquetWriter``.
        row_group_rows: most rows of a row group.
        metrics: properties that say which statistics are kept, all of them legal.
        notes: for each property that could not be used, which, and what is used instead.
    """

    parquet: Mapping[str, Any]
    row_group_rows: int
    metrics: dict[str, str]
    notes: tuple[str, ...]


#: What a file is written with when a table's own options fail.
SAFE_PARQUET: Final[Mapping[str, Any]] = {"compression": "zstd", "compression_level": None}


def file_options(properties: Mapping[str, str]) -> FileOptions:
    """Read what a table's properties say about its Parquet files. Never raises for a value."""
    reader = _Reader(properties)
    codec = reader.choice(TableProperties.PARQUET_COMPRESSION, _CODECS, "zstd")
    parquet: dict[str, Any] = {"compression": codec, "compression_level": reader.level(codec)}
    for name, argument, legal in (
        (TableProperties.PARQUET_PAGE_SIZE_BYTES, "data_page_size", _PAGE_BYTES_RANGE),
        (TableProperties.PARQUET_DICT_SIZE_BYTES, "dictionary_pagesize_limit", _DICTIONARY_RANGE),
        (TableProperties.PARQUET_PAGE_ROW_LIMIT, "max_rows_per_page", _PAGE_ROWS_RANGE),
    ):
        value = reader.count(name, legal)
        if value is not None:
            parquet[argument] = value
    rows = reader.count(TableProperties.PARQUET_ROW_GROUP_LIMIT, _ROW_GROUP_RANGE) or _ROW_GROUP_ROWS
    metrics = reader.metrics()
    # Those that commits read, so that a file's notes name them too.
    reader.choice(TableProperties.WRITE_AVRO_COMPRESSION, _AVRO_CODECS, "gzip")
    reader.count(TableProperties.MIN_SNAPSHOTS_TO_KEEP, range(1, 10**18))
    reader.locations()
    return FileOptions(parquet, rows, metrics, tuple(reader.notes))


def avro_codec_name(properties: Mapping[str, str]) -> str:
    """Return the codec of a table's manifests and manifest lists, as pyiceberg spells it. Never raises for a value."""
    return _Reader(properties).choice(TableProperties.WRITE_AVRO_COMPRESSION, _AVRO_CODECS, "gzip")


def min_snapshots(properties: Mapping[str, str]) -> int:
    """Return how many snapshots a table wants to keep at least. Never raises for a value."""
    return _Reader(properties).count(TableProperties.MIN_SNAPSHOTS_TO_KEEP, range(1, 10**18)) or 1


def expires_files(properties: Mapping[str, str]) -> bool:
    """Say whether snapshots of a table may expire and its files be deleted: not with ``gc.enabled=false`` (R29)."""
    return properties.get("gc.enabled", "true").strip().lower() != "false"


def max_snapshot_age_ms(properties: Mapping[str, str]) -> int:
    """Return how long a snapshot is kept that no branch or tag reaches, in milliseconds. Never raises for a value."""
    found = stated_snapshot_age_ms(properties)
    return TableProperties.MAX_SNAPSHOT_AGE_MS_DEFAULT if found is None else found


def stated_snapshot_age_ms(properties: Mapping[str, str]) -> int | None:
    """Return how long a table's owner wants snapshots kept, in milliseconds; None for no word. Never raises."""
    return _Reader(properties).count(TableProperties.MAX_SNAPSHOT_AGE_MS, range(10**18))


class _Reader:
    """Reads properties and writes down which could not be used."""

    def __init__(self, properties: Mapping[str, str]) -> None:
        self._properties = properties
        self.notes: list[str] = []

    def choice(self, name: str, known: Mapping[str, str], default: str) -> str:
        text = self._properties.get(name)
        if not text:
            return default
        found = known.get(text.strip().lower())
        if found is None:
            self._note(name, text, default)
        return found or default

    def level(self, codec: str) -> int | None:
        name = TableProperties.PARQUET_COMPRESSION_LEVEL
        text = self._properties.get(name)
        legal = _LEVELS.get(codec)
        if not text or legal is None:
            # Of a codec without levels it says nothing.
            return None
        level = int(text) if _NUMBER.match(text) else -1
        if level not in legal:
            self._note(name, text, f"the level that {codec} has by default")
            return None
        return level

    def count(self, name: str, legal: range) -> int | None:
        """Read a number; one that is out of range becomes the nearest legal one, anything else None."""
        text = self._properties.get(name)
        if not text:
            return None
        if not _NUMBER.match(text.strip()):
            self._note(name, text, "the default")
            return None
        value = int(text)
        nearest = min(max(value, legal.start), legal.stop - 1)
        if nearest != value:
            self._note(name, text, str(nearest))
        return nearest

    def metrics(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, text in self._properties.items():
            if name == TableProperties.DEFAULT_WRITE_METRICS_MODE or name.startswith(_METRICS_PREFIX):
                if _METRICS.match(text):
                    found[name] = text
                else:
                    self._note(name, text, "the default")
        return found

    def locations(self) -> None:
        """Write down what would put files elsewhere: they lie below the table's location (R30)."""
        for name, text in self._properties.items():
            if REDIRECTING.match(name) and text.strip().lower() not in ("", "false"):
                self._note(name, text, "the table's location")

    def _note(self, name: str, found: str, used: str) -> None:
        self.notes.append(f"table property {name} is {found!r}, which Arka cannot use: {used} is used instead")


__all__ = [
    "SAFE_PARQUET",
    "FileOptions",
    "avro_codec_name",
    "file_options",
    "min_snapshots",
]
