"""The figures: loss against time and FLOPs, density and learning rate over the steps, masks of a few layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from mst_compile.report.figures import STYLE, smooth

from .run import Run

COLOURS = {"dense": "#444444", "mst": "#d1495b", "small": "#2e86ab", "static": "#e09f3e", "short": "#6a994e"}


def draw(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write all figures as PNG and return their paths."""
    files = []
    with plt.rc_context(STYLE | {"figure.constrained_layout.use": True}):
        for name, figure in (("loss", loss_figure(runs)), ("density", density_figure(runs))):
            files.append(out / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
            plt.close(figure)
        for run in runs:
            if run.snapshots:
                files.append(out / f"masks_{run.spec.name}.png")
                figure = mask_figure(run)
                figure.savefig(files[-1], dpi=150)
                plt.close(figure)
    return files


def loss_figure(runs: Sequence[Run]) -> Any:
    """Smoothed training loss (line) and validation loss (dots), against training time and against FLOPs."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    panels = (
        (axes[0], "seconds", 1.0, "training time (s), compilation apart"),
        (axes[1], "flops", 1e12, "training TFLOP (matrix products)"),
    )
    for axis, key, unit, label in panels:
        for run in runs:
            _loss_curve(axis, run, key, unit)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.06 * max(run.rows[-1][key] / unit for run in runs))
    losses = [row["loss"] for run in runs for row in run.rows[len(run.rows) // 20 :]]
    axes[0].set_ylim(min(losses) - 0.1, max(losses) + 0.1)
    axes[0].set_ylabel("loss (nats per token)")
    axes[1].legend(title="dots: validation, line: training (smoothed)", title_fontsize=9)
    return figure


def _loss_curve(axis: Axes, run: Run, key: str, unit: float) -> None:
    colour, rows = COLOURS[run.spec.name], run.rows
    x = [row[key] / unit for row in rows]
    axis.plot(x, smooth([row["loss"] for row in rows], max(5, len(rows) // 40)), color=colour, alpha=0.55, lw=1.3)
    points = [(row[key] / unit, row["val_loss"]) for row in rows if row["val_loss"] is not None]
    if points:
        axis.plot(*zip(*points, strict=True), "o", color=colour, ms=4, label=run.spec.label)
        axis.annotate(f"{points[-1][1]:.2f}", points[-1], (5, 4), textcoords="offset points", color=colour, fontsize=9)


def density_figure(runs: Sequence[Run]) -> Any:
    """Density of the sparse weights with the schedule's target, and the learning rate below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=(2.2, 1))
    for run in runs:
        colour, steps = COLOURS[run.spec.name], [row["step"] for row in run.rows]
        top.step(steps, [100 * row["density"] for row in run.rows], where="mid", color=colour, label=run.spec.label)
        if run.snapshots and run.spec.name == "mst":
            target = [100 * (1 - row["sparsity_target"]) for row in run.rows]
            top.plot(steps, target, ":", color=colour, lw=1, label="MST: target")
        bottom.plot(steps, [row["lr"] for row in run.rows], color=colour, lw=1.2)
    top.set(ylabel="active share of sparse layers (%)", ylim=(0, 105))
    top.legend(loc="center")
    bottom.set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None), xlim=(0, None))
    return figure


def mask_figure(run: Run) -> Any:
    """Block masks: one row a layer, one column a moment. A dark cell is an active block."""
    moments = list(run.snapshots)
    names = _telling_layers(list(run.snapshots[moments[0]]))
    figure, axes = plt.subplots(
        len(names), len(moments), figsize=(2.5 * len(moments) + 1.2, 2.1 * len(names) + 0.6), squeeze=False
    )
    colours = ListedColormap(["#f1efe9", COLOURS[run.spec.name]])
    for line, name in zip(axes, names, strict=True):
        for axis, moment in zip(line, moments, strict=True):
            mask = run.snapshots[moment][name]
            if mask.shape[0] > 2 * mask.shape[1]:
                mask = mask.t()  # all lie on their long side
            axis.imshow(mask.numpy(), cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
            axis.set_xlabel(f"{100 * mask.float().mean().item():.0f} % active", fontsize=9)
        shape = " x ".join(map(str, run.snapshots[moments[0]][name].shape))
        line[0].set_ylabel(f"{_short(name)}\n{shape} blocks", fontsize=9)
    for axis, moment in zip(axes[0], moments, strict=True):
        axis.set_title(moment.replace(", ", "\n"), fontsize=10)
    figure.suptitle(f"{run.spec.label}: active blocks", fontsize=11)
    return figure


def _telling_layers(names: list[str]) -> list[str]:
    """One weight of each kind, from the middle of the stack."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.split(".h.")[-1].split(".", 1)[-1] if ".h." in name else name, []).append(name)
    chosen = [same[math.ceil(len(same) / 2) - 1] for same in by_kind.values()]
    order = [name for name in names if name in chosen]
    return order[-5:] if len(order) > 5 else order


def _short(name: str) -> str:
    return name.removeprefix("transformer.").removesuffix(".weight")
