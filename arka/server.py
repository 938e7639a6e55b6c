"""The server: how its components are put together, its listeners, and the order in which everything ends.

Owns: the three nurseries (tiers, around connections, around streams) and the drain. Does not own what
runs in them. Shutdown, whatever the clients do, ends within ``drain_s``: stop accepting, tell clients,
bring down what is accepted, then cancel.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit
from uuid import UUID

import structlog
import trio

from arka import failpoints, redaction
from arka._core.buffers import set_kept_bytes
from arka.errors import ArkaError, ConfigurationError, ErrorCode
from arka.flight import messages
from arka.flight.accepting import accept_connections
from arka.flight.connections import ENDING_MOST
from arka.flight.grpc import Health
from arka.flight.http2 import REFUSING_MOST, ConnectionFactory
from arka.flight.service import FlightService
from arka.iceberg.config import CatalogConfig
from arka.listeners import check_host, open_listeners
from arka.options import Limits, Settings
from arka.privacy import find_group, share_with
from arka.settings_shared import store_settings
from arka.storage.backup import settle_restored
from arka.storage.backuphold import is_held
from arka.storage.catalog import IcebergCatalog, adopt_warehouse, open_catalog
from arka.storage.datadir import announce, device_of, disk_uuid, free_bytes, lock_data_dir, shares_device
from arka.storage.descriptors import RESERVE, WORKER_DESCRIPTORS, budget, raise_limit
from arka.storage.disk import PosixDisk
from arka.storage.modes import Places, warn_of_modes
from arka.storage.objects import open_folder, open_object_store, read_range
from arka.storage.place import settle_place
from arka.storage.ports import CatalogUnavailable
from arka.storage.readpipe import READ_FOLDER, prepare_read_folders
from arka.storage.survival import local_tiers
from arka.storage.threads import most_threads
from arka.storage.warehouse import MarkedWarehouse, local_root
from arka.tiers.admission import Ledger
from arka.tiers.assembly import WAL_FOLDER, OpenLog, Surroundings
from arka.tiers.decoderoom import DecodeRoom
from arka.tiers.demo import demo_definitions
from arka.tiers.effects import Effects
from arka.tiers.epochs import Claim, skip_epochs
from arka.tiers.pipeline import Pipeline
from arka.tiers.space import SharedRoom
from arka.tiers.startup import open_pipeline
from arka.watchdog import watch_loop

log = structlog.get_logger(__name__)

#: The part of limits.memory_bytes that freed frames may keep, to be used again without a page fault.
_KEPT_PART: Final = 4
#: Share of drain_s after which acks are no longer waited for: the rest is for sealing and worker exit.
_ACK_SHARE: Final = 0.7
#: Share of drain_s after which connections are cancelled.
_CONNECTION_SHARE: Final = 0.8
#: Share of drain_s that sealing the log may take, and then leaving the store.
_SEAL_SHARE: Final = 0.08


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Server:
    """Serves Flight on its listeners until it is told to stop."""

    def __init__(
        self,
        opened: OpenLog,
        effects: Effects,
        service: FlightService,
        health: Health,
        connections: ConnectionFactory,
        listeners: list[trio.SocketListener],
        *,
        drain_s: float,
    ) -> None:
        """Join what is served with where.

        Args:
            opened: the log's tiers; run by this server.
            effects: runs the actions that change something; run by this server.
            service: its write streams are told of the drain.
            health: told whether the server serves.
            connections: serves one accepted stream.
            listeners: open sockets; closed where the drain begins, and by whoever opened them in any other case.
            drain_s: longest time from the stop to the end of ``run``.
        """
        self._pipeline = opened.pipeline
        self._reservation = opened.reservation
        self._effects = effects
        self._service = service
        self._health = health
        self._connections = connections
        self._listeners = listeners
        self._drain_s = drain_s
        self._pipeline.tell_in(connections.round)

    async def run(
        self,
        stop: trio.Event,
        *,
        prepare: Callable[[], Awaitable[None]] | None = None,
        started: Callable[[], None],
    ) -> None:
        """Serve until ``stop`` is set.

        Args:
            stop: begins the drain; this returns within ``drain_s`` of it.
            prepare: awaited once the tiers run, before connections are accepted.
            started: called once connections are accepted.

        Raises:
            WalPoisoned: the log's disk failed.
            Fenced: another process owns the log.

        Cancellation: as a crash at that moment: nothing acked is lost.
        """
        async with trio.open_nursery() as tiers:
            await tiers.start(self._pipeline.run)
            tiers.start_soon(self._pipeline.guard_log, self._reservation.run)
            await tiers.start(self._effects.run)
            if prepare is not None:
                await prepare()
            async with trio.open_nursery() as connections:
                accepting = trio.CancelScope()
                connections.start_soon(self._accept, accepting, connections)
                self._health.set_serving(True)
                started()
                await stop.wait()
                await self._drain(accepting, connections.cancel_scope)
            await failpoints.reach("stop.drained")
            with trio.move_on_after(self._drain_s * _SEAL_SHARE) as sealing:
                await self._pipeline.close()
                await failpoints.reach("stop.sealed")
            if sealing.cancelled_caught:
                log.warning("server.not_sealed", reason="the disk is slow; the next start recovers the log")
            with trio.move_on_after(self._drain_s * _SEAL_SHARE):
                await self._pipeline.uplink.leave()
            tiers.cancel_scope.cancel()

    async def _accept(self, accepting: trio.CancelScope, connections: trio.Nursery) -> None:
        with accepting:
            async with trio.open_nursery() as loops:
                for listener in self._listeners:
                    loops.start_soon(accept_connections, listener, self._connections.serve, connections)
        for listener in self._listeners:
            # Not aclose, which would leave the others open where this task is cancelled.
            listener.socket.close()

    async def _drain(self, accepting: trio.CancelScope, connections: trio.CancelScope) -> None:
        """Stop intake, finish what is accepted as far as the time allows, end the connections."""
        started = trio.current_time()
        log.info("server.draining", drain_s=self._drain_s)
        self._health.set_serving(False)
        accepting.cancel()
        self._effects.start_drain()
        self._pipeline.start_drain()
        acks_until = started + self._drain_s * _ACK_SHARE
        self._connections.start_drain()
        with trio.move_on_at(acks_until) as scope:
            # Streams end as soon as nothing is on its way any more: idle clients do not hold the process.
            self._service.start_drain(acks_until)
            await self._effects.wait_idle()
            await self._pipeline.wait_drained()
        if scope.cancelled_caught:
            log.warning("server.drain_incomplete", reason="writes are left for the next start to bring down")
        with trio.move_on_at(started + self._drain_s * _CONNECTION_SHARE):
            await self._connections.wait_idle()
        connections.cancel()


async def serve(
    settings: Settings, *, stop: trio.Event, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run a server with these settings until ``stop`` is set.

    Args:
        settings: all options; relative paths are taken from the working directory.
        stop: set it to drain; this returns within ``server.drain_s``.
        task_status: started with the Flight address once connections are accepted.

    Raises:
        ConfigurationError: the settings cannot work, or another server holds the data directory.
        DataCorruption: stored data is damaged; nothing was started.
        Fenced: another process owns this node's log now.
        WalPoisoned: the log's disk failed.

    Cancellation: as a crash at that moment: nothing acked is lost.
    """
    # Before anything can fail.
    redaction.remember(
        redaction.secrets_of(
            {"object_store.config": settings.object_store.config, "iceberg.catalog": settings.iceberg.catalog},
            (settings.object_store.url, settings.iceberg.catalog_uri, settings.iceberg.warehouse),
            os.environ,
        )
    )
    with watch_loop(settings.log.slow_turn_s):
        await _serve(settings, stop, task_status)


