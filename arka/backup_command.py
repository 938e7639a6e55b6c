"""The command ``arka backup``: a copy of an embedded data directory that can be started.

Owns: what a person reads of it, and the exit codes (``arka.exits``). Does not own the copy: ``arka.storage.backup``.
"""

from __future__ import annotations

from pathlib import Path

import click

from arka.errors import ArkaError, ConfigurationError
from arka.exits import EXIT_CONFIGURATION, EXIT_FAILURE, fail


@click.command()
@click.argument("data_dir", metavar="DATA_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("dest", metavar="DEST", type=click.Path(path_type=Path))
def backup(data_dir: Path, dest: Path) -> None:
    """Copy a data directory that holds catalog, warehouse and object store; its server may be running.

    DEST must not exist. The copy holds every write that was acknowledged disk, or higher, before the command began. A
    write with no more than a memory ack may be missing.

    To restore it, copy DEST to where the data directory was, and start the server there:

    \b
        cp -a DEST DATA_DIR
        arka-server --data-dir DATA_DIR

    The first start takes LSNs above all that were ever given. At another path it needs --adopt-warehouse.

    Exit codes: 0 it is copied, 1 a failure: DEST.partial is what there was of it, 2 it cannot be copied.
    """  # noqa: D301 (the escape is click's)
    from arka.storage.backup import back_up
    from arka.storage.disk import PosixDisk

    try:
        made = back_up(data_dir, dest, PosixDisk())
    except ArkaError as error:
        fail(error, EXIT_CONFIGURATION if isinstance(error, ConfigurationError) else EXIT_FAILURE)
    except OSError as error:
        fail(error, EXIT_FAILURE)
    for table in made.outside:
        click.echo(f"arka: {table} lies outside of {data_dir}: its files are not in the copy", err=True)
    click.echo(f"copied {data_dir} to {dest}: {made.files} files, {made.bytes} bytes, up to LSN {made.through_lsn}")


__all__ = ["backup"]
