"""Pages that are made of ``results.jsonl``: ``python -m bench.report``.

Writes ``bench/RESULTS.md``, the table of the newest result of each name, and plots into ``docs/images``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from bench.harness import MEASUREMENTS, RESULTS, ROOT, load

PAGE = ROOT / "bench" / "RESULTS.md"
IMAGES = ROOT / "docs" / "images"
#: Of a plot's file: it lies in the repository.
LIMIT_BYTES = 60_000
#: Enough for a plot's few, and the shades at their edges.
COLOURS = 64
OURS, MISSED, OTHER, LINE = "#2a6fbb", "#c8452f", "#8a8f98", "#1f2328"

Record = dict[str, Any]


def newest() -> list[Record]:
    """The newest result of each name, in the order of the measurements; others come last."""
    found: dict[str, Record] = {}
    for line in RESULTS.read_text().splitlines():
        record = json.loads(line)
        # A later one takes the earlier one's place at the end.
        found.pop(record["name"], None)
        found[record["name"]] = record
    order = {name: number for number, name in enumerate(MEASUREMENTS)}
    return sorted(found.values(), key=lambda record: order.get(record.get("measurement", ""), len(order)))


def sweep_of(record: Record) -> str:
    """Which sweep a result is a point of; empty for none."""
    return str(record["notes"].get("sweep", ""))


# -- the page --------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """A number with three digits that matter."""
    if value is None:
        return ""
    size = abs(value)
    if size >= 1e7:
        return f"{value / 1e6:,.0f} M"
    return f"{value:,.0f}" if size >= 100 else f"{value:,.3g}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first columns are words and whose others are numbers."""
    names = list(head)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * left + "--:|" * (len(names) - left)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def page(records: list[Record]) -> str:
    """The whole of RESULTS.md."""
    rows = [record for record in records if not sweep_of(record)]
    judged = [record for record in rows if record["met"] is not None]
    met = sum(record["met"] for record in judged)
    machines = sorted({record["machine"] for record in records})
    commits = list(dict.fromkeys(record["commit"] for record in records))
    lines = [
        "# Results",
        "",
        "<!-- Written by `python -m bench.report` from bench/results.jsonl; `make bench` measures all of it again. -->",
        "",
        f"{met} of {len(judged)} targets are met. Ours and the floor ran in turn, pair by pair; figures are medians, "
        "the ratio is the median of the pairs' ratios, n is the number of our runs, p99 theirs. A target is for the "
        "ratio where there is a floor, and for our figure where there is none. All sides share the machine. What waits "
        "for the disk depends on what else does: an fsync for each message costs peers more on a busy disk, and then "
        "their rows flatter us (`nats-messages-1` was between 3.5 and 6.6 on one machine and another). Why "
        "targets are missed stands in [docs/performance.md](../docs/performance.md).",
        "",
        f"Machine: {'; '.join(machines)}. Commit{'s' if len(commits) > 1 else ''}: {', '.join(commits)}.",
        "",
        "![Each measurement's ratio beside its target](../docs/images/bench-ratios.png)",
        "",
        *table(
            ("measurement", "ours", "floor", "unit", "ratio", "target", "", "n", "p99"),
            (
                (
                    f"`{record['name']}`",
                    figure(record["median"]),
                    figure(record["floor_median"]),
                    record["unit"],
                    "" if record["ratio"] is None else f"{record['ratio']:.2f}",
                    record["target"],
                    {True: "met", False: "**MISSED**", None: ""}[record["met"]],
                    str(record["n"]),
                    figure(record["p99"]),
                )
                for record in rows
            ),
        ),
        "",
        "## What they are",
        "",
        *table(
            ("measurement", "ours", "floor"),
            ((f"`{record['name']}`", record["what"], record["floor"]) for record in rows),
            left=3,
        ),
        "",
        "## Notes",
        "",
        *(f"- `{record['name']}`: {notes(record)}" for record in rows if record["notes"]),
    ]
    for name in dict.fromkeys(sweep_of(record) for record in records if sweep_of(record)):
        points = [record for record in records if sweep_of(record) == name]
        shown = [key for key, value in points[0]["notes"].items() if key not in ("sweep", "x") and scalar(value)]
        lines += [
            "",
            f"## Sweep: {name}",
            "",
            f"![{name}](../docs/images/bench-{name}.png)",
            "",
            *table(
                ("what", points[0]["unit"], *shown),
                (
                    (record["what"], figure(record["median"]), *(cell(record["notes"].get(key)) for key in shown))
                    for record in points
                ),
            ),
        ]
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> bool:
    """Whether a note fits into a cell."""
    return isinstance(value, int | float) or (isinstance(value, dict) and len(value) < 4)


def cell(value: Any) -> str:
    """A note's value."""
    if isinstance(value, dict):
        return ", ".join(f"{name}: {cell(count)}" for name, count in value.items())
    return figure(value) if isinstance(value, int | float) else str(value or "")


def notes(record: Record) -> str:
    """All notes of a result in one line."""
    return "; ".join(f"{name.replace('_', ' ')} {cell(value)}" for name, value in record["notes"].items())


# -- the plots -------------------------------------------------------------------------------------


def save(drawn: Figure, name: str) -> None:
    """Write a plot, and see that it is small."""
    path = IMAGES / f"bench-{name}.png"
    full = BytesIO()
    drawn.savefig(full, dpi=80, bbox_inches="tight")
    plt.close(drawn)
    Image.open(full).convert("RGB").quantize(COLOURS).save(path, optimize=True)
    size = path.stat().st_size
    assert size < LIMIT_BYTES, f"{path} has {size} bytes"


