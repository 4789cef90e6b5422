"""What the quality study needs beside one pass over plenty of text: repeated text, losses on the way, other bases."""

from __future__ import annotations

import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import quality_study
from quality import model, records, report, step_times, training
from quality.analysis import Results
from quality.config import schedule_of
from quality.configurations import (
    BUDGET_QUEUE,
    CONFIGURATIONS,
    KNOWN,
    LARGE_QUEUE,
    ON_BUDGET,
    ON_GPU,
    ON_REGROWN,
)
from quality.sizes import BUDGET, LARGE, QUICK, REGIMES, Study

import mst_compile


def text_of(words: int) -> torch.Tensor:
    written = " ".join(random.Random(words).choices(["one", "two", "three", "many"], k=words))
    return torch.frombuffer(bytearray(written, "ascii"), dtype=torch.uint8)


@pytest.fixture(scope="module")
def text() -> training.Text:
    return training.Text(text_of(20_000), text_of(2_000))


def test_repeated_text_is_spread_over_the_whole() -> None:
    text = torch.arange(64_000)
    assert training.repeated(text, None) is text
    left = training.repeated(text, 6400)
    assert len(left) == 6400
    assert torch.equal(left.view(64, 100)[:, 0], torch.arange(0, 64_000, 1000))
    assert (left.view(64, 100).diff() == 1).all()


def test_a_run_on_little_text_sees_nothing_else(text: training.Text) -> None:
    study = replace(QUICK, steps=40, unique=64 * 40, learning_rate=3e-3)
    seen = {bytes(row) for row in training.repeated(text.train, study.unique).unfold(0, 8, 1).numpy()}
    x, _ = training.training_batch(training.repeated(text.train, study.unique), study, 0, 7)
    assert {bytes(row) for row in x.to(torch.uint8).unfold(1, 8, 1).flatten(0, 1).numpy()} <= seen
    few = training.train(KNOWN["dense"], 0, study, text)
    all_of_it = training.train(KNOWN["dense"], 0, replace(study, unique=None), text)
    assert few["losses"] != all_of_it["losses"]


def test_every_byte_of_a_text_tells_it_from_others(text: training.Text) -> None:
    same = training.Text(text.train.clone(), text.validation.clone())
    assert same.fingerprint == text.fingerprint
    for part in ("train", "validation"):
        changed = getattr(text, part).clone()
        changed[-1] += 1
        assert replace(text, **{part: changed}).fingerprint != text.fingerprint


def test_losses_on_the_way_change_nothing(text: training.Text) -> None:
    plain = training.train(KNOWN["static-b8"], 0, QUICK, text)
    checked = training.train(KNOWN["static-b8"], 0, replace(QUICK, checks=2), text)
    assert plain["checks"] == []
    assert [step for step, _ in checked["checks"]] == [20, 40]
    assert plain["losses"] == checked["losses"]
    losses = [loss for _, loss in checked["checks"]] + [checked["val_loss"]]
    assert losses == sorted(losses, reverse=True)


def test_rivals_get_the_flops_of_the_base_that_the_study_names() -> None:
    study = replace(LARGE, steps=400)
    budget = training.planned_flops(KNOWN[LARGE.base], study)
    for name in ("dense-384-match", "dense-512-match", "dense-short"):
        shape, steps = training.size_of(KNOWN[name], study)
        assert shape.width == {"dense-384-match": 384, "dense-512-match": 512}.get(name, 768)
        assert steps * shape.dense_flops(study.tokens) == pytest.approx(budget, rel=0.02)
    assert training.size_of(KNOWN["dense-512"], study)[1] == 400
    assert budget == pytest.approx(0.245 * 400 * study.shape.dense_flops(study.tokens), rel=0.01)


