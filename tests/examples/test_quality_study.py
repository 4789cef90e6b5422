"""The quality study end to end, tiny; its FLOPs against sums by hand; its statistic against curves of known spikes."""

from __future__ import annotations

import json
import lzma
import math
import random
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import quality_permutation
import quality_study
from quality import model, records, report, training
from quality.analysis import Results
from quality.config import Config, learning_rate, schedule_of
from quality.configurations import CONFIGURATIONS, LARGE_QUEUE
from quality.guards import Guard
from quality.sizes import BASE, LARGE, QUICK, Study

import mst_compile

BY_NAME = {config.name: config for config in CONFIGURATIONS}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "under", "one", "old", "tree"]
    for name, count in (("train.txt", 20_000), ("val.txt", 2_000)):
        (folder / name).write_text(" ".join(random.Random(count).choices(words, k=count)))
    return folder


def quick(text: Path, out: Path, *more: str) -> int:
    data = ["--data", str(text / "train.txt"), "--val", str(text / "val.txt")]
    return quality_study.main([*data, "--out", str(out), "--quick", *more])


def test_runs_collects_reports_and_resumes(text: Path, tmp_path: Path) -> None:
    out, csv, doc = (tmp_path / name for name in ("runs.jsonl", "quality.csv", "quality.md"))
    only = ["--only", "dense", "static-b8", BASE]
    assert quick(text, out, *only, "--seeds", "0") == 3
    with out.open("a") as stream:
        stream.write('{"name": "cut off by a cra')
    assert quick(text, out, *only, "--seeds", "0", "1", "--collect", "--csv", str(csv)) == 3
    assert quick(text, out, *only, "--seeds", "0", "1") == 0

    rows = records.read_csv(csv)
    assert [(r["name"], r["seed"]) for r in rows] == [(n, s) for n in ("dense", BASE, "static-b8") for s in (0, 1)]
    by_key = {(r["name"], r["seed"]): r for r in rows}
    for seed in (0, 1):
        dense, static, mst = (by_key[name, seed] for name in ("dense", "static-b8", BASE))
        assert dense["flops_relative"] == dense["density"] == dense["nonzero"] == 1
        assert static["density"] == pytest.approx(0.2, abs=0.03)
        assert static["nonzero"] == pytest.approx(static["density"], abs=1e-5)
        assert static["flops_relative"] < mst["flops_relative"] < 1
        assert mst["density"] == 1
        assert mst["density_min"] == pytest.approx(0.1, abs=0.03)
        assert all(1 < r["val_loss"] < 5 and r["seconds"] > 0 for r in (dense, static, mst))
        assert json.loads(static["settings"]) == {"kind": "constant"}
        assert dense["spike20_z"] is None

    doc.write_text("# By hand\n\n<!-- study:table -->\nold\n<!-- end -->\n\nBy hand, too.\n")
    quality_study.main(["--report", "--csv", str(csv), "--doc", str(doc)])
    written = doc.read_text()
    assert written.startswith("# By hand\n")
    assert written.endswith("By hand, too.\n")
    assert "| `mst-b8` |" in written
    assert "old" not in written


@pytest.mark.parametrize("config", [c for c in CONFIGURATIONS if c.kind != "dense"], ids=lambda c: c.name)
def test_blocks_and_densities_are_those_asked_for(config: Config) -> None:
    study = Study()
    network = model.GPT(study.shape)
    training.make_sparse(network, config, study, 0)
    weights = mst_compile.sparsifier(network).weights
    assert len(weights) == 4 * study.layers
    finer = {block for _, _, block in config.overrides if block is not None}
    assert {w.grid.block for w in weights.values()} == {config.block} | finer  # none shrank to fit the backbone
    schedule = schedule_of(config, study)
    assert schedule is not None
    total = sum(w.numel for w in weights.values())
    assert sum(w.active for w in weights.values()) / total == pytest.approx(1 - schedule.sparsity_at(0), abs=0.01)


