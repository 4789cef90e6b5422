"""Loss against what a run costs: dense models of several widths as a line, sparse ones as points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.path import Path as Polygon
from matplotlib.transforms import Bbox

from .analysis import Results
from .configurations import KNOWN
from .records import Record
from .report import TIME, WHEN

_COSTS = (("flops_relative", "training FLOPs, relative to dense"), (TIME, "CPU seconds of training"))
# All large runs have the same FLOPs.
_LARGE_COSTS = (("steps", "steps, at equal training FLOPs"), ("seconds", "seconds on an H100"))
_MARKER = 5.0  # points from a label's place to the edge of a mark, at the least
_RINGS = (7, 12, 18, 26, 36, 48)  # points that a label may stand off; from the second on a line leads to it


def draw(file: Path, rows: list[Record], large: list[Record]) -> None:
    """Write the figure: a row for short, long and large runs, a column for FLOPs and time. SVG, always the same bytes
    for the same rows."""
    figure = figure_of(rows, large)
    with mpl.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def figure_of(rows: list[Record], large: list[Record]) -> Figure:
    """The figure, with every label placed."""
    results = Results(rows)
    figure, axes = plt.subplots(3, 2, figsize=(9.2, 11.5), layout="constrained")
    for i, (length, title) in enumerate((("full", "1 token a weight"), (3, "3 tokens a weight"))):
        names = [n for n in results.names if KNOWN[n].length == length]
        dense = [n for n in results.frontier_names if n in names and KNOWN[n].decay_law == "rate"]
        for axis, (column, label) in zip(axes[i], _COSTS, strict=True):
            points = {n: (results.mean(n, column), results.loss(n)) for n in [*dense, *WHEN] if n in names}
            panel(axis, points, dense, label, f"{title}, 1.6 M weights, CPU")
    points_of = {r["name"]: r for r in large}
    for axis, (column, label) in zip(axes[2], _LARGE_COSTS, strict=True):
        points = {n: (r[column], r["val_loss"]) for n, r in points_of.items()}
        dense = [n for n in points if KNOWN[n].kind == "dense"]
        panel(axis, points, dense, label, "20 tokens a weight that is left, 42 M, H100")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.draw_without_rendering()  # panels have their places now, and keep them
    figure.set_layout_engine("none")
    for axis in axes.flat:
        name_points(axis)
    return figure


def panel(axis: Axes, points: dict[str, tuple[float, float]], dense: Sequence[str], label: str, title: str) -> None:
    line = sorted((points[n], n) for n in dense)
    sparse = [n for n in points if n not in dense]
    for names, style, colour, what in (
        ([n for _, n in line], "o-", "tab:gray", "dense: narrower, or fewer steps"),
        (sparse, "s", "tab:red", "sparse at some time"),
    ):
        (drawn,) = axis.plot([points[n][0] for n in names], [points[n][1] for n in names], style, color=colour, ms=5)
        drawn.set_label(what)
        drawn.set_gid(" ".join(n.removesuffix("-long") for n in names))
    axis.set(xlabel=label, ylabel="validation loss", title=title)
    axis.margins(0.2, 0.12)
    axis.spines[["top", "right"]].set_visible(False)


def name_points(axis: Axes) -> None:
    """Write the name of every point beside it, where it covers no other name, no point, no line and no edge."""
    taken: list[Bbox] = []
    edges: list[np.ndarray] = []
    named: list[tuple[np.ndarray, str]] = []
    for line in axis.lines:
        places = line.get_transform().transform(line.get_xydata())
        taken += [Bbox.from_bounds(x - _MARKER, y - _MARKER, 2 * _MARKER, 2 * _MARKER) for x, y in places]
        if line.get_linestyle() != "None":
            edges += [np.array(pair) for pair in itertools.pairwise(places)]
        named += zip(places, str(line.get_gid()).split(), strict=True)
    inside = axis.get_window_extent()
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    points = [place for place, _ in named]
    for place, name in named:
        text = figure.text(0, 0, name, fontsize=8)
        width, height = text.get_window_extent().size
        text.remove()
        centre = free_place(place, (width + 4, height + 2), points, taken, edges, inside)
        box = Bbox.from_bounds(*(centre - (width / 2, height / 2)), width, height)
        taken.append(box)
        arrow = {"arrowstyle": "-", "lw": 0.5, "color": "#777777", "shrinkA": 0, "shrinkB": 3}
        axis.annotate(
            name, place * 72 / figure.dpi, centre * 72 / figure.dpi, xycoords="figure points",
            textcoords="figure points", fontsize=8, ha="center", va="center",
            arrowprops=arrow if distance(place, box) > _RINGS[1] else None,
        )  # fmt: skip


def free_place(
    place: np.ndarray,
    size: tuple[float, float],
    points: Sequence[np.ndarray],
    taken: Sequence[Bbox],
    edges: Sequence[np.ndarray],
    inside: Bbox,
) -> np.ndarray:
    """Where to centre the label of a point at ``place``, in pixels: near it where it is free, or least covered.

    Args:
        size: width and height of the label.
        points: all points that have labels.
        taken: boxes that it must not cover.
        edges: ``[2, 2]`` ends of lines that it must not cover.
        inside: box that it must not leave.
    """
    best, least = place, math.inf
    for ring, turn in itertools.product(_RINGS, range(16)):
        angle = 2 * math.pi * turn / 16
        towards = np.array([math.cos(angle), math.sin(angle)])
        centre = place + towards * (ring + np.abs(towards) @ (np.array(size) / 2))
        box = Bbox.from_bounds(*(centre - np.array(size) / 2), *size)
        covered = 5 * sum(box.overlaps(other) for other in taken)
        covered += 5 * sum(Polygon(edge).intersects_bbox(box, filled=False) for edge in edges)
        # It belongs to the nearest point, and nothing stands between them.
        own = distance(place, box)
        covered += sum(distance(other, box) <= own for other in points if not np.allclose(other, place))
        way = Polygon(np.array([place, np.clip(place, box.min, box.max)]))
        covered += sum(way.intersects_path(Polygon(e), filled=False) for e in edges if not _ends_at(e, place))
        within = (inside.min <= box.min).all() and (box.max <= inside.max).all()
        covered += 0 if within else 5
        if covered < least:
            best, least = centre, covered
        if not covered:
            break
    return best


def distance(place: np.ndarray, box: Bbox) -> float:
    return math.dist(place, np.clip(place, box.min, box.max))


def _ends_at(edge: np.ndarray, place: np.ndarray) -> bool:
    return any(np.allclose(end, place) for end in edge)
