"""Runs of one budget: each against the dense ones of equal FLOPs and of equal time, by times measured in turn."""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import quality_study
from quality import budget, records, step_times, training
from quality.configurations import KNOWN
from quality.records import Record
from quality.sizes import BUDGET, QUICK

FLOPS = BUDGET.steps * BUDGET.shape.dense_flops(BUDGET.tokens)


def run(name: str, loss: float, width: int = 64, **changes: Any) -> Record:
    row = {"name": name, "val_loss": loss, "width": width, "cpu": "one", "torch": "2", "dtype": "float32", "seed": 0}
    row |= {"density": 1.0, "steps": 2400, "flops": FLOPS, "flops_relative": 1.0, "unique": None, "text": "c1"}
    return row | changes


def time(name: str, milliseconds: float, width: int) -> Record:
    return {"name": name, "width": width, "milliseconds": milliseconds, "cpu": "one", "threads": 1, "rounds": 5}


def cells(rows: list[Record], times: list[Record], *wanted: str) -> list[tuple[str, ...]]:
    """These columns of all tables."""
    found: list[tuple[str, ...]] = []
    for line in budget.table(rows, times).splitlines():
        parts = [cell.strip() for cell in line.strip("|").split("|")]
        if parts[0] == "run":
            places = [parts.index(name) for name in wanted]
        elif line.startswith("| `"):
            found.append(tuple(parts[place] for place in places))
    return found


def test_each_text_has_its_own_best_dense_run() -> None:
    rows = [
        run("dense", 1.6),
        run("wide-128-b8", 1.5, 128, steps=2181, density=0.2),
        run("dense-80-match", 1.7),
        run("dense", 2.0, unique=614400),
        run("dense-80-match", 1.9, unique=614400),
        run("dense", 1.8, steps=480, flops=FLOPS / 5),
    ]
    against = "against the best dense width of equal FLOPs"
    assert cells(rows, [], "run", "validation loss", against) == [
        ("`wide-128-b8`", "1.500", "-0.100"),
        ("`dense`", "1.600", "+0.000"),
        ("`dense-80-match`", "1.700", "+0.100"),
        ("`dense-80-match`", "1.900", "+0.000"),
        ("`dense`", "2.000", "+0.100"),
        ("`dense`", "1.800", "+0.000"),
    ]
    assert budget.text_of(run("dense", 1.6, text=None)) == "9.8 MB, hardly repeated (corpus not recorded)"
    headings = [line for line in budget.table(rows, []).splitlines() if line.startswith("**")]
    assert headings == [
        f"**{text} (corpus c1)**"
        for text in ("9.8 MB, hardly repeated", "0.61 MB, 16 times", "2.0 MB, hardly repeated")
    ]


def test_more_flops_are_no_rival_but_in_time() -> None:
    rows = [
        run("dense", 1.60),
        run("dense-64-more", 1.56, steps=3600, flops=1.5 * FLOPS, flops_relative=1.5),
        run("wide-128-b8", 1.57, 128, steps=2400, density=0.2),
    ]
    times = [time("dense", 50.0, 64), time("wide-128-b8", 50.0 * 1.5**0.5, 128)]
    wanted = ("run", "against the best dense width of equal FLOPs", "CPU seconds", "against dense widths of equal time")
    assert cells(rows, times, *wanted) == [
        ("`dense-64-more`", "+0.000", "180", "+0.000"),
        ("`wide-128-b8`", "-0.030", "147", "-0.010"),  # half way, in the logarithm, from 1.60 to 1.56
        ("`dense`", "+0.000", "120", "+0.000"),
    ]


@pytest.mark.parametrize(
    ("milliseconds", "rival"),
    [(40.0, None), (50.0, 1.6), (60.0, 1.6), (75.0, 1.6), (76.4, 1.6), (77.0, None)],
)
def test_a_dense_run_that_takes_longer_for_nothing_is_no_rival(milliseconds: float, rival: float | None) -> None:
    own = [run("dense", 1.6, time=120.0), run("dense-80-match", 1.7, time=180.0)]
    assert budget.rival_of_equal_time(run("wide-128-b8", 1.5, time=2.4 * milliseconds), own) == rival


