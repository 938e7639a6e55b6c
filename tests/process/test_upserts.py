"""Upserts and deletes through SIGKILLs are those of a dictionary, for every reader (``upserts.py`` in small).

``UPSERT_SEED`` in the environment sets the seed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import readers

from .upserts import Run

pytestmark = [pytest.mark.process, pytest.mark.slow]

SEED = int(os.environ.get("UPSERT_SEED", "1"))


def test_equal_to_a_dictionary(tmp_path: Path) -> None:
    """Streams that share keys, three kills: each snapshot, and what six engines read, is what a dictionary holds.

    The dictionary takes the writes in the order of the LSNs that the acks told.
    """
    print(f"UPSERT_SEED={SEED}")
    run = Run(tmp_path, ["partitioned", "strings"], SEED, streams=4, life_s=(1.5, 3.5))
    run.run(kills=3)
    print("\n".join(run.lines()))
    for figures in run.tables.values():
        assert figures.engines == list(readers.ENGINES)
        assert figures.checked == figures.snapshots > 0