def test_an_unknown_name_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no configuration is called nonsense"):
        quick(text, tmp_path / "runs.jsonl", "--only", "nonsense")


def test_time_over_leaves_the_rest_for_the_next_time(text: Path, tmp_path: Path, capsys) -> None:
    out, only = tmp_path / "runs.jsonl", ("--only", "static-b8", "dense", "--seeds", "0", "--minutes", "0.001")
    assert quick(text, out, *only) == 1
    assert "dense with seed 0 is the next to train" in capsys.readouterr().out
    assert [r["name"] for r in records.read(out)] == ["static-b8"]  # in the order asked for
    assert quick(text, out, *only) == 1
    assert quick(text, out, *only) == 0
    assert [r["name"] for r in records.read(out)] == ["static-b8", "dense"]


def test_packed_text_is_the_same(text: Path, tmp_path: Path) -> None:
    packed = [tmp_path / f"{name}.txt.xz" for name in ("train", "val")]
    for path in packed:
        path.write_bytes(lzma.compress((text / path.stem).read_bytes()))
    plain, found = training.Text.load(text / "train.txt", text / "val.txt"), training.Text.load(*packed)
    assert torch.equal(plain.train, found.train)
    assert torch.equal(plain.validation, found.validation)


def test_a_gpu_trains_large_models_in_blocks_that_have_kernels_there(text: Path, tmp_path: Path, monkeypatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quality_study, "train_all", lambda runs, study, *rest: asked.extend([runs, study, *rest]) or 0)
    data = ["--data", str(text / "train.txt"), "--val", str(text / "val.txt"), "--out", str(tmp_path / "runs")]
    quality_study.main([*data, "--device", "cuda", "--minutes", "9", "--seeds", "3"])
    runs, study, _, _, device, minutes = asked
    assert isinstance(runs, list)
    assert [config.name for config, _ in runs] == list(LARGE_QUEUE)
    assert all(config.kind == "dense" or config.block >= 32 for config, _ in runs)
    assert (study, device, minutes) == (LARGE, torch.device("cuda"), 9.0)
    assert sum(p.numel() for p in model.GPT(LARGE.shape).parameters()) >= 20e6
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        quality_study.main([*data, "--device", "cuda"])


def test_changed_settings_are_not_taken_for_done() -> None:
    config = BY_NAME[BASE]
    record = {"name": config.name, "seed": 0, "settings": config.settings(), "study": dict(Study().__dict__)}
    assert records.is_done([record], config, 0, Study(), "c1")
    assert not records.is_done([record], config, 1, Study(), "c1")
    assert not records.is_done([record], config, 0, Study(steps=7), "c1")
    assert not records.is_done([record], Config(config.name, config.note, block=4), 0, Study(), "c1")


def test_seeds_after_the_first_are_for_the_main_configurations() -> None:
    runs = quality_study.plan(None, [5, 6])
    assert [c.name for c, seed in runs if seed == 5] == [c.name for c in CONFIGURATIONS]
    assert [c.name for c, seed in runs if seed == 6] == [c.name for c in CONFIGURATIONS if c.main]
    assert len({c.name for c in CONFIGURATIONS}) == len(CONFIGURATIONS)


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_flops_by_hand() -> None:
    # Width 4, 1 layer: qkv 48, proj 16, up 64, down 64 = 192 weights, head 256 * 4 = 1024; context 8, 10 tokens.
    shape = model.Shape(width=4, layers=1, heads=1, context=8)
    assert shape.hidden_size == 192
    attention = 12 * 8 * 4  # QK and AV: 2 * 2 * 8 * 4 forward, twice that backward
    assert shape.dense_flops(10) == 10 * (6 * (192 + 1024) + attention)
    assert shape.step_flops(10, active=50, in_gradient=192) == 10 * (4 * 50 + 2 * 192 + 6 * 1024 + attention)