def test_the_luckiest_run_is_no_rival() -> None:
    """The best configuration over all seeds is, whichever was best with the seed at hand."""
    own = [run("dense", loss, seed=seed, time=100.0) for seed, loss in enumerate((1.60, 1.62, 1.58))]
    own += [run("dense-80-match", loss, 80, seed=seed, time=90.0) for seed, loss in enumerate((1.70, 1.50, 1.70))]
    sparse = [run("wide-128-b8", 1.55, 128, seed=seed, time=95.0) for seed in range(3)]
    assert [budget.rival_of_equal_flops(r, [*own, *sparse]) for r in sparse] == [1.60, 1.62, 1.58]
    assert budget.rival_of_equal_flops(run("wide-128-b8", 1.55, 128, seed=3), own) is None
    rivals = [budget.rival_of_equal_time(r, [*own, *sparse]) for r in sparse]
    share = math.log(95 / 90) / math.log(100 / 90)
    assert rivals == pytest.approx([1.70 - share * 0.10, 1.50 + share * 0.12, 1.70 - share * 0.12])


def test_noise_is_pooled_and_errors_are_of_the_mean() -> None:
    rows = [run("dense", loss, seed=seed) for seed, loss in enumerate((1.0, 1.2, 1.4))]
    rows += [run("wide-128-b8", loss, 128, seed=seed) for seed, loss in enumerate((1.0, 1.1))]
    assert budget.noise(rows) == pytest.approx(0.2)
    assert budget.noise(rows[3:]) is None
    rows += [run("wide-128-b8", 1.2, 128, seed=2)]
    assert budget.noise(rows) == pytest.approx(math.sqrt((0.2**2 + 0.1**2) / 2))
    assert budget.with_error([0.1, 0.2, 0.3]) == "+0.200 ± 0.058"
    assert budget.with_error([0.1, 0.2]) == "+0.150"
    assert budget.with_error([0.0] * 3) == "+0.000"  # of the rival itself
    assert "**9.8 MB, hardly repeated (corpus c1)**: a run's loss has a standard deviation of 0.158" in budget.table(
        rows, []
    )


def test_rates_do_not_change_what_a_step_takes() -> None:
    times = [time("wide-128-b8", 60.0, 128), time("wide-128-b1-set", 70.0, 128), time("dense", 50.0, 64)]

    def seconds(name: str, width: int) -> float | None:
        return budget.seconds_of(run(name, 1.0, width, steps=1000), times)

    assert seconds("wide-128-b8-rate-double", 128) == 60.0
    assert seconds("wide-128-b1-set-rate-double", 128) == 70.0
    assert seconds("dense-64-more", 64) == seconds("dense-64-match-rate-double", 64) == 50.0
    assert seconds("wide-128-b8-set", 128) is None
    assert seconds("dense-80-match", 80) is None


def test_steps_are_timed_in_turn_and_new_times_replace_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(random.Random(0).choices("abc ", k=4000))
    (tmp_path / "text").write_text(text)
    asked: list[str] = []

    def train(config: Any, seed: int, study: Any, *_: Any, stop: int, device: torch.device) -> Record:
        asked.append(config.name)
        assert (seed, stop, study.width) == (0, quality_study.STEPS, QUICK.width)
        width = 64 if config.kind == "dense" else 128
        seconds = stop * (len(asked) if config.kind == "dense" else 10) / 1000
        return {"name": config.name, "width": width, "cpu": "one", "torch": "2", "processor_seconds": seconds}

    monkeypatch.setattr(step_times, "train", train)
    csv = tmp_path / "times.csv"
    data = ["--data", str(tmp_path / "text"), "--val", str(tmp_path / "text"), "--times-csv", str(csv)]
    more = ["--quick", "--seeds", "0", "--out", str(tmp_path / "runs"), "--time", "3"]
    assert quality_study.main([*data, *more, "--only", "dense", "wide-128-b8"]) == 0
    assert asked == ["dense", "wide-128-b8"] * 3
    dense, wide = step_times.read(csv)
    assert (dense["milliseconds"], dense["least"], dense["most"], dense["rounds"]) == (3.0, 1.0, 5.0, 3)
    assert (wide["name"], wide["milliseconds"], wide["width"]) == ("wide-128-b8", 10.0, 128)
    asked.clear()
    quality_study.main([*data, *more, "--only", "dense", "dense-80-match"])
    assert [(row["name"], row["milliseconds"]) for row in step_times.read(csv)] == [
        ("wide-128-b8", 10.0),
        ("dense", 3.0),
        ("dense-80-match", 4.0),
    ]
    assert not (tmp_path / "runs").exists()