def plot_ratios(records: list[Record]) -> None:
    """A bar from each floor to what we did; to the right is better, whichever way the target goes."""
    rows = [record for record in records if record["ratio"] and not sweep_of(record)]

    def better(record: Record, ratio: float) -> float:
        return 1 / ratio if lower_is_better(record) else ratio

    drawn, axes = plt.subplots(figsize=(9, 0.24 * len(rows) + 1))
    places = range(len(rows))
    bars = [better(record, record["ratio"]) for record in rows]
    colours = [{True: OURS, False: MISSED, None: OTHER}[record["met"]] for record in rows]
    axes.barh(places, [bar - 1 for bar in bars], left=1, color=colours, height=0.7)
    for place, record in zip(places, rows, strict=True):
        if record["target"]:
            target = better(record, float(record["target"].split()[1]))
            axes.plot([target, target], [place - 0.45, place + 0.45], color=LINE, linewidth=2)
    axes.axvline(1, color=LINE, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_yticks(places, [record["name"] for record in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title("times better than the floor; the mark is the target (red: missed, grey: none)", fontsize=10)
    save(drawn, "ratios")


def lower_is_better(record: Record) -> bool:
    """Whether a small figure is the good one."""
    return record["target"].startswith("<=") or record["unit"] in ("s", "ms", "us", "ns", "bytes", "kB", "MiB")


def panel(axes: Axes, title: str, label: str, *, log_y: bool = False) -> None:
    """Dress a panel."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    if log_y:
        axes.set_yscale("log")
    axes.set_ylim(bottom=None if log_y else 0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def numbers_on(axes: Axes, values: list[int]) -> None:
    """Put the points' own numbers on a logarithmic x axis."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.minorticks_off()


def plot_batch_size(points: list[Record]) -> None:
    """Throughput, and latencies."""
    rows = [point["notes"]["x"] for point in points]
    drawn, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot(rows, [point["median"] for point in points], "o-", color=OURS, label="MB/s")
    left.plot(rows, [point["notes"]["rows/s"] / 1e6 for point in points], "s--", color=OTHER, label="million rows/s")
    for tier, colour in (("memory", OTHER), ("disk", OURS)):
        for share, style in ((50, "-"), (99, ":")):
            name = f"{tier} ack p{share}"
            right.plot(rows, [point["notes"][f"{name} ms"] for point in points], style, color=colour, label=name)
    for axes, title in ((left, "disk-acked, one stream"), (right, "ms to the ack, one write at a time")):
        numbers_on(axes, rows)
        panel(axes, title, "rows per batch (32 bytes each)", log_y=True)
    save(drawn, "batch-size")


def plot_one_large_many_small(points: list[Record]) -> None:
    """The first ack and the last."""
    pieces = [point["notes"]["x"] for point in points]
    drawn, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot(pieces, [point["median"] for point in points], "o-", color=OURS, label="last disk ack")
    first = [point["notes"]["first disk ack ms"] for point in points]
    axes.plot(pieces, first, "s--", color=OTHER, label="first disk ack")
    numbers_on(axes, pieces)
    panel(axes, "a million rows (32 MB): ms to the disk ack", "batches", log_y=True)
    save(drawn, "one-large-many-small")


def plot_concurrent_streams(points: list[Record]) -> None:
    """The sum, for one table and for several."""
    drawn, axes = plt.subplots(figsize=(6, 3.6))
    for series, style, colour in (("one table", "o-", OURS), ("a table of its own each", "s--", OTHER)):
        part = [point for point in points if point["notes"]["series"] == series]
        xs = [point["notes"]["x"] for point in part]
        axes.plot(xs, [point["median"] for point in part], style, color=colour, label=series)
    numbers_on(axes, sorted({point["notes"]["x"] for point in points}))
    panel(axes, "disk-acked MB/s, all streams together, 320 kB batches", "streams")
    save(drawn, "concurrent-streams")


def plot_backpressure(points: list[Record]) -> None:
    """Throughput over time."""
    drawn, axes = plt.subplots(figsize=(8, 3.6))
    for point, colour in zip(points, (OTHER, OURS, MISSED), strict=False):
        (name,) = (name for name in point["notes"] if name.startswith("MB/s by "))
        width = float(name.removeprefix("MB/s by ").removesuffix(" s"))
        rates = point["notes"][name]
        axes.step([width * n for n in range(len(rates))], rates, where="post", color=colour, label=point["notes"]["x"])
    panel(axes, "disk-acked MB/s of a stream that writes as fast as it may", "seconds")
    save(drawn, "backpressure")


PLOTS: dict[str, Callable[[list[Record]], None]] = {
    "batch-size": plot_batch_size,
    "one-large-many-small": plot_one_large_many_small,
    "concurrent-streams": plot_concurrent_streams,
    "backpressure": plot_backpressure,
}


def main() -> None:
    """Write the page and the plots."""
    mpl.use("Agg")
    load()
    records = newest()
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_ratios(records)
    for name, plot in PLOTS.items():
        points = [record for record in records if sweep_of(record) == name]
        if points:
            plot(points)
    PAGE.write_text(page(records))
    print(f"{PAGE.relative_to(ROOT)}, {len(list(IMAGES.glob('bench-*.png')))} plots in {IMAGES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