def test_flops_of_a_run_count_dense_gradients() -> None:
    study = Study(width=64, layers=1, heads=1, context=16, batch=1, steps=20)
    config = Config("x", "", kind="constant", schedule={"growth": "gradient", "interval": 5, "total_steps": None})
    network = model.GPT(study.shape)
    training.make_sparse(network, config, study, 0)
    active, _ = model.active_weights(network, mst_compile.sparsifier(network).weights)
    # Steps 5, 10, 15 and 20 are followed by an event, whose growth reads the gradient of all weights.
    rest = 16 * (6 * 256 * 64 + 12 * 16 * 64)
    by_hand = 20 * (16 * 6 * active + rest) + 4 * 16 * 2 * (12 * 64**2 - active)
    assert training.planned_flops(config, study) == by_hand


def test_rivals_get_the_flops_of_the_base() -> None:
    study = Study()
    budget = training.planned_flops(BY_NAME[BASE], study)
    small, steps = training.size_of(BY_NAME["dense-small"], study)
    assert steps == study.steps
    assert small.width < study.width
    assert steps * small.dense_flops(study.tokens) == pytest.approx(budget, rel=0.06)
    shape, steps = training.size_of(BY_NAME["dense-short"], study)
    assert shape == study.shape
    assert steps * shape.dense_flops(study.tokens) == pytest.approx(budget, rel=0.01)


def test_dead_units_are_dead_on_both_sides() -> None:
    network = model.GPT(model.Shape(width=8, layers=1, heads=1, context=4))
    block = network.blocks[0]
    with torch.no_grad():
        block.up.weight[:8] = 0  # 8 of 32 rows
        block.down.weight[:, 4:12] = 0  # meets 4 of them
        block.attention.qkv.weight[16:18] = 0  # 2 of 8 value rows
        block.attention.proj.weight[:, 1] = 0
    assert model.dead_units(network) == (4 / 32, 1 / 8)


def sparse_gpt() -> model.GPT:
    """A topology event follows every second step."""
    torch.manual_seed(0)
    gpt = model.GPT(model.Shape(64, 1, 2, 16))
    schedule = mst_compile.Constant(sparsity=0.8, growth="gradient", drop_fraction=0.9, interval=2, total_steps=8)
    return mst_compile.sparsify(gpt, schedule, block=8, exclude="head", guard="none")


def train_step(gpt: model.GPT, optimizer: torch.optim.Optimizer, guard: Guard) -> None:
    x = torch.randint(256, (2, 17))
    gpt(x[:, :-1], x[:, 1:]).backward()
    guard.before_step()
    optimizer.step()
    optimizer.zero_grad()


