"""Nothing is imported or configured from where a server happens to run (R40)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arka import importpath
from arka.exits import EXIT_CONFIGURATION
from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import connect, create, numbers, write_all

pytestmark = pytest.mark.process

#: What a folder of a user's may be called.
NAMES = ("arka", "pyiceberg", "json", "pyarrow", "multiprocessing", "sqlalchemy", "socket", "trio")
TRAP = "raise SystemError('imported from the working directory')\n"
#: Not even YAML: whoever reads it fails.
SETTINGS = "catalog: [\n  arka: }: :\n"


def write_one_row(server: ServerProcess) -> None:
    """A table is made, written to and committed: server and workers do their work."""
    with connect(server.location) as client:
        create(client, "t")
        acks = write_all(client, "t", [numbers([1])])
        assert [ack["error"] for ack in acks] == [None] * 4
    assert lake.column(server.data, "t", "n") == [1]


def fill_with_packages(folder: Path) -> None:
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(TRAP)


def fill_with_modules(folder: Path) -> None:
    for name in NAMES:
        (folder / f"{name}.py").write_text(TRAP)


def fill_with_folders(folder: Path) -> None:
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")


def fill_with_nothing(folder: Path) -> None:
    del folder


@pytest.mark.parametrize(
    ("fill", "path"),
    [
        (fill_with_nothing, None),
        (fill_with_packages, None),
        (fill_with_modules, ""),
        (fill_with_folders, os.pathsep),
        (fill_with_folders, f".{os.pathsep}/nowhere/at/all"),
    ],
)
def test_working_directory(
    fill: Callable[[Path], None], path: str | None, make_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """A server starts and commits in any directory, whatever lies there under the names of modules."""
    here = tmp_path / "here"
    here.mkdir()
    fill(here)
    server = make_server(iceberg__commit_interval_s=0.1)
    server.cwd = here
    if path is not None:
        server.variables["PYTHONPATH"] = path
    server.start()
    write_one_row(server)
    server.stop()
    assert "working directory" not in server.log.read_text()


@pytest.mark.parametrize("place", ["cwd", "home", "pyiceberg_home", "variables"])
def test_settings_of_pyiceberg(place: str, make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """No ``.pyiceberg.yaml`` and no variable of pyiceberg's changes what the server's settings say."""
    here = tmp_path / "here"
    here.mkdir()
    (here / ".pyiceberg.yaml").write_text(SETTINGS)
    server = make_server(iceberg__commit_interval_s=0.1)
    if place == "cwd":
        server.cwd = here
    elif place == "home":
        server.variables["HOME"] = str(here)
    elif place == "pyiceberg_home":
        server.variables["PYICEBERG_HOME"] = str(here)
    else:
        server.variables |= {
            # A value and a table of one name: whoever reads both fails.
            "PYICEBERG_CATALOG": "x",
            "PYICEBERG_CATALOG__ARKA__URI": "sqlite:////nowhere/at/all.db",
            "PYICEBERG_CATALOG__ARKA__PY_IO_IMPL": "nowhere.AtAll",
            "PYICEBERG_MAX_WORKERS": "many",
            "PYICEBERG_LEGACY_CURRENT_SNAPSHOT_ID": "perhaps",
        }
    server.start()
    write_one_row(server)
    server.stop()


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("sqlalchemy", "raise ImportError('no library libnothing.so')"),
        ("pyiceberg", "raise AttributeError('half of it is missing')"),
        ("strictyaml", "def broken(:"),
    ],
)
def test_broken_installation(module: str, text: str, make_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Workers that cannot import end the start with one line that says what is missing; it is no outage."""
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / f"{module}.py").write_text(text + "\n")
    server = make_server()
    server.variables["PYTHONPATH"] = str(shadow)
    server.spawn()
    assert server.wait(60) == EXIT_CONFIGURATION
    said = server.log.read_text()
    (line,) = [line for line in said.splitlines() if "installation is broken" in line]
    assert text.partition("'")[2].rstrip("')") in line
    assert "Traceback" not in said
    assert "catalog.unavailable" not in said


def test_import_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The working directory goes in every spelling, but for the checkout that the server itself is imported from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    entries = ["", ".", str(tmp_path), str(tmp_path / "link"), "/usr/lib", str(tmp_path / "other")]
    assert importpath.without_working_directory(entries) == ["/usr/lib", str(tmp_path / "other")]
    root = Path(importpath.__file__).parents[1]
    monkeypatch.chdir(root)
    assert importpath.without_working_directory([str(root), ""]) == [str(root)]


def test_path_of_children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Processes that a server starts get a path without the working directory, before their first import."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", "/usr/lib", ".")))
    monkeypatch.setenv(importpath.SAFE_PATH, "")
    monkeypatch.setattr(sys, "path", ["", "/usr/lib"])
    importpath.protect_children()
    importpath.leave_working_directory_out()
    assert os.environ["PYTHONPATH"] == "/usr/lib"
    assert os.environ[importpath.SAFE_PATH] == "1"
    assert sys.path == ["/usr/lib"]
