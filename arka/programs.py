"""The programs ``arka-server`` and ``arka``, as they are installed.

Owns: that loading a program's main module costs nothing: each worker process loads it again.
"""

from __future__ import annotations


def arka_server() -> None:
    """Run ``arka-server``."""
    from arka.cli import main_server

    main_server()


def arka() -> None:
    """Run ``arka``."""
    from arka.cli import main

    main()


__all__ = ["arka", "arka_server"]
