"""Runs of any length on a page: short ones as they are, of long ones what can be seen, all of it exact that is counted,
in memory that does not grow with the records."""

from __future__ import annotations

import bisect
import math
import random
import statistics
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from mst_compile import MixedSparsity, sparsify
from mst_compile.report import Recorder, figures, files, page, read
from mst_compile.report.course import WHOLE, Course, Kept, Series, Speeds
from mst_compile.report.history import History, Snapshot, moments, overview, pack

LONG, SPIKE, NANS = 60_000, 37_036, (23_333, 45_001)
PHASES = ("warmup", "sparse", "dense")


def row(i: int, records: int) -> dict[str, Any]:
    """A record of a synthetic run."""
    place = 3 * i // records
    found: dict[str, Any] = {"step": i + 1, "loss": 2 + math.exp(-i / records), "density": (1.0, 0.2, 1.0)[place]}
    found |= {"sparsity": 1 - found["density"], "phase": PHASES[place], "flops": 1e9 * (i + 1), "flops_of_dense": 0.5}
    found |= {"seconds": 0.01 * (i + 1), "compile_seconds": 1.0, "wall_seconds": 0.02 * (i + 1)}
    return found | {"lr": 1e-3 * (1 - i / records), "tokens_per_s": 1000.0 + (7919 * i) % records}


