"""The page for operators names each event of the log that asks for attention."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LEVELS = {"warning", "error", "critical", "exception"}


def _events() -> Iterator[tuple[str, Path]]:
    """Each event that a module logs at a level that asks for attention, with the module."""
    for path in sorted((_ROOT / "arka").rglob("*.py")):
        if "testing" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in _LEVELS
                and node.args
                and isinstance(node.args[0], ast.Constant)
                and isinstance(node.args[0].value, str)
            ):
                # The commit workers' own log has the fields in its text.
                yield node.args[0].value.split()[0], path


def test_each_warning_is_explained() -> None:
    """The page says of each warning what it means and what to do."""
    page = (_ROOT / "docs" / "operations.md").read_text()
    found = dict(_events())
    assert len(found) > 30
    missing = {event: path.name for event, path in found.items() if f"`{event}`" not in page}
    assert not missing
