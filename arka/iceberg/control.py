"""Tables in the catalog: create, drop, load and list them as plain records.

Owns: what an Arka table looks like in Iceberg (location, spec, properties) and reading it back. Does not
own commits, nor what of a dropped table is deleted (``purge``).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Final
from uuid import UUID

import msgspec
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NoSuchNamespaceError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.schema import Schema
from pyiceberg.table import Table, TableProperties

from arka import failpoints
from arka._core.rowkeys import is_key_type
from arka.errors import InvalidRequest
from arka.iceberg.catalogs import catalog
from arka.iceberg.config import MARKER_FILE, CatalogConfig
from arka.iceberg.fileio import local_path, make_directory
from arka.iceberg.manifests import ManifestMemory, metadata_files
from arka.iceberg.marks import is_mark, marks_in
from arka.iceberg.partition import new_partition_spec, partition_fields, split_fields
from arka.iceberg.pointer import read_pointer
from arka.iceberg.purge import all_identifiers, drop_entry
from arka.iceberg.purge import purge as purge_files
from arka.iceberg.runfiles import forget_table
from arka.iceberg.schema import UnsupportedType, arrow_schema, new_iceberg_schema
from arka.iceberg.sight import check_files
from arka.records import TableDefinition, TableInfo, TableName, TableType
from arka.storage.ports import (
    CatalogConflict,
    CatalogListing,
    CatalogTable,
    CatalogUnavailable,
    FilesMissing,
    TableExists,
    TableMissing,
    Unusable,
    WarehouseChanged,
)
from arka.tableproperties import CLEANED, CLEANED_VALUE, PRIMARY_KEY, TABLE_TYPE, is_reserved

#: Only version 2 has delete files that every reader knows, and pyiceberg cannot write version 3.
_FORMAT_VERSION: Final = 2
#: Attempts at a drop against other writers' commits to the table.
_DROP_ATTEMPTS: Final = 5

_log = logging.getLogger(__name__)


def create_table(config: CatalogConfig, definition: TableDefinition, location_suffix: str) -> CatalogTable:
    """Create a table and, if need be, its namespace.

    Args:
        config: the catalog.
        definition: checked, with canonical types.
        location_suffix: 8 hex digits that make the location unlike that of any earlier table (R5).

    Raises:
        TableExists: the name is taken.
        CatalogConflict: the definition cannot be an Iceberg table.
        Exception: the catalog or the warehouse did not answer; the table may exist.
    """
    opened = catalog(config)
    identifier = tuple(definition.name)
    schema = new_iceberg_schema(definition.schema, definition.key_columns)
    spec = new_partition_spec(schema, definition.partition)
    properties = new_properties(definition)
    if opened.table_exists(identifier):
        raise TableExists(f"Table already exists: {definition.name}")
    opened.create_namespace_if_not_exists((definition.name.namespace,))
    location = f"{config.warehouse}/{definition.name.namespace}/{definition.name.name}-{location_suffix}"
    _make_folder(config, location)
    failpoints.hit("catalog.create")
    try:
        table = opened.create_table(
            identifier,
            schema,
            # A REST catalog's warehouse may be a mere name; it then chooses the location itself.
            location=location if "://" in config.warehouse else None,
            partition_spec=spec,
            properties=properties,
        )
    except TableAlreadyExistsError as error:
        raise TableExists(f"Table already exists: {definition.name}") from error
    failpoints.hit("catalog.created")
    return describe(table)


def _make_folder(config: CatalogConfig, location: str) -> None:
    """Make the folder of a new table in a local warehouse, with those above it; nothing else ever makes these (R28).

    Raises:
        WarehouseChanged: the warehouse that this node has used is not there, or has lost its marker.
    """
    root, folder = local_path(config.warehouse), local_path(location)
    if root is None or folder is None or config.is_rest:
        return
    if config.is_marked() and not os.path.exists(os.path.join(root, MARKER_FILE)):
        raise WarehouseChanged(f"the warehouse {root} has no {MARKER_FILE}: it is not mounted, or was emptied")
    make_directory(os.path.join(folder, "metadata"), shared=True)


def look_at(config: CatalogConfig, info: TableInfo) -> None:
    """Look for the files of a table's current metadata.

    Raises:
        FilesMissing: one is not there.
        TableMissing: no such table.
        OSError: the warehouse did not answer.
    """
    table = _load_same(catalog(config), info.name, info.uuid)
    check_files(metadata_files(table, ManifestMemory()), table.io)


def drop_table(config: CatalogConfig, name: TableName, uuid: UUID, purge: bool) -> None:
    """Drop a table if the name still means it; with ``purge`` delete its files too.

    Raises:
        TableMissing: no table with that UUID under that name.
        Exception: the catalog did not answer; the table may be gone.
    """
    opened = catalog(config)
    for _ in range(_DROP_ATTEMPTS):
        try:
            table = _load_same(opened, name, uuid)
        except TableMissing:
            # Dropped by others, or by a process that died right after it.
            forget_table(config.index_dir, uuid)
            raise
        failpoints.hit("catalog.drop")
        try:
            drop_entry(opened, table)
        except NoSuchTableError as error:
            raise TableMissing(f"Table not found: {name}") from error
        except CommitFailedException:
            # Others committed to it, or it is another table now: look again.
            continue
        break
    else:
        raise CatalogUnavailable(f"table {name}: others changed it {_DROP_ATTEMPTS} times while it was to be dropped")
    failpoints.hit("catalog.dropped")
    forget_table(config.index_dir, uuid)
    if purge:
        purge_files(config, opened, table)
        failpoints.hit("catalog.purged")


def load_table(config: CatalogConfig, name: TableName) -> CatalogTable:
    """Load one table, fresh.

    Raises:
        TableMissing: no such table.
        CatalogConflict: it is not one that Arka can write: format version or types.
        FilesMissing: its current metadata file is gone.
        CatalogUnavailable: its metadata file holds something else.
    """
    return describe(_load(catalog(config), name))


def list_tables(config: CatalogConfig) -> CatalogListing:
    """Load every table that Arka could write.

    Those with names, types or format versions beyond Arka's, and those whose metadata cannot be read, are named: they
    are there all the same.
    """
    opened = catalog(config)
    found = []
    unread = []
    unusable = {}
    for identifier in all_identifiers(opened):
        name = TableName(".".join(identifier[:-1]), identifier[-1])
        try:
            table = _load(opened, identifier)
            uuid = UUID(str(table.metadata.table_uuid))
            TableName.from_parts(list(identifier))
            found.append(describe(table))
        except InvalidRequest as error:
            unusable[uuid] = Unusable(name, str(error), spelled=False)
            _log.info("catalog.table_skipped table=%s reason=%s", name, error)
        except CatalogConflict as error:
            unusable[uuid] = Unusable(name, str(error))
            _log.info("catalog.table_skipped table=%s reason=%s", name, error)
        except TableMissing:
            # Dropped between the listing and the load.
            continue
        except Exception as error:
            # One table that cannot be read, for whatever reason, must not keep the others from being served.
            unread.append(name)
            _log.warning("catalog.table_broken table=%s reason=%s", name, error)
    tables = tuple(sorted(found, key=lambda table: table.info.name))
    return CatalogListing(tables, frozenset(unread), unusable)


def describe(table: Table) -> CatalogTable:
    """Turn a loaded table into plain records.

    Raises:
        CatalogConflict: its format version, a column's type or a partition field is beyond Arka.
    """
    check_format(table)
    metadata = table.metadata
    name = TableName(*table.name())
    try:
        schema = arrow_schema(metadata.schema())
    except UnsupportedType as error:
        raise CatalogConflict(f"table {name}: {error}") from error
    properties = metadata.properties
    word = properties.get(TABLE_TYPE, TableType.APPEND_ONLY)
    if word not in set(TableType):
        raise CatalogConflict(f"table {name}: property {TABLE_TYPE} is {word!r}, expected append_only or primary_key")
    info = TableInfo(
        uuid=UUID(str(metadata.table_uuid)),
        name=name,
        schema=schema,
        schema_id=metadata.current_schema_id,
        table_type=TableType(word),
        key_columns=key_columns(metadata.schema(), properties),
        spec_id=metadata.default_spec_id,
        partition=partition_fields(metadata.spec()),
        location=metadata.location,
        properties={key: value for key, value in properties.items() if not is_mark(key)},
    )
    for column in info.key_columns:
        if column not in schema.names or schema.field(column).nullable or not is_key_type(schema.field(column).type):
            raise CatalogConflict(f"table {name}: column {column!r} of its key is not there, optional or of a bad type")
    try:
        split_fields(info)
    except ValueError as error:
        raise CatalogConflict(f"table {name}: {error}") from error
    specs = {number: partition_fields(spec) for number, spec in metadata.specs().items()}
    return CatalogTable(info, marks_in(metadata), metadata.current_snapshot_id, specs)


def check_format(table: Table) -> None:
    """Check that a table has a format that Arka writes.

    Raises:
        CatalogConflict: its format version is another.
    """
    version = table.metadata.format_version
    if version != _FORMAT_VERSION:
        raise CatalogConflict(
            f"table {'.'.join(table.name())} has format version {version}, expected {_FORMAT_VERSION}"
        )


def key_columns(schema: Schema, properties: Mapping[str, str]) -> tuple[str, ...]:
    """The names that the key's columns have now; in the order of CreateTable unless one was renamed since.

    Raises:
        CatalogConflict: others have written something else into the property.
    """
    text = properties.get(PRIMARY_KEY, "[]")
    try:
        names = tuple(msgspec.json.decode(text, type=list[str]))
    except msgspec.MsgspecError as error:
        raise CatalogConflict(f"property {PRIMARY_KEY} is {text!r}, expected a JSON list of column names") from error
    fields = {name for number in sorted(schema.identifier_field_ids) if (name := schema.find_column_name(number))}
    if not names or not fields or set(names) == fields:
        return names
    # Others renamed one: the schema knows which columns identify a row by their ids.
    return tuple(field.name for field in schema.fields if field.name in fields)


def _load(opened: Catalog, identifier: tuple[str, ...]) -> Table:
    try:
        return opened.load_table(tuple(identifier))
    except (NoSuchTableError, NoSuchNamespaceError) as error:
        raise TableMissing(f"Table not found: {'.'.join(identifier)}") from error
    except FileNotFoundError as error:
        # A REST catalog reads it itself, so that it is an SQL catalog that has a pointer.
        raise FilesMissing(read_pointer(opened, tuple(identifier)) or f"of {'.'.join(identifier)}") from error
    except ValueError as error:
        raise CatalogUnavailable(f"table {'.'.join(identifier)}: its metadata cannot be read: {error}") from error


def _load_same(opened: Catalog, name: TableName, uuid: UUID) -> Table:
    table = _load(opened, name)
    if table.metadata.table_uuid != uuid:
        raise TableMissing(f"Table not found: {name} with UUID {uuid}")
    return table


def new_properties(definition: TableDefinition) -> dict[str, str]:
    """Return the properties of a table that does not exist yet: what was asked for, and ours.

    Nothing here changes what other writers of the table do (R30).

    Raises:
        CatalogConflict: a property is reserved, or its value cannot be.
    """
    asked = dict(definition.properties)
    version = asked.pop(TableProperties.FORMAT_VERSION, str(_FORMAT_VERSION))
    if version != str(_FORMAT_VERSION):
        raise CatalogConflict(f"Unsupported format-version {version!r}: expected {_FORMAT_VERSION}")
    reserved = sorted(key for key in asked if is_reserved(key))
    if reserved:
        raise CatalogConflict(f"Reserved table properties: {', '.join(reserved)}")
    made = {**asked, TABLE_TYPE: definition.table_type.value, CLEANED: CLEANED_VALUE}
    if definition.key_columns:
        made[PRIMARY_KEY] = json.dumps(definition.key_columns)
    return made


__all__ = [
    "check_format",
    "create_table",
    "describe",
    "drop_table",
    "key_columns",
    "list_tables",
    "load_table",
    "look_at",
    "new_properties",
]