async def _serve(settings: Settings, stop: trio.Event, task_status: trio.TaskStatus[Address]) -> None:
    data_dir = Path(await trio.Path(settings.server.data_dir).absolute())
    limits = _limits(settings)
    host, port, insecure = settings.server.host, settings.server.port, settings.server.insecure
    # Before anything is made on the disk.
    await check_host(host, port, insecure=insecure)
    group = find_group(settings.server.shared_group)
    share_with(group)
    with lock_data_dir(data_dir):
        config = CatalogConfig.from_options(settings.iceberg, data_dir, settings.iceberg.catalog)
        await settle_place(
            config,
            data_dir,
            PosixDisk(),
            data_dir / WAL_FOLDER,
            partial(adopt_warehouse, config),
            adopting=settings.server.adopt_warehouse,
            take_over=settings.server.take_over,
        )

        async def skip(log_uuid: UUID, through_epoch: int) -> None:
            claim = Claim(settings.server.node_id, None, disk_uuid(data_dir))
            await skip_epochs(open_object_store(settings.object_store), claim, log_uuid, through_epoch)

        warn_of_modes(_places(settings, config, data_dir), group)
        await settle_restored(data_dir, PosixDisk(), data_dir / WAL_FOLDER, skip)
        listeners = await open_listeners(host, port, insecure=insecure)
        async with _closing(listeners), _engine(settings, data_dir) as opened:
            decode_room = DecodeRoom(limits.memory_bytes)
            ledger = Ledger.of(limits, decode_room.limit_bytes)
            set_kept_bytes(settings.limits.memory_bytes // _KEPT_PART)
            prepare_read_folders(data_dir / READ_FOLDER)
            effects = Effects(settings.limits.actions)
            service = FlightService(opened.pipeline, effects, limits, decode_room)
            health = Health([f"{messages.PACKAGE}.FlightService"])
            connections = ConnectionFactory({**service.routes(), **health.routes()}, ledger, limits)
            server = Server(opened, effects, service, health, connections, listeners, drain_s=settings.server.drain_s)
            address = Address(*listeners[0].socket.getsockname()[:2])
            prepare = partial(_register_demo_tables, opened.pipeline) if settings.server.demo_tables else None
            with ExitStack() as announced:

                def started() -> None:
                    announced.enter_context(announce(data_dir, flight=f"grpc://{address}", http=None))
                    log.info("server.ready", flight=f"grpc://{address}", data_dir=str(data_dir), epoch=opened.epoch)
                    task_status.started(address)

                await server.run(stop, prepare=prepare, started=started)
    log.info("server.stopped")


@asynccontextmanager
async def _closing(listeners: list[trio.SocketListener]) -> AsyncIterator[None]:
    """Close listeners at the end of the block, also where the start fails or the server is cancelled."""
    try:
        yield
    finally:
        for listener in listeners:
            listener.socket.close()


def _places(settings: Settings, config: CatalogConfig, data_dir: Path) -> Places:
    """Say where the server's files lie, as far as that is on this machine."""
    store, (scheme, _, catalog) = urlsplit(settings.object_store.url), config.uri.partition(":///")
    return Places(
        data_dir,
        Path(unquote(store.path)) if store.scheme == "file" else None,
        local_root(config.warehouse),
        Path("/", unquote(catalog.partition("?")[0])) if scheme.startswith("sqlite") else None,
    )


def _limits(settings: Settings) -> Limits:
    """Return the limits with no more connections than there are descriptors for (R31), and messages that fit (T25)."""
    workers = settings.iceberg.encode_workers + settings.iceberg.commit_workers
    reserve = RESERVE + ENDING_MOST + REFUSING_MOST + WORKER_DESCRIPTORS * workers
    found = budget(raise_limit(), settings.limits.connections, reserve)
    log.info(
        "server.budget",
        descriptors=found.limit,
        reserved=found.limit - found.connections if found.connections < settings.limits.connections else reserve,
        connections=found.connections,
        streams=settings.limits.streams,
        workers=workers,
        threads=most_threads(),
    )
    if found.connections < settings.limits.connections:
        log.warning(
            "server.connections_clamped",
            connections=found.connections,
            asked=settings.limits.connections,
            descriptors=found.limit,
            hint="limits.connections needs more descriptors: raise the hard limit (ulimit -Hn, LimitNOFILE)",
        )
    most = settings.limits.memory_bytes // 2
    if settings.limits.message_bytes > most:
        log.warning(
            "server.message_bytes_clamped",
            message_bytes=most,
            asked=settings.limits.message_bytes,
            hint="limits.message_bytes may be half of limits.memory_bytes at most, and limits.batch_bytes no more",
        )
    message_bytes = min(settings.limits.message_bytes, most)
    # What a batch decodes to is bounded by `batch_bytes`, however few bytes it came in: it has to fit as well (T23).
    batch_bytes = min(settings.limits.batch_bytes, message_bytes)
    return replace(settings.limits, connections=found.connections, message_bytes=message_bytes, batch_bytes=batch_bytes)


@asynccontextmanager
async def _engine(settings: Settings, data_dir: Path) -> AsyncIterator[OpenLog]:
    """Open catalog, store and log."""
    local = local_tiers(
        data_dir,
        object_store=settings.object_store.url,
        warehouse=settings.iceberg.warehouse,
        catalog=settings.iceberg.catalog_uri,
    )
    for tier, reason in local.items():
        if reason is not None:
            log.warning("server.local_only", tier=tier, hint=reason)
    # Each may be a mount of its own.
    wal_dir, spill_dir, checkpoint_dir = (data_dir / name for name in (WAL_FOLDER, READ_FOLDER, "checkpoints"))
    spill_apart = device_of(spill_dir) != device_of(wal_dir)
    index_bytes = settings.limits.index_bytes
    async with open_catalog(
        settings.iceberg,
        data_dir,
        settings.iceberg.catalog,
        index_bytes=index_bytes,
        partitions=settings.limits.partitions,
        reads=settings.limits.reads,
    ) as catalog:
        surroundings = Surroundings(
            warehouse=_open_warehouse(settings, data_dir),
            disk=PosixDisk(),
            disk_uuid=disk_uuid(data_dir),
            store=open_object_store(settings.object_store),
            checkpoints=open_folder(checkpoint_dir),
            catalog=catalog,
            read_range=read_range,
            read_free=partial(free_bytes, wal_dir),
            backup_runs=partial(is_held, data_dir),
            read_spill_free=partial(free_bytes, spill_dir) if spill_apart else None,
            shared=SharedRoom(
                store=shares_device(wal_dir, settings.object_store.url),
                warehouse=shares_device(wal_dir, settings.iceberg.warehouse),
                checkpoints=device_of(checkpoint_dir) == device_of(wal_dir),
            ),
            survival={tier: reason is None for tier, reason in local.items()},
            rng=random.Random(),
        )
        opened = await open_pipeline(settings, data_dir, surroundings)
        async with trio.open_nursery() as warming:
            # The first commit need not wait for imports, nor the clients for the first commit's.
            warming.start_soon(_warm, catalog)
            yield opened
            warming.cancel_scope.cancel()


def _open_warehouse(settings: Settings, data_dir: Path) -> MarkedWarehouse | None:
    """Open the warehouse's marker; None where the warehouse is the catalog's own (R28)."""
    config = CatalogConfig.from_options(settings.iceberg, data_dir, settings.iceberg.catalog)
    if config.is_rest:
        return None
    if config.warehouse.startswith("file:"):
        return MarkedWarehouse(config, data_dir, None)
    options = replace(
        settings.object_store, url=config.warehouse, config=store_settings(config.warehouse, settings.iceberg.catalog)
    )
    try:
        return MarkedWarehouse(config, data_dir, open_object_store(options))
    except ConfigurationError as error:
        log.warning("warehouse.unmarked", warehouse=config.warehouse, hint=error.detail)
        return None


async def _warm(catalog: IcebergCatalog) -> None:
    try:
        await catalog.start()
    except CatalogUnavailable as error:
        # Not needed yet: whoever needs it waits for it.
        log.warning("catalog.unavailable", reason=str(error))


async def _register_demo_tables(pipeline: Pipeline) -> None:
    for definition in demo_definitions():
        try:
            await pipeline.tables.create(definition)
        except ArkaError as error:
            if error.code not in (ErrorCode.TABLE_EXISTS, ErrorCode.TABLE_STOPPED, ErrorCode.UNAVAILABLE):
                raise
            log.warning("table.demo_not_made", table=str(definition.name), reason=error.detail)


__all__ = ["Address", "Server", "serve"]
