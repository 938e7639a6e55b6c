"""Files of strangers in the object store's folders decide nothing, and are left alone (R7, R10, R33)."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from arka.errors import Fenced
from arka.lineage import NO_STARTS
from arka.records import Tier
from arka.testing.simnode import SimNode, create_table, write_all
from arka.testing.simstore import SimStore
from arka.tiers.epochs import Claim, LocalLog, take_epoch
from arka.tiers.listing import is_own, list_own
from arka.wal.asidefile import aside_key, find_asides
from arka.wal.objectfile import object_key

DISK = UUID(int=0xD15C)
TABLE = UUID(int=0x7AB1E)
#: Names that sort before and after every key, copies of keys, and numbers of another form.
NAMES = [".DS_Store", "Thumbs.db", "zz~", "0000000001.bak", "9999999999 (1)", "99999999999999999", "-1", "٠٠٠٠٠٠٠٠٠٩"]
FOLDERS = ["epoch", "started", "lsn", "heartbeat", "wal", "checkpoint", "parked", "behind", "aside"]


@pytest.mark.parametrize("name", NAMES)
async def test_they_neither_fence_nor_stop_a_start(autojump_clock: MockClock, name: str) -> None:
    """A running process keeps its epoch, and the next start of its disk, or of another one, counts on from there."""
    store = SimStore()
    lease = await take_epoch(store, Claim("n", None, DISK))
    await lease.record_start(None, NO_STARTS)
    for folder in ("epoch", "started", "lsn", "heartbeat", "heartbeat/0000000001", "wal", "wal/0000000001"):
        store.objects[f"n/{folder}/{name}"] = b"x"
    await lease.verify()
    await lease.reserve_block()
    local = LocalLog(lease.log_uuid, 1, lease.first_lsn)
    again = await take_epoch(store, Claim("n", local, DISK))
    assert (again.log_uuid, again.epoch) == (lease.log_uuid, 2)
    assert again.first_lsn == lease.lsn_ceiling
    await again.record_start(None, NO_STARTS)
    with pytest.raises(Fenced, match="Epoch 0000000002"):
        await lease.verify()
    await again.leave()
    other = await take_epoch(store, Claim("n", None, UUID(int=0x07DE)))
    assert (other.epoch, other.first_lsn) == (3, again.lsn_ceiling)
    assert sum(key.endswith(f"/{name}") for key in store.objects) == 7, "they are left alone"


@pytest.mark.parametrize("lost", [False, True])
async def test_a_node_goes_on_among_them(autojump_clock: MockClock, lost: bool) -> None:
    """Writes, checkpoints, deletions, a restart, and a restore on an empty disk, with strangers in every folder."""
    world = SimNode()
    world.catalog.poison.add(7)

    def litter(epoch: int) -> None:
        folders = [*FOLDERS, *(f"{folder}/{epoch:010d}" for folder in ("wal", "checkpoint", "heartbeat"))]
        folders += [f"{folder}/{TABLE}" for folder in ("parked", "behind", "aside")]
        for store in (world.store, world.disk.checkpoints):
            for key in [f"n/{folder}/{name}" for folder in folders for name in NAMES]:
                store.objects[key] = b"x"

    with trio.fail_after(6000):
        async with world.run() as pipeline:
            await write_all(pipeline, await create_table(pipeline), range(10), Tier.ICEBERG_COMMITTED)
        litter(1)
        before = {key for key in world.store.objects if key.endswith(tuple(NAMES))}
        if lost:
            world.lose_disk()
        async with world.run() as pipeline:
            (table,) = pipeline.tables.all()
            await write_all(pipeline, table, range(10, 20), Tier.ICEBERG_COMMITTED)
            litter(2)
            await write_all(pipeline, table, range(20, 40), Tier.ICEBERG_COMMITTED)
    assert world.ids() == [n for n in range(40) if n != 7]
    assert before <= world.store.objects.keys(), "they are left alone"


async def test_each_is_logged_once() -> None:
    """A listing that runs every few seconds does not repeat itself."""
    store = SimStore()
    store.objects |= {"once/epoch/0000000001": b"", "once/epoch/mine.txt": b"x", "once/lsn/also": b"x"}
    with capture_logs() as logs:
        for _ in range(3):
            assert [meta.key for meta in await list_own(store, "once", "epoch/")] == ["once/epoch/0000000001"]
            assert len(await list_own(store, "once")) == 1
    found = [entry for entry in logs if entry["event"] == "objects.stranger"]
    assert sorted(entry["path"].rpartition("once/")[2] for entry in found) == ["epoch/mine.txt", "lsn/also"]


def test_forms_are_exact() -> None:
    """What a node writes is its own; what differs by a letter is not."""
    own = [object_key("n", 1, 5), aside_key("n", TABLE, 3), "n/epoch/0000000001", "n/heartbeat/0000000001/0000000002"]
    own += [f"n/parked/{TABLE}/{1:016d}-{1:010d}.wal", f"n/checkpoint/{1:010d}/{7:016d}", f"n/lsn/{9:016d}"]
    assert all(is_own("n", key) for key in own)
    for key in own:
        for wrong in (f"{key}.bak", f"{key}/x", f"{key}\n", key.replace("n/", "m/", 1), f"x{key}", key[:-1]):
            assert not is_own("n", wrong), wrong


def test_the_tool_leaves_them_out(tmp_path: Path) -> None:
    """``arka wal aside`` and its kin read the copies of set-aside writes alone."""
    folder = tmp_path / "checkpoints" / "n" / "aside" / str(TABLE)
    folder.mkdir(parents=True)
    (folder / f"{3:016d}").write_bytes(b"")
    for name in ("Thumbs.db", f"{3:016d}.bak", ".DS_Store"):
        (folder / name).write_bytes(b"x")
    assert [path.name for path in find_asides(tmp_path)] == [f"{3:016d}"]
