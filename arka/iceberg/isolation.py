"""Keep pyiceberg to the settings that the server hands over (R40).

Owns: that no ``.pyiceberg.yaml`` of a directory, of the user's home or of ``PYICEBERG_HOME`` is read, and no variable
``PYICEBERG_*``. Both would change a catalog's properties behind the server's settings: of each machine, another one. To
be imported by worker processes before anything else of pyiceberg; held by tests/iceberg/test_pyiceberg_contract.py.
"""

from __future__ import annotations

from pyiceberg.typedef import RecursiveDict
from pyiceberg.utils.config import Config


def _no_files() -> RecursiveDict | None:
    """Stand in for the search of ``.pyiceberg.yaml``."""
    return None


def _no_variables(config: RecursiveDict) -> RecursiveDict:
    """Stand in for the variables ``PYICEBERG_*``."""
    return config


Config._from_configuration_files = staticmethod(_no_files)  # type: ignore[method-assign]
Config._from_environment_variables = staticmethod(_no_variables)  # type: ignore[method-assign]

__all__: list[str] = []
