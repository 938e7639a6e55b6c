"""A commit looks at catalog, warehouse and table folder after the compare-and-swap, before it answers (R28)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from arka.iceberg.fileio import local_path
from arka.storage.ports import FilesMissing, WarehouseChanged
from tests.iceberg.swaps import SCHEMA, after_the_swap, rows


def _replace_by_a_copy(path: Path) -> None:
    copy = path.with_name(path.name + ".copy")
    if path.is_dir():
        shutil.copytree(path, copy)
        path.rename(path.with_name(path.name + ".old"))
    else:
        shutil.copy(path, copy)
    copy.rename(path)


@pytest.mark.parametrize("key", [(), ("n",)])
@pytest.mark.parametrize("what", ["catalog", "warehouse", "table"])
def test_replaced_between_the_swap_and_the_answer(
    lake: Any, monkeypatch: pytest.MonkeyPatch, what: str, key: tuple[str, ...]
) -> None:
    """The answer of a commit that went to another catalog, warehouse or folder is that nobody knows."""
    info = lake.create(SCHEMA, key=key)
    lake.append(info, [rows(0)], 0)
    place = {
        "catalog": lake.directory / "catalog.db",
        "warehouse": lake.directory / "warehouse",
        "table": Path(local_path(info.location) or ""),
    }[what]
    staged = lake.encode(info, [rows(1)], 1)
    after_the_swap(monkeypatch, lake, lambda: _replace_by_a_copy(place))
    with pytest.raises(WarehouseChanged):
        lake.commit(info, staged)


@pytest.mark.parametrize("pattern", ["*.metadata.json", "snap-*.avro", "*-m0.avro"])
def test_files_that_are_goneafter_the_swap(lake: Any, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    """A commit whose metadata names a file that is not there is not answered as done."""
    info = lake.create(SCHEMA)
    lake.append(info, [rows(0)], 0)
    folder = Path(local_path(info.location) or "") / "metadata"

    def remove() -> None:
        for path in folder.glob(pattern):
            path.unlink()

    staged = lake.encode(info, [rows(1)], 1)
    after_the_swap(monkeypatch, lake, remove)
    with pytest.raises(FilesMissing):
        lake.commit(info, staged)


def test_no_folder_is_made_for_a_table_whose_folder_is_gone(lake: Any) -> None:
    """Encoding makes nothing above a table's own folder, nor that folder itself."""
    info = lake.create(SCHEMA)
    shutil.rmtree(lake.directory / "warehouse" / "default")
    with pytest.raises(WarehouseChanged, match="gone"):
        lake.append(info, [rows(0)], 0)
    assert list((lake.directory / "warehouse").iterdir()) == []
