"""``pytest tests/simulation --seed N`` replays one seed; ``--seeds N`` says how many are run (ARKA_SIM_SEEDS)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: Seeds of one test: small enough that workers can share them out.
_SEEDS_A_TEST = 50


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="simulate this seed only")
    parser.addoption("--seeds", type=int, default=int(os.environ.get("ARKA_SIM_SEEDS", "200")), help="how many seeds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" not in metafunc.fixturenames:
        return
    seed = metafunc.config.getoption("--seed", default=None)
    if seed is not None:
        ranges = [range(seed, seed + 1)]
    else:
        last = metafunc.config.getoption("--seeds", default=200)
        ranges = [range(first, min(first + _SEEDS_A_TEST, last)) for first in range(0, last, _SEEDS_A_TEST)]
    metafunc.parametrize("seeds", ranges, ids=[f"{seeds.start}-{seeds.stop - 1}" for seeds in ranges])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is here: `make test` runs it apart from the rest."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.simulation)
