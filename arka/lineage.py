"""Which starts of a log one data directory descends from, and whether a table's mark is of one of them (R15, R29).

Owns: the record of a log's starts, what a table remembers of a log, and the judgement whether the two fit together.
Does not own where either is kept: ``arka.wal.logstate``, ``arka.tiers.epochrecords`` and ``arka.iceberg.marks`` do.

Two copies of a data directory have the same log, take the same epochs, and give the same LSNs to different writes. So
LSN and epoch do not say whose commit a mark speaks of. Each start draws a random token and records it, with the first
LSN that it may give, before its first commit. A commit writes a hash of the token beside the mark. The hash covers the
table's UUID, epoch and LSN too: others may copy the properties of one table to another one of the same log.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID

#: Starts that a log remembers: of a table whose last commit is from an earlier one only the LSN is judged.
MAX_STARTS: Final = 64
#: What a commit's hash covers: the start's token, the table's UUID, epoch and LSN.
_COVERED: Final = struct.Struct("<Q16sQQ")


class Start(NamedTuple):
    """One start of a log that may have committed.

    Attributes:
        epoch: the epoch that it took.
        token: a random number of 63 bits; never 0.
        first_lsn: no LSN at or above it was given before.
    """

    epoch: int
    token: int
    first_lsn: int


@dataclass(frozen=True, slots=True)
class CommitMark:
    """What a table remembers of one log, in its own properties (R15).

    Attributes:
        log_uuid: the log.
        committed_lsn: the last LSN of it that the table holds.
        epoch: in which that was committed.
        token: what the commit wrote of its start's token, see ``Lineage.token_for``; 0 where an older version did.
        damage: what others changed of the mark, for people; empty if nothing. The numbers mean nothing then.
    """

    log_uuid: UUID
    committed_lsn: int
    epoch: int
    token: int = 0
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Lineage:
    """The starts of a log that a data directory knows of, oldest first.

    Invariant: epochs rise, and no first LSN is below the one before it. It lacks none above its first epoch that has
    committed to a table, since a directory that the log went on without is stale (R13).
    """

    starts: tuple[Start, ...] = ()

    def extended(self, start: Start) -> Lineage:
        """Add a start; one of the same epoch gives way to it, and the oldest may be forgotten."""
        kept = [known for known in self.starts if known.epoch < start.epoch]
        return Lineage((*kept, start)[-MAX_STARTS:])

    def token_of(self, epoch: int) -> int:
        """The token of the start that took an epoch; 0 if it is not known."""
        return next((start.token for start in self.starts if start.epoch == epoch), 0)

    def token_for(self, table: UUID, epoch: int, committed_lsn: int) -> int:
        """What a commit of the start that took an epoch writes: 64 bits that fit this mark of this table alone.

        Returns:
            0 if the start's token is not known.
        """
        token = self.token_of(epoch)
        if not token:
            return 0
        covered = _COVERED.pack(token, table.bytes, epoch, committed_lsn)
        return int.from_bytes(hashlib.blake2b(covered, digest_size=8).digest(), "little") or 1

    def objection(
        self, name: object, table: UUID, mark: CommitMark, known_lsn: int = 0, recorded: CommitMark | None = None
    ) -> str:
        """Say why a table's mark is not to be believed, and what to do; empty if it may be (R15, R20, R25).

        Args:
            name: the table's, for people.
            table: its UUID.
            mark: what the table remembers of this log.
            known_lsn: the last LSN that the asking process knew to be committed before the mark was read; 0 if none.
            recorded: the highest mark of the table that this directory has seen, as of the start; None if none.
        """
        if mark.damage:
            return (
                f"Others changed what Arka recorded in table {name}: {mark.damage}. Nothing is committed to it or "
                "taken for committed. Set the property back and restart the server, or drop the table"
            )
        problem = self.problem_of(table, mark)
        if problem:
            return other_copy_detail(name, problem)
        if mark.committed_lsn < known_lsn:
            return rollback_detail(name, mark.committed_lsn, known_lsn)
        problem = "" if recorded is None else self.contradiction(recorded, mark)
        return other_copy_detail(name, problem) if problem else ""

    def problem_of(self, table: UUID, mark: CommitMark) -> str:
        """Say why a table's intact mark is not of this log as this directory has it; empty if it may be.

        A mark of an epoch above the last start is not judged: it is a question of who has the epoch (R10).
        """
        later = next((start for start in self.starts if start.epoch > mark.epoch), None)
        if later is not None and mark.committed_lsn >= later.first_lsn:
            return (
                f"it holds LSN {mark.committed_lsn} in epoch {mark.epoch}, in which this directory gave none above "
                f"{later.first_lsn - 1}"
            )
        if not self.starts or not self.starts[0].epoch <= mark.epoch <= self.starts[-1].epoch:
            return ""
        if not mark.token or mark.token != self.token_for(table, mark.epoch, mark.committed_lsn):
            # Each start that committed here since the first of these has recorded its token and written the hash.
            return f"no process of this directory committed LSN {mark.committed_lsn} to it in epoch {mark.epoch}"
        return ""

    def contradiction(self, recorded: CommitMark, mark: CommitMark) -> str:
        """Say why a mark cannot follow one that this directory has seen of the same table; empty if it can.

        Of epochs before the first start that is known no token is known: there the order of both numbers says it.

        Args:
            recorded: the mark that was seen.
            mark: an intact mark that is not below it.
        """
        if not self.starts or mark.epoch >= self.starts[0].epoch:
            return ""
        if mark.committed_lsn == recorded.committed_lsn:
            # An older version writes no token.
            follows = mark.epoch == recorded.epoch and mark.token in (0, recorded.token)
        else:
            follows = mark.epoch >= recorded.epoch
        if follows:
            return ""
        return (
            f"it holds LSN {mark.committed_lsn} in epoch {mark.epoch}, and this directory has seen LSN "
            f"{recorded.committed_lsn} of epoch {recorded.epoch} in it"
        )


#: Of a log that no start was recorded of.
NO_STARTS: Final = Lineage()


def other_copy_detail(name: object, problem: str) -> str:
    """Say that a table is not this directory's to commit to, and what to do.

    Args:
        name: the table's.
        problem: see ``Lineage.problem_of``.
    """
    return (
        f"Table {name} stands where this data directory did not bring it: {problem}. Another copy of this data "
        "directory writes to the same tables, or an older state of it was put back, or others copied another table's "
        "arka.* properties to it. Nothing is committed here or taken for committed. Set such properties back and "
        "restart the server. Let only one copy go on, and stop the others for good: docs/recovery.md, A copy of a "
        "data directory"
    )


def rollback_detail(name: object, found_lsn: int, known_lsn: int) -> str:
    """Say that a table stands below what was committed, with both numbers (R20).

    Args:
        name: the table's.
        found_lsn: where it stands.
        known_lsn: what was committed to it.
    """
    return (
        f"Table {name} stands at LSN {found_lsn}, but {known_lsn} was committed: others rolled it back, "
        "replaced it or removed its arka.* properties. Nothing is replayed (R20); drop it, or move it back and restart"
    )


__all__ = ["MAX_STARTS", "NO_STARTS", "CommitMark", "Lineage", "Start", "other_copy_detail", "rollback_detail"]
