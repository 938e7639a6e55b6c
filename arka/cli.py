"""The commands ``arka-server`` and ``arka``: flags, signals, exit codes.

Owns: what the process does with settings, signals and errors. The components are built by
``arka.server.serve``; a program that embeds the server calls that itself. Exit codes: ``arka.exits``.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import click
import structlog
import trio

from arka import failpoints
from arka.backup_command import backup
from arka.errors import ArkaError, ConfigurationError, DataCorruption, Fenced, InternalError
from arka.exits import EXIT_CONFIGURATION, EXIT_DAMAGED, EXIT_FAILURE, EXIT_FENCED, EXIT_SIGNAL, complain, fail
from arka.logs import configure_logging
from arka.options import Settings
from arka.privacy import keep_private
from arka.redaction import redact
from arka.settings import Given, load_settings, show_settings
from arka.wal_commands import wal

#: In the order in which one of several errors decides the exit code.
_EXIT_CODES: Final[tuple[tuple[type[ArkaError], int], ...]] = (
    (DataCorruption, EXIT_DAMAGED),
    (Fenced, EXIT_FENCED),
    (ConfigurationError, EXIT_CONFIGURATION),
)

#: The flags of ``arka-server`` and the settings that they give.
_FLAGS: Final = {
    "data_dir": ("--data-dir", "server.data_dir"),
    "host": ("--host", "server.host"),
    "insecure": ("--insecure", "server.insecure"),
    "port": ("--port", "server.port"),
    "http_port": ("--http-port", "server.http_port"),
    "node_id": ("--node-id", "server.node_id"),
    "object_store": ("--object-store", "object_store.url"),
    "catalog_uri": ("--catalog-uri", "iceberg.catalog_uri"),
    "warehouse": ("--warehouse", "iceberg.warehouse"),
    "demo_tables": ("--demo-tables", "server.demo_tables"),
    "take_over": ("--take-over", "server.take_over"),
    "new_store": ("--new-store", "server.new_store"),
    "adopt_warehouse": ("--adopt-warehouse", "server.adopt_warehouse"),
    "log_format": ("--log-format", "log.format"),
    "log_level": ("--log-level", "log.level"),
}

log = structlog.get_logger(__name__)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", metavar="FILE.toml", type=click.Path(path_type=Path), help="Settings in TOML.")
@click.option("--data-dir", metavar="DIR", help="WAL, lock file and embedded defaults.  [./arka_data]")
@click.option("--host", metavar="ADDRESS", help="Address that Flight listens on.  [127.0.0.1]")
@click.option("--insecure", is_flag=True, default=None, help="Listen on addresses that other machines reach.")
@click.option("--port", metavar="PORT", help="Flight port; 0 takes a free one.  [8815]")
@click.option("--http-port", metavar="PORT", help="Reserved: nothing listens on it yet.  [8816]")
@click.option("--node-id", metavar="NAME", help="This node's name in the object store.  [arka-0]")
@click.option("--object-store", metavar="URL", help="Object store.  [file://DATA/objects]")
@click.option("--catalog-uri", metavar="URI", help="Iceberg catalog.  [sqlite:///DATA/catalog.db]")
@click.option("--warehouse", metavar="URL", help="Iceberg warehouse.  [file://DATA/warehouse]")
@click.option("--demo-tables", is_flag=True, default=None, help="Register the example tables at start.")
@click.option("--take-over", is_flag=True, default=None, help="Take the log from a server that runs elsewhere.")
@click.option("--new-store", is_flag=True, default=None, help="Go on in an empty object store: the old one is lost.")
@click.option("--adopt-warehouse", is_flag=True, default=None, help="Start a data directory that was moved or copied.")
@click.option("--log-format", metavar="console|json", help="Log lines for people or for machines.  [console]")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.  [info]")
@click.option("--show-config", is_flag=True, help="Print every setting with its origin and exit.")
@click.version_option(package_name="arka", prog_name="arka-server")
def main_server(config: Path | None, show_config: bool, **flags: str | bool | None) -> None:
    """Take Arrow batches over Flight and acknowledge each at every durability tier, down to Iceberg.

    Every setting can stand in the TOML file ([server] drain_s = 5.0), in the environment
    (ARKA_SERVER_DRAIN_S=5.0) and, for those below, in a flag; the later wins. SIGTERM and SIGINT drain;
    a second one ends the process at once.

    Exit codes: 0 clean, 2 usage or configuration, 3 damaged data, 4 fenced, 1 any other failure.
    """
    keep_private()
    given = [Given(key, flags[name], flag) for name, (flag, key) in _FLAGS.items() if flags[name] is not None]
    try:
        loaded = load_settings(config=config, flags=given)
        failpoints.arm(failpoints.wished(os.environ), server_pid=os.getpid())
    except ConfigurationError as error:
        fail(error, EXIT_CONFIGURATION)
    if show_config:
        for line in show_settings(loaded):
            click.echo(line)
        return
    configure_logging(loaded.settings.log)
    sys.exit(run_server(loaded.settings))


def run_server(settings: Settings) -> int:
    """Run the server until a signal or a failure ends it.

    Returns:
        The exit code. What the error was has been said on stderr: one line for an error that the person
        at the keyboard can act on, a logged traceback for any other.
    """
    ready = trio.Event()
    try:
        trio.run(_serve_until_signalled, settings, ready)
    except BaseException as error:
        return _report(error, ready=ready.is_set(), debug=settings.log.level == "debug")
    return 0


async def _serve_until_signalled(settings: Settings, ready: trio.Event) -> None:
    # Here, so that --help, --version and --show-config do not pay for pyarrow and pyiceberg.
    gc.disable()
    from arka.server import serve

    # What imports made stays: a full collection would walk it again and again, 50 ms of the loop each time (T23).
    gc.collect()
    gc.freeze()
    gc.enable()
    stop = trio.Event()
    async with trio.open_nursery() as signals:
        await signals.start(_watch_signals, stop)
        async with trio.open_nursery() as serving:
            signals.start_soon(_end_start, stop, ready, serving.cancel_scope)
            await serving.start(partial(serve, settings, stop=stop))
            ready.set()
        signals.cancel_scope.cancel()


async def _end_start(stop: trio.Event, ready: trio.Event, serving: trio.CancelScope) -> None:
    """Cut a start short: it may be waiting for a store or a catalog that is away, and nothing is acked yet."""
    await stop.wait()
    if not ready.is_set():
        serving.cancel()


async def _watch_signals(stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Ask for a drain at the first signal and end the process at the second."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            if stop.is_set():
                log.warning("server.killed", signal=signal.Signals(number).name)
                # Not sys.exit: whatever hangs the drain would hang the unwinding too. A crash is safe.
                os._exit(EXIT_SIGNAL + number)
            log.info("server.stopping", signal=signal.Signals(number).name)
            stop.set()


def _report(error: BaseException, *, ready: bool, debug: bool) -> int:
    """Say what ended the server and return the exit code that fits.

    Args:
        error: what ``trio.run`` raised.
        ready: whether the server had been serving: an OSError is then no matter of its settings.
        debug: whether a traceback is wanted for an expected error too.
    """
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):  # before our handlers were in place
        return EXIT_SIGNAL + signal.SIGINT
    expected: tuple[type[BaseException], ...] = (ArkaError,) if ready else (ArkaError, OSError)
    if any(isinstance(leaf, InternalError) or not isinstance(leaf, expected) for leaf in leaves):
        log.error("server.failed", exc_info=error)
        return EXIT_FAILURE
    if debug:
        click.echo(redact("".join(traceback.format_exception(error))), err=True, nl=False)
    for kind, code in _EXIT_CODES:
        decisive = next((leaf for leaf in leaves if isinstance(leaf, kind)), None)
        if decisive is not None:
            complain(decisive)
            return code
    complain(leaves[0])
    return EXIT_FAILURE


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors in a tree of exception groups, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for child in error.exceptions:
            yield from _leaves(child)
    else:
        yield error


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="arka", prog_name="arka")
def main() -> None:
    """Look after an Arka server's data."""
    keep_private()


main.add_command(backup)
main.add_command(wal)


__all__ = ["main", "main_server", "run_server"]
