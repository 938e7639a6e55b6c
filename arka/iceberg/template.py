"""What workers have in common: the process that all of them are forked from imports this module.

Owns: the imports that jobs need, paid for once, and the signals that this process must not heed. Only
``multiprocessing``'s fork server imports it; the server names it, and never loads pyiceberg.
"""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import signal
import sys

from arka.importpath import leave_working_directory_out

# Before all else: the rest takes seconds. A terminal and a service manager send these to the whole group, and the
# server, which drains first, needs workers until it ends. This process ends when the server's pipe to it is closed.
for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})

# Imports make hundreds of thousands of objects and no garbage: looking for some takes a tenth of the time.
gc.disable()


class _NoPandas(importlib.abc.MetaPathFinder):
    """Keeps ``pyarrow.dataset`` from importing pandas: a fifth of the time, and no job uses it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")


_no_pandas = _NoPandas()
sys.meta_path.insert(0, _no_pandas)

#: Why workers cannot do their jobs; None when they can. An exception here would end this process, and the server would
#: take that for an outage (R40).
failure: str | None = None

leave_working_directory_out()
for _module in (
    # Before anything else of pyiceberg.
    "arka.iceberg.isolation",
    "sqlite3",
    "sqlalchemy.dialects.sqlite",
    "arka.iceberg.worker",
    "arka.iceberg.commit",
    "arka.iceberg.control",
    "arka.iceberg.encode",
    "arka.iceberg.scan",
):
    try:
        importlib.import_module(_module)
    except Exception as _error:
        failure = f"{_module}: {type(_error).__name__}: {_error}"
        break

sys.meta_path.remove(_no_pandas)

# A collection in a worker would write to each object's header, and so copy the pages that all share.
gc.collect()
gc.freeze()
gc.enable()

__all__ = ["failure"]
