"""What others own of a table, and how old it may be here (R27).

Owns: when a table is loaded again from the catalog, which answer is newer than another, and that what was adopted is in
the log. Does not own what a table's writes are bound to (``arka.tiers.table``) nor tables that are no longer under
their names (``arka.tiers.tables``).

A table's schema, partition spec, sort order, properties and format version are the catalog's. Every commit brings back
what it loaded. A stream that opens asks for what is older than ``iceberg.adopt_s``, and waits at most 1 s: while the
catalog does not answer, the last that was adopted serves (R5, R13).

Answers of two requests that overlap cannot be ordered. So an answer counts only if nothing was adopted since its
request began; else the catalog is asked again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple
from uuid import UUID

import structlog
import trio

from arka.errors import ArkaError, Unavailable
from arka.records import TableInfo
from arka.storage.ports import Catalog, CatalogConflict, CatalogTable, CatalogUnavailable, FilesMissing, TableMissing
from arka.tiers import ddl
from arka.tiers.foreign import judge
from arka.tiers.memory import MemoryTier
from arka.tiers.table import NEVER, Table

log = structlog.get_logger(__name__)

#: The longest that a stream waits for a newer answer, in seconds.
PATIENCE_S: Final = 1.0


class Question(NamedTuple):
    """A request whose answer may be adopted: when it began, and what had been adopted by then."""

    began: float
    adoptions: int


class _Load:
    """A request of ``refresh`` that is under way."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.ended = trio.Event()
        # Whether the catalog answered, and whether it is known how new the answer is.
        self.answered = False
        self.settled = False


