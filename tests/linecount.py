"""The work of a call, counted in lines of Python: what grows too fast shows whatever the machine does."""

from __future__ import annotations

import sys
from collections.abc import Callable


def lines_run(function: Callable[[], object], *refusals: type[Exception]) -> int:
    """Count the lines of Python that a call runs.

    Args:
        function: called once.
        refusals: what it may raise.
    """
    count = 0

    def trace(_frame: object, event: str, _argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except refusals:
        pass
    finally:
        sys.settrace(before)
    return count
