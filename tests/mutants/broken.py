"""Engines that break one rule each: a test of that rule has to fail on them.

Owns: what is broken, and how. Each function changes the process that calls it, for good. Does not own which test
catches it (``test_mutants``), nor mutants that a simulated history catches (``tests/simulation``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MUTANTS: dict[str, Callable[[], None]] = {}


def mutant(function: Callable[[], None]) -> Callable[[], None]:
    """List a mutant under its function's name."""
    MUTANTS[function.__name__] = function
    return function


@mutant
def reads_know_no_commit() -> None:
    """A read holds a table's mark against nothing that the server knows to be committed (R20, R25)."""
    from arka.storage.ports import ReadJob

    ReadJob.objection = (  # type: ignore[method-assign]
        lambda job, mark: job.lineage.objection(job.table.name, job.table.uuid, mark)
    )


@mutant
def copies_start() -> None:
    """A copied data directory is not told from its original (R29)."""
    from arka.storage import place

    place.find_move = lambda *_: None  # type: ignore[assignment]
    place._is_taken_over = lambda *_, **__: False


@mutant
def tokens_are_ignored() -> None:
    """A mark of the log's own UUID is the log's own, whichever start made it (R15, R29)."""
    from arka.lineage import Lineage

    Lineage.problem_of = lambda *_: ""  # type: ignore[method-assign]


@mutant
def superseded_metadata_goes_at_once() -> None:
    """Metadata files are deleted as soon as they are superseded (R29, R30)."""
    from arka.iceberg.garbage import Garbage

    make = Garbage.__init__

    def hasty(self: Any, grace_s: float = 0.0, **options: Any) -> None:
        make(self, 0.0, **options)

    Garbage.__init__ = hasty  # type: ignore[method-assign]


@mutant
def private_properties() -> None:
    """Tables get properties that other writers act on (R30)."""
    from arka.iceberg import control
    from arka.tableproperties import FORMER_DEFAULTS

    made = control.new_properties
    control.new_properties = lambda definition: {**made(definition), **FORMER_DEFAULTS}


@mutant
def old_connections_are_trusted() -> None:
    """Nobody asks over a new connection whether a commit is there (R28)."""
    from arka.iceberg import commit

    commit.is_seen = lambda *_: True


@mutant
def waiting_files_are_trusted() -> None:
    """Nobody looks for files that wait for their commit (R28)."""
    from arka.iceberg.waiting import WaitingFiles

    WaitingFiles.check = lambda *_: None  # type: ignore[method-assign,misc,assignment]


@mutant
def files_of_commits_are_leftovers() -> None:
    """Files of an attempt are deleted without a look at what the table names (R32)."""
    from arka.iceberg import leftovers

    leftovers._names_any = lambda *_: False


@mutant
def reads_of_what_was_set_aside() -> None:
    """A read finds a write whose writer was told that it is in no table (R25, R32)."""
    from dataclasses import replace

    from arka.tiers import reads

    frames_of = reads._frames_of

    def all_of(*args: Any) -> Any:
        found = frames_of(*args)
        return found and replace(found, without=())

    reads._frames_of = all_of


@mutant
def set_apart_without_a_word() -> None:
    """What is set apart counts for nothing in the watch: its table stands still in silence (R35)."""
    from arka.tiers.pipeline import Pipeline

    watched = Pipeline._watched

    def forgetful(self: Any, table: Any) -> Any:
        found = watched(self, table)
        look = found._look
        if look.__name__ != "within_the_log":

            def within_the_log() -> Any:
                state = look()
                return state if table.backlog else type(state)(state.reached_lsn, 0)

            found._look = within_the_log
        return found

    Pipeline._watched = forgetful  # type: ignore[method-assign]


@mutant
def starts_without_a_deadline() -> None:
    """Each step of a start waits for a slow store as long as it takes (R31, R35)."""
    from arka.tiers.uplink import Patience

    @contextmanager
    def spend(self: Patience) -> Iterator[tuple[float, float]]:
        yield float("inf"), float("inf")

    Patience.spend = spend  # type: ignore[method-assign]


