"""Tables of text for a person or a script: each cell is printed whole, however narrow the terminal is.

Owns: the layout. Does not own what is shown (``wal_commands``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click


def show_table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a title, the columns' names and a line for each row.

    Args:
        title: goes first.
        names: of the columns.
        rows: each as many cells as there are columns. Nothing is cut or wrapped.
    """
    lines = [tuple(names), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    click.echo(title)
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


__all__ = ["show_table"]
