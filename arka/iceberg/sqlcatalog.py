"""pyiceberg's SQL catalog without its copies: commit ten thousand costs what commit ten does.

Owns: the cache of parsed metadata, staging without deep copies, and the checks made on the very metadata
that the compare-and-swap replaces (R15). Does not own what a commit consists of.

Overrides private parts of pyiceberg 0.12.0; ``tests/iceberg/test_pyiceberg_contract.py`` holds each of them.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from pyiceberg.catalog import Catalog
from pyiceberg.catalog.sql import IcebergTables, SqlCatalog
from pyiceberg.exceptions import CommitFailedException, NoSuchTableError
from pyiceberg.io import FileIO, load_file_io
from pyiceberg.table import CommitTableResponse, StagedTable, Table, TableProperties
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.update import (
    TableRequirement,
    TableUpdate,
    _apply_table_update,
    _TableMetadataUpdateContext,
    _update_table_metadata_log,
    update_table_metadata,
)
from pyiceberg.typedef import EMPTY_DICT, Identifier, Properties
from sqlalchemy import delete, event, select

from arka import failpoints
from arka.iceberg.locations import table_locations
from arka.iceberg.timestamps import forward_metadata, forward_updates
from arka.storage.ports import StagedFilesMissing

#: Parsed metadata files kept by one worker; a few per table of its shard are in use.
_METADATA_CACHE_ENTRIES: Final = 256
#: How long a table wants its metadata log to be; pyiceberg raises where it is no number.
_LOG_LENGTH: Final = TableProperties.METADATA_PREVIOUS_VERSIONS_MAX
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}\Z")


def apply_updates(base: TableMetadata, updates: tuple[TableUpdate, ...], metadata_location: str) -> TableMetadata:
    """Apply updates to metadata as pyiceberg does, without its closing deep copy.

    Sharing is safe: metadata objects are frozen and no update changes one in place.

    Args:
        base: the metadata that the commit is based on.
        updates: in order.
        metadata_location: of ``base``, for the metadata log.

    Raises:
        ValueError: an update does not fit the metadata.
    """
    context = _TableMetadataUpdateContext()
    made = base
    for update in updates:
        made = _apply_table_update(update, made, context)
    if context.has_changes():
        made = _log_metadata(made, metadata_location, base.last_updated_ms)
        made = forward_metadata(base, made)
    return made


def _log_metadata(made: TableMetadata, location: str, last_updated_ms: int) -> TableMetadata:
    """Add the metadata file before to the metadata log, whatever others set as the log's length (R17)."""
    usable = {key: text for key, text in made.properties.items() if key != _LOG_LENGTH or _NUMBER.match(text)}
    logged = _update_table_metadata_log(
        made.model_copy(update={"properties": usable}) if len(usable) < len(made.properties) else made,
        location,
        last_updated_ms,
    )
    return logged.model_copy(update={"properties": made.properties}) if len(usable) < len(made.properties) else logged


