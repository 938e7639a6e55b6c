"""Rules of the source that no linter of ours knows: who may use what, and what nobody may."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import arka

PACKAGE = Path(arka.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

#: What only some modules may import or name, by the prefix of their path. Import-linter sees packages,
#: not their submodules and attributes.
RESERVED = {
    "pyarrow.flight": ("client/",),
    "grpc": (),
    "asyncio": (),
    "threading": ("storage/", "iceberg/", "testing/proxy.py", "watchdog.py", "logs.py"),
    "trio.to_thread": ("storage/", "wal/writer.py"),
    "trio.from_thread": ("storage/", "wal/writer.py"),
    "trio_parallel": ("storage/",),
    "math.inf": (),
    "trio.lowlevel.spawn_system_task": (),
}


def dotted(node: ast.AST) -> str | None:
    """Write an attribute chain as it stands in the source: ``trio.to_thread.run_sync``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return None


def names_used(tree: ast.AST) -> Iterator[str]:
    """Yield every dotted name that a module imports or uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := dotted(node)):
            yield name


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES)
def test_reserved_names_stay_where_they_belong(module):
    """Threads, foreign transports and unbounded waits appear only where the architecture puts them."""
    for used in names_used(parse(module)):
        for name, places in RESERVED.items():
            if used == name or used.startswith(f"{name}."):
                assert module.startswith(places or "\0"), f"{module} uses {used}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_swallowed(module):
    """No handler catches everything and does nothing."""
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.ExceptHandler):
            caught = dotted(node.type) if node.type else "BaseException"
            idle = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not (caught in ("Exception", "BaseException") and idle), f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_owns(module):
    """Each module begins with a docstring."""
    tree = parse(module)
    assert ast.get_docstring(tree) or not tree.body, f"{module} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_module_is_finished(module):
    """No reminders to finish something later."""
    found = re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", (PACKAGE / module).read_text(encoding="utf-8"))
    assert found == []


def test_package_has_no_attic():
    """A function lives with its caller or under a noun, not in a drawer."""
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert not drawers & {Path(module).stem for module in MODULES}


#: Modules that fill a file which ``privacy.make_file`` has made in the line before, or which is not theirs to make.
_FILLS = {"storage/datadir.py", "wal/salvage.py", "iceberg/worker.py"}


def open_makings(module: str) -> Iterator[str]:
    """Yield each call by which a module would make a file or folder with the modes of the process's umask."""
    for node in ast.walk(parse(module)):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        writes = any(
            isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value in _WRITING_MODES
            for value in (*node.args, *(keyword.value for keyword in node.keywords))
        )
        if (
            (name == "open" and writes and "private_opener" not in text)
            or (name == "open" and "O_CREAT" in text and "FILE_MODE" not in text)
            or name in ("mkdir", "makedirs", "mkstemp", "mkdtemp", "copyfile", "copytree")
            or (name == "mkfifo" and "FILE_MODE" not in text)
            or (name in ("write_text", "write_bytes", "touch") and module not in _FILLS)
        ):
            yield f"{module}:{node.lineno}: {text[:80]}"


_WRITING_MODES = {"w", "wb", "x", "xb", "a", "ab", "w+", "wb+", "w+b", "x+b", "r+b"}


def test_files_are_made_private():
    """What is made is private by the call that makes it, and not by a umask that an embedding program may choose."""
    modules = [module for module in MODULES if not module.startswith("testing/") and module != "privacy.py"]
    assert [found for module in modules for found in open_makings(module)] == []
