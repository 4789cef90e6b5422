"""The figures, drawn as the library's reports are: loss, density and learning rate with the phases, masks of a few
layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from mst_compile.report.figures import STYLE, density_figure, loss_figure, mask_figure
from mst_compile.report.history import History, Snapshot

from .run import Run

COLOURS = {"dense": "#444444", "mst": "#d1495b", "small": "#2e86ab", "static": "#e09f3e", "short": "#6a994e"}


def draw(runs: Sequence[Run], out: Path) -> list[Path]:
    """Write all figures as PNG and return their paths."""
    files = []
    with rc_context(STYLE):
        for name, figure in figures([history(run) for run in runs], [run.spec.name for run in runs]):
            files.append(out / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
    return files


def figures(histories: Sequence[History], names: Sequence[str]) -> Iterator[tuple[str, Figure]]:
    """File name without its ending, and figure."""
    yield "loss", loss_figure(histories)
    yield "density", density_figure(histories)
    for told, name in zip(histories, names, strict=True):
        if told.snapshots:
            yield f"masks_{name}", mask_figure(told)


def history(run: Run) -> History:
    """A run as figures take it."""
    schedule = run.spec.schedule
    rows = [{key: value for key, value in row.items() if value is not None} for row in run.rows]
    for row in rows:
        row["sparsity"] = row["sparsity_target"]
    return History(
        run.spec.label,
        rows,
        phases=schedule.phases(run.spec.steps) if schedule is not None else [],
        sparse=schedule is not None,
        snapshots=list(_snapshots(run)),
        colour=COLOURS[run.spec.name],
    )


def _snapshots(run: Run) -> Iterator[Snapshot]:
    for moment, masks in run.snapshots.items():
        phase, _, step = moment.rpartition(", step ")
        yield Snapshot(int(step), phase, {name: masks[name] for name in _telling_layers(list(masks))})


def _telling_layers(names: list[str]) -> list[str]:
    """One weight of each kind, from the middle of the stack."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.split(".h.")[-1].split(".", 1)[-1] if ".h." in name else name, []).append(name)
    chosen = [same[math.ceil(len(same) / 2) - 1] for same in by_kind.values()]
    order = [name for name in names if name in chosen]
    return order[-5:] if len(order) > 5 else order