class ServerSqlCatalog(SqlCatalog):
    """A SQL catalog that obeys the server's configuration: table properties choose no credentials and no folders (R30).

    Times in the metadata that it writes only go forward (R34).
    """

    def __init__(self, name: str, **properties: str) -> None:
        self._staged_locations: list[str] = []
        self._last_look: Callable[[Sequence[str]], None] | None = None
        super().__init__(name, **properties)
        event.listen(self.engine, "after_cursor_execute", self._look_before_commit)

    @contextlib.contextmanager
    def last_look(self, check: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Have a function called in each compare-and-swap, between the swap and the transaction's commit.

        The swap has waited for the locks of others by then, which may take long, and what the function raises undoes
        it.

        Args:
            check: takes the locations of the metadata files that were written for the commit.
        """
        self._last_look = check
        try:
            yield
        finally:
            self._last_look = None

    def _look_before_commit(
        self, _connection: Any, cursor: Any, _statement: str, _values: Any, context: Any, _: bool
    ) -> None:
        if self._last_look is not None and context is not None and context.isupdate and cursor.rowcount > 0:
            self._last_look(tuple(self._staged_locations))

    def commit_table(
        self, table: Table, requirements: tuple[TableRequirement, ...], updates: tuple[TableUpdate, ...]
    ) -> CommitTableResponse:
        """Commit by compare-and-swap on the metadata location.

        Raises:
            CommitFailedException: a requirement does not hold on the current metadata, or another commit
                won; nothing happened, and the metadata file written for it is gone again.
            StagedFilesMissing: from the last look; the same holds.
        """
        self._staged_locations.clear()
        try:
            return super().commit_table(table, requirements, updates)
        except (CommitFailedException, StagedFilesMissing):
            for location in self._staged_locations:
                with contextlib.suppress(OSError):
                    table.io.delete(location)
            raise

    def _load_file_io(self, properties: Properties = EMPTY_DICT, location: str | None = None) -> FileIO:
        # What is left out are the table's properties.
        return load_file_io(self.properties, location)

    def _update_and_stage_table(
        self,
        current_table: Table | None,
        table_identifier: Identifier,
        requirements: tuple[TableRequirement, ...],
        updates: tuple[TableUpdate, ...],
    ) -> StagedTable:
        if current_table is None:
            # Only a commit to a table that is gone comes here: never create it again.
            raise CommitFailedException(f"Table does not exist: {'.'.join(table_identifier)}")
        for requirement in requirements:
            requirement.validate(current_table.metadata)
        metadata = self._apply(current_table, forward_updates(current_table.metadata, updates))
        version = self._parse_metadata_version(current_table.metadata_location) + 1
        location = table_locations(metadata.location).new_table_metadata_file_location(version)
        self._staged_locations.append(location)
        return StagedTable(
            identifier=table_identifier,
            metadata=metadata,
            metadata_location=location,
            io=current_table.io,
            catalog=self,
        )

    def drop_loaded(self, table: Table) -> None:
        """Remove a table's entry if it still is the one that was loaded, in one statement (R5).

        Args:
            table: as it was just loaded under its name.

        Raises:
            NoSuchTableError: there is no entry of that name.
            CommitFailedException: the entry points elsewhere: others committed, or gave the name to another table.
        """
        namespace, name = Catalog.namespace_to_string(table.name()[:-1]), table.name()[-1]
        named = (
            IcebergTables.catalog_name == self.name,
            IcebergTables.table_namespace == namespace,
            IcebergTables.table_name == name,
        )
        loaded = IcebergTables.metadata_location == table.metadata_location
        with self.engine.begin() as connection:
            if connection.execute(delete(IcebergTables).where(*named, loaded)).rowcount == 1:
                return
            there = connection.execute(select(IcebergTables.table_name).where(*named)).first()
        if there is None:
            raise NoSuchTableError(f"Table does not exist: {namespace}.{name}")
        raise CommitFailedException(f"Table {namespace}.{name} was changed by others meanwhile")

    def all_pointers(self) -> list[tuple[str, str]]:
        """List every entry of the database, those of catalogs of other names too: name and metadata location."""
        wanted = select(IcebergTables.table_namespace, IcebergTables.table_name, IcebergTables.metadata_location)
        with self.engine.connect() as connection:
            return [(f"{space}.{name}", location) for space, name, location in connection.execute(wanted) if location]

    def _apply(self, table: Table, updates: tuple[TableUpdate, ...]) -> TableMetadata:
        made = update_table_metadata(table.metadata, updates, metadata_location=table.metadata_location)
        return forward_metadata(table.metadata, made)


class LeanSqlCatalog(ServerSqlCatalog):
    """A SQL catalog that parses each metadata file once.

    Metadata files are written once under a unique name, so their parsed form is cached by location; the
    pointer to the current one is read from the database every time. Used by one thread.
    """

    def __init__(self, name: str, **properties: str) -> None:
        self._parsed: OrderedDict[str, tuple[TableMetadata, FileIO]] = OrderedDict()
        super().__init__(name, **properties)

    def _convert_orm_to_iceberg(self, orm_table: IcebergTables) -> Table:
        location = orm_table.metadata_location
        known = self._parsed.get(location) if location else None
        if location is None or known is None:
            table = super()._convert_orm_to_iceberg(orm_table)
            self._remember(table.metadata_location, table.metadata, table.io)
            return table
        self._parsed.move_to_end(location)
        metadata, io = known
        return Table(
            identifier=(*Catalog.identifier_to_tuple(orm_table.table_namespace), orm_table.table_name),
            metadata=metadata,
            metadata_location=location,
            io=io,
            catalog=self,
        )

    def _apply(self, table: Table, updates: tuple[TableUpdate, ...]) -> TableMetadata:
        return apply_updates(table.metadata, updates, table.metadata_location)

    @staticmethod
    def _write_metadata(metadata: TableMetadata, io: FileIO, metadata_path: str) -> None:
        SqlCatalog._write_metadata(metadata, io, metadata_path)
        failpoints.hit("commit.metadata")

    def commit_table(
        self, table: Table, requirements: tuple[TableRequirement, ...], updates: tuple[TableUpdate, ...]
    ) -> CommitTableResponse:
        """Commit as ``ServerSqlCatalog`` does, and remember what the table has become."""
        response = super().commit_table(table, requirements, updates)
        self._remember(response.metadata_location, response.metadata, table.io)
        return response

    def _remember(self, location: str, metadata: TableMetadata, io: FileIO) -> None:
        self._parsed[location] = (metadata, io)
        self._parsed.move_to_end(location)
        while len(self._parsed) > _METADATA_CACHE_ENTRIES:
            self._parsed.popitem(last=False)


__all__ = ["LeanSqlCatalog", "ServerSqlCatalog", "apply_updates"]
