"""Which keys below a node's id are the node's own, and which belong to strangers (R7, R10).

Owns: the exact form of every key that a node writes, and the listings that return these keys alone. Does not own
what an object holds (``arka.tiers.epochrecords``, ``arka.wal.objectfile``, ``arka.wal.asidefile``).

People and programs leave files in folders: copies, ``Thumbs.db``, ``.DS_Store``. Such a file is logged once. It is
never read, never deleted, and decides nothing. Every listing of a node's keys goes through ``list_own``.
"""

from __future__ import annotations

import re
from typing import Final

import structlog

from arka.storage.ports import ObjectMeta, ObjectStore
from arka.tableproperties import UUID_FORM

log = structlog.get_logger(__name__)

_EPOCH: Final = r"[0-9]{10}"
_LSN: Final = r"[0-9]{16}"
#: The forms of keys, below the node's id, by their first folder.
_FORMS: Final = {
    folder: re.compile(form, re.ASCII)
    for folder, form in {
        "epoch": _EPOCH,
        "started": _EPOCH,
        "heartbeat": f"{_EPOCH}/[0-9]{{10}}",
        "lsn": _LSN,
        "wal": rf"{_EPOCH}/{_LSN}\.wal",
        "checkpoint": f"{_EPOCH}/{_LSN}",
        "parked": rf"{UUID_FORM}/{_LSN}-{_EPOCH}\.wal",
        "behind": rf"{UUID_FORM}/{_LSN}-{_EPOCH}\.wal",
        "aside": f"{UUID_FORM}/{_LSN}",
    }.items()
}
#: Strangers that are remembered as logged.
_MAX_LOGGED: Final = 1024
_logged: set[str] = set()


def is_own(node_id: str, key: str) -> bool:
    """Say whether a key has the exact form of one that the node writes.

    Args:
        node_id: the node's name in the store.
        key: a key of the store.
    """
    if not key.startswith(f"{node_id}/"):
        return False
    folder, _, rest = key[len(node_id) + 1 :].partition("/")
    form = _FORMS.get(folder)
    return form is not None and form.fullmatch(rest) is not None


async def list_own(
    store: ObjectStore, node_id: str, below: str = "", *, start_after: str | None = None
) -> list[ObjectMeta]:
    """List a node's own objects in key order; each stranger among them is logged once and left out.

    Args:
        store: the object store.
        node_id: the node's name in it.
        below: what the keys begin with, below the node's id; for example ``"epoch/"``.
        start_after: keys up to this one are left out.

    Raises:
        StoreUnavailable: the store does not answer.

    Cancellation: nothing changes.
    """
    own: list[ObjectMeta] = []
    for meta in await store.list_keys(f"{node_id}/{below}", start_after=start_after):
        if is_own(node_id, meta.key):
            own.append(meta)
        else:
            _report(f"{store.url}/{meta.key}", meta.size)
    return own


def _report(path: str, size: int) -> None:
    if path in _logged or len(_logged) >= _MAX_LOGGED:
        return
    _logged.add(path)
    log.warning("objects.stranger", path=path, size=size, hint="its name is not one that Arka gives: left alone")


__all__ = ["is_own", "list_own"]
