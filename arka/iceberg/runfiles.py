"""Files of runs on the local disk, and what goes into them and comes out.

Owns: making and mapping such files, the secret of a table's hashes, and the way between Arrow arrays and the packed
numbers and hashes of runs. Does not own a run's format (``arka._core.runs``) nor which runs are an index
(``keyindex``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import pyarrow as pa
from typing_extensions import Buffer

from arka._core.rowkeys import HASH_BYTES
from arka._core.runs import FileMap, Run, RunDamaged
from arka.iceberg.fileio import make_directory, sync_directory, write_durable
from arka.privacy import FILE_MODE
from arka.records import FIELD_ID_KEY

#: The directory of staged runs, among those of indexes.
STAGED: Final = "staged"
_SECRET_BYTES: Final = 16
_CHECK_BYTES: Final = 8
_UUID_CHARACTERS: Final = 36


def table_secret(root: str, table_uuid: UUID) -> bytes:
    """Return the secret of a table's hashes, from the one of the node, which is made if there is none.

    Args:
        root: the directory of all indexes.
        table_uuid: the table.

    Raises:
        OSError: the disk failed.

    Durability: the node's secret is durable on return; with another one, indexes are made anew.
    """
    path = Path(root, "secret")
    try:
        secret = path.read_bytes()
    except FileNotFoundError:
        made = f"{path}.{uuid4()}"
        write_durable(made, os.urandom(32))
        # Two workers may do this at once: the first to give the name wins.
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
        os.unlink(made)
        sync_directory(root)
        secret = path.read_bytes()
    return hashlib.blake2b(table_uuid.bytes, key=secret, digest_size=_SECRET_BYTES).digest()


def check_of(secret: bytes, key: pa.Schema) -> bytes:
    """Return what tells one way to hash keys from others, and does not give the secret away.

    Args:
        secret: what keys are hashed with.
        key: their columns, with field ids, in the order in which they are hashed.
    """
    columns = b",".join(field.metadata[FIELD_ID_KEY] for field in key)
    return hashlib.blake2b(columns, key=secret, digest_size=_CHECK_BYTES).digest()


def forget_table(root: str, table_uuid: UUID) -> None:
    """Remove a dropped table's index and staged runs; what cannot be removed is left."""
    shutil.rmtree(os.path.join(root, str(table_uuid)), ignore_errors=True)
    for path in Path(root, STAGED).glob(f"{table_uuid}-*.run"):
        with contextlib.suppress(OSError):
            path.unlink()


def forget_others(root: str, tables: Collection[UUID]) -> None:
    """Remove indexes and staged runs of all tables but these; what cannot be removed is left.

    Others may drop a table, and a process may die before it has removed what it had of one.
    """
    names = {name[:_UUID_CHARACTERS] for directory in (root, os.path.join(root, STAGED)) for name in _listed(directory)}
    for name in names:
        with contextlib.suppress(ValueError, OSError):
            if (uuid := UUID(name)) not in tables:
                forget_table(root, uuid)


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def new_name() -> str:
    """Return a name that no other run has."""
    return f"{uuid4().hex}.run"


def new_run(directory: str, write: Callable[[int], object], name: str | None = None) -> str:
    """Make a run.

    Args:
        directory: where; made if it is missing.
        write: writes it to a descriptor.
        name: of a run that is not there; None for ``new_name``.

    Returns:
        Its name.

    Raises:
        OSError: the disk failed; nothing is left of it, unless the process dies.

    Durability: its bytes are durable on return, its name is with the directory.
    """
    name = name or new_name()
    with open_run(directory, name) as descriptor:
        write(descriptor)
    return name


@contextmanager
def open_run(directory: str, name: str) -> Iterator[int]:
    """Open a new run's file for writing; see ``new_run``."""
    make_directory(directory)
    path = os.path.join(directory, name)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE)
    try:
        yield descriptor
        os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def map_run(path: str, base: int = 0) -> Run:
    """Map a run's file; it takes no file descriptor.

    Raises:
        OSError: it is not there.
        RunDamaged: it is none.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            raise RunDamaged(f"{path} is empty")
        return Run(FileMap(descriptor, size), base)
    finally:
        os.close(descriptor)


def hashes_of(buffer: Buffer) -> pa.FixedSizeBinaryArray:
    """Return packed hashes as an array; it shares their memory."""
    made = pa.py_buffer(buffer)
    return pa.Array.from_buffers(pa.binary(HASH_BYTES), made.size // HASH_BYTES, [None, made])


def numbers_of(buffer: Buffer) -> pa.UInt32Array:
    """Return packed native 32-bit numbers as an array; it shares their memory."""
    made = pa.py_buffer(buffer)
    return pa.Array.from_buffers(pa.uint32(), made.size // 4, [None, made])


def packed(array: pa.Array) -> pa.Buffer:
    """Return the values of an array of hashes or numbers without nulls, packed; they share its memory."""
    width = array.type.byte_width
    buffer = array.buffers()[1]
    return pa.py_buffer(b"") if buffer is None else buffer.slice(array.offset * width, len(array) * width)


__all__ = [
    "STAGED",
    "check_of",
    "forget_others",
    "forget_table",
    "hashes_of",
    "map_run",
    "new_name",
    "new_run",
    "numbers_of",
    "open_run",
    "packed",
    "table_secret",
]
