"""A warehouse without files, which may be exchanged, emptied, or lose a file for a time (R28).

Owns: which warehouse is at the place, its marker, and which tables lack a file. Does not own the tables
(``simcatalog``) nor what a process remembers of its warehouse, which is on its machine's disk (``simworld``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from uuid import UUID

from arka.storage.ports import FilesMissing, WarehouseChanged

URL: Final = "sim://warehouse"


class SimWarehouse:
    """The place where all processes of a simulation find their tables' files.

    Attributes:
        marker: of the log's own warehouse, which is not always at the place.
        is_own: whether it is.
        local: whether a commit looks at the place by itself, as on local files; else the server asks for a look.
        gone: tables one of whose metadata files is not there.
        was_gone: tables of which that was ever so.
        on_marker: told of each marker that is made in another warehouse.
    """

    def __init__(self) -> None:
        self.marker: UUID | None = None
        self.is_own = True
        self.local = True
        self.gone: set[UUID] = set()
        self.was_gone: set[UUID] = set()
        self.on_marker: Callable[[], None] = lambda: None
        self._other_marker: UUID | None = None

    def exchange(self, marker: UUID | None) -> None:
        """Put another warehouse at the place, with the marker ``marker``; None for an empty one."""
        self.is_own = False
        self._other_marker = marker

    def bring_back(self) -> None:
        """Put the own warehouse back at the place."""
        self.is_own = True

    def lose_file(self, table: UUID) -> None:
        """Take one metadata file of a table away; ``gone`` may be emptied again."""
        self.gone.add(table)
        self.was_gone.add(table)

    def shows(self, table: UUID) -> bool:
        """Whether a reader of catalog and warehouse can read a table now."""
        return self.is_own and table not in self.gone

    def check_place(self) -> None:
        """Check that the own warehouse is at the place.

        Raises:
            WarehouseChanged: it is not.
        """
        if not self.is_own:
            raise WarehouseChanged("the warehouse is another one than before")

    def check_files(self, table: UUID) -> None:
        """Look for a table's files.

        Raises:
            WarehouseChanged: the own warehouse is not at the place.
            FilesMissing: a file is not there.
        """
        self.check_place()
        if table in self.gone:
            raise FilesMissing(f"{URL}/{table}/metadata/m0.avro")

    def read_marker(self) -> UUID | None:
        """Read the marker of the warehouse that is at the place."""
        return self.marker if self.is_own else self._other_marker

    def make_marker(self, uuid: UUID) -> UUID:
        """Make a marker in the warehouse that is at the place, if it has none; returns the one that it has."""
        if not self.is_own:
            if self._other_marker is None:
                self.on_marker()
                self._other_marker = uuid
            return self._other_marker
        self.marker = self.marker or uuid
        return self.marker


__all__ = ["URL", "SimWarehouse"]
