"""What every test gets: a quiet Hypothesis that never fails for slowness, and no settings from outside."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from arka.settings import SETTINGS

# A deadline is a timed assertion; a shared machine breaks those.
settings.register_profile("arka", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arka")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's own settings from the code under test and from its subprocesses."""
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
