"""Open every healthy table that a run of the tests left behind, with every reader.

    pytest --basetemp=FOLDER ...
    python -m tests.engines.leftovers FOLDER

A table is healthy unless its test broke it on purpose: ``BROKEN`` names those tests. ``KNOWN`` names what a reader's
release cannot read of any such table. Each healthy table is read whole
by pyiceberg, DuckDB, Polars and Spark, which must count the same rows, and parsed by Iceberg's Java library. The exit
code is 1 if any reader fails on any healthy table.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyiceberg.table import StaticTable

from tests.readers import open_duckdb

from .spark import Spark

_MOVED: Final = "the test moved its files, deleted them or let a service that is gone hold them"
_IO: Final = "a property that others set leads readers elsewhere"
_DROPPED: Final = "docs/readers.md: a partition's source column was dropped"
_TIME: Final = "docs/readers.md: Spark has no type for a time of day"
_BROTLI: Final = "docs/readers.md: Spark has no brotli, which others asked for"

#: Folders of tests that leave a table broken on purpose, by how their names begin, and why.
BROKEN: Final[dict[str, str]] = {
    "test_backup_": _MOVED,
    "test_what_": _MOVED,
    "test_copy_is_adopted": _MOVED,
    "test_files_that_are_gone": _MOVED,
    "test_foreign_tables_beyond": _MOVED,
    "test_manifest_that_is_gone": _MOVED,
    "test_no_folder_is_made": _MOVED,
    "test_purge_beside_a_table": _MOVED,
    "test_properties_that_others_se": _IO,
}
#: What one reader cannot read of a healthy table, by reader and the beginning of the test's folder, and why.
KNOWN: Final[dict[tuple[str, str], str]] = {
    ("duckdb", "elsewhere"): _DROPPED,
    ("duckdb", "test_it_is_adopted"): _DROPPED,
    ("duckdb", "test_manifests_are_merged"): _DROPPED,
    ("spark", "test_every_canonical_type"): _TIME,
    ("spark", "test_parquet_files_carry_ids"): _TIME,
    ("spark", "test_a_property_of_others_fall"): _BROTLI,
}


@dataclass(frozen=True)
class Leftover:
    """One table of one catalog."""

    test: str
    name: str
    metadata: str


def find(folder: Path) -> Iterator[Leftover]:
    """Find the tables of every SQLite catalog below a folder."""
    for path in sorted(folder.rglob("*.db")):
        test = path.relative_to(folder).parts[1 if path.relative_to(folder).parts[0].startswith("popen-") else 0]
        opened = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
        try:
            rows = opened.execute(
                "SELECT table_namespace, table_name, metadata_location FROM iceberg_tables"
            ).fetchall()
        except sqlite3.DatabaseError:
            # Not a catalog, or one that a test damaged.
            continue
        finally:
            opened.close()
        for namespace, name, metadata in rows:
            # The services that other places were on do not outlive their tests.
            if metadata.startswith("file:"):
                yield Leftover(test, f"{namespace}.{name}", metadata)


class _Duck:
    """DuckDB in a process of its own: an exception on one of its threads ends the process that it runs in."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve_duck, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def count(self, metadata: str) -> int:
        """Count the rows of a table.

        Raises:
            RuntimeError: DuckDB fails on it, or ended.
        """
        try:
            self._pipe.send(metadata)
            found: int | str = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            self._start()
            raise RuntimeError("the process that DuckDB ran in was ended by it") from None
        if isinstance(found, str):
            raise RuntimeError(found)
        return found

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _serve_duck(pipe: Any) -> None:
    with contextlib.suppress(EOFError), contextlib.closing(open_duckdb()) as duck:
        while True:
            metadata = pipe.recv()
            # Every column is read: a count alone would look at the manifests.
            query = f"SELECT count(*) FROM (SELECT hash(COLUMNS(*)) FROM iceberg_scan('{metadata}'))"
            try:
                pipe.send(duck.execute(query).fetchone()[0])
            except Exception as error:
                pipe.send(str(error))


def _broken_reason(test: str) -> str | None:
    return next((reason for prefix, reason in BROKEN.items() if test.startswith(prefix)), None)


def _known_reason(engine: str, test: str) -> str | None:
    return next((why for (known, prefix), why in KNOWN.items() if known == engine and test.startswith(prefix)), None)


def main() -> int:
    """Read everything; print what failed and a count for each reader."""
    folder = Path(sys.argv[1]).resolve()
    found = list(dict.fromkeys(find(folder)))
    failures: list[str] = []
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="arka-leftovers-") as scratch, Spark(Path(scratch)) as spark:
        duck = _Duck()
        readers: dict[str, Callable[[str], Any]] = {
            "pyiceberg": lambda metadata: StaticTable.from_metadata(metadata).scan().to_arrow().num_rows,
            "duckdb": duck.count,
            "polars": _by_polars,
            "spark": lambda metadata: spark.ask("count", metadata),
            "iceberg-core": lambda metadata: spark.ask("parse", metadata) and None,
        }
        skipped = 0
        for table in found:
            reason = _broken_reason(table.test)
            if reason is not None:
                skipped += 1
                print(f"broken on purpose: {table.test} {table.name}: {reason}")
                continue
            rows: dict[str, int] = {}
            for engine, read in readers.items():
                try:
                    value = read(table.metadata)
                except Exception as error:
                    known = _known_reason(engine, table.test)
                    if known is not None:
                        print(f"known of {engine}: {table.test} {table.name}: {known}")
                        continue
                    failures.append(f"{engine}: {table.test} {table.name} {table.metadata}: {str(error)[:400]}")
                else:
                    counts[engine] = counts.get(engine, 0) + 1
                    if value is not None:
                        rows[engine] = value
            if len(set(rows.values())) > 1:
                failures.append(f"rows differ: {table.test} {table.name} {table.metadata}: {rows}")
        duck.close()
    for failure in failures:
        print(failure)
    opened = ", ".join(f"{engine} {count}" for engine, count in counts.items())
    print(f"{len(found)} tables, {skipped} broken on purpose; opened: {opened}; {len(failures)} failures")
    return 1 if failures or not counts else 0


def _by_polars(metadata: str) -> int:
    import polars

    return polars.scan_iceberg(metadata).collect().height


if __name__ == "__main__":
    sys.exit(main())
