"""What workers have in common: the process that all of them are forked from imports this module.

Owns: the imports that jobs need, paid for once, and the signals that this process must not heed. Only
``multiprocessing``'s fork server imports it; the server names it, and never loads pyiceberg.
"""

from __future__ import annotations

import gc
import importlib
import signal

# Before all else: the rest takes seconds. A terminal and a service manager send these to the whole group, and the
# server, which drains first, needs workers until it ends. This process ends when the server's pipe to it is closed.
for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})

for _module in (
    "sqlite3",
    "sqlalchemy.dialects.sqlite",
    "arka.iceberg.worker",
    "arka.iceberg.commit",
    "arka.iceberg.control",
    "arka.iceberg.encode",
    "arka.iceberg.scan",
):
    importlib.import_module(_module)

# A collection in a worker would write to each object's header, and so copy the pages that all share.
gc.collect()
gc.freeze()

__all__: list[str] = []
