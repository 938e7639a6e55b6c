"""Objects in a local folder: durable when the put returns, and no listing that hides a failure."""

import errno
import os
import shutil
from pathlib import Path

import pytest

import arka.storage.objects
from arka.storage.objects import FileObjectStore, open_folder, read_range
from arka.storage.ports import ObjectExists, StoreUnavailable


class FolderSyncs:
    """Which folders were fsynced, in order; can let one of the next fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[Path] = []
        self.fail: Path | None = None
        real = arka.storage.objects._sync_directory

        def sync(folder: Path) -> None:
            if folder == self.fail:
                self.fail = None
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
            self.folders.append(folder)
            real(folder)

        monkeypatch.setattr(arka.storage.objects, "_sync_directory", sync)


@pytest.fixture
def syncs(monkeypatch):
    return FolderSyncs(monkeypatch)


async def test_staging_files_of_a_crash_are_invisible(tmp_path):
    """What a crash left half written is in no listing, and in no later object's way."""
    store = FileObjectStore(tmp_path, 2)
    await store.put_new("n/epoch/1", [b"x"])
    staging = tmp_path / ".staging"
    assert list(staging.iterdir()) == []
    (staging / "0123456789abcdef").write_bytes(b"half")
    for prefix in ("", "n/", "n/epoch/"):
        assert [meta.key for meta in await store.list_keys(prefix)] == ["n/epoch/1"]
    await store.put_new("n/epoch/2", [b"y"])
    assert [meta.key for meta in await store.list_keys("")] == ["n/epoch/1", "n/epoch/2"]


async def test_every_name_on_the_way_is_durable(tmp_path, syncs):
    """A put fsyncs each folder that holds a new name, from the root's parent down to the object's folder."""
    root = tmp_path / "a" / "root"
    await FileObjectStore(root, 2).put_new("n/wal/7/x", [b"x"])
    assert {tmp_path, tmp_path / "a", root, root / "n", root / "n" / "wal"} <= set(syncs.folders)
    assert syncs.folders[-1] == root / "n" / "wal" / "7"


async def test_existing_folders_of_another_process_are_made_durable(tmp_path, syncs):
    """A folder that is there already may never have been fsynced: the first put of a process does it."""
    (tmp_path / "n" / "wal").mkdir(parents=True)
    store = FileObjectStore(tmp_path, 2)
    await store.put_new("n/wal/x", [b"x"])
    assert {tmp_path.parent, tmp_path, tmp_path / "n"} <= set(syncs.folders)
    syncs.folders.clear()
    await store.put_new("n/wal/y", [b"y"])
    assert syncs.folders == [tmp_path / "n" / "wal"], "once is enough"


@pytest.mark.parametrize("folder", ["", "n", "n/wal"])
async def test_retry_after_a_failed_folder_sync_syncs_again(folder, tmp_path, syncs):
    """A put whose folder sync failed is not taken for durable by its retry until that folder was fsynced."""
    store = FileObjectStore(tmp_path, 2)
    syncs.fail = tmp_path / folder
    with pytest.raises(StoreUnavailable):
        await store.put_new("n/wal/x", [b"x"])
    syncs.folders.clear()
    try:
        await store.put_new("n/wal/x", [b"x"])
    except ObjectExists:
        assert folder == "n/wal"
    assert tmp_path / folder in syncs.folders
    assert await store.get("n/wal/x") == b"x"


async def test_a_folder_that_was_removed_is_made_again(tmp_path):
    """Somebody who empties the store's folder does not stop later puts for ever."""
    store = FileObjectStore(tmp_path, 2)
    await store.put_new("n/wal/x", [b"x"])
    (tmp_path / "n" / "wal" / "x").unlink()
    (tmp_path / "n" / "wal").rmdir()
    (tmp_path / ".staging").rmdir()
    await store.put_new("n/wal/x", [b"y"])
    assert await store.get("n/wal/x") == b"y"


