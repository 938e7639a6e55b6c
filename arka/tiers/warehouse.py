"""Whether the warehouse and the catalog are the ones that this log was joined to (R28).

Owns: the marker's meaning, the stall of the last tier while they are not, and when a table's files were last seen to
be there. Does not own the marker's bytes (``ports.Warehouse``), nor the look that each commit takes itself
(``arka.iceberg.sight``).

While the warehouse is not ours nothing is acknowledged ``iceberg_committed``: a reader would not find it. As soon as it
is ours again, each table is judged by its own mark (R16) and what was recorded of it (R20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final
from uuid import UUID, uuid4

import structlog
import trio

from arka.errors import ArkaError
from arka.records import TableInfo
from arka.storage.ports import Catalog, CatalogUnavailable, FilesMissing, TableMissing, Warehouse, WarehouseChanged
from arka.tiers.creates import PendingCreate

log = structlog.get_logger(__name__)

#: Pause between two looks at a warehouse that is not ours, in seconds.
_LOOK_AGAIN_S: Final = 1.0
#: A table's files have been seen to be there within so many seconds of each of its ``iceberg_committed`` acks.
SEEN_S: Final = 60.0


class WarehouseWatch:
    """The last tier's look at where it writes. Used from trio's thread only."""

    def __init__(
        self,
        warehouse: Warehouse | None,
        catalog: Catalog,
        known: Callable[[], Iterable[TableInfo]],
        asked_for: Callable[[], Iterable[PendingCreate]] = tuple,
    ) -> None:
        """Join the warehouse to the catalog.

        Args:
            warehouse: None where it cannot have a marker: the check is then one of each table's own files.
            catalog: lists tables, and looks for their files.
            known: returns the tables that the log knows, as it knows them.
            asked_for: returns the creates whose outcome the log does not tell: the catalog may have their tables.
        """
        self._warehouse = warehouse
        self._catalog = catalog
        self._known_tables = known
        self._asked_for = asked_for
        self._known: UUID | None = None
        self._trouble: str | None = None if warehouse is None else "the warehouse's marker was not read yet"
        self._said: str | None = None
        self._ours = trio.Event()
        self._wanted = trio.Event()
        self._joining = trio.Lock()
        self._seen: dict[UUID, float] = {}
        if warehouse is None:
            self._ours.set()

    @property
    def trouble(self) -> str | None:
        """Why nothing is acknowledged ``iceberg_committed`` now, for people; None if the warehouse is ours."""
        return self._trouble

    async def is_ours(self) -> bool:
        """Say whether the warehouse's marker is readable and ours, by reading it now.

        Where there is no marker the answer is yes: the check is then one of each table's own files.
        """
        if self._warehouse is None:
            return True
        try:
            await self._read()
        except CatalogUnavailable as error:
            self._stall(str(error))
            return False
        return True

    async def check(self) -> None:
        """Check that the warehouse is ours before something is made in it.

        Raises:
            WarehouseChanged: it is not, or does not answer.
        """
        if not await self.is_ours():
            raise WarehouseChanged(self._trouble or "the warehouse is not the one that it was")

    async def report(self, error: WarehouseChanged) -> bool:
        """Hear that catalog or warehouse are others, or that a file is gone.

        Returns:
            Whether the trouble is the table's own: a file of it is gone from a warehouse that is ours (R33).
        """
        self._seen.clear()
        if isinstance(error, FilesMissing) and await self.is_ours():
            return True
        self._stall(str(error))
        return False

    async def wait_ours(self) -> None:
        """Wait until catalog and warehouse are ours; returns at once while they are."""
        await self._ours.wait()

    def note_seen(self, table: UUID) -> None:
        """Record that all files of a table's current metadata were seen just now."""
        self._seen[table] = trio.current_time()

    async def confirm(self, table: TableInfo) -> None:
        """See to it that a table's files were seen within ``SEEN_S``, by a look of its own if need be.

        Raises:
            FilesMissing: one is not there.
            CatalogUnavailable: ask again.
        """
        if trio.current_time() - self._seen.get(table.uuid, -SEEN_S) < SEEN_S:
            return
        try:
            await self._catalog.look_at(table)
        except TableMissing as error:
            raise WarehouseChanged(f"{table.name} is not in the catalog any more") from error
        self.note_seen(table.uuid)

    async def run(self) -> None:
        """Read marker and catalog until both are ours, whenever they are not; until cancelled."""
        while True:
            while self._trouble is not None:
                try:
                    await self._read()
                    await self._catalog.list_tables()
                except (CatalogUnavailable, ArkaError) as error:
                    self._stall(str(error))
                    await trio.sleep(_LOOK_AGAIN_S)
                else:
                    self._recover()
            self._wanted = trio.Event()
            await self._wanted.wait()

    async def _read(self) -> None:
        """Read the marker; make it where there never was one and every table of ours can be read.

        Raises:
            CatalogUnavailable: it is not ours, or nobody answers.
        """
        warehouse = self._warehouse
        if warehouse is None:
            return
        if self._known is None:
            known = await warehouse.known()
            if self._known is None:
                # Else another task has joined the warehouse meanwhile.
                self._known = known
        found = await warehouse.read_marker()
        if found is None or self._known is None:
            # Invariant: one task looks and joins at a time. What a task saw before another one had made the marker says
            # nothing of the tables that were created since.
            async with self._joining:
                found = await self._join(warehouse)
        if found is None:
            log.warning("warehouse.unmarked", warehouse=warehouse.url, hint="its top folder cannot be written to")
            self._warehouse = None
        elif found != self._known:
            raise WarehouseChanged(f"{warehouse.url} is warehouse {found}, expected {self._known}")

    async def _join(self, warehouse: Warehouse) -> UUID | None:
        """Read the marker, or make it, and remember it if nothing is remembered; None where it cannot be made.

        Raises:
            CatalogUnavailable: it lacks what our tables have in it, or nobody answers.
        """
        found = await warehouse.read_marker()
        if found is None:
            found = await self._make(warehouse)
        elif self._known is None:
            await self._check_first_join(warehouse, found)
        if found is not None and self._known is None:
            await warehouse.know(found)
            self._known = found
        return found

    async def _make(self, warehouse: Warehouse) -> UUID | None:
        """Make the marker of a warehouse that has none, unless it lacks what our tables have in it (R28).

        Where this log had a marker before, any table of the catalog is looked for: one may be ours that the log does
        not know yet, since the answer to its create was lost.
        """
        missing, _ = await self._look_for_tables(every=self._known is not None)
        if missing:
            raise WarehouseChanged(
                f"{warehouse.url} has no marker, and the metadata of {', '.join(missing)} cannot be read: it is not "
                "mounted, was emptied, or is another one"
            )
        return await warehouse.make_marker(self._known or uuid4())

    async def _check_first_join(self, warehouse: Warehouse, found: UUID) -> None:
        """Check that a marked warehouse, which this disk knows nothing of, is not one that lacks all our tables.

        One table that cannot be read is no reason to hold the others back (R33).

        Raises:
            WarehouseChanged: it lacks them all.
        """
        missing, readable = await self._look_for_tables()
        if missing and not readable:
            raise WarehouseChanged(
                f"{warehouse.url} is warehouse {found}, and the metadata of {', '.join(missing)} cannot be read in it: "
                "it is another one than the catalog's"
            )

    async def _look_for_tables(self, *, every: bool = False) -> tuple[list[str], int]:
        """Look for the files of all tables of this log that the catalog names.

        Args:
            every: whether to look for those of all tables that it names.

        Returns:
            The names of those that lack one, or may lack one, and how many lack none.
        """
        listing = await self._catalog.list_tables()
        known = {info.uuid: info.name for info in self._known_tables()}
        asked_for = tuple(self._asked_for())
        names = {*known.values(), *(create.definition.name for create in asked_for)}
        suffixes = tuple(f"-{create.suffix}" for create in asked_for)
        missing = sorted(map(str, listing.unread if every else listing.unread & names))
        listed = {table.info.uuid for table in listing.tables} | listing.unusable.keys()
        if not every and any(uuid not in listed and name not in listing.unread for uuid, name in known.items()):
            # Of what cannot be read the catalog tells the name alone: it may be a table of ours that others renamed.
            missing += sorted(map(str, listing.unread - names))
        readable = 0
        for table in listing.tables:
            info = table.info
            ours = info.uuid in known or info.name in names or info.location.endswith(suffixes)
            if not ours and not every:
                continue
            # What was read once may be remembered: look for the file.
            try:
                await self._catalog.look_at(table.info)
            except (FilesMissing, TableMissing):
                missing.append(str(table.info.name))
            else:
                readable += 1
        return missing, readable

    def _stall(self, reason: str) -> None:
        if self._ours.is_set():
            self._ours = trio.Event()
        self._trouble = reason
        if self._said != reason:
            self._said = reason
            log.warning("warehouse.stalled", reason=reason, hint="nothing is acknowledged iceberg_committed meanwhile")
        self._wanted.set()

    def _recover(self) -> None:
        if self._said is not None:
            log.info("warehouse.recovered")
        self._trouble = self._said = None
        self._ours.set()


__all__ = ["SEEN_S", "WarehouseWatch"]
