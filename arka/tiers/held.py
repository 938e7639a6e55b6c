"""Which objects with frames of one table have to be in the object store, beside the log (R33).

Owns: what the newest checkpoint names, and which of it is damaged or gone. A frame whose segment the log has let go of
is in such an object alone, so that one that is gone may not be passed over. Does not own the objects
(``arka.tiers.parking``) nor what becomes of their table (``arka.tiers.tables``).

A segment goes only after a checkpoint that names the objects with its frames (``arka.tiers.release``). What lies above
the first segment is in the log too.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Mapping, Sequence
from typing import Final
from uuid import UUID

from arka.errors import DataCorruption
from arka.records import MAX_LSN, HeldObject
from arka.tiers.table import Table

#: How many digits of an LSN begin an object's name.
_LSN_DIGITS: Final = 16


def stop_damaged(table: Table, error: DataCorruption) -> None:
    """Stop a table of which something is damaged or gone, with the way out (R33)."""
    table.stop(
        f"Table {table.info.name} stops at LSN {table.committed.lsn}: {error.detail}. What is intact of its writes is "
        "kept. Put that file or object back as it was and restart the server, or drop the table"
    )


def first_damage(group: BaseExceptionGroup[DataCorruption]) -> DataCorruption:
    """The first one in a group."""
    found = group.exceptions[0]
    return first_damage(found) if isinstance(found, BaseExceptionGroup) else found


class HeldObjects:
    """The objects of one log that have to be there. Used from trio's thread only."""

    def __init__(self, held: Mapping[UUID, Sequence[HeldObject]], base_lsn: int) -> None:
        """Begin with what the start found.

        Args:
            held: by table, what the newest checkpoint names.
            base_lsn: the last LSN that the log's segments do not hold.
        """
        self._expected = {uuid: list(objects) for uuid, objects in held.items()}
        self._base_lsn = base_lsn
        self._damage: dict[str, DataCorruption] = {}

    def note_unreadable(self, uuid: UUID, key: str, error: DataCorruption) -> None:
        """Hear of an object whose header is damaged; its name says where its frames begin.

        Args:
            uuid: the table.
            key: below the node's name.
            error: what is wrong.
        """
        self._damage[key] = error
        expected = self._expected.setdefault(uuid, [])
        if all(each.key != key for each in expected):
            digits = key.rpartition("/")[2][:_LSN_DIGITS]
            expected.append(HeldObject(key, int(digits) if digits.isdecimal() else 0, MAX_LSN))

    def check(self, table: Table, folder: str, here: Iterable[str], url: str) -> None:
        """Check that a table whose mark was read lacks none of its objects.

        Args:
            table: which.
            folder: of the objects.
            here: the keys of those that are intact.
            url: where the node's objects are, for messages.

        Raises:
            DataCorruption: it lacks one; the writes in it are named.
        """
        uuid, committed_lsn = table.info.uuid, table.committed.lsn
        missing = self.missing(uuid, folder, here)
        lost = [each for each in missing if self._is_lost(each, committed_lsn)]
        # The rest is committed, or in the log.
        self.forget(uuid, [each.key for each in missing if each not in lost])
        if not lost:
            return
        spans = ", ".join(f"({max(after, committed_lsn)}, {through}]" for after, through in self._spans(lost, here))
        damage = self._damage.get(lost[0].key)
        raise DataCorruption(
            f"{url}/{lost[0].key}",
            0 if damage is None else damage.offset,
            f"writes of {table.info.name} in LSNs {spans}" + ("" if damage is None else f" ({damage.expected})"),
            "no object" if damage is None else damage.found,
        )

    def missing(self, uuid: UUID, folder: str, here: Iterable[str]) -> list[HeldObject]:
        """The objects of a table that have to be in a folder and are not among those that are intact there."""
        intact = set(here)
        found = (each for each in self._expected.get(uuid, ()) if each.key.startswith(f"{folder}/"))
        return sorted((each for each in found if each.key not in intact), key=lambda each: each.first_lsn)

    def with_missing(self, folder: str, found: Mapping[UUID, Sequence[HeldObject]]) -> dict[UUID, list[HeldObject]]:
        """Add what is missing to what is there: no later start may pass over it.

        Args:
            folder: of the objects.
            found: by table, those that are intact.
        """
        joined = {uuid: list(objects) for uuid, objects in found.items() if objects}
        for uuid in self._expected:
            missing = self.missing(uuid, folder, [each.key for each in found.get(uuid, ())])
            if missing:
                joined.setdefault(uuid, []).extend(missing)
        return joined

    def forget(self, uuid: UUID, keys: Iterable[str]) -> None:
        """Expect objects no more that are about to be deleted, or that nothing needs."""
        gone = set(keys)
        kept = [each for each in self._expected.pop(uuid, ()) if each.key not in gone]
        if kept:
            self._expected[uuid] = kept

    def forget_all(self, uuid: UUID, folder: str) -> None:
        """Expect no object of a table in a folder any more."""
        self.forget(uuid, [each.key for each in self._expected.get(uuid, ()) if each.key.startswith(f"{folder}/")])

    def _spans(self, lost: Sequence[HeldObject], here: Iterable[str]) -> list[tuple[int, int]]:
        """The LSNs of lost objects, ``(after, through]``: one span for those that no intact one lies between."""
        intact = sorted(here)
        spans: list[tuple[int, int]] = []
        between = -1
        for each in lost:
            through, place = min(each.last_lsn, self._base_lsn), bisect(intact, each.key)
            if place == between:
                spans[-1] = spans[-1][0], max(spans[-1][1], through)
            else:
                spans.append((each.first_lsn - 1, through))
            between = place
        return spans

    def _is_lost(self, held: HeldObject, committed_lsn: int) -> bool:
        """Whether an object that is missing held writes that are neither committed nor in the log."""
        return held.first_lsn <= self._base_lsn and min(held.last_lsn, self._base_lsn) > committed_lsn


__all__ = ["HeldObjects", "first_damage", "stop_damaged"]