async def test_folder_of_copies_is_made_again(tmp_path):
    """A folder of copies that somebody removed under a running server takes the next copy."""
    store = open_folder(tmp_path / "copies")
    await store.put_new("n/checkpoint/1", [b"x"])
    shutil.rmtree(tmp_path / "copies")
    assert await store.list_keys("n/") == []
    await store.put_new("n/checkpoint/2", [b"y"])
    assert [meta.key for meta in await store.list_keys("n/")] == ["n/checkpoint/2"]


async def test_failed_put_leaves_nothing(tmp_path, monkeypatch):
    """A put that the disk refused is StoreUnavailable, leaves no object, and may be repeated."""
    store = FileObjectStore(tmp_path, 2)
    with monkeypatch.context() as patch:

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await store.put_new("n/x", [b"x"])
    assert await store.list_keys("") == []
    assert not list(tmp_path.rglob("*/*"))
    await store.put_new("n/x", [b"x"])


@pytest.mark.parametrize("error", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
async def test_listing_that_cannot_be_read_is_no_empty_listing(error, tmp_path, monkeypatch):
    """A folder that cannot be read is StoreUnavailable: "no newer epoch" would be acked upon (R10)."""
    store = FileObjectStore(tmp_path, 2)
    await store.put_new("n/epoch/2", [b"x"])
    real = os.scandir

    def scandir(path):
        if str(path).endswith("epoch"):
            raise OSError(error, os.strerror(error), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for prefix in ("n/epoch/", "n/", ""):
        with pytest.raises(StoreUnavailable):
            await store.list_keys(prefix)
    assert await store.list_keys("m/wal/") == []


async def test_object_deleted_during_a_listing_is_left_out(tmp_path, monkeypatch):
    """A listing while others delete is a listing, not a failure."""
    store = FileObjectStore(tmp_path, 2)
    for name in "abc":
        await store.put_new(f"n/{name}", [b"x"])
    real = Path.stat

    def stat(self, **options):
        if self.name == "b":
            self.unlink(missing_ok=True)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    assert [meta.key for meta in await store.list_keys("n/")] == ["n/a", "n/c"]


async def test_read_range_is_exact(tmp_path):
    """Exactly the bytes asked for, or an error that names the file and where it ends."""
    path = tmp_path / "segment"
    path.write_bytes(bytes(range(100)))
    assert await read_range(path, 0, 100) == bytes(range(100))
    assert await read_range(path, 10, 10) == b""
    assert await read_range(path, 64, 70) == bytes(range(64, 70))
    with pytest.raises(OSError, match="ends at 100, expected at least 101"):
        await read_range(path, 64, 101)


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another store"])
async def test_folder_that_went_away_is_a_store_that_does_not_answer(instead, tmp_path):
    """Nothing is made, deleted or missed in what is in its place; with the folder back, all of it is there (R10)."""
    root = tmp_path / "root"
    store = FileObjectStore(root, 2)
    await store.put_new("n/epoch/1", [b"x"])
    root.rename(tmp_path / "away")
    if instead != "nothing":
        root.mkdir()
    if instead == "another store":
        (root / "n").mkdir()
        (root / "n" / "other").write_bytes(b"y")
    before = sorted(root.rglob("*"))
    for request in (
        store.put_new("n/wal/1", [b"z"]),
        store.list_keys("n/"),
        store.get("n/epoch/1"),
        store.get_range("n/epoch/1", 0, 1),
        store.delete(["n/other"]),
    ):
        with pytest.raises(StoreUnavailable, match=r"is gone|is not the folder that it was"):
            await request
    assert sorted(root.rglob("*")) == before
    assert root.exists() == (instead != "nothing")
    if root.exists():
        root.rename(tmp_path / "instead")
    (tmp_path / "away").rename(root)
    await store.put_new("n/wal/1", [b"z"])
    assert [meta.key for meta in await store.list_keys("n/")] == ["n/epoch/1", "n/wal/1"]
