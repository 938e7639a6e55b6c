"""A short run of the fuzz target for the wire: the long one is run by hand."""

from __future__ import annotations

import pytest
import structlog

from tests.fuzz import fuzz_wire


@pytest.fixture
def _own_logging():
    yield
    structlog.reset_defaults()


@pytest.mark.usefixtures("_own_logging")
def test_mutated_clients_are_answered_in_order():
    """Mutated client bytes end in protocol errors or in nothing, never in an exception or a leaked charge."""
    outcomes = fuzz_wire.main(["--cases", "4000", "--seed", "20", "--every", "2"])
    assert outcomes["connections"] == 2000
    assert outcomes["the peer closed it"] > 300
    assert outcomes["PROTOCOL_ERROR"] > 300
