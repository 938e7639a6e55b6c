"""Both disks do what the log relies on."""

import random
from pathlib import Path

import pytest

from arka.storage.disk import PosixDisk
from arka.storage.ports import Disk
from arka.testing.conformance_disk import CHECKS
from arka.testing.simdisk import SimDisk


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kind", ["posix", "simulated"])
async def test_disk_conforms(kind: str, name: str, tmp_path: Path) -> None:
    """The real and the simulated disk pass the same checks."""
    disk: Disk = PosixDisk() if kind == "posix" else SimDisk(random.Random(1))
    await CHECKS[name](disk, tmp_path / "deep" / "log")
