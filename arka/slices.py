"""Long lists in slices, so that others run between two of them (T22).

Owns: how many tables are looked at in one step of trio's thread. Does not own what is looked at, nor how that stays
true while it changes between two slices: whoever takes slices says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")

#: Tables that one step looks at: some microseconds each.
TABLES: Final = 256


def slices_of(items: Iterable[T], size: int = TABLES) -> Iterator[list[T]]:
    """Divide what there is now into slices; let others run after each.

    Args:
        items: what there is; it is copied before the first slice is taken, and may change after that.
        size: items of a slice, from 1.
    """
    left = list(items)
    for start in range(0, len(left), size):
        yield left[start : start + size]


__all__ = ["TABLES", "slices_of"]
