"""Figures of the study: of recorded runs, always the same, with labels that cover nothing."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.path import Path as Polygon
from matplotlib.text import Annotation, Text

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from quality import plots, plots_budget, records, step_times
from quality.sizes import BUDGET

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def tables(*names: str) -> list[list[records.Record]]:
    return [records.read_csv(BENCHMARKS / f"quality{name}.csv") for name in names]


def one_budget() -> tuple[list[records.Record], list[records.Record]]:
    return tables("_regimes")[0], step_times.read(BENCHMARKS / "quality_step_times.csv")


def test_the_figure_shows_recorded_runs_and_is_always_the_same(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plots.draw(tmp_path / name, *tables("", "_large"))
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert all(name in drawn.decode() for name in ("dense-384-match", "static-b64", "start-70", "3 tokens a weight"))


def test_the_figure_of_one_budget_shows_every_text(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        plots_budget.draw(tmp_path / name, *one_budget())
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    rows = [row for row in one_budget()[0] if row["text"]]
    seeds = Counter((plots_budget.text_of(row), row["name"]) for row in rows)
    # Of one seed there are no points to draw, only curves.
    texts = {plots_budget.text_of(r) for r in rows if r["unique"] or seeds[plots_budget.text_of(r), r["name"]] >= 3}
    assert len(texts) == 4
    assert all(
        text in drawn.decode()
        for text in (*(text.split(" (")[0] for text in texts), "epochs", "CPU seconds", "wide-96-b2-set")
    )


def test_the_recorded_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    """Versions of matplotlib draw alike but not by the same bytes, so only what is written is compared."""
    plots.draw(tmp_path / "when.svg", *tables("", "_large"))
    plots_budget.draw(tmp_path / "budget.svg", *one_budget())
    for name in ("when.svg", "budget.svg"):
        old, new = (
            sorted(line.split(">")[-2] for line in (folder / name).read_text().splitlines() if "</text>" in line)
            for folder in (BENCHMARKS.parent / "docs", tmp_path)
        )
        assert old == new


def test_curves_end_where_the_run_did() -> None:
    rows, times = one_budget()
    figure = plots_budget.figure_of(rows, times)
    repeated = [axis for axis in figure.axes if axis.get_xlabel() == "epochs"]
    assert len(repeated) == 2
    for axis, unique in zip(
        repeated, sorted({r["unique"] for r in rows if r["unique"] and r["text"]}, reverse=True), strict=True
    ):
        ends = {(line.get_xdata()[-1], line.get_ydata()[-1]) for line in axis.lines}
        own = [r for r in rows if r["unique"] == unique and r["text"] and r["seed"] == 0]
        expected = {(r["steps"] * BUDGET.tokens / unique, r["val_loss"]) for r in own}
        assert {(round(x, 6), round(y, 3)) for x, y in ends} == {(round(x, 6), round(y, 3)) for x, y in expected}
        assert min(y for _, y in ends) > axis.get_ylim()[0]
    plots.plt.close(figure)


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: plots.figure_of(*tables("", "_large")), "validation loss"),
        (lambda: plots_budget.figure_of(*one_budget()), "CPU seconds"),
    ],
    ids=["when", "budget"],
)
def test_no_label_covers_anything(draw: Callable[[], Figure], named: str) -> None:
    figure = draw()
    figure.draw_without_rendering()
    axes = [axis for axis in figure.axes if named in (axis.get_xlabel(), axis.get_ylabel())]
    assert axes
    for axis in axes:
        texts = [child for child in axis.get_children() if isinstance(child, Annotation)]
        boxes = [Text.get_window_extent(text) for text in texts]
        frame = axis.get_window_extent()
        for i, box in enumerate(boxes):
            assert frame.x0 <= box.x0 < box.x1 <= frame.x1
            assert not any(box.overlaps(other) for other in boxes[:i])
            for line in axis.lines:
                places = line.get_transform().transform(line.get_xydata())
                assert not any(box.contains(*place) for place in places)
                if line.get_linestyle() == "-":
                    assert not Polygon(places).intersects_bbox(box, filled=False)
        shown = {text.get_text() for text in texts}
        assert len(shown) == len(texts) == sum(len(line.get_xdata()) for line in axis.lines)
    plots.plt.close(figure)
