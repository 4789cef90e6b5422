"""Figures of runs: loss against steps, time and FLOPs; density with its phases; masks."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .course import drawable
from .history import History, moments
from .sinks import need

_matplotlib = need("matplotlib", "drawing figures", '"mst-compile[viz]"')

from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

DENSE, SPARSE = "#444444", ("#d1495b", "#2e86ab", "#e09f3e", "#6a994e", "#7b5ea7", "#3a7d7c")
INACTIVE = "#f1efe9"
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names are the user's: a dollar sign is one
    "svg.hashsalt": "mst_compile",
}
_POINTS = 1500  # of a curve: more cannot be seen, and make large files
_CHARACTER = 0.0115  # width of one of the phases' names, of that of the axes
AXES = (
    ("step", 1.0, "optimizer step"),
    ("seconds", 1.0, "training time (s), compilation apart"),
    ("flops", 1e12, "training TFLOP (matrix products)"),
)


def smooth(values: Sequence[float], window: int, counts: Sequence[int] | None = None) -> list[float]:
    """Exponential mean with bias correction; a value that is not drawable does not enter it, and leaves a gap. A value
    with a count enters so many times; ``window`` is in such times."""
    mean, weight, fade, out = 0.0, 0.0, 1 - 1 / max(1, window), []
    for value, count in zip(values, counts or [1] * len(values), strict=True):
        if not drawable(value):
            out.append(math.nan)
            continue
        keep = fade**count
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append(mean / weight)
    return out


def coloured(histories: Sequence[History]) -> list[str]:
    """A colour for each run: its own, grey for the first dense one, then those of the palette."""
    chosen, palette, grey = [], 0, True
    for history in histories:
        if history.colour is not None:
            chosen.append(history.colour)
        elif not history.sparse and grey:
            chosen.append(DENSE)
            grey = False
        else:
            chosen.append(SPARSE[palette % len(SPARSE)])
            palette += 1
    return chosen


def figures(histories: Sequence[History]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of all that can be drawn of runs that are compared."""
    with rc_context(STYLE):
        if any(drawable(v) for history in histories for v in history.column("loss")):
            yield "loss", loss_figure(histories)
        if any(history.sparse and history.rows for history in histories):
            yield "density", density_figure(histories)
        for i, history in enumerate(histories):
            if history.snapshots:
                yield "masks" if len(histories) == 1 else f"masks_{i + 1}", mask_figure(history)


def draw(histories: Sequence[History], folder: Path) -> list[Path]:
    """Write all figures as PNG and return their paths."""
    written = []
    for name, figure in figures(histories):
        written.append(folder / f"{name}.png")
        drawn = io.BytesIO()
        with rc_context(STYLE):
            figure.savefig(drawn, format="png", dpi=150)
        files.replace(written[-1], drawn.getvalue())
    return written


def svg(figure: Figure) -> str:
    """A figure as the text of an SVG file, the same for the same figure."""
    with rc_context(STYLE):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


# -- loss --------------------------------------------------------------------------------------------------------------


def loss_figure(histories: Sequence[History]) -> Figure:
    """Smoothed training loss (line) and validation loss (dots), against steps, training time and FLOPs."""
    panels = [axis for axis in AXES if all(history.last(axis[0]) is not None for history in histories if history.rows)]
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 4.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for history, colour in zip(histories, coloured(histories), strict=True):
        for axis, (key, unit, _) in zip(axes, panels, strict=True):
            handles |= _loss_curve(axis, history, colour, key, unit)
    for axis, (key, unit, label) in zip(axes, panels, strict=True):
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.03 * max(1e-12, *(history.last(key) or 0.0 for history in histories)) / unit)
    _limit(axes[0], histories)
    axes[0].set_ylabel("loss")
    _legend(figure, handles)
    return figure


