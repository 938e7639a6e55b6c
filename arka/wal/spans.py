"""Sets of LSNs as few spans: what a survey of a log counts in.

Owns: their arithmetic, for spans whose end may be unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from arka._core.lsn import LSN_END


class LsnSpan(NamedTuple):
    """The LSNs from ``first`` to ``last``, both included; ``last`` is None where the end is not known."""

    first: int
    last: int | None


def append_lsn(spans: list[LsnSpan], lsn: int) -> None:
    """Add an LSN; the last span grows if it touches it."""
    if spans and spans[-1].last == lsn - 1:
        spans[-1] = LsnSpan(spans[-1].first, lsn)
    else:
        spans.append(LsnSpan(lsn, lsn))


def _last(span: LsnSpan) -> int:
    return LSN_END if span.last is None else span.last


def merge_spans(spans: Iterable[LsnSpan]) -> list[LsnSpan]:
    """Sort spans and join those that touch or overlap."""
    merged: list[LsnSpan] = []
    for span in sorted(spans, key=lambda span: span.first):
        if merged and span.first <= _last(merged[-1]) + 1:
            last = max(_last(merged[-1]), _last(span))
            merged[-1] = LsnSpan(merged[-1].first, None if last == LSN_END else last)
        else:
            merged.append(span)
    return merged


def subtract_spans(spans: Iterable[LsnSpan], gone: Iterable[LsnSpan]) -> list[LsnSpan]:
    """What of ``spans`` is not in ``gone``."""
    cuts = merge_spans(gone)
    left = []
    for span in spans:
        first = span.first
        for cut in cuts:
            if _last(cut) < first or cut.first > _last(span):
                continue
            if cut.first > first:
                left.append(LsnSpan(first, cut.first - 1))
            first = _last(cut) + 1
        if first <= _last(span):
            left.append(LsnSpan(first, span.last))
    return left


__all__ = ["LsnSpan", "append_lsn", "merge_spans", "subtract_spans"]
