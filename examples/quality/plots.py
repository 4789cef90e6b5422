"""Loss against what a run costs: dense models of several widths as a line, sparse ones as points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .analysis import Results
from .configurations import KNOWN
from .records import Record
from .report import TIME, WHEN

_COSTS = (("flops_relative", "training FLOPs, relative to dense"), (TIME, "CPU seconds of training"))
# All large runs have the same FLOPs.
_LARGE_COSTS = (("steps", "steps, at equal training FLOPs"), ("seconds", "seconds on an H100"))


def draw(file: Path, rows: list[Record], large: list[Record]) -> None:
    """Write the figure: a column for short, long and large runs, a row for FLOPs and time. SVG, always the same bytes
    for the same rows."""
    results = Results(rows)
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    for i, (length, title) in enumerate((("full", "1 token a weight"), (3, "3 tokens a weight"))):
        names = [n for n in results.names if KNOWN[n].length == length]
        dense = [n for n in results.frontier_names if n in names and KNOWN[n].decay_law == "rate"]
        for row, (column, label) in enumerate(_COSTS):
            points = {n: (results.mean(n, column), results.loss(n)) for n in [*dense, *WHEN] if n in names}
            _panel(axes[row, i], points, dense, label, f"{title}, 1.6 M weights, CPU" if row == 0 else "")
    points_of = {r["name"]: r for r in large}
    for row, (column, label) in enumerate(_LARGE_COSTS):
        points = {n: (r[column], r["val_loss"]) for n, r in points_of.items()}
        dense = [n for n in points if KNOWN[n].kind == "dense"]
        _panel(axes[row, 2], points, dense, label, "20 tokens a weight that is left, 42 M weights" if row == 0 else "")
    with mpl.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _panel(axis: Axes, points: dict[str, tuple[float, float]], dense: Sequence[str], label: str, title: str) -> None:
    line = sorted(points[n] for n in dense)
    axis.plot([x for x, _ in line], [y for _, y in line], "o-", color="tab:gray", label="dense")
    sparse = [n for n in points if n not in dense]
    axis.plot([points[n][0] for n in sparse], [points[n][1] for n in sparse], "s", color="tab:red", label="sparse")
    for name, place in points.items():
        axis.annotate(name.removesuffix("-long"), place, xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.set(xlabel=label, ylabel="validation loss", title=title)
    axis.margins(0.15)
    axis.legend()
