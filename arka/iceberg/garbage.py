"""Metadata files that no retained snapshot needs: deleted, after a grace period.

Owns: which manifest lists and manifests our own commits have made useless, and when they go. Does not own
data files, nor what other writers or a crash left behind: a sweep of the folder finds that.

What a worker knows dies with it. That is safe: a file that is forgotten here is left, never deleted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from pyiceberg.io import FileIO
from pyiceberg.manifest import ManifestFile
from pyiceberg.table.metadata import TableMetadata

from arka.iceberg.producer import discard

#: How long a reader may go on with a snapshot that has expired, in seconds.
GRACE_S: Final = 600.0
#: Deletions after one commit; the rest waits for the next, so that no commit takes long.
_DELETIONS_PER_COMMIT: Final = 16


@dataclass(slots=True)
class _Lineage:
    """Garbage of one table, valid while every snapshot in it was added by this process, one after another.

    Attributes:
        replaced: manifests that a merge made useless, with the sequence number of the merging snapshot:
            every snapshot from that one on does without them.
        unreferenced: files that no retained snapshot needs, with the time from which they may go.
    """

    replaced: deque[tuple[int, str]] = field(default_factory=deque)
    unreferenced: deque[tuple[float, str]] = field(default_factory=deque)


class Garbage:
    """The garbage of the tables that this worker commits to.

    Args:
        grace_s: seconds between a file's last use by a retained snapshot and its deletion.
        clock: seconds; monotonic.
    """

    def __init__(self, grace_s: float = GRACE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._tables: dict[UUID, _Lineage] = {}

    def landed(
        self,
        before: TableMetadata,
        after: TableMetadata,
        merged_away: Sequence[ManifestFile],
        *,
        consecutive: bool,
    ) -> None:
        """Take note of a commit.

        Args:
            before: the metadata that the commit was based on.
            after: what it became.
            merged_away: manifests of the parent that the new snapshot does without.
            consecutive: whether the parent was this worker's own last commit. After a rollback or another
                writer's commit, snapshots may refer again to what was thought useless.
        """
        if not consecutive or len(after.refs) > 1:
            self._tables.pop(after.table_uuid, None)
            return
        lineage = self._tables.setdefault(after.table_uuid, _Lineage())
        due = self._clock() + self._grace_s
        newest = max(snapshot.sequence_number or 0 for snapshot in after.snapshots)
        lineage.replaced += ((newest, manifest.manifest_path) for manifest in merged_away)
        kept = {snapshot.snapshot_id for snapshot in after.snapshots}
        for snapshot in before.snapshots:
            if snapshot.snapshot_id not in kept:
                lineage.unreferenced.append((due, snapshot.manifest_list))
        oldest = min(snapshot.sequence_number or 0 for snapshot in after.snapshots)
        while lineage.replaced and lineage.replaced[0][0] <= oldest:
            lineage.unreferenced.append((due, lineage.replaced.popleft()[1]))

    def collect(self, table_uuid: UUID, io: FileIO) -> None:
        """Delete what is due, a little at a time; what cannot be deleted is left for the sweep."""
        lineage = self._tables.get(table_uuid)
        if lineage is None:
            return
        now = self._clock()
        gone: list[str] = []
        while lineage.unreferenced and lineage.unreferenced[0][0] <= now and len(gone) < _DELETIONS_PER_COMMIT:
            gone.append(lineage.unreferenced.popleft()[1])
        discard(io, gone)


__all__ = ["GRACE_S", "Garbage"]