def test_what_an_older_record_does_not_tell_are_the_defaults() -> None:
    config = KNOWN["dense"]
    told = {key: value for key, value in asdict(Study()).items() if key not in ("base", "unique", "checks")}
    record = {"name": "dense", "seed": 0, "settings": config.settings(), "study": told}
    assert records.is_done([record], config, 0, Study(), "c1")
    assert not records.is_done([record], config, 0, Study(unique=10), "c1")
    assert records.is_done([record | {"text": "c1"}], config, 0, Study(), "c1")
    assert not records.is_done([record | {"text": "c2"}], config, 0, Study(), "c1")
    assert not records.is_done([record], config, 0, Study(dtype="float32"), "c1")


def test_a_rehearsal_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.txt").write_bytes(bytes(text_of(2000).numpy()))
    asked: list[tuple[str, int | None]] = []
    monkeypatch.setattr(quality_study, "train", lambda config, *_, stop, device: asked.append((config.name, stop)))
    data = ["--data", str(tmp_path / "train.txt"), "--val", str(tmp_path / "train.txt")]
    out = tmp_path / "runs.jsonl"
    more = ["--only", *LARGE_QUEUE, "--seeds", "1", "--rehearse", "2"]
    assert quality_study.main([*data, "--quick", "--out", str(out), *more]) == 0
    assert asked == [(name, 2) for name in LARGE_QUEUE]
    assert not out.exists()


@pytest.mark.parametrize("name", ["static-b64", "set-b64", "start-80-b64"])
def test_blocks_on_a_gpu_are_those_asked_for(name: str) -> None:
    network = model.GPT(replace(LARGE, layers=1).shape)
    training.make_sparse(network, KNOWN[name], LARGE, 0)
    weights = mst_compile.sparsifier(network).weights.values()
    assert {w.grid.block for w in weights} == {64}  # none shrank to fit the backbone
    assert sum(w.active for w in weights) / sum(w.numel for w in weights) == pytest.approx(0.2, abs=0.01)


def test_names_are_of_one_configuration_each() -> None:
    assert len(KNOWN) == len(CONFIGURATIONS) + len(ON_GPU) + len(ON_BUDGET) + len(ON_REGROWN)
    assert {*LARGE_QUEUE, *BUDGET_QUEUE} <= set(KNOWN)


def test_first_steps_of_regrown_blocks_make_a_difference(text: training.Text) -> None:
    """Each way another run than its base, of as many FLOPs."""
    names = ("set-b8", "set-b8-own", "set-b8-warm", "set-b8-own-warm", "set-b8-999", "set-b8-999-own-warm")
    runs = [training.train(KNOWN[name], 0, QUICK, text, stop=12) for name in names]
    assert len({tuple(run["losses"]) for run in runs}) == len(runs)
    assert len({run["flops"] for run in runs}) == 1
    assert {c.name for c in ON_REGROWN if c.kind == "mst"} >= {"mst-b8-own", "mst-b8-warm", "mst-b8-999-own-warm"}


@pytest.mark.parametrize("name", ["wide-128-b8", "wide-96-start", "wide-96-60"])
def test_wider_sparse_models_get_the_steps_that_the_budget_allows(name: str) -> None:
    study = replace(BUDGET, steps=200)
    shape, steps = training.size_of(KNOWN[name], study)
    own = replace(study, steps=steps)
    budget = training.planned_flops(KNOWN["dense"], study)
    assert shape.width == int(name.split("-")[1])
    assert training.planned_flops(KNOWN[name], own) == pytest.approx(budget, rel=0.02)
    schedule = schedule_of(KNOWN[name], own)
    assert schedule is not None
    if name == "wide-96-start":  # dense over the last 15 % of its own steps, not of the study's
        assert schedule.sparsity_at(round(0.8 * steps)) > 0 == schedule.sparsity_at(round(0.86 * steps))