class Adoption:
    """Keeps what others own of this node's tables from growing old. Used from trio's thread only."""

    def __init__(
        self,
        catalog: Catalog,
        memory: MemoryTier,
        *,
        log_uuid: UUID,
        adopt_s: float,
        look_for: Callable[[Table], Awaitable[None]],
    ) -> None:
        """Join the catalog to the log.

        Args:
            catalog: what owns the tables.
            memory: takes the record of what was adopted.
            log_uuid: the log.
            adopt_s: age after which a stream that opens asks again, in seconds.
            look_for: finds out what became of a table that is not under its name; raises CatalogUnavailable.
        """
        self._catalog = catalog
        self._memory = memory
        self._log_uuid = log_uuid
        self._adopt_s = adopt_s
        self._look_for = look_for
        self._loads: dict[UUID, _Load] = {}
        self._nursery: trio.Nursery | None = None

    def start(self, nursery: trio.Nursery) -> None:
        """Let requests run in ``nursery``: whoever waits for one may give up, and others wait for it too."""
        self._nursery = nursery

    def stop(self) -> None:
        """Ask nothing any more."""
        self._nursery = None

    def ask(self, table: Table) -> Question:
        """Begin a request whose answer goes to ``take``."""
        return Question(trio.current_time(), table.adoptions)

    async def refresh(self, table: Table, *, max_age_s: float | None = None) -> None:
        """Wait until a table is known as the catalog had it not long ago, 1 s at most.

        Args:
            table: which; of one that takes no writes nothing is asked.
            max_age_s: what is older is loaded again; None for ``iceberg.adopt_s``.

        Cancellation: a request that is under way goes on.
        """
        since = trio.current_time() - (self._adopt_s if max_age_s is None else max_age_s)
        with trio.move_on_after(PATIENCE_S):
            while self._is_older(table, since):
                load = self._loads.get(table.info.uuid) or self._begin(table)
                if load is None or trio.current_time() >= load.began + PATIENCE_S:
                    # Others have waited for this one long enough.
                    return
                await load.ended.wait()
                if load.began >= since and (load.settled or not load.answered):
                    return

    def _is_older(self, table: Table, since: float) -> bool:
        return self._nursery is not None and table.is_committing and table.adopted_at <= since

    def _begin(self, table: Table) -> _Load | None:
        """Ask the catalog for a table."""
        if self._nursery is None:
            return None
        load = self._loads[table.info.uuid] = _Load(trio.current_time())
        self._nursery.start_soon(self._run, table, load)
        return load

    async def _run(self, table: Table, load: _Load) -> None:
        question = self.ask(table)
        uuid = table.info.uuid
        try:
            await self._ask_catalog(table, load, question)
            load.answered = True
        except (CatalogUnavailable, ArkaError) as error:
            log.info("table.not_refreshed", table=str(table.info.name), reason=str(error))
        finally:
            del self._loads[uuid]
            load.ended.set()

    async def _ask_catalog(self, table: Table, load: _Load, question: Question) -> None:
        try:
            found = await self._catalog.load_table(table.info.name)
        except CatalogConflict as error:
            load.settled = self.refuse(table, str(error), question)
            return
        except TableMissing:
            found = None
        if found is not None and found.info.uuid == table.info.uuid:
            load.settled = self.take(table, found, question)
            return
        await self._look_for(table)
        load.settled = not table.is_committing or table.adoptions != question.adoptions

    # -- answers ----------------------------------------------------------------------------------

    def take(self, table: Table, found: CatalogTable, question: Question) -> bool:
        """Adopt what a request has brought, unless something else was adopted since it began.

        Args:
            table: the table that was asked for.
            found: the answer; about another table it is left alone.
            question: see ``ask``.

        Returns:
            Whether the table is known as it was when the request began, or later.
        """
        if found.info.uuid != table.info.uuid or not table.is_committing:
            return True
        judged = table.numbered(judge(table.info, found.info, self._log_uuid).info)
        if question.adoptions != table.adoptions and judged != table.info:
            # Which one is newer? Open streams are to have it now, so nobody is waited for.
            table.adopted_at = NEVER
            if table.info.uuid not in self._loads:
                self._begin(table)
            return False
        self.adopt(table, found.info, question)
        table.specs = found.specs
        return True

    def refuse(self, table: Table, reason: str, question: Question) -> bool:
        """Take no writes for a table that others made something of that Arka cannot write, until they mend it.

        Returns:
            See ``take``.
        """
        if not table.is_committing:
            return True
        if question.adoptions != table.adoptions:
            return False
        table.adoptions += 1
        table.adopted_at = max(table.adopted_at, question.began)
        detail = f"Others made of {table.info.name} what Arka cannot write: {reason}. Mend the table, or drop it"
        if table.refusal != detail:
            log.warning("table.refused", table=str(table.info.name), reason=reason)
        table.refusal = detail
        return True

    def miss_file(self, table: Table, error: FilesMissing) -> None:
        """Take no writes for a table that a file of its current metadata is gone of, until all were seen (R33)."""
        detail = f"Table {table.info.name} cannot be read: {error}. Restore it"
        if table.is_committing and table.gone != detail:
            log.warning("table.refused", table=str(table.info.name), reason=str(error))
            table.gone = table.refusal = detail

    def adopt(self, table: Table, info: TableInfo, question: Question | None = None) -> None:
        """Make the catalog's table ours: what is accepted from now on is bound to it.

        Args:
            table: the table as it was.
            info: the same table, perhaps under another name.
            question: the request that brought it; None for one whose answer is known to be the newest.
        """
        table.adoptions += 1
        table.adopted_at = max(table.adopted_at, trio.current_time() if question is None else question.began)
        table.properties = info.properties
        info, refusal, remarks = judge(table.info, info, self._log_uuid)
        refusal = table.gone or refusal
        info = table.numbered(info)
        if (refusal, remarks) != (table.refusal, table.remarks):
            log.warning("table.judged", table=str(info.name), refusal=refusal, remarks=remarks)
        table.refusal, table.remarks, table.misnamed = refusal, remarks, ""
        if info == table.info:
            return
        log.info(
            "table.adopted",
            table=str(info.name),
            schema_id=info.schema_id,
            spec_id=info.spec_id,
            columns=info.schema.names,
        )
        from_lsn = self._memory.last_lsn + 1
        if table.is_committing:
            # A start that finds the catalog away goes on with what was adopted last, and under the last name. Behind
            # the record of a drop it would bring the table back.
            try:
                from_lsn = ddl.log_created(self._memory, info, info.location[-8:])
            except Unavailable as error:
                # No LSN can be given now (R31). A stream that opens meanwhile may write once there are some again: it
                # is bound to the table as it is now (R27).
                log.info("table.not_recorded", table=str(info.name), reason=str(error))
                ddl.owe_created(self._memory, info, info.location[-8:])
        table.bind(info, from_lsn)


__all__ = ["PATIENCE_S", "Adoption", "Question"]
