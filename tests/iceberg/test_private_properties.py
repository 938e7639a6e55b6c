"""Arka's private needs stay in memory: other writers keep their retries and their metadata files (R30)."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from arka.iceberg import control
from arka.records import TableName
from arka.storage.ports import CommitOutcome
from arka.tableproperties import CLEANED, FORMER_DEFAULTS

SCHEMA = pa.schema([pa.field("n", pa.int64(), nullable=False), pa.field("s", pa.string())])

RETRIES = "commit.retry.num-retries"


def _rows(*numbers: int) -> pa.RecordBatch:
    return pa.record_batch({"n": pa.array(numbers, pa.int64()), "s": [str(n) for n in numbers]}, schema=SCHEMA)


def _as_older_releases_left_it(lake: Any, info: Any, **changes: str) -> None:
    catalog = lake.foreign()
    with catalog.load_table(tuple(info.name)).transaction() as transaction:
        transaction.remove_properties(CLEANED)
        transaction.set_properties({**FORMER_DEFAULTS, **changes})
    catalog.close()


@pytest.fixture(params=[(False, ()), (True, ()), (False, ("n",))], ids=["lean", "stock", "keyed"])
def made(request: pytest.FixtureRequest, make_lake: Any) -> tuple[Any, Any]:
    """A lake and a table of it: both ways to commit, both kinds of table."""
    stock, key = request.param
    lake = make_lake(stock_commit=stock)
    return lake, lake.create(SCHEMA, key=key)


def test_a_new_table_holds_nothing_that_others_act_on(made: tuple[Any, Any]) -> None:
    """Created and committed to, a table has Arka's own properties alone."""
    lake, info = made
    lake.append(info, [_rows(1)], 0)
    foreign = {name for name in lake.table(info).properties if not name.startswith("arka.")}
    assert foreign == set()


def test_what_older_releases_wrote_goes_with_the_next_commit(made: tuple[Any, Any]) -> None:
    """All three values go, in the commit that holds the rows."""
    lake, info = made
    _as_older_releases_left_it(lake, info)
    assert lake.append(info, [_rows(1)], 0).outcome is CommitOutcome.COMMITTED
    properties = lake.table(info).properties
    assert not FORMER_DEFAULTS.keys() & properties.keys()
    assert properties[CLEANED] == "1"


def test_values_that_a_user_chose_stay(made: tuple[Any, Any]) -> None:
    """Another value was not written by Arka; and a value set after the cleaning is the user's, whatever it is."""
    lake, info = made
    _as_older_releases_left_it(lake, info, **{RETRIES: "7", "write.metadata.previous-versions-max": "21"})
    lake.append(info, [_rows(1)], 0)
    properties = lake.table(info).properties
    assert (properties[RETRIES], properties["write.metadata.previous-versions-max"]) == ("7", "21")
    assert "write.metadata.delete-after-commit.enabled" not in properties
    catalog = lake.foreign()
    with catalog.load_table(tuple(info.name)).transaction() as transaction:
        transaction.set_properties({RETRIES: "0"})
    catalog.close()
    lake.append(info, [_rows(2)], 1)
    assert lake.table(info).properties[RETRIES] == "0"


def test_a_table_that_others_made_keeps_its_values(lake: Any) -> None:
    """Arka never wrote these values to it."""
    catalog = lake.foreign()
    catalog.create_namespace_if_not_exists("default")
    catalog.create_table(("default", "theirs"), SCHEMA, properties=dict(FORMER_DEFAULTS))
    catalog.close()
    info = control.load_table(lake.config, TableName("default", "theirs")).info
    lake.append(info, [_rows(1)], 0)
    assert FORMER_DEFAULTS.items() <= lake.table(info).properties.items()
