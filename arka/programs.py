"""The programs ``arka-server`` and ``arka``, as they are installed.

Owns: that loading a program's main module costs nothing: each worker process loads it again.
"""

from __future__ import annotations


def arka_server() -> None:
    """Run ``arka-server``."""
    from arka.importpath import leave_working_directory_out, protect_children

    leave_working_directory_out()
    protect_children()
    from arka.cli import main_server

    main_server()


def arka() -> None:
    """Run ``arka``."""
    from arka.importpath import leave_working_directory_out

    leave_working_directory_out()
    from arka.cli import main

    main()


__all__ = ["arka", "arka_server"]