def lost(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(int((one & other).sum()) for one, other in pairs)


@pytest.mark.parametrize("form", ["none", "pair"])
def test_the_pair_guard_keeps_one_side(form: Literal["none", "pair"]) -> None:
    gpt = sparse_gpt()
    guard, optimizer = Guard(gpt, form), torch.optim.AdamW(gpt.parameters(), 1e-2)
    look = Guard(gpt, "pair")
    train_step(gpt, optimizer, guard)
    before = [(a.zero, b.zero) for a, b in look.pairs()]
    train_step(gpt, optimizer, guard)  # an event follows that drops nine blocks of ten
    after = [(a.zero, b.zero) for a, b in look.pairs()]
    assert (lost(after) > lost(before)) == (form == "none")


def test_coverage_keeps_rows_and_columns() -> None:
    gpt = sparse_gpt()
    guard, optimizer = Guard(gpt, "coverage"), torch.optim.AdamW(gpt.parameters(), 1e-2)
    train_step(gpt, optimizer, guard)
    before = mst_compile.sparsifier(gpt).masks
    train_step(gpt, optimizer, guard)
    for name, mask in mst_compile.sparsifier(gpt).masks.items():
        assert not torch.equal(mask, before[name])
        for dim in (0, 1):
            assert (mask.any(dim) | ~before[name].any(dim)).all(), name


def test_revived_pairs_learn_and_change_nothing() -> None:
    gpt = sparse_gpt()
    guard, optimizer = Guard(gpt, "revive"), torch.optim.SGD(gpt.parameters(), 0.0)
    block = gpt.blocks[0]
    assert isinstance(block, model.Block)
    sparsifier = mst_compile.sparsifier(gpt)
    up, down = sparsifier.masks["blocks.0.up.weight"], sparsifier.masks["blocks.0.down.weight"]
    up[3] = False
    down[:, 3] = False
    sparsifier.apply_mask("blocks.0.up.weight", up)
    sparsifier.apply_mask("blocks.0.down.weight", down)
    train_step(gpt, optimizer, guard)
    guard.after_step()
    assert not block.up.weight[24:32].any()  # no event yet
    assert not block.down.weight[:, 24:32].any()
    train_step(gpt, optimizer, guard)
    mask = sparsifier.masks["blocks.0.up.weight"]
    mask[3, 5] = True
    sparsifier.apply_mask("blocks.0.up.weight", mask)
    x = torch.randint(256, (2, 17))
    loss = gpt(x[:, :-1], x[:, 1:])
    guard.after_step()
    assert block.up.weight[24:32].any()
    again = gpt(x[:, :-1], x[:, 1:])
    assert torch.equal(again, loss)
    own = sparsifier.weights["blocks.0.down.weight"]
    own.set_dense_grad(True)
    again.backward()
    assert block.down.weight.grad is not None
    assert block.down.weight.grad[:, 24:32].any()
    assert not block.up.weight[24:32][:, ~mask[3].repeat_interleave(8)].any()


def test_schedules_do_what_their_names_say() -> None:
    study = Study()
    stays = schedule_of(BY_NAME["mst-b8-stays"], study)
    base = schedule_of(BY_NAME[BASE], study)
    at_once = schedule_of(BY_NAME["at-once-80"], study)
    assert stays is not None
    assert base is not None
    assert at_once is not None
    assert stays.sparsity_at(study.steps) == 0.9
    assert all(stays.is_topology_event(s) == base.is_topology_event(s) for s in range(900))
    assert [at_once.sparsity_at(s) for s in (0, 959, 960, 1200)] == [0.8, 0.8, 0.0, 0.0]
    assert [s for s in range(1201) if at_once.is_topology_event(s)] == [960]
    assert base.sparsity_at(round(study.steps * (1 - study.decay))) == 0.0


def test_learning_rate_follows_the_inputs() -> None:
    study, plain = Study(width=256), Config("x", "")
    shape, narrow = study.shape, model.narrowed(study.shape, 128)
    assert training.rate_factor(plain, study, shape, 1.0) == 1
    assert training.rate_factor(plain, study, shape, 0.1) == pytest.approx(10)
    assert training.rate_factor(plain, study, narrow, 1.0) == 2
    assert training.rate_factor(Config("x", "", input_rate=0.5), study, narrow, 0.5) == 2
    assert training.rate_factor(Config("x", "", input_rate=0.0, hidden_rate=3.0), study, narrow, 0.1) == 3


def test_graphcores_law_sees_the_inputs_too() -> None:
    study, config = Study(width=256), Config("x", "", rate_law="graphcore")
    narrow = model.narrowed(study.shape, 128)
    assert training.rate_factor(config, study, study.shape, 1.0) == 1
    for shape, density, sparsity in ((study.shape, 0.2, 0.8), (narrow, 1.0, 0.5), (narrow, 0.2, 0.9)):
        expected = math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)
        assert training.rate_factor(config, study, shape, density) == pytest.approx(expected)


