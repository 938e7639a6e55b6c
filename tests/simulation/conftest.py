"""``pytest tests/simulation --seed N`` replays one seed; ``--seeds N`` says how many are run (ARKA_SIM_SEEDS)."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="simulate this seed only")
    parser.addoption("--seeds", type=int, default=int(os.environ.get("ARKA_SIM_SEEDS", "1000")), help="how many seeds")


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> range:
    seed = request.config.getoption("--seed", default=None)
    if seed is not None:
        return range(seed, seed + 1)
    return range(request.config.getoption("--seeds", default=1000))
