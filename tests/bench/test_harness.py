"""What the benchmarks' table says follows from the runs: ratios pair by pair, targets both ways, one row a name."""

from __future__ import annotations

import json

import pytest

from bench import harness
from bench.harness import Result, pairs


def test_ratio_is_the_median_of_the_pairs():
    """A slow minute hits both sides of a pair: the ratio is not that of the medians."""
    result = Result("r", "what", "MB/s", "floor", ">= 1.5", values=[10.0, 2.0, 30.0], floors=[5.0, 1.0, 30.0])
    assert result.ratio == 2.0
    assert result.met


@pytest.mark.parametrize(
    ("target", "met"), [("<= 1.0", False), ("<= 2.0", True), (">= 2.0", True), (">= 2.1", False), ("", None)]
)
def test_target_without_floor_is_for_the_value(target: str, met: bool | None):
    """Both words, and none."""
    assert Result("r", "what", "ms", target=target, values=[2.0]).met is met


def test_pairs_take_turns():
    """One run of each does not count; then neither side is always the first."""
    ran = []

    def side(name: str) -> float:
        ran.append(name)
        return 1.0

    result = pairs(Result("r", "what", "s"), lambda: side("ours"), lambda: side("floor"), count=2)
    assert ran == ["ours", "floor", "floor", "ours", "ours", "floor"]
    assert (len(result.values), len(result.floors)) == (2, 2)


def test_page_has_the_newest_of_each_name(tmp_path, monkeypatch, capsys):
    """Measured again, a row is replaced; sweeps have tables of their own."""
    pytest.importorskip("matplotlib", reason='the extra "bench" is not installed')
    from bench import report

    path = tmp_path / "results.jsonl"
    monkeypatch.setattr(harness, "RESULTS", path)
    monkeypatch.setattr(report, "RESULTS", path)
    harness.record(Result("one", "what", "MB/s", "floor", ">= 1.0", [3.0], [2.0]), "one")
    harness.record(
        Result("point", "a point", "MB/s", values=[7.0], notes={"sweep": "some", "x": 1, "p99 ms": 2.5}), "s"
    )
    harness.record(Result("one", "what", "MB/s", "floor", ">= 1.0", [1.0], [2.0]), "one")
    assert len(path.read_text().splitlines()) == 3
    assert json.loads(path.read_text().splitlines()[0])["met"]
    page = report.page(report.newest())
    (row,) = (line for line in page.splitlines() if line.startswith("| `one` | 1"))
    assert "0.50" in row
    assert "**MISSED**" in row
    assert "0 of 1 targets are met" in page
    assert "| a point | 7 | 2.5 |" in page
    assert "one" in capsys.readouterr().out
