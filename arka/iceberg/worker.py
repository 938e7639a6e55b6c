"""A worker process: how it begins, how it ends, and the jobs it runs.

Owns: the process's ties to the server and the functions that cross the process boundary. Does not own what
the jobs do.

The server imports this module too, and only to name the functions: what they need is imported by the process that
workers are forked from (``arka.iceberg.template``). The server never loads pyiceberg.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from uuid import UUID

from arka import failpoints
from arka.errors import ArkaError, InternalError
from arka.iceberg.config import CatalogConfig
from arka.importpath import leave_working_directory_out
from arka.privacy import keep_private, share_with
from arka.records import TableDefinition, TableInfo, TableName
from arka.redaction import redact, remember
from arka.storage.ports import (
    CatalogConflict,
    CatalogListing,
    CatalogRestored,
    CatalogTable,
    CatalogUnavailable,
    CommitJob,
    CommitResult,
    ReadJob,
    SchemaMisfit,
    StagedFiles,
    TableExists,
    TableFrames,
    TableMissing,
    UnwritableRows,
    WorkUnfinished,
)

#: Workers give way to the server's own process: what a client waits for first is there, and a backlog is bounded by the
#: disk and not by the time that it takes.
_NICENESS: Final = 5

#: How much sooner than others the kernel ends a process that reads for a client.
_READER_OOM_SCORE: Final = "500"

#: What jobs raise on purpose: crosses to the server as it is.
_DEFINITE: Final = (
    ArkaError,
    CatalogConflict,
    CatalogUnavailable,
    SchemaMisfit,
    TableExists,
    TableMissing,
    UnwritableRows,
    WorkUnfinished,
)

#: Exit code of a process whose open connection to an SQLite catalog is not to the catalog's files any more (R28).
RESTORED_EXIT: Final = 75

#: Bugs rather than weather: retrying cannot help.
_BUGS: Final = (AssertionError, AttributeError, LookupError, NameError, TypeError, ValueError)

P = ParamSpec("P")
T = TypeVar("T")


def initialise(server_pid: int, shared_group: int | None, secrets: tuple[str, ...]) -> None:
    """Tie this process to the server; runs once, before any job.

    The worker ends when the server does, however that ends, in the middle of a job too (R15). It ignores the
    signals by which a terminal or a service manager stops the whole group: the server drains first and then closes
    its workers.

    Args:
        server_pid: process id of the server.
        shared_group: the group that may read warehouse and catalog; None: nobody else may.
        secrets: what no error and no log line of this process may hold.
    """
    keep_private()
    share_with(shared_group)
    remember(secrets)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    # The server's path came along, which may begin with its working directory (R40).
    leave_working_directory_out()
    importlib.import_module("arka.iceberg.isolation")
    threading.Thread(target=_end_with_server, daemon=True).start()
    failpoints.arm(failpoints.wished(os.environ), server_pid=server_pid)
    logging.getLogger("pyiceberg").setLevel(logging.ERROR)


def run_packed(packed: bytes) -> bytes:
    """Run a job that the server has packed, and pack what it returns: there neither is done on trio's thread (T22)."""
    job, arguments = pickle.loads(packed)
    return pickle.dumps(job(*arguments), pickle.HIGHEST_PROTOCOL)


def initialise_reader(server_pid: int, shared_group: int | None, secrets: tuple[str, ...]) -> None:
    """As ``initialise``, for a process that reads for clients: where memory runs out, it is the first to go (T27)."""
    initialise(server_pid, shared_group, secrets)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_READER_OOM_SCORE)


def _end_with_server() -> None:
    # Not PR_SET_PDEATHSIG: this process's parent is the one that it was forked from, not the server.
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(1)


def check_installation(answer: Connection) -> None:
    """Send why this process cannot import what jobs need; None if it can.

    Args:
        answer: takes one text or None.
    """
    try:
        reason: str | None = importlib.import_module("arka.iceberg.template").failure
    except Exception as error:
        reason = _describe(error)
    answer.send(reason)


def do_nothing() -> None:
    """Show that a process could be forked, or be the first job that starts a worker."""