def test_a_run_may_be_given_more() -> None:
    own, more = (training.size_of(KNOWN[name], BUDGET) for name in ("dense-80-match", "dense-80-more"))
    assert own[0] == more[0]
    assert more[1] == pytest.approx(1.5 * own[1], abs=1)


# Of each text, by how much of it there is: who leads, over how many seeds, and whether it leads in time as well.
CLAIMS = [
    ("2.46", "wide-128-b2-set-rate-double", 3, False),
    ("2.0", "wide-96-b1-set-rate-double", 9, False),
    ("2.0", "wide-96-70-b1-set-rate-double", 9, True),
    ("2.0", "wide-96-b2-set-rate-double", 9, False),
    ("2.0", "wide-96-70-b2-set-rate-double", 9, True),
    ("9.8", "wide-128-b1-set-rate-double", 3, False),
    ("9.8", "wide-128-b2-set-rate-double", 3, False),
]


@pytest.mark.parametrize(("megabytes", "name", "seeds", "in_time"), CLAIMS)
def test_the_leads_that_the_pages_claim_are_in_the_rows(megabytes: str, name: str, seeds: int, in_time: bool) -> None:
    """Mean and standard error over all seeds, and more than twice of it."""
    top = Path(__file__).parents[2]
    times = step_times.read(top / "benchmarks" / "quality_step_times.csv")
    rows = [
        r | {"time": budget.seconds_of(r, times)} for r in records.read_csv(top / "benchmarks" / "quality_regimes.csv")
    ]
    own = [r for r in rows if r["text"] and budget.text_of(r).startswith(f"{megabytes} MB")]
    found = [r for r in own if r["name"] == name]
    assert len(found) == seeds
    page = (top / "docs" / "when.md").read_text()
    for rival_of in (budget.rival_of_equal_flops, budget.rival_of_equal_time)[: 1 + in_time]:
        rivals = [(r, rival_of(r, own)) for r in found]
        differences = [rival - r["val_loss"] for r, rival in rivals if rival is not None]
        assert len(differences) == seeds
        said = budget.with_error(differences)
        assert said.removeprefix("+") in page
        assert statistics.fmean(differences) > 2 * statistics.stdev(differences) / math.sqrt(seeds)


def test_blocks_of_8_lead_in_time() -> None:
    top = Path(__file__).parents[2]
    times = step_times.read(top / "benchmarks" / "quality_step_times.csv")
    rows = records.read_csv(top / "benchmarks" / "quality_regimes.csv")
    own = [r | {"time": budget.seconds_of(r, times)} for r in rows if budget.text_of(r).startswith("2.0 MB")]
    found = [r for r in own if r["name"] == "wide-96-70-b8-rate-double"]
    in_flops, in_time = (
        [rival - r["val_loss"] for r in found if (rival := rival_of(r, own)) is not None]
        for rival_of in (budget.rival_of_equal_flops, budget.rival_of_equal_time)
    )
    assert len(in_flops) == len(in_time) == 9
    page = (top / "docs" / "when.md").read_text()
    for leads in (in_flops, in_time):
        assert budget.with_error(leads).removeprefix("+") in page
    assert statistics.fmean(in_time) > 2 * statistics.stdev(in_time) / 3
    dense = next(r["time"] for r in own if r["name"] == "dense-48-match-rate-double")
    assert found[0]["time"] / dense == pytest.approx(0.92, abs=0.005)
