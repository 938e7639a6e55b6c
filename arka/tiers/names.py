"""What the catalog's list says of a table's name (R5, R20, R27).

Owns: which entry is a table's own where others registered it under several names, what a table is told to be that is
not under its name, and taking in a fresh list. Does not own the list of tables (``arka.tiers.tables``) nor when a
table is asked for (``arka.tiers.adoption``).

The rule for one table under several names: the name that Arka knows stays the table's name, also across restarts, for
as long as the catalog has the table under it. The others are refused, with the name to use. Where Arka knows none of
the names, or its own is gone, the entry that holds most of this log is the table's; of equal ones the first by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol
from uuid import UUID

import structlog
import trio

from arka.errors import ArkaError, ErrorCode, InvalidRequest
from arka.records import TableInfo, TableName
from arka.storage.ports import Catalog, CatalogListing, CatalogTable, CatalogUnavailable, Unusable
from arka.tiers import ddl
from arka.tiers.table import Table

log = structlog.get_logger(__name__)

#: The longest that a list of tables waits for the catalog, in seconds.
_PATIENCE_S: Final = 1.0


class Misnamed(CatalogUnavailable):
    """Others gave a table a name that Arka cannot spell: it is there, and its writes wait."""


def own_entries(listing: CatalogListing, names: Mapping[UUID, TableName], log_uuid: UUID) -> dict[UUID, CatalogTable]:
    """Choose one entry for each table of a list.

    Args:
        listing: the catalog's tables; one may stand there under several names.
        names: the name that each table is known by here.
        log_uuid: the log that writes to them.
    """
    found: dict[UUID, CatalogTable] = {}
    for entry in listing.tables:
        uuid = entry.info.uuid
        other = found.get(uuid)
        if other is None:
            found[uuid] = entry
            continue
        found[uuid] = max(entry, other, key=lambda each: _claim(each, names.get(uuid), log_uuid))
        log.warning("catalog.second_name", names=[str(entry.info.name), str(other.info.name)], table_uuid=str(uuid))
    return found


def own_entry(listing: CatalogListing, info: TableInfo, log_uuid: UUID) -> CatalogTable | None:
    """Find a table's own entry in a list; None if it is in none that Arka can write."""
    return own_entries(listing, {info.uuid: info.name}, log_uuid).get(info.uuid)


def _claim(entry: CatalogTable, known: TableName | None, log_uuid: UUID) -> tuple[bool, int, list[int]]:
    # Of names that claim the same, the first one wins: the greatest in the order of negated characters.
    order = [-ord(character) for character in str(entry.info.name)] + [1]
    return entry.info.name == known, entry.committed_lsn(log_uuid), order


async def check_own_name(catalog: Catalog, known: Table, name: TableName) -> None:
    """Check that a table which was found under another name than its own was renamed, and has not two names.

    Raises:
        ArkaError: ``invalid_request``: it still is under the name that it is known by.
        Unavailable: the catalog does not answer.
    """
    try:
        own = await ddl.load_table(catalog, known.info.name)
    except ArkaError as error:
        if error.code is not ErrorCode.TABLE_STOPPED:
            raise
        # Whatever stands there cannot be written, so that it is not known which table it is.
        own = None
    if own is not None and own.info.uuid == known.info.uuid:
        raise InvalidRequest(
            f"{name} is a second name of table {known.info.name} ({known.info.uuid}), which others registered: use "
            f"{known.info.name}, or take one of the two names out of the catalog"
        )


def misname(table: Table, unusable: Unusable) -> Misnamed:
    """Refuse new writes to a table to which others gave a name that Arka cannot spell; returns what to raise."""
    reason = (
        f"Others renamed {table.info.name} ({table.info.uuid}) to {str(unusable.name)!r}, which is no name for Arka: "
        f"{unusable.reason}. Its waiting writes are kept: give it a name that Arka takes, and they are committed"
    )
    if table.refusal != reason:
        log.warning("table.misnamed", table=str(table.info.name), reason=reason)
    table.misnamed, table.refusal = str(unusable.name), reason
    return Misnamed(reason)


def stop_missing(table: Table, listing: CatalogListing) -> None:
    """Stop a table that others took away, or made something of that Arka cannot write."""
    unusable = listing.unusable.get(table.info.uuid)
    table.stop(
        f"Table {table.info.name} ({table.info.uuid}) is not in the catalog and was not dropped here: others dropped "
        "it. Its uncommitted writes are kept: register it again and restart the server, or drop it (DropTable, with "
        "its table_uuid if another table has the name)"
        if unusable is None
        else f"Others made of {table.info.name} what Arka cannot write: {unusable.reason}. Its uncommitted writes are "
        "kept: mend the table and restart the server, or drop it"
    )


class Named(Protocol):
    """What a fresh list changes: the node's tables."""

    def all(self) -> Iterable[Table]:
        """Every table that is known."""
        ...

    def get(self, uuid: UUID) -> Table | None:
        """The table with this UUID."""
        ...

    async def register(self, found: CatalogTable) -> Table:
        """Take a table of the catalog in, or follow its name."""
        ...


class FreshList:
    """Takes the catalog's list in when somebody asks which tables there are. Used from trio's thread only."""

    def __init__(
        self, catalog: Catalog, tables: Named, *, log_uuid: UUID, refresh: Callable[[Table], Awaitable[None]]
    ) -> None:
        """Join the catalog to the tables.

        Args:
            catalog: what has the list.
            tables: what takes it in.
            log_uuid: the log.
            refresh: asks for one table that the list does not have.
        """
        self._catalog = catalog
        self._tables = tables
        self._log_uuid = log_uuid
        self._refresh = refresh
        # The request that has not begun yet, and its waiters: one that runs may be older than they are.
        self._next: trio.Event | None = None
        self._asking = trio.Lock()

    async def take(self, nursery: trio.Nursery | None) -> None:
        """Wait until the tables are known as the catalog has them now, 1 s at most (R27).

        Args:
            nursery: where the request runs; None: nothing is asked.

        Cancellation: a request that is under way goes on.
        """
        if nursery is None:
            return
        if self._next is None:
            self._next = trio.Event()
            nursery.start_soon(self._run, self._next)
        waited = self._next
        with trio.move_on_after(_PATIENCE_S):
            await waited.wait()

    async def _run(self, ended: trio.Event) -> None:
        try:
            async with self._asking:
                self._next = None
                await self._take_in()
        except (CatalogUnavailable, ArkaError) as error:
            log.info("tables.not_listed", reason=str(error))
        finally:
            if self._next is ended:
                self._next = None
            ended.set()

    async def _take_in(self) -> None:
        known = {table.info.uuid: (table, table.adoptions) for table in self._tables.all()}
        listing = await self._catalog.list_tables()
        found = own_entries(listing, {uuid: table.info.name for uuid, (table, _) in known.items()}, self._log_uuid)
        for uuid, entry in found.items():
            table = self._tables.get(uuid)
            if table is not None and (uuid not in known or table.adoptions != known[uuid][1]):
                # Another answer came meanwhile, and nobody can say which one is newer.
                continue
            try:
                await self._tables.register(entry)
            except ArkaError as error:
                log.info("catalog.table_skipped", table=str(entry.info.name), reason=error.detail)
        for uuid, (table, _) in known.items():
            if uuid not in found and table.is_committing:
                await self._refresh(table)


__all__ = [
    "FreshList",
    "Misnamed",
    "check_own_name",
    "misname",
    "own_entries",
    "own_entry",
    "stop_missing",
]
