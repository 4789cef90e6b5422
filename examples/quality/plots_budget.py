"""Models of one budget of FLOPs: loss against time where text is hardly repeated, and against epochs where it is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import records
from .budget import is_dense, seconds_of, text_of
from .plots import name_points, panel
from .records import Record
from .sizes import BUDGET

_SEEDS = 3  # at the least, of a configuration that is drawn against time; of repeated text all are
_TOP = 0.45  # nats above the best run: what lies higher is every run's beginning


def draw(file: Path, rows: list[Record], times: list[Record]) -> None:
    """Write the figure as SVG, always the same bytes for the same rows."""
    figure = figure_of(rows, times)
    with mpl.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def figure_of(rows: Sequence[Record], times: Sequence[Record]) -> Figure:
    """The figure: a row of panels for budgets of text that is hardly repeated, one for text that is."""
    texts: dict[str, list[Record]] = {}
    for row in rows:
        if row["text"]:  # of older ones the corpus is not known, and may be another
            texts.setdefault(text_of(row), []).append(row | {"time": seconds_of(row, times)})
    once = {
        text: found
        for text, found in texts.items()
        if found[0]["unique"] is None and any(map(_drawn, records.by_name(found).values()))
    }
    often = {text: found for text, found in texts.items() if found[0]["unique"] is not None}
    figure = plt.figure(figsize=(9.2, 8.0), layout="constrained")
    grid = figure.add_gridspec(2, len(once) * len(often))  # both rows are as wide, whatever they hold
    panels = [figure.add_subplot(grid[0, i * len(often) : (i + 1) * len(often)]) for i in range(len(once))]
    for axis, (text, found) in zip(panels, sorted(once.items(), key=lambda item: item[1][0]["flops"]), strict=True):
        _against_time(axis, found, text)
    for i, (text, found) in enumerate(often.items()):
        _against_epochs(figure.add_subplot(grid[1, i * len(once) : (i + 1) * len(once)]), found, text)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.draw_without_rendering()  # panels have their places now, and keep them
    figure.set_layout_engine("none")
    for axis in panels:
        name_points(axis)
    return figure


def label_of(name: str) -> str:
    """A configuration's name without what nearly all of them have in common; the base's tells its width as well."""
    return f"dense-{BUDGET.width}" if name == "dense" else name.replace("-rate-double", "").replace("-match", "")


def _with_rate(name: str) -> str:
    """A configuration's name with its rate, which others of its width may not have."""
    return label_of(name) + (", twice the rate" if name.endswith("-rate-double") else "")


def _short(text: str) -> str:
    """A text, without which corpus it is of."""
    return text.split(" (")[0]


def _drawn(found: Sequence[Record]) -> bool:
    """Whether a configuration has seeds enough, and its steps were timed."""
    return len(found) >= _SEEDS and found[0]["time"] is not None


def _against_time(axis: Axes, rows: Sequence[Record], text: str) -> None:
    """Means over seeds; of dense models that differ in their rate alone the best one."""
    points: dict[str, tuple[float, float]] = {}
    dense: list[str] = []
    for found in filter(_drawn, records.by_name(rows).values()):
        label, loss = label_of(found[0]["name"]), statistics.fmean(row["val_loss"] for row in found)
        if label not in points or loss < points[label][1]:
            points[label] = (found[0]["time"], loss)
        if is_dense(found[0]):
            dense.append(label)
    budget = rows[0]["flops"] / rows[0]["flops_relative"] / 1e12
    panel(axis, points, list(dict.fromkeys(dense)), "CPU seconds", f"{_short(text)}\n{budget:.1f}e12 FLOPs")


def _against_epochs(axis: Axes, rows: Sequence[Record], text: str) -> None:
    """Validation loss on the way, of the first seed that there is; dense models in gray."""
    dense = sorted({row["name"] for row in rows if is_dense(row)})
    sparse = sorted({row["name"] for row in rows if not is_dense(row)})
    grays, reds = plt.get_cmap("Greys"), plt.get_cmap("autumn")
    colours = {name: grays(0.4 + 0.6 * i / max(1, len(dense) - 1)) for i, name in enumerate(dense)}
    colours |= {name: reds(0.7 * i / max(1, len(sparse) - 1)) for i, name in enumerate(sparse)}
    best = min(row["val_loss"] for row in rows)
    first = {row["name"]: row for row in sorted(rows, key=lambda row: -row["seed"])}
    for name in (*dense, *sparse):
        points = records.curve(first[name])
        epochs = [step * BUDGET.tokens / first[name]["unique"] for step, _ in points]
        axis.plot(epochs, [loss for _, loss in points], ".-", color=colours[name], lw=1.2, label=_with_rate(name))
    axis.set(xlabel="epochs", ylabel="validation loss", title=_short(text), ylim=(best - 0.02, best + _TOP))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="best")
