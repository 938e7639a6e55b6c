"""Metadata files that nothing needs: deleted, after a grace period.

Owns: which manifest lists, manifests and superseded ``metadata.json`` files may go, and when. No property of the
table decides that: a copy of the catalog that is younger than the grace period names files that are all there
(R30). Data and delete files go as well once no retained snapshot names them, if our own commits took
them out. Does not own what attempts left (``leftovers``).

What a worker knows dies with it. A file that is forgotten is left, never deleted, with one exception: the first
commit that a worker makes to a table looks once for ``metadata.json`` files that earlier workers forgot.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from pyiceberg.io import FileIO
from pyiceberg.manifest import ManifestFile
from pyiceberg.table.metadata import TableMetadata

from arka.iceberg.fileio import list_folder
from arka.iceberg.producer import discard
from arka.iceberg.tableoptions import expires_files
from arka.tableproperties import UUID_FORM

#: How long a reader may go on with a snapshot that has expired, in seconds.
GRACE_S: Final = 600.0
#: Deletions after one commit; the rest waits for the next, so that no commit takes long.
_DELETIONS_PER_COMMIT: Final = 16
#: The same for manifests, data files and delete files: a commit of upserts replaces dozens of them.
_FILES_PER_COMMIT: Final = 128
#: ``<version>-<uuid>.metadata.json``, as pyiceberg names metadata files.
_METADATA_NAME: Final = re.compile(rf"(\d{{5,}})-{UUID_FORM}\.metadata\.json\Z")
#: Locations that Arka made end in eight digits of the table's own: such a folder holds one table (R5).
_OWN_LOCATION: Final = re.compile(r"-[0-9a-f]{8}\Z")


@dataclass(slots=True)
class _Superseded:
    """Metadata files of one table that are out of its metadata log, or are still in it.

    Attributes:
        log: what the metadata log named after the last commit of this worker.
        gone: files that have left it, oldest first, with the time from which they may go.
    """

    log: set[str] = field(default_factory=set)
    gone: deque[tuple[float, str]] = field(default_factory=deque)


@dataclass(slots=True)
class _Lineage:
    """Garbage of one table, valid while every snapshot in it was added by this process, one after another.

    Attributes:
        replaced: manifests, data files and delete files that a commit made useless, with the sequence number of its
            snapshot: every snapshot from that one on does without them.
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
        self._superseded: dict[UUID, _Superseded] = {}

    def forget(self) -> None:
        """Forget everything: catalog or warehouse are others now, and nothing known of the old ones holds there."""
        self._tables.clear()
        self._superseded.clear()

    def replaced(self, before: TableMetadata, after: TableMetadata, location: str, io: FileIO) -> None:
        """Take in that a commit wrote a new metadata file, and delete older ones whose grace is over.

        Also files that other writers' commits pushed out of the metadata log meanwhile. A file that is current or in
        the log again, since others registered an older state, is kept.

        Args:
            before: the metadata that the commit was based on.
            after: what it became.
            location: of the file that holds ``after``.
            io: the warehouse.
        """
        now = self._clock()
        kept = {entry.metadata_file for entry in after.metadata_log} | {location}
        known = self._superseded.get(after.table_uuid)
        if known is None:
            known = self._superseded[after.table_uuid] = _Superseded()
            known.gone += ((now, file) for file in _forgotten(after, location, io, self._grace_s))
        left = (known.log | {entry.metadata_file for entry in before.metadata_log}) - kept
        known.gone += ((now + self._grace_s, file) for file in sorted(left))
        known.log = kept
        due: list[str] = []
        while known.gone and known.gone[0][0] <= now and len(due) < _DELETIONS_PER_COMMIT:
            file = known.gone.popleft()[1]
            if file not in kept:
                due.append(file)
        discard(io, due)

    def landed(
        self,
        before: TableMetadata,
        after: TableMetadata,
        merged_away: Sequence[ManifestFile],
        removed: Sequence[str] = (),
        *,
        consecutive: bool,
    ) -> None:
        """Take note of a commit.

        Args:
            before: the metadata that the commit was based on.
            after: what it became.
            merged_away: manifests of the parent that the new snapshot does without.
            removed: data and delete files of the parent that the new snapshot does without.
            consecutive: whether the parent was this worker's own last commit. After a rollback or another
                writer's commit, snapshots may refer again to what was thought useless.

        With ``gc.enabled=false`` others share the files: what was known is forgotten, and nothing is deleted (R29).
        """
        if not consecutive or len(after.refs) > 1 or not expires_files(after.properties):
            self._tables.pop(after.table_uuid, None)
            return
        lineage = self._tables.setdefault(after.table_uuid, _Lineage())
        due = self._clock() + self._grace_s
        newest = max(snapshot.sequence_number or 0 for snapshot in after.snapshots)
        lineage.replaced += ((newest, manifest.manifest_path) for manifest in merged_away)
        lineage.replaced += ((newest, path) for path in removed)
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
        while lineage.unreferenced and lineage.unreferenced[0][0] <= now and len(gone) < _FILES_PER_COMMIT:
            gone.append(lineage.unreferenced.popleft()[1])
        discard(io, gone)


def _forgotten(metadata: TableMetadata, location: str, io: FileIO, grace_s: float) -> list[str]:
    """Find metadata files that workers before this one left: older than all that the log names, and than the grace.

    Only in a folder that is certainly this table's own (R29). Ages are told by the files' own times, so that no
    clock but the warehouse's counts.
    """
    folder, _, current = location.rpartition("/")
    if not _OWN_LOCATION.search(metadata.location) or not folder.startswith(metadata.location):
        return []
    kept = {current} | {entry.metadata_file.rpartition("/")[2] for entry in metadata.metadata_log}
    versions = [int(match[1]) for name in kept if (match := _METADATA_NAME.match(name))]
    if len(versions) < len(kept):
        return []
    try:
        found = list_folder(io, folder)
    except OSError:
        return []
    newest = found.get(current, 0.0)
    return [
        f"{folder}/{name}"
        for name, written in sorted(found.items())
        if (match := _METADATA_NAME.match(name)) and int(match[1]) < min(versions) and newest - written > grace_s
    ]


__all__ = ["GRACE_S", "Garbage"]