def _job(function: Callable[P, T]) -> Callable[P, T | Exception]:
    """Make a job return what it would raise, as an error that the server can rebuild without pyiceberg."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T | Exception:
        try:
            return function(*args, **kwargs)
        except CatalogRestored:
            # Closing the database would write what this process remembers of it over the restored one.
            os._exit(RESTORED_EXIT)
        except _DEFINITE as error:
            made: Exception = error
        except Exception as error:
            # Errors of requests can be both: the network is more likely than the code.
            bug = isinstance(error, _BUGS) and not isinstance(error, OSError)
            made = (InternalError if bug else CatalogUnavailable)(_describe(error))
        # Frames and causes stay here: they may hold what cannot be pickled.
        made.__traceback__ = made.__cause__ = made.__context__ = None
        return made

    return guarded


def _describe(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}")


@_job
def connect(config: CatalogConfig) -> None:
    """Open the catalog.

    Raises:
        CatalogUnavailable: the catalog does not answer.
    """
    from arka.iceberg.catalogs import catalog

    catalog(config)


@_job
def encode(config: CatalogConfig, job: TableFrames) -> StagedFiles:
    """See ``arka.iceberg.encode.encode``."""
    from arka.iceberg.encode import encode as run

    return run(config, job)


@_job
def discard_attempt(
    config: CatalogConfig, table: TableInfo, commit_ids: tuple[str, ...], paths: tuple[str, ...]
) -> bool:
    """See ``arka.iceberg.leftovers.discard_attempt``."""
    from arka.iceberg.leftovers import discard_attempt as run

    return run(config, table, commit_ids, paths)


@_job
def commit(config: CatalogConfig, job: CommitJob) -> CommitResult:
    """See ``arka.iceberg.commit.commit``."""
    from arka.iceberg.commit import commit as run

    return run(config, job)


@_job
def create_table(config: CatalogConfig, definition: TableDefinition, location_suffix: str) -> CatalogTable:
    """See ``arka.iceberg.control.create_table``."""
    from arka.iceberg.control import create_table as run

    return run(config, definition, location_suffix)


@_job
def drop_table(config: CatalogConfig, name: TableName, uuid: UUID, purge: bool) -> None:
    """See ``arka.iceberg.control.drop_table``."""
    from arka.iceberg.control import drop_table as run

    run(config, name, uuid, purge)


@_job
def forget_others(config: CatalogConfig, tables: frozenset[UUID]) -> None:
    """See ``arka.iceberg.runfiles.forget_others``."""
    from arka.iceberg.runfiles import forget_others as run

    run(config.index_dir, tables)


@_job
def load_table(config: CatalogConfig, name: TableName) -> CatalogTable:
    """See ``arka.iceberg.control.load_table``."""
    from arka.iceberg.control import load_table as run

    return run(config, name)


@_job
def list_tables(config: CatalogConfig) -> CatalogListing:
    """See ``arka.iceberg.control.list_tables``."""
    from arka.iceberg.control import list_tables as run

    return run(config)


@_job
def adopt(config: CatalogConfig, old: str, new: str, others: tuple[tuple[str, str], ...]) -> list[str]:
    """See ``arka.iceberg.adopt.adopt``."""
    from arka.iceberg.adopt import Move
    from arka.iceberg.adopt import adopt as run

    return run(config, Move(old, new, others))


@_job
def look_at(config: CatalogConfig, info: TableInfo) -> None:
    """See ``arka.iceberg.control.look_at``."""
    from arka.iceberg.control import look_at as run

    run(config, info)


@_job
def scan(config: CatalogConfig, job: ReadJob, folder: str) -> int:
    """See ``arka.iceberg.scan.scan``."""
    from arka.iceberg.scan import scan as run

    return run(config, job, folder)


__all__ = [
    "RESTORED_EXIT",
    "adopt",
    "check_installation",
    "commit",
    "connect",
    "create_table",
    "discard_attempt",
    "do_nothing",
    "drop_table",
    "encode",
    "forget_others",
    "initialise",
    "list_tables",
    "load_table",
    "look_at",
    "run_packed",
    "scan",
]
