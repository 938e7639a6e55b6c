"""Limits that a start lowers so that they fit one another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from arka.options import MIB, Settings
from arka.server import _limits


@pytest.mark.parametrize("memory_mib", [64, 100, 256, 1024, 4096])
async def test_messages_and_batches_fit_the_memory(memory_mib: int) -> None:
    """T23, T25: a message is at most half of the memory, and a batch, also decoded, at most a message."""
    settings = Settings()
    found = _limits(replace(settings, limits=replace(settings.limits, memory_bytes=memory_mib * MIB)))
    assert 2 * found.message_bytes <= found.memory_bytes
    assert found.batch_bytes <= found.message_bytes
    if memory_mib >= 1024:
        assert (found.message_bytes, found.batch_bytes) == (settings.limits.message_bytes, settings.limits.batch_bytes)