def _loss_curve(axis: Axes, history: History, colour: str, key: str, unit: float) -> dict[str, Any]:
    """Draw a run's losses; what the legend shall show of it, by label."""
    losses = history.losses()
    rows, values, counts = [row for row, _, _ in losses], [v for _, v, _ in losses], [n for _, _, n in losses]
    x = [value / unit for value in history.column(key, rows)]
    y = smooth(values, max(5, sum(counts) // 40), counts)
    keep = slice(None, None, 1 if history.course is not None else max(1, len(rows) // _POINTS))
    (line,) = axis.plot(x[keep], y[keep], color=colour, alpha=0.55, lw=1.3)
    found = {f"{history.label}: training (smoothed)": line}
    if bad := history.not_finite():
        found = {f"{history.label}: training (smoothed), {bad} steps not finite": line}
    rows = history.curve("val_loss")
    unseen = zip(rows, history.column("val_loss", rows), strict=True)
    points = [(row[key] / unit, value) for row, value in unseen if drawable(value)]
    if points:
        (dots,) = axis.plot(*zip(*points, strict=True), "o", color=colour, ms=4)
        found[f"{history.label}: validation, {points[-1][1]:.3f} at the end"] = dots
    return found


def _limit(axis: Axes, histories: Sequence[History]) -> None:
    """Let the first steps, where losses are highest, leave the frame."""
    seen = [v for h in histories for v in h.settled() if drawable(v)]
    seen += [v for h in histories for v in h.column("val_loss") if drawable(v)]
    if seen:
        room = 0.03 * (max(seen) - min(seen)) + 1e-3
        axis.set_ylim(min(seen) - room, max(seen) + room)


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """A legend below the axes, where it covers nothing."""
    # matplotlib leaves out labels that begin with an underscore.
    labels = [f"\u200b{label}" if label.startswith("_") else label for label in handles]
    columns = max(1, min(len(labels), int(14 * figure.get_figwidth()) // max(map(len, labels), default=1)))
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns, fontsize=9)


# -- density -----------------------------------------------------------------------------------------------------------


def density_figure(histories: Sequence[History]) -> Figure:
    """Density of the sparse weights with what the schedule asks for; below it, where it was recorded, the learning rate
    (``lr``). Runs with the same phases share a panel, on which these are marked and named."""
    colours = coloured(histories)
    groups: dict[tuple[Any, ...], list[tuple[History, str]]] = {}
    for history, colour in zip(histories, colours, strict=True):
        if history.sparse and history.rows:
            groups.setdefault(tuple(history.phases), []).append((history, colour))
    rated = [(h, c) for h, c in zip(histories, colours, strict=True) if h.last("lr") is not None]
    heights = [2.2] * len(groups) + [1.0] * bool(rated)
    figure = Figure(figsize=(9, 1.5 * sum(heights) + 1.4), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    end = max(history.rows[-1]["step"] for history in histories if history.rows)
    handles: dict[str, Any] = {}
    for axis, (phases, members) in zip(axes, groups.items(), strict=False):
        for history, colour in members:
            handles |= _density_curve(axis, history, colour)
        axis.set(ylabel="active share of\nsparse weights (%)", ylim=(0, 105), xlim=(0, max(1, end)))
        mark_phases(axis, phases, max(1, end))
    for history, colour in rated:
        rows = history.curve("lr")
        steps, rates = history.column("step", rows), history.column("lr", rows)
        (handles[f"{history.label}: learning rate"],) = axes[-1].plot(steps, rates, color=colour, lw=1.2, ls="--")
    if rated:
        axes[-1].set(ylabel="learning rate", ylim=(0, None))
    axes[-1].set_xlabel("optimizer step")
    _legend(figure, handles)
    return figure


def _density_curve(axis: Axes, history: History, colour: str) -> dict[str, Any]:
    rows = history.curve("density", _POINTS)
    density = [100 * value for value in history.column("density", rows)]
    (line,) = axis.step(history.column("step", rows), density, where="mid", color=colour)
    rows = history.curve("sparsity", _POINTS)
    wanted = [100 * (1 - value) for value in history.column("sparsity", rows)]
    (target,) = axis.plot(history.column("step", rows), wanted, ":", color=colour, lw=1)
    return {f"{history.label}: density": line, f"{history.label}: density asked for": target}


def mark_phases(axis: Axes, phases: Sequence[tuple[str, int, int]], end: float) -> None:
    """Shade every other phase, and name each above the axes, in lines where names are wider than their phases."""
    ends: list[float] = []  # of the names in each line so far
    for i, (name, first, last) in enumerate((n, a, min(b, end)) for n, a, b in phases if a < end):
        if i % 2:
            axis.axvspan(first, last, color="#000000", alpha=0.05, lw=0)
        if i:
            axis.axvline(first, color="#888888", lw=0.8, ls="--")
        half = _CHARACTER * len(name) / 2
        centre = min(max((first + last) / 2 / end, half), 1 - half)
        line = next((k for k, edge in enumerate(ends) if centre - half > edge), len(ends))
        ends[line : line + 1] = [centre + half]
        axis.text(
            centre, 1.02 + 0.09 * line, name, transform=axis.transAxes, ha="center", va="bottom", fontsize=9,
            color="#555555",
        )  # fmt: skip


# -- masks -------------------------------------------------------------------------------------------------------------


def mask_figure(history: History) -> Figure:
    """Block masks: one row a weight, one column a moment. A square is a block."""
    chosen = [history.snapshots[i] for i in moments(len(history.snapshots))]
    names = list(chosen[0].masks)
    (colour,) = coloured([history])
    shown = {(m.step, name): _lying(m.masks[name]) for m in chosen for name in names if name in m.masks}
    width = 2.6
    heights = [
        max(0.35, width * _lying(chosen[0].masks[n]).shape[0] / _lying(chosen[0].masks[n]).shape[1]) for n in names
    ]
    figure = Figure(figsize=(width * len(chosen) + 1.4, sum(heights) + 0.4 * len(names) + 1.0), layout="compressed")
    axes = figure.subplots(len(names), len(chosen), squeeze=False, height_ratios=heights)
    for line, name in zip(axes, names, strict=True):
        for axis, moment in zip(line, chosen, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            mask = shown.get((moment.step, name))
            if mask is None:
                continue
            share = 100 * mask.float().mean().item()
            colours = ListedColormap([INACTIVE, colour])
            axis.imshow(mask.tolist(), cmap=colours, vmin=0, vmax=1, aspect="equal", interpolation="nearest")
            axis.set_xlabel(f"{share:.0f} % active", fontsize=9)
        size = " x ".join(map(str, chosen[0].masks[name].shape))
        line[0].set_ylabel(f"{_short(name)}\n{size} blocks", fontsize=8, rotation=0, ha="right", va="center")
    for axis, moment in zip(axes[0], chosen, strict=True):
        axis.set_title(moment.title.replace(", ", "\n"), fontsize=10)
    figure.suptitle(f"{history.label}: blocks of a few weights", fontsize=11)
    patches = {"active block": Patch(color=colour), "block of zeros": Patch(facecolor=INACTIVE, edgecolor="#bbbbbb")}
    _legend(figure, patches)
    return figure


def _lying(mask: Any) -> Any:
    """A mask on its long side, as all are drawn."""
    return mask.t() if mask.shape[0] > mask.shape[1] else mask


def _short(name: str) -> str:
    """The end of a weight's name, broken into lines."""
    text = name.removesuffix(".weight")
    text = text if len(text) <= 36 else f"...{text[-33:]}"
    lines = [""]
    for part in re.split(r"(?<=\.)(?!\.)", text):  # at dots, and within what is wider than a line
        for piece in (part[i : i + 18] for i in range(0, len(part), 18)):
            if len(lines[-1]) + len(piece) <= 18:
                lines[-1] += piece
            else:
                lines.append(piece)
    return "\n".join(lines)