def synthetic(folder: Path, records: int, events: int = 0) -> Path:
    """A run of so many records, with a spike, a loss that is NaN and one that is infinite, validation every 500 steps,
    a value that was logged once, and a learning rate that leaps once."""
    folder.mkdir()
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(32, 32)), MixedSparsity.published(records), block=4)
    with Recorder(model, folder, tokens_per_step=4) as recorder:
        about = recorder._about_now
        about["phases"] = [[name, records * i // 3, records * (i + 1) // 3] for i, name in enumerate(PHASES)]
        recorder._write_about()

    def lines() -> Any:
        for i in range(records):
            found = row(i, records)
            if i == SPIKE * records // LONG:
                found |= {"loss": 50.0, "lr": 0.7, "once": 3.25}
            if i in [n * records // LONG for n in NANS]:
                found["loss"] = math.nan if i < records // 2 else math.inf
            if i % 500 == 499:
                found["val_loss"] = found["loss"] + 1
            yield f"{files.dumps(found)}\n"

    files.replace(folder / "scalars.jsonl", lines())
    event = {"phase": "sparse", "density": 0.5, "skipped": ""}
    files.replace(
        folder / "events.jsonl",
        (
            f"{files.dumps(event | change(i) | {'step': i + 1, 'weights': {f'w{i % 3}': change(i) | SIZES}})}\n"
            for i in range(events)
        ),
    )
    masks = (pack(Snapshot(i, "sparse", {"w": torch.arange(64).view(8, 8) % (i + 2) == 0})) for i in range(events))
    files.replace(folder / "masks.jsonl", (f"{files.dumps(each)}\n" for each in masks))
    return folder


SIZES = {"density": 0.5, "block": 4}


def change(i: int) -> dict[str, int]:
    return {"dropped": i % 11, "grown": i % 7}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, History]:
    """All records of a long run, and what is kept of them."""
    folder = synthetic(tmp_path_factory.mktemp("runs") / "long", LONG)
    return read(folder), overview(folder)


def peak(folder: Path) -> int:
    """Bytes that were allocated at once by Python while a run was read."""
    tracemalloc.start()
    try:
        overview(folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# -- short runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("records", "events"), [(3, 0), (1600, 230), (WHOLE, 7)])
def test_a_short_run_is_shown_as_it_is(records: int, events: int, tmp_path: Path) -> None:
    folder = synthetic(tmp_path / "run", records, events)
    found = overview(folder)
    assert str(found.rows) == str(read(folder).rows)
    assert page.render([found]) == page.render([read(folder)])


# -- long runs ---------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    folder, peaks = synthetic(tmp_path / "run", 1), []
    for records in (20_000, 200_000):
        lines = (f'{{"step": {i}, "loss": {i * 7919 % 10007}}}\n' for i in range(records))
        files.replace(folder / "scalars.jsonl", lines)
        peaks.append(peak(folder))
    assert peaks[1] < 1.5 * peaks[0]


def test_events_and_masks_do_not_gather(tmp_path: Path) -> None:
    few, many = (synthetic(tmp_path / str(n), 10, events=n) for n in (300, 3000))
    assert peak(many) < 1.5 * peak(few)
    whole, found = read(many), overview(many)
    assert page._run(found) == page._run(whole)
    assert found.changes().count == len(whole.events) == 3000
    assert found.changes().weights == whole.changes().weights
    drawn = [whole.snapshots[i] for i in moments(len(whole.snapshots))]
    assert [each.step for each in found.snapshots] == [each.step for each in drawn] == [0, 600, 1200, 1799, 2399, 2999]
    assert all(one.masks["w"].equal(other.masks["w"]) for one, other in zip(found.snapshots, drawn, strict=True))


def test_tables_of_a_long_run_are_exact(long: tuple[History, History]) -> None:
    """All but the median of speeds, to .1 %."""
    whole, found = long
    assert len(found.rows) < LONG // 10
    names = set().union(*whole.rows)
    assert "once" in names
    assert {name: found.last(name) for name in names} == {name: whole.last(name) for name in names}
    for one, other in zip(page._result(found), page._result(whole), strict=True):
        if one != other:
            assert abs(float(one) / float(other) - 1) < 1e-3
    assert page._run(found) == page._run(whole)
    assert len(page._phases(found)) == 3
    assert page.savings([found]) == page.savings([whole])
    assert found.not_finite() == whole.not_finite() == 2


def test_curves_of_a_long_run_have_what_can_be_seen(long: tuple[History, History]) -> None:
    whole, found = long
    for name in ("loss", "val_loss", "lr", "density", "sparsity"):
        values, kept = (
            [v for v in history.column(name, history.curve(name)) if math.isfinite(v)] for history in (whole, found)
        )
        assert (min(kept), max(kept), kept[0], kept[-1]) == (min(values), max(values), values[0], values[-1])
        assert len(kept) <= 4000
    assert found.column("val_loss", found.curve("val_loss")) == [v for v in whole.column("val_loss") if v == v]
    losses = {each["step"]: each["loss"] for each in found.curve("loss")}
    assert losses[SPIKE + 1] == 50
    assert math.isnan(losses[NANS[0] + 1])
    assert losses[NANS[1] + 1] == math.inf
    shown = {each["step"]: each["density"] for each in found.curve("density")}
    for edge, before, after in ((LONG // 3, 1.0, 0.2), (2 * LONG // 3, 0.2, 1.0)):  # it leaps where it did
        assert before in [shown[step] for step in shown if edge - 200 < step <= edge]
        assert after in [shown[step] for step in shown if edge < step <= edge + 200]
    assert max(v for v in found.settled() if figures.drawable(v)) == 50
    assert max(whole.settled()[: LONG // 100]) == pytest.approx(found.settled()[0], abs=0.01), "from the same step on"


def test_the_curve_of_a_long_run_is_that_of_all_records(long: tuple[History, History]) -> None:
    """Where both have a point: the means of stretches differ by what an exponential mean forgets within one."""
    lines = []
    for history in long:
        figure = figures.loss_figure([history])
        (line,) = [each for each in figure.axes[0].lines if each.get_linestyle() == "-"]
        lines.append(dict(zip(line.get_xdata(), line.get_ydata(), strict=True)))
    assert sum(math.isnan(y) for y in lines[1].values()) == 2, "gaps"
    steps = sorted(lines[0])
    near = [(y, lines[0][steps[bisect.bisect(steps, x) - 1]]) for x, y in list(lines[1].items())[::20]]
    compared = [(y, other) for y, other in near if not math.isnan(y) and not math.isnan(other)]
    assert len(compared) > 20
    assert all(abs(y - other) < 0.01 for y, other in compared)


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 2500, 31_000])
def test_stretches_are_of_equal_numbers_of_records(count: int) -> None:
    chance = random.Random(count)
    values = [chance.choice([chance.gauss(0, 1), chance.gauss(0, 9), math.nan, 1e300]) for _ in range(count)]
    series = Series()
    for i, value in enumerate(values):
        series.add(Kept(i, value, {}))
    assert len(series.stretches) <= 1000
    size = series.stretches[0].records
    assert [stretch.records for stretch in series.stretches[:-1]] == [size] * (len(series.stretches) - 1)
    for i, stretch in enumerate(series.stretches):
        mine = values[i * size : (i + 1) * size]
        good = [v for v in mine if figures.drawable(v)]
        kept = [each.value for each in stretch.kept()]
        assert (stretch.records, stretch.bads) == (len(mine), len(mine) - len(good))
        assert stretch.total == pytest.approx(math.fsum(good))
        assert (stretch.first.number, stretch.last.number) == (i * size, i * size + len(mine) - 1)
        assert [each.number for each in stretch.kept()] == sorted({each.number for each in stretch.kept()})
        if good:
            assert {min(good), max(good), good[-1]} <= set(kept)
        assert any(not figures.drawable(v) for v in kept) == (len(good) < len(mine))


def test_a_loss_that_is_never_finite_again_ends_the_curve() -> None:
    course = Course()
    for i in range(3 * WHOLE):
        course.add({"step": i, "loss": 1.0 if i < 2 * WHOLE else math.nan})
    values = [value for _, value, _ in course.losses()]
    first = next(i for i, value in enumerate(values) if math.isnan(value))
    assert abs(first / len(values) - 2 / 3) < 0.01
    assert all(math.isnan(value) for value in values[first + 2 :])


def test_losses_that_are_not_finite_now_and_then_leave_a_curve() -> None:
    """One in each stretch would otherwise leave points with gaps on both sides, and no line."""
    course = Course()
    for i in range(3 * WHOLE):
        course.add({"step": i, "loss": math.nan if i % 5 == 0 else 1.0})
    values = [value for _, value, _ in course.losses()]
    assert sum(map(math.isnan, values)) == 1
    assert sum(n for _, v, n in course.losses() if v == 1) == sum(i % 5 != 0 for i in range(3 * WHOLE))


@pytest.mark.parametrize("scale", [1.0, 1e-300, -5.0, 1e307])
def test_a_median_of_many_values(scale: float) -> None:
    chance, speeds = random.Random(0), Speeds()
    values = [scale * (1 + chance.random()) for _ in range(20_001)]
    for i, value in enumerate(values, 1):
        speeds.add(value)
        if i == 5000:
            assert speeds.median() == sorted(values[:i])[i // 2], "exact of few"
    assert abs((speeds.median() or 0) / statistics.median(values) - 1) < 5e-4
    assert len(speeds._counts) <= 8192
    assert Speeds().median() is None


def test_a_run_by_hand_is_whole() -> None:
    found = History("mine", [{"step": i, "loss": 1.0, "tokens_per_s": float(i)} for i in range(10)])
    assert found.speed() == 5
    assert found.changes().count == 0
    assert len(found.losses()) == len(found.curve("loss")) == 10
