"""What this process, and those that it starts, import: nothing from the working directory (R40).

Owns: the import path of a server and of its workers. Imports nothing but the language, since all else comes after it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Final

#: Python's own switch: a process with it does not put its working directory on its path (Python 3.11).
SAFE_PATH: Final = "PYTHONSAFEPATH"


def leave_working_directory_out() -> None:
    """Take the working directory off this process's import path.

    ``python -m`` and ``python -c`` put it there, and so does an empty entry of ``PYTHONPATH``. A folder of the user's
    that is named ``json`` or ``pyiceberg`` must not stand in for the module of that name. A checkout of Arka that the
    server runs from stays.
    """
    sys.path[:] = without_working_directory(sys.path)


def protect_children() -> None:
    """Let the Python processes that this one starts do the same from their first import on."""
    os.environ[SAFE_PATH] = "1"
    given = os.environ.get("PYTHONPATH")
    if given is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join(without_working_directory(given.split(os.pathsep)))


def without_working_directory(entries: Iterable[str]) -> list[str]:
    """Return the entries of an import path that are not the working directory."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        here = os.getcwd()
    except FileNotFoundError:
        # It was removed: nothing can be imported from it.
        here = ""

    def stays(entry: str) -> bool:
        if not entry:
            return False
        place = os.path.realpath(entry)
        return place != os.path.realpath(here) or place == os.path.realpath(home)

    return [entry for entry in entries if stays(entry)]


__all__ = ["SAFE_PATH", "leave_working_directory_out", "protect_children", "without_working_directory"]
