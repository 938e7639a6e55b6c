"""An installed package works from anywhere: the sdist, and the wheel that is built from it."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from arka.testing.serverprocess import ServerProcess

from . import lake
from .clients import connect, create, numbers, write_all

# The extensions are compiled, on a machine that may have other things to do.
pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
#: What a build must not find ready-made, nor leave behind.
BUILT = ("*.so", "*.c", "__pycache__", "build", "dist", "*.egg-info")
#: Ends only what hangs: the extensions are compiled.
BUILD_TIMEOUT_S = 900
TRAP = "raise SystemError('imported from the working directory')\n"


def run(*command: str, cwd: Path, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ARKA_", "PYTHON", "CC"))}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's sources without anything that was built from them."""
    tree = tmp_path_factory.mktemp("tree") / "arka"
    tree.mkdir()
    for name in ("arka", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns(*BUILT))
        else:
            shutil.copy(source, tree / name)
    return tree


def build(kind: str, tree: Path, **variables: str) -> Path:
    """Let the build backend make one distribution, as pip and ``python -m build`` do."""
    out = tree.parent / f"{kind}s"
    program = f"import setuptools.build_meta as backend; print(backend.build_{kind}({str(out)!r}))"
    out.mkdir(exist_ok=True)
    return out / run(sys.executable, "-c", program, cwd=tree, **variables).stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tree: Path) -> Path:
    return build("sdist", tree)


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip makes of the sdist, when it installs that."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    # How fast the code is does not matter here; how fast it is built does.
    return build("wheel", folder, CFLAGS="-O0")


def test_what_an_sdist_holds(sdist: Path) -> None:
    """All sources, no C that was generated, nothing that was built, no tests."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    modules = {path.name for path in (ROOT / "arka" / "_core").glob("*.p[yx][xdi]")}
    modules |= {path.name for path in (ROOT / "arka" / "_core").glob("*.pyi")}
    assert {f"arka/_core/{name}" for name in modules} <= names
    assert {"LICENSE", "README.md", "setup.py", "arka/py.typed", "arka/wal/FORMAT.md"} <= names
    assert [name for name in names if name.endswith((".c", ".so", ".pyc"))] == []
    assert [name for name in names if name.startswith(("tests", "bench", "examples", "."))] == []


def test_what_a_wheel_holds(wheel: Path) -> None:
    """Every extension, without a debugger's symbols, and no C."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if name.endswith(".so")]
        sizes = {name: len(archive.read(name)) for name in libraries}
        symbols = [name for name in libraries if b".symtab" in archive.read(name)]
    assert len(libraries) == len(list((ROOT / "arka" / "_core").glob("*.pyx")))
    assert symbols == []
    assert sum(sizes.values()) < 16 << 20, sizes
    assert [name for name in names if name.endswith(".c")] == []
    assert {"arka/py.typed", "arka/_core/wire.pyi"} <= set(names)


def test_installed_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """A server of an environment of its own serves in a directory that holds ``arka``, ``pyiceberg`` and ``json``."""
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    (packages,) = home.glob("lib/python*/site-packages")
    # What it depends on is there already; ours is not: the path file of a checkout is not followed from here.
    (packages / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in site.getsitepackages()))
    python = str(home / "bin" / "python")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("arka", "pyiceberg", "json"):
        (here / name).mkdir()
        (here / name / "__init__.py").write_text(TRAP)
    where = run(python, "-P", "-c", "import arka.server; print(arka.server.__file__)", cwd=here).stdout
    assert where.startswith(str(packages))
    assert run(str(home / "bin" / "arka"), "--help", cwd=here).stdout
    server = ServerProcess(tmp_path / "data")
    server.cwd = here
    server.program = home / "bin" / "arka-server"
    with server, connect(server.location) as client:
        create(client, "t")
        write_all(client, "t", [numbers([1, 2])])
    assert lake.column(server.data, "t", "n") == [1, 2]


@pytest.mark.parametrize(
    ("prelude", "variables", "words"),
    [
        ("", {"CC": "/nowhere/at/all/cc"}, ["C compiler", "/nowhere/at/all/cc", "build-essential"]),
        ("import sys; sys.platform = 'darwin'", {}, ["Linux", "darwin"]),
        ("import sys; sys.platform = 'win32'", {}, ["Linux", "win32"]),
    ],
)
def test_what_a_build_lacks(prelude: str, variables: dict[str, str], words: list[str], tree: Path) -> None:
    """A missing compiler, or another system, is said in one line, and not by a traceback."""
    program = f"{prelude}\nimport runpy, sys\nsys.argv = ['setup.py', 'build_ext']\nrunpy.run_path('setup.py')"
    one = {"ARKA_EXT": "lsn", **variables}
    done = run(sys.executable, "-c", program, cwd=tree, check=False, **one)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert [word for word in words if word not in line] == []
