"""Both disks do what the log relies on."""

import errno
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


def test_errors_name_the_file() -> None:
    """An error of a call that is given a descriptor names its file: a person has to find the disk."""
    full = Path("/dev/full")
    file = PosixDisk().open(full)
    with pytest.raises(OSError, match="/dev/full") as raised:
        file.write(0, [b"x"])
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="/dev/full"):
        # A device cannot be fsynced.
        file.sync()
    file.close()