def test_decay_may_be_apart_from_the_rate_and_old_rows_are_not_taken_for_it() -> None:
    study, old, new = Study(), Config("x", ""), Config("x", "", decay_law="independent", hidden_rate=2.0)
    for config, decay in ((old, study.weight_decay), (new, study.weight_decay / 5)):
        group = {"lr": 0.5, "weight_decay": study.weight_decay}
        training.scale(group, config, study, config.hidden_rate * 5)
        assert group == {"lr": 2.5 * config.hidden_rate, "weight_decay": pytest.approx(decay)}
    assert "decay_law" not in old.settings()
    assert new.settings()["decay_law"] == "independent"
    apart = {c.name for c in CONFIGURATIONS if c.decay_law == "independent"}
    assert {"start-80-apart-long", "static-b8-apart-long", "dense-152-apart-long", "dense-128-apart-long"} <= apart
    recorded = records.read_csv(Path(__file__).parents[2] / "benchmarks" / "quality.csv")
    assert not any("decay_law" in row["settings"] for row in recorded if row["name"] not in apart)


def test_rivals_have_the_same_laws() -> None:
    """Narrower models of the old law stand against old runs, of the new law against new ones; at full width there is
    no difference."""

    def row(name: str, flops: float, loss: float) -> dict[str, Any]:
        return {"name": name, "seed": 0, "flops_relative": flops, "val_loss": loss}

    rows = [row("dense", 1.0, 1.0), row("dense-128", 0.25, 3.0), row("dense-128-apart", 0.25, 2.0)]
    results = Results([*rows, row("start-80", 0.5, 2.5), row("start-80-apart", 0.5, 2.5)])
    assert results.gap("start-80") == pytest.approx(2.5 - 2.0)
    assert results.gap("start-80-apart") == pytest.approx(2.5 - 1.5)


