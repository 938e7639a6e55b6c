"""How tests reach the example programs, which are scripts and no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import an example by its name, as if its folder were the current one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture
def run_example() -> Callable[..., list[str]]:
    """Give the command line that runs an example with this interpreter."""
    return lambda name, *arguments: [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
