"""What the tests of commits have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from arka.iceberg import catalogs

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False)])


def rows(*numbers: int) -> pa.RecordBatch:
    """A batch with a row for each number."""
    return pa.RecordBatch.from_pylist([{"n": number} for number in numbers], schema=SCHEMA)


def after_the_swap(monkeypatch: pytest.MonkeyPatch, lake: Any, action: Callable[[], object]) -> None:
    """Have something done right after the catalog's compare-and-swap, before its answer."""
    catalog = catalogs.catalog(lake.config)
    real = catalog.commit_table

    def commit_table(*args: Any) -> Any:
        response = real(*args)
        action()
        return response

    monkeypatch.setattr(catalog, "commit_table", commit_table)