def test_learning_rate() -> None:
    study, config = Study(steps=100, warmup=0.1, decay=0.2, learning_rate=1.0), Config("x", "")
    rates = [learning_rate(config, study, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:81] == [1.0] * 71
    assert rates[99] == pytest.approx(1 / 20)
    cosine = Config("x", "", decay="cosine", learning_rate=2.0)
    assert learning_rate(cosine, study, 10, 100) == pytest.approx(2.0)
    assert learning_rate(cosine, study, 99, 100) == pytest.approx(0.2, abs=0.01)


# -- what the figures mean ---------------------------------------------------------------------------------------------


def row(name: str, seed: int, loss: float, flops: float) -> records.Record:
    return {"name": name, "seed": seed, "val_loss": loss, "flops_relative": flops}


def test_noise_leaves_out_what_a_seed_does_to_all() -> None:
    losses = {"dense": (1.0, 1.1), BASE: (1.5, 1.6), "static-b8": (1.2, 1.3)}
    results = Results([row(n, s, pair[s], 0.5) for n, pair in losses.items() for s in (0, 1)])
    assert results.noise == pytest.approx(0, abs=1e-9)
    assert results.compare("static-b8", BASE).difference == pytest.approx(-0.3)
    # One that scatters widely does not make the others noisy; half of the differences below 0.01 make the noise.
    losses |= {"early": (1.5, 1.59), "mst-b4": (1.4, 1.51), "no-regrow": (1.3, 1.9)}
    results = Results([row(n, s, pair[s], 0.5) for n, pair in losses.items() for s in (0, 1)])
    assert results.scatter["no-regrow"] == pytest.approx(0.5)
    assert results.noise == pytest.approx(0.005 / 0.6745 / 2**0.5, rel=1e-3)
    assert results.compare("static-b8", BASE).word == "better"
    assert results.compare("mst-b4", BASE).word == "better"
    assert results.compare("early", BASE).word == "within noise"
    assert results.compare("no-regrow", BASE).word == "seeds disagree"


def test_noise_of_normal_runs_is_found() -> None:
    names = [c.name for c in CONFIGURATIONS][:50]
    found = []
    for seed in range(20):
        generator = random.Random(seed)
        rows = [row(n, s, 1.0 + 0.1 * s + generator.gauss(0, 0.01), 0.5) for n in names for s in (0, 1)]
        found.append(Results(rows).noise)
    assert np.mean(found) == pytest.approx(0.01, rel=0.1)
    assert min(found) > 0.006
    assert max(found) < 0.016


def test_dense_loss_of_equal_flops() -> None:
    rows = [row("dense", 0, 1.0, 1.0), row("dense-small", 0, 2.0, 0.25), row("static-b8", 0, 1.4, 0.5)]
    results = Results(rows)
    assert results.dense_loss(0.5, 0) == pytest.approx(1.5)
    assert results.gap("static-b8") == pytest.approx(-0.1)
    assert results.dense_loss(0.1, 0) is None


def test_longer_runs_have_dense_rivals_of_their_own() -> None:
    short = [row("dense", 0, 1.0, 1.0), row("dense-small", 0, 2.0, 0.25), row("start-80", 0, 1.4, 0.5)]
    long = [row("dense-long", 0, 0.5, 3.0), row("dense-152-long", 0, 1.5, 0.75), row("start-80-long", 0, 0.9, 1.5)]
    results = Results(short + long)
    assert results.gap("start-80") == pytest.approx(-0.1)
    assert results.gap("start-80-long") == pytest.approx(-0.1)
    note = next(c.note for c in CONFIGURATIONS if c.name == "start-80")
    assert f"| {note} | 0.50 | 1.400 | +0.400 | 0.900 | +0.400 | -0.100 |" in report.longer(results)


def test_report_says_what_the_rows_say(tmp_path: Path) -> None:
    rows = [row("dense", 0, 1.0, 1.0), row(BASE, 0, 1.6, 0.4), row("early", 0, 1.55, 0.45)]
    text = report.remedies(Results(rows))
    assert "| `early`: restoration ramp early | -0.050 | noise unknown | 0.45 |" in text


# -- permutation of channels -------------------------------------------------------------------------------------------


def test_gathering_finds_blocks_that_were_scattered() -> None:
    generator = np.random.default_rng(0)
    block, channels = 4, 32
    hidden, stream = generator.permutation(channels), generator.permutation(channels)
    mask = np.kron(np.eye(channels // block), np.ones((block, block)))  # one block a row of blocks
    scattered = (mask + 0.01 * generator.random(mask.shape))[hidden][:, stream]
    found = [
        quality_permutation.Matrix(scattered.copy(), ("hidden", "stream"), channels // block),
        quality_permutation.Matrix(scattered.T.copy(), ("stream", "hidden"), channels // block),
    ]
    before = sum(m.kept_energy(block) for m in found)
    quality_permutation.gather(found, block)
    after = sum(m.kept_energy(block) for m in found)
    assert before < 0.6 * 2 * mask.sum()
    assert after > 0.95 * 2 * mask.sum()
    # Both matrices are the first one in another order, and in the same order.
    assert np.array_equal(found[0].energy, found[1].energy.T)
    assert np.array_equal(np.sort(found[0].energy, axis=None), np.sort(scattered, axis=None))


def test_fixed_channels_stay() -> None:
    energy = np.random.default_rng(1).random((16, 16))
    found = [quality_permutation.Matrix(energy.copy(), (None, "stream"), 4)]
    quality_permutation.gather(found, 4)
    assert np.array_equal(np.sort(found[0].energy, axis=1), np.sort(energy, axis=1))
    assert found[0].kept_energy(4) > quality_permutation.Matrix(energy, (None, "stream"), 4).kept_energy(4)
    assert found[0].kept_energy(1) == pytest.approx(np.sort(energy, axis=None)[-4:].sum())


def test_shares_of_a_model_are_in_order(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_permutation, "Study", lambda: QUICK)
    data = ["--data", str(text / "train.txt"), "--val", str(text / "val.txt")]
    rows = quality_permutation.main([*data, "--steps", "0", "--blocks", "16"])
    assert [row[:2] for row in rows] == [(0, 16)]
    before, after, single = rows[0][2:]
    assert 0.1 * 0.9 < before <= after < single < 0.5
