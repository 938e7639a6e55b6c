"""One node without faults but those that a test makes: the whole engine below the transport, life after life.

Owns: a machine's disk, an object store and a catalog in memory, and the way a server begins and ends on them. For
tests on a virtual clock that want one exact history; random ones are ``arka.testing.simulation``'s.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest import mock
from uuid import UUID

import pyarrow as pa
import trio

from arka.options import KIB, IcebergOptions, Limits, ServerOptions, Settings, WalOptions
from arka.records import Operation, TableDefinition, TableName, Tier
from arka.testing.simcatalog import SimCatalog
from arka.testing.simdisk import PowerCut
from arka.testing.simstore import SimStore
from arka.testing.simworld import (
    CatalogWeather,
    MachineDisk,
    Process,
    ProcessCatalog,
    ProcessDisk,
    ProcessWarehouse,
    Trace,
    compute_inline,
)
from arka.testing.simwriters import SCHEMA, frame_buffer
from arka.tiers.assembly import OpenLog, Surroundings
from arka.tiers.memory import Appended
from arka.tiers.pipeline import Pipeline
from arka.tiers.room import NoRoom
from arka.tiers.startup import open_pipeline
from arka.tiers.table import Table

#: The table that a test writes to unless it says otherwise.
NAME: Final = TableName("default", "t")

#: Small, so that segments fill up, are released, and nothing takes long.
SETTINGS: Final = Settings(
    server=ServerOptions(node_id="n"),
    limits=Limits(disk_free_bytes=0),
    wal=WalOptions(segment_bytes=8 * KIB, release_grace_s=0.0),
    iceberg=IcebergOptions(commit_interval_s=0.1),
)


class SimNode:
    """A node; each ``run`` is one life of its server.

    Attributes:
        disk: the machine's disk; ``lose_disk`` puts an empty one there.
        store: the object store.
        weather: the catalog that all processes share, and what befalls requests to it.
        settings: of the next life.
    """

    def __init__(self, settings: Settings = SETTINGS) -> None:
        rng = random.Random(0)
        self.disk = MachineDisk(rng, UUID(int=1))
        self.store = SimStore()
        self.weather = CatalogWeather(rng, Trace())
        self.settings = settings

    @property
    def catalog(self) -> SimCatalog:
        """The catalog's tables."""
        return self.weather.tables

    def lose_disk(self) -> MachineDisk:
        """Put an empty disk in the place of the machine's; returns the old one."""
        old, self.disk = self.disk, MachineDisk(random.Random(0), UUID(int=self.disk.uuid.int + 1))
        return old

    def fork(self) -> SimNode:
        """Another node on a copy of this one's data directory, object store included; the catalog is the same one."""
        other = SimNode(self.settings)
        other.disk, other.weather = self.disk.fork(), self.weather
        other.store.objects.update(self.store.objects)
        return other

    async def open(self) -> OpenLog:
        """Start a server as far as its pipeline, which does not run yet.

        Raises:
            PowerCut: the disk was told to lose its power (``SimDisk.cut_power_after``).
        """
        process = Process("life")
        disk = ProcessDisk(process, self.disk, random.Random(0), max_delay_s=0.0, on_power_cut=process.die)
        world = Surroundings(
            disk=disk,
            disk_uuid=self.disk.uuid,
            store=self.store,
            checkpoints=self.disk.checkpoints,
            catalog=ProcessCatalog(process, self.weather, disk),
            read_range=disk.read_range,
            read_free=lambda: 1 << 40,
            survival={},
            rng=random.Random(0),
            compute=compute_inline,
            warehouse=ProcessWarehouse(process, self.weather.warehouse, self.disk),
        )
        with process.scope:
            return await open_pipeline(self.settings, Path("/data"), world)
        raise PowerCut("the machine went off during the start")

    @asynccontextmanager
    async def run(self, *, closes: bool = False) -> AsyncIterator[Pipeline]:
        """Run a server for the length of the block; it is killed at its end unless it ``closes`` in order."""
        opened = await self.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(opened.pipeline.run)
            yield opened.pipeline
            if closes:
                await opened.pipeline.close()
                await opened.pipeline.uplink.leave()
            nursery.cancel_scope.cancel()
        self.disk.kill()

    def ids(self, name: TableName = NAME) -> list[int]:
        """The numbers of the writes that a table holds, in the order in which they were committed."""
        found: list[int] = self.catalog.rows(name)["id"].to_pylist()
        return found

    def keys_of(self, kind: str) -> list[str]:
        """The store's keys of one kind: ``wal``, ``checkpoint``, ``parked`` and so on."""
        return sorted(key for key in self.store.objects if f"/{kind}/" in key)


async def create_table(pipeline: Pipeline, name: TableName = NAME) -> Table:
    """Create a table with the writers' schema, or find it."""
    return (await pipeline.tables.create(TableDefinition(name, SCHEMA)))[0]


def write(pipeline: Pipeline, table: Table, number: int, key: bytes = b"", *, filler: int = 700) -> Appended:
    """Write one row whose ``id`` is ``number``."""
    columns = [[number], [0], ["x" * filler]]
    batch = pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    _, buffer = frame_buffer(batch)
    return pipeline.append(table, buffer, rows=1, operation=Operation.UPSERT, key=key, charge=None)


async def write_all(pipeline: Pipeline, table: Table, numbers: range, tier: Tier = Tier.OBJECT_STORAGE) -> None:
    """Write numbers with keys ``k<number>``, and wait until all of them have reached a tier."""
    for number in numbers:
        write(pipeline, table, number, b"k%d" % number)
    await pipeline.flush(table, tier)


async def write_some(pipeline: Pipeline, table: Table, numbers: range, *, filler: int = 3000, key: str = "") -> None:
    """Write rows, each as soon as there is room for it; with keys ``<key><number>`` if ``key`` is given."""
    for number in numbers:
        while True:
            try:
                write(pipeline, table, number, f"{key}{number}".encode() if key else b"", filler=filler)
            except NoRoom as error:
                await error.room.wait()
            else:
                break
        await trio.sleep(0.02)


@asynccontextmanager
async def drop_under_way(pipeline: Pipeline, *, purge: bool = False) -> AsyncIterator[None]:
    """Drop the table ``NAME``; the catalog is asked before the block runs, and answers once it has ended."""
    begun, goes_on, drop_table = trio.Event(), trio.Event(), pipeline.tables.catalog.drop_table

    async def drop_late(*args: Any, **options: Any) -> None:
        begun.set()
        await goes_on.wait()
        await drop_table(*args, **options)

    with mock.patch.object(pipeline.tables.catalog, "drop_table", drop_late):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(pipeline.tables.drop, NAME, purge=purge))
            await begun.wait()
            yield
            goes_on.set()


def with_options(**options: object) -> Settings:
    """The settings of a node with other options, ``table__name=value``."""
    settings = SETTINGS
    for key, value in options.items():
        table, _, name = key.partition("__")
        settings = replace(settings, **{table: replace(getattr(settings, table), **{name: value})})
    return settings


__all__ = [
    "NAME",
    "SETTINGS",
    "SimNode",
    "create_table",
    "drop_under_way",
    "with_options",
    "write",
    "write_all",
    "write_some",
]
