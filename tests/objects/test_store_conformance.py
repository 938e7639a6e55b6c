"""The three object stores do what the object tier relies on."""

from pathlib import Path

import pytest
from obstore.store import MemoryStore

from arka.storage.objects import FileObjectStore, RemoteObjectStore
from arka.storage.ports import ObjectStore
from arka.testing.conformance_store import CHECKS
from arka.testing.simstore import SimStore


def make_store(kind: str, root: Path) -> ObjectStore:
    if kind == "file":
        return FileObjectStore(root / "not" / "yet" / "there", 8)
    if kind == "remote":
        return RemoteObjectStore(MemoryStore(), "memory:///", 8)
    return SimStore()


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", ["file", "remote", "simulated"])
async def test_store_conforms(kind: str, name: str, tmp_path: Path) -> None:
    """The local, the remote and the simulated store pass the same checks."""
    await CHECKS[name](make_store(kind, tmp_path))
