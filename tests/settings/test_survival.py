"""What survives the loss of the disk, where room is measured, and how descriptors are divided (R14, R23, R31)."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from arka.storage.datadir import device_of, free_bytes, shares_device
from arka.storage.descriptors import RESERVE, budget, raise_limit
from arka.storage.survival import local_reason, local_tiers

#: A file system of its own on every Linux machine.
OTHER = Path("/dev/shm")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    if device_of(tmp_path) == device_of(OTHER):
        pytest.fail("the temporary directory is on /dev/shm: give another one")
    made = tmp_path / "data"
    made.mkdir()
    return made


@pytest.mark.parametrize(
    ("url", "survives"),
    [
        ("file://{data}/objects", False),
        ("file://{beside}/objects", False),
        ("file://{beside}/not/there/yet", False),
        ("file:///dev/shm/objects", False),
        ("s3://bucket/prefix", True),
        ("http://catalog", True),
        ("postgresql+psycopg2://host/db", True),
        ("sqlite:///{data}/catalog.db", False),
        ("sqlite:///{beside}/c.db", False),
        ("sqlite+pysqlite:///{beside}/c.db", False),
        ("sqlite:////dev/shm/c.db", True),
    ],
)
def test_a_url_survives_by_its_device(data_dir: Path, url: str, survives: bool) -> None:
    """A local folder never does; an SQLite file does on another device."""
    found = url.format(data=data_dir, beside=data_dir.parent / "beside")
    assert (local_reason(data_dir, found) is None) == survives


def test_a_link_is_followed(data_dir: Path) -> None:
    """A catalog that is reached through a link lies where the link points."""
    link = data_dir.parent / "link"
    link.symlink_to(OTHER)
    assert local_reason(data_dir, f"sqlite:///{link}/c.db") is None
    assert free_bytes(link / "wal") == free_bytes(OTHER)
    assert shares_device(link, "file:///dev/shm/objects")
    assert not shares_device(data_dir, "file:///dev/shm/objects")


def test_iceberg_needs_warehouse_and_catalog(data_dir: Path) -> None:
    """One of them on this disk is enough to lose what was committed."""
    for warehouse, catalog, survives in (
        ("s3://b/w", "http://catalog", True),
        ("s3://b/w", f"sqlite:///{data_dir}/c.db", False),
        (f"file://{data_dir}/w", "http://catalog", False),
    ):
        found = local_tiers(data_dir, object_store="s3://b/o", warehouse=warehouse, catalog=catalog)
        assert [reason is None for reason in found.values()] == [True, survives]


@pytest.mark.parametrize(
    ("limit", "asked", "connections"),
    [(1024, 10_000, 1024 - RESERVE), (20_000, 10_000, 10_000), (64, 10, 10), (64, 1000, 32), (1, 5, 1)],
)
def test_connections_leave_a_reserve(limit: int, asked: int, connections: int) -> None:
    """Connections get what is asked for, or what is left."""
    assert budget(limit, asked).connections == connections


def test_the_soft_limit_is_raised() -> None:
    """The process may have what its hard limit allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_limit() > 256
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