def test_every_regime_is_one_budget() -> None:
    for name, study in REGIMES.items():
        assert replace(study, unique=None, steps=BUDGET.steps) == BUDGET
        assert study.steps == {"twenty": BUDGET.steps // 5, "thrice": 3 * BUDGET.steps}.get(name, BUDGET.steps)
        if name.startswith("repeat"):
            assert study.unique == BUDGET.steps * BUDGET.tokens // int(name.removeprefix("repeat-"))


def test_the_report_of_large_models_holds_each_against_the_base(tmp_path: Path) -> None:
    row = {"seed": 0, "steps": 100, "val_loss": 1.0, "flops": 2e15, "seconds": 2.5, "cpu": "card", "torch": "2"}
    rows = [row | {"name": "dense-short", "steps": 50, "val_loss": 1.25}, row | {"name": LARGE.base}]
    file = tmp_path / "quality.md"
    file.write_text("By hand\n<!-- study:large -->\nold\n<!-- end -->\n")
    report.write(file, [], rows)
    first, second = [line.split(" | ") for line in file.read_text().splitlines() if line.startswith("| `")]
    assert (first[0], first[5]) == ("| `static-b64`", "")
    assert (second[0], *second[3:6], second[8]) == ("| `dense-short`", "50", "1.250", "+0.250", "50.0 |")
    assert "old" not in file.read_text()


def test_dense_models_of_equal_time() -> None:
    def row(name: str, flops: float, seconds: float, loss: float) -> dict[str, Any]:
        costs = {"flops_relative": flops, "processor_seconds": seconds, "density": 1.0}
        return {"name": name, "seed": 0, "val_loss": loss} | costs

    rows = [row("dense", 1.0, 100, 1.0), row("dense-128", 0.25, 25, 3.0), row("start-80", 0.25, 50, 2.5)]
    results = Results(rows)
    assert results.gap("start-80") == pytest.approx(-0.5)
    assert results.gap("start-80", "processor_seconds") == pytest.approx(0.5)
    (line,) = report.when(results).splitlines()[2:]
    assert line.split(" | ")[3:] == ["0.25", "-0.500", "0.50", "+0.500", "+1.500 |"]


@pytest.mark.parametrize("name", ["quality.md", "when.md"])
def test_the_pages_say_what_the_recorded_rows_say(name: str, tmp_path: Path) -> None:
    top = Path(__file__).parents[2]
    page = tmp_path / name
    page.write_bytes((top / "docs" / name).read_bytes())
    tables = ("quality.csv", "quality_large.csv", "quality_regimes.csv")
    times = step_times.read(top / "benchmarks" / "quality_step_times.csv")
    report.write(page, *(records.read_csv(top / "benchmarks" / f) for f in tables), times)
    assert page.read_text() == (top / "docs" / name).read_text()


def test_runs_on_different_texts_are_kept_apart_and_lengths_may_differ(text: training.Text, tmp_path: Path) -> None:
    short = replace(QUICK, steps=8, unique=640)
    kept = [
        training.train(KNOWN["dense"], 0, QUICK, text) | {"checks": [(20, 0.5), (40, 9.0)]},
        training.train(KNOWN["dense"], 0, short, text),
    ]
    kept.append(training.train(KNOWN["set-b8"], 0, short, text))
    kept.append(kept[-1] | {"losses": kept[-1]["losses"][:5], "name": "rigl-b8"})
    rows = records.rows(kept)
    assert [(row["name"], row["unique"]) for row in rows] == [
        ("dense", None), ("dense", 640), ("rigl-b8", 640), ("set-b8", 640),
    ]  # fmt: skip
    assert (rows[0]["best_loss"], rows[0]["best_step"]) == (0.5, 20)  # the run's end was not its best
    other = records.rows([*kept, kept[0] | {"text": "another", "val_loss": 9.0}])
    assert [row["val_loss"] for row in other if row["name"] == "dense" and row["unique"] is None] in (
        [9.0, kept[0]["val_loss"]],
        [kept[0]["val_loss"], 9.0],
    )
    records.write_csv(file := tmp_path / "rows.csv", rows)
    read = records.read_csv(file)
    assert records.curve(read[0]) == [(20, 0.5), (40, 9.0), (QUICK.steps, round(kept[0]["val_loss"], 4))]
    assert records.curve(read[1]) == []
    assert "best_loss" not in rows[1]
