"""Table properties: Arka's own names, and what a client may set.

Owns: every ``arka.*`` name in table properties and snapshot summaries, the list of properties that CreateTable takes
(R30), and what a legal value looks like. Does not own the marks' meaning (``arka.iceberg.marks``) nor when a property
takes effect.

A bad value that is only noticed when a file is written would stop rows that were acknowledged long before (R17), so
values are checked here. A name that is not listed is refused: some properties choose where files go, with which
credentials, or which code handles them, and each library has more of them than anyone can list.

Source: Iceberg table configuration, https://iceberg.apache.org/docs/latest/configuration/
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple
from uuid import UUID

from arka.errors import quote

#: Whether a table is append_only or primary_key; set by the server.
TABLE_TYPE: Final = "arka.table-type"
#: The columns of a primary key, a JSON list; set by the server.
PRIMARY_KEY: Final = "arka.primary-key"
#: The one log whose node writes to a primary-key table (R26); set by the server, changed by an operator.
OWNER: Final = "arka.owner"
#: ``1``: properties that older releases wrote for their own needs are gone from the table (R30).
CLEANED: Final = "arka.cleaned"
CLEANED_VALUE: Final = "1"
#: Which upsert of a key stands: the last, or the first.
MERGE: Final = "arka.merge"
MERGE_FIRST: Final = "first"
#: A primary-key table with this property set to ``null`` takes streams that lack nullable columns.
PARTIAL: Final = "arka.partial"
PARTIAL_NULL: Final = "null"
#: How rows are deleted: by files of positions, the one form that every Iceberg reader knows.
DELETE_MODE: Final = "arka.delete-mode"

#: Properties of primary-key tables alone.
KEYED_ONLY: Final = frozenset({PARTIAL, MERGE, DELETE_MODE})

#: Entries of a snapshot's summary: the log, the first and last LSN of the table's writes in the snapshot, the commit.
SUMMARY_LOG: Final = "arka.log"
SUMMARY_FIRST_LSN: Final = "arka.lsn-first"
SUMMARY_LAST_LSN: Final = "arka.lsn-last"
SUMMARY_COMMIT_ID: Final = "arka.commit-id"

#: What older releases wrote into each table for their own needs. It is removed once, and only at exactly this value.
FORMER_DEFAULTS: Final[Mapping[str, str]] = {
    "commit.retry.num-retries": "0",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}

#: A UUID in lower-case hex, as a regular expression.
UUID_FORM: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
#: The properties of a log's mark (R15).
MARK: Final = re.compile(rf"arka\.({UUID_FORM})\.(committed-lsn|epoch|token)\Z")

#: Most bytes of all properties together: they are in each metadata file, which each commit writes.
MAX_BYTES: Final = 64 * 1024


class Rule(NamedTuple):
    """What a value must look like.

    Attributes:
        pattern: of the whole value.
        expected: the same for people.
    """

    pattern: re.Pattern[str]
    expected: str


# With ASCII beside IGNORECASE: a long s is an s to the latter alone, and no other reader of the value takes it for one.
_COUNT: Final = Rule(re.compile(r"[1-9][0-9]{0,17}\Z"), "a whole number from 1")
_COUNT_OR_NONE: Final = Rule(re.compile(r"(?:0|[1-9][0-9]{0,8})\Z"), "a whole number from 0")
_FLAG: Final = Rule(re.compile(r"(?:true|false)\Z", re.IGNORECASE | re.ASCII), "true or false")
_SHARE: Final = Rule(re.compile(r"0?\.[0-9]{0,15}[1-9]\Z"), "a number between 0 and 1, such as 0.01")
_METRICS_MODE: Final = Rule(
    re.compile(r"(?:none|counts|full|truncate\([1-9][0-9]{0,8}\))\Z", re.IGNORECASE | re.ASCII),
    "none, counts, truncate(N) or full",
)
#: A property that nobody writes may hold any text.
_TEXT: Final = Rule(re.compile(r"(?s:.*)\Z"), "text")

#: The ``arka.*`` properties that clients set.
OWN_RULES: Final[dict[str, Rule]] = {
    PARTIAL: Rule(re.compile(rf"{PARTIAL_NULL}\Z"), PARTIAL_NULL),
    MERGE: Rule(re.compile(rf"(?:last|{MERGE_FIRST})\Z"), "last or first"),
    DELETE_MODE: Rule(re.compile(r"position\Z"), "position"),
}

_EXACT: Final[dict[str, Rule]] = {
    # Taken for what it says and not written: the format is the server's choice.
    "format-version": Rule(re.compile(r"2\Z"), "2"),
    "comment": _TEXT,
    "write.target-file-size-bytes": _COUNT,
    "write.parquet.compression-codec": Rule(
        re.compile(r"(?:zstd|gzip|snappy|lz4|brotli|uncompressed)\Z", re.IGNORECASE | re.ASCII),
        "zstd, gzip, snappy, lz4, brotli or uncompressed",
    ),
    "write.parquet.compression-level": Rule(re.compile(r"(?:[1-9]|1[0-9]|2[0-2])\Z"), "a whole number from 1 to 22"),
    "write.parquet.row-group-size-bytes": _COUNT,
    "write.parquet.row-group-limit": _COUNT,
    "write.parquet.row-group-check-min-record-count": _COUNT,
    "write.parquet.row-group-check-max-record-count": _COUNT,
    "write.parquet.page-size-bytes": _COUNT,
    "write.parquet.page-row-limit": _COUNT,
    "write.parquet.page-version": Rule(re.compile(r"v[12]\Z", re.IGNORECASE | re.ASCII), "v1 or v2"),
    "write.parquet.dict-size-bytes": _COUNT,
    "write.parquet.bloom-filter-max-bytes": _COUNT,
    "write.metadata.metrics.default": _METRICS_MODE,
    "write.metadata.metrics.max-inferred-column-defaults": _COUNT,
    "history.expire.max-snapshot-age-ms": _COUNT,
    "history.expire.min-snapshots-to-keep": _COUNT,
    "history.expire.max-ref-age-ms": _COUNT,
    "commit.manifest.target-size-bytes": _COUNT,
    "commit.manifest.min-count-to-merge": _COUNT,
    "commit.manifest-merge.enabled": _FLAG,
    "commit.retry.num-retries": _COUNT_OR_NONE,
    "commit.retry.min-wait-ms": _COUNT_OR_NONE,
    "commit.retry.max-wait-ms": _COUNT_OR_NONE,
    "commit.retry.total-timeout-ms": _COUNT_OR_NONE,
}
#: Properties with a column's name, or a name of the client's own, behind the prefix.
_PREFIXES: Final[dict[str, Rule]] = {
    "write.metadata.metrics.column.": _METRICS_MODE,
    "write.parquet.bloom-filter-enabled.column.": _FLAG,
    "write.parquet.bloom-filter-fpp.column.": _SHARE,
    "write.parquet.bloom-filter-ndv.column.": _COUNT,
    "write.parquet.stats-enabled.column.": _FLAG,
    "write.parquet.columns-dictionary-encoding-enabled.": _FLAG,
    "user.": _TEXT,
}
#: What a refusal of an unknown name offers.
ALLOWED: Final = (
    "write.parquet.*, write.metadata.metrics.*, write.target-file-size-bytes, history.expire.*, commit.manifest*, "
    f"commit.retry.*, comment, user.*, {', '.join(sorted(OWN_RULES))}"
)


def rule_of(name: str) -> Rule | None:
    """Return what a value of a property must look like; None for a name that a client may not set."""
    known = OWN_RULES.get(name) or _EXACT.get(name)
    if known is not None:
        return known
    return next(
        (rule for prefix, rule in _PREFIXES.items() if name.startswith(prefix) and len(name) > len(prefix)), None
    )


def problem_of(properties: Mapping[str, str], *, keyed: bool) -> str | None:
    """Say what is wrong with a table's ``arka.*`` properties, whoever set them; None if they can take effect.

    Args:
        properties: all of a table's properties; names that are not Arka's are not looked at.
        keyed: whether it is a primary-key table.
    """
    for name, rule in OWN_RULES.items():
        value = properties.get(name)
        if value is None:
            continue
        if not keyed:
            return f"property {quote(name)} is for primary_key tables only"
        if not rule.pattern.match(value):
            return f"property {quote(name)} is {quote(value)}, expected {rule.expected}"
    return None


def is_reserved(name: str) -> bool:
    """Say whether the server alone sets a property."""
    return MARK.match(name) is not None or name in (TABLE_TYPE, PRIMARY_KEY, CLEANED)


def cleaning(properties: Mapping[str, str]) -> tuple[str, ...] | None:
    """Choose the properties that a table's next commit removes (R30).

    Returns:
        Their names, possibly none, if the table is to be marked as cleaned with that commit. None: it is already, or
        it is not one that Arka made, and all of its properties are its owner's.
    """
    if properties.get(CLEANED) == CLEANED_VALUE or TABLE_TYPE not in properties:
        return None
    return tuple(name for name, value in FORMER_DEFAULTS.items() if properties.get(name) == value)


def committed_lsn_property(log_uuid: UUID) -> str:
    """Name the property that holds the last LSN of a log that the table holds."""
    return f"arka.{log_uuid}.committed-lsn"


def epoch_property(log_uuid: UUID) -> str:
    """Name the property that holds the epoch of the last commit of a log."""
    return f"arka.{log_uuid}.epoch"


def token_property(log_uuid: UUID) -> str:
    """Name the property that says which start of a log made its last commit, and what that commit set (R15)."""
    return f"arka.{log_uuid}.token"


__all__ = [
    "ALLOWED",
    "CLEANED",
    "CLEANED_VALUE",
    "DELETE_MODE",
    "FORMER_DEFAULTS",
    "KEYED_ONLY",
    "MARK",
    "MAX_BYTES",
    "MERGE",
    "MERGE_FIRST",
    "OWNER",
    "OWN_RULES",
    "PARTIAL",
    "PARTIAL_NULL",
    "PRIMARY_KEY",
    "SUMMARY_COMMIT_ID",
    "SUMMARY_FIRST_LSN",
    "SUMMARY_LAST_LSN",
    "SUMMARY_LOG",
    "TABLE_TYPE",
    "UUID_FORM",
    "Rule",
    "cleaning",
    "committed_lsn_property",
    "epoch_property",
    "is_reserved",
    "problem_of",
    "rule_of",
    "token_property",
]