@mutant
def streams_without_order() -> None:
    """``ordered`` is ignored: writes behind a refusal are taken (R36)."""
    from arka.flight.ordering import StreamOrder

    StreamOrder.is_ordered = lambda *_: False  # type: ignore[assignment,method-assign]


@mutant
def damage_counts_against_all() -> None:
    """No table is ever known to be quiet: a kill counts against each (R37)."""
    from arka.tiers.activity import TableActivity

    TableActivity._is_quiet = lambda *_: False  # type: ignore[assignment,method-assign]


@mutant
def new_stores_without_copies() -> None:
    """A log goes on in a new store although something was in the old one only (R38)."""
    from arka.tiers import newstore

    async def nothing(*_: Any) -> None:
        return None

    newstore._check_copies = nothing


@mutant
def backups_keep_their_block() -> None:
    """A restored backup goes on with the LSNs that its original may have given since (R2, R38)."""
    from arka.storage import backup

    async def nothing(*_: Any) -> None:
        return None

    backup.settle_restored = nothing


@mutant
def reads_believe_marks() -> None:
    """A read takes every mark for this log's own (R15, R25)."""
    from dataclasses import replace

    from arka.iceberg import scan
    from arka.lineage import NO_STARTS

    base_of = scan._base_of
    scan._base_of = lambda table, job: base_of(table, replace(job, lineage=NO_STARTS))


@mutant
def backups_without_a_look() -> None:
    """A backup does not look whether it has the files that its tables need (R38)."""
    from arka.storage.backuptables import CopiedTables

    CopiedTables.check = lambda *_: ()  # type: ignore[method-assign]


@mutant
def missing_segments_are_not_missed() -> None:
    """What the seal mark names need not be there (R39)."""
    from arka.wal import named

    named.find_unnamed = lambda *_: []


@mutant
def missing_state_is_an_empty_disk() -> None:
    """A log whose state or seal mark is gone is taken for none (R39)."""
    from arka.tiers import startup
    from arka.wal import dump, named, salvage

    for module in (named, startup, dump, salvage):
        if hasattr(module, "find_headless"):
            module.find_headless = lambda *_: None


@mutant
def settings_of_others() -> None:
    """Settings files and variables of pyiceberg count (R40)."""
    import sys
    from types import ModuleType

    sys.modules["arka.iceberg.isolation"] = ModuleType("arka.iceberg.isolation")


@mutant
def doubles_are_floats() -> None:
    """Doubles of manifests are read by pyiceberg's compiled decoder (R27)."""
    import sys
    from types import ModuleType

    sys.modules["arka.iceberg.avrodoubles"] = ModuleType("arka.iceberg.avrodoubles")


@mutant
def imports_from_the_working_directory() -> None:
    """The working directory stays on the path that modules are imported from (R40)."""
    from arka import importpath

    importpath.without_working_directory = lambda entries: list(entries)  # type: ignore[assignment]


@mutant
def drops_by_name() -> None:
    """A drop removes whatever has the name by then (R5)."""
    from arka.iceberg import control

    control.drop_entry = lambda opened, table: opened.drop_table(table.name())


@mutant
def purges_without_a_look() -> None:
    """A purge does not look for other tables near the one that it purges (R29)."""
    from arka.iceberg import purge

    purge._others_near = lambda *_: []


@mutant
def files_of_older_columns() -> None:
    """Files that were written before others made a column required are committed (R27)."""
    from arka.iceberg import commit

    commit.misfit = lambda *_: ""


@mutant
def second_names_are_renames() -> None:
    """A table moves to whatever name it was found under last (R5, R20)."""
    from arka.tiers import tables

    async def believe(*_: Any) -> None:
        return

    tables.check_own_name = believe


@mutant
def schema_ids_are_believed() -> None:
    """A schema id of others means the columns that it meant first (R24)."""
    from arka.tiers.table import Table

    Table.numbered = lambda self, info: info  # type: ignore[method-assign]
    Table.learn_schema = lambda self, number, schema: self.schemas.setdefault(number, schema)  # type: ignore[method-assign]


__all__ = ["MUTANTS"]
