"""What every test gets: a quiet Hypothesis that never fails for slowness, no settings from outside, its own logging."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

from arka.settings import SETTINGS

# A deadline is a timed assertion; a shared machine breaks those.
settings.register_profile("arka", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arka")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several files run at a time, mix those that wait for servers with those that compute, to the end."""
    if not hasattr(config, "workerinput"):
        return
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order: list[tuple[float, Path]] = []
    for waits in (False, True):
        kind = [path for path, found in files.items() if waits == (found[0].get_closest_marker("process") is not None)]
        total, before = sum(len(files[path]) for path in kind), 0
        for path in sorted(kind, key=lambda path: (-len(files[path]), path)):
            order.append((before / total, path))
            before += len(files[path])
    items[:] = [item for _, path in sorted(order) for item in files[path]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the code under test and from its subprocesses."""
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)


@pytest.fixture(autouse=True)
def _logging_put_back() -> Iterator[None]:
    """Undo what a test does to the process's logging: the next one in this process reads its own lines."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    kept = structlog.get_config() if structlog.is_configured() else None
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    if kept is not None:
        structlog.configure(**kept)
