"""A Recorder in loops of many kinds: what it writes, resuming, what it refuses."""

from __future__ import annotations

import copy
import csv
import itertools
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Blocks
from torch import nn

import mst_compile
from mst_compile import Constant, MixedSparsity, densify, sparsifier, sparsify
from mst_compile.errors import ArgumentError, MissingPackageError, ModelError, RecordError
from mst_compile.flops import Meter
from mst_compile.report import Recorder, read

STEPS = 20
SCHEDULES = {
    "published": MixedSparsity.published(STEPS, interval=4),
    "default": MixedSparsity(STEPS, ramp_interval=1, restoration=0.2),
    "no events": Constant(0.7, growth="none"),
    "dense": None,
}


def made(schedule: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Blocks()
    if schedule is not None:
        sparsify(model, schedule, block=4)
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> torch.Tensor:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(i))
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"seconds", "compile_seconds", "wall_seconds", "tokens_per_s"}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_recorded_is_what_happened(name: str, tmp_path: Path) -> None:
    model, optimizer = made(SCHEDULES[name])
    own = None if SCHEDULES[name] is None else sparsifier(model)
    meter, told, losses = Meter(model, 8), [], []
    if own is not None:
        own.on_event(told.append)
    densities = []
    with Recorder(model, tmp_path / "run", tokens_per_step=8) as recorder:
        for i in range(STEPS):
            meter.step()
            densities.append(1.0 if own is None else own.density)
            losses.append(step(model, optimizer, i).item())
            row = recorder.log(loss=losses[-1], extra=i)
            assert row is not None
            assert (row["flops"], row["step"], row["density"]) == (meter.flops, i + 1, densities[-1])
            assert lines(tmp_path / "run" / "scalars.jsonl")[-1] == row, "not written through"
    rows = lines(tmp_path / "run" / "scalars.jsonl")
    assert [row["loss"] for row in rows] == losses
    assert rows[-1]["flops_of_dense"] == meter.flops / (STEPS * meter.dense)
    assert (rows[-1]["flops_of_dense"] == 1.0) == (own is None)
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(rows))
    events = lines(tmp_path / "run" / "events.jsonl")
    assert [e["step"] for e in events] == [e.step for e in told]
    assert (name in ("published", "default")) == bool(events)
    for written, event in zip(events, told, strict=True):
        assert (written["dropped"], written["grown"], written["density"]) == (event.dropped, event.grown, event.density)
        assert written["weights"].keys() == event.weights.keys()
    assert rows[-1]["dropped"] == sum(e.dropped for e in told)
    assert rows[-1]["events"] == len(told)
    with open(tmp_path / "run" / "scalars.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items() if k != "phase"} for row in table] == [
        {k: v for k, v in row.items() if k != "phase"} for row in rows
    ]
    found = read(tmp_path / "run")
    assert found.sparse == (own is not None)
    if own is not None:
        (masks,) = [found.snapshots[-1].masks]
        assert masks
        assert all(mask.equal(own.masks[weight]) for weight, mask in masks.items())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Broken off behind its checkpoint, in the middle of a line."""
    schedule = SCHEDULES["published"]
    model, optimizer = made(schedule)
    with Recorder(model, tmp_path / "whole", tokens_per_step=8, label="run") as recorder:
        for i in range(STEPS):
            recorder.log(loss=step(model, optimizer, i))
    model, optimizer = made(schedule)
    first = Recorder(model, tmp_path / "parts", tokens_per_step=8, label="run")
    for i in range(13):
        if i == 10:
            saved = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
        first.log(loss=step(model, optimizer, i))
    for name in ("scalars.jsonl", "events.jsonl", "masks.jsonl"):
        with open(tmp_path / "parts" / name, "a") as file:
            file.write('{"step": 14, "lo')
    del first
    model, optimizer = made(schedule)
    with pytest.raises(RecordError, match=r"13 steps.*overwrite=True"):
        Recorder(model, tmp_path / "parts")
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    second = Recorder(model, tmp_path / "parts", tokens_per_step=8, label="run")
    assert second.step == 10
    for i in range(10, STEPS):
        second.log(loss=step(model, optimizer, i))
    second.close()
    for name in ("scalars.jsonl", "events.jsonl", "masks.jsonl"):
        one, other = (timeless(lines(tmp_path / run / name)) for run in ("whole", "parts"))
        assert one == other, name
    assert read(tmp_path / "parts").about["resumed"] == [10]


def test_a_dense_run_resumes_at_a_step_that_is_given(tmp_path: Path) -> None:
    model, optimizer = made(None)
    with Recorder(model, tmp_path) as recorder:
        for i in range(6):
            recorder.log(loss=step(model, optimizer, i))
    with Recorder(model, tmp_path, step=4) as recorder:
        recorder.log(loss=step(model, optimizer, 4))
    assert [row["step"] for row in lines(tmp_path / "scalars.jsonl")] == [1, 2, 3, 4, 5]
    with Recorder(model, tmp_path, overwrite=True) as recorder:
        recorder.log(loss=1)
    assert [row["step"] for row in lines(tmp_path / "scalars.jsonl")] == [1]


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    model, _ = made(None)
    values = [1.0, math.nan, math.inf, -math.inf, 2.0]
    with Recorder(model, tmp_path) as recorder:
        for value in values:
            recorder.log(loss=torch.tensor(value))

    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    for line in (tmp_path / "scalars.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert str(read(tmp_path).column("loss")) == str(values)


def test_a_scalar_that_comes_later(tmp_path: Path) -> None:
    model, _ = made(None)
    with Recorder(model, tmp_path) as recorder:
        for i in range(6):
            recorder.log(loss=i, val_loss=2.0 * i if i % 3 == 2 else None, **{"<b>,\n": i} if i else {})
    with open(tmp_path / "scalars.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["val_loss"] for row in table] == ["", "", "4.0", "", "", "10.0"]
    assert [row["<b>,\n"] for row in table] == ["", "1.0", "2.0", "3.0", "4.0", "5.0"]


def test_every_so_many_steps_all_steps_count(tmp_path: Path) -> None:
    model, optimizer = made(SCHEDULES["published"])
    meter = Meter(model, 8)
    with Recorder(model, tmp_path, tokens_per_step=8, every=5) as recorder:
        for i in range(STEPS):
            meter.step()
            recorder.log(loss=step(model, optimizer, i))
    rows = lines(tmp_path / "scalars.jsonl")
    assert [row["step"] for row in rows] == [1, 5, 10, 15, 20]
    assert rows[-1]["flops"] == meter.flops


def test_steps_that_were_not_taken(tmp_path: Path) -> None:
    """As GradScaler leaves them out."""
    model, optimizer = made(SCHEDULES["default"])
    with Recorder(model, tmp_path) as recorder:
        recorder.log(loss=step(model, optimizer, 0))
        assert recorder.log(loss=math.inf) is None
        recorder.log(loss=step(model, optimizer, 1))
    assert [row["step"] for row in lines(tmp_path / "scalars.jsonl")] == [1, 2]


def test_a_model_that_is_made_dense_on_the_way(tmp_path: Path) -> None:
    model, optimizer = made(SCHEDULES["no events"])
    with Recorder(model, tmp_path, tokens_per_step=8) as recorder:
        first = recorder.log(loss=step(model, optimizer, 0))
        densify(model)
        recorder.start()
        second = recorder.log(loss=step(model, optimizer, 1))
    assert first is not None
    assert second is not None
    dense = read(tmp_path).about["dense_flops_per_step"]
    assert (second["step"], second["density"], second["flops"] - first["flops"]) == (2, 1.0, dense)


def test_no_time_counts_outside_start_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mst_compile.report import clock

    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    model, _ = made(None)
    with Recorder(model, tmp_path, tokens_per_step=10) as recorder:
        for _ in range(3):
            now[0] += 100
            recorder.start()
            now[0] += 2
            recorder.stop()
            now[0] += 50
            row = recorder.log(loss=1)
            assert row is not None
            assert row["tokens_per_s"] == 5
        assert (row["seconds"], row["wall_seconds"]) == (6, 456)
        now[0] += 7
        row = recorder.log(loss=1)
        assert row is not None
        assert row["seconds"] == 13


def test_a_step_that_compiled_is_charged_as_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds and in the processor's alike, and is compilation for the rest."""
    from mst_compile.report import clock

    now, used, stages = [0.0], [0.0], [0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.time, "process_time", lambda: used[0])
    monkeypatch.setattr(clock.Clock, "_count", staticmethod(lambda: stages[0]))
    own = clock.Clock()
    for seconds, processor, compiled in ((50.0, 40.0, True), (30.0, 20.0, True), (2.0, 1.0, False), (3.0, 2.5, False)):
        now[0], used[0] = now[0] + 9, used[0] + 9  # not timed
        own.start()
        now[0], used[0], stages[0] = now[0] + seconds, used[0] + processor, stages[0] + compiled
        assert own.stop() == seconds
    assert (own.seconds, own.processor_seconds, own.compile_seconds) == (3 * 2 + 3, 3 * 1 + 2.5, 80 - 2 * 2)


def test_a_closed_recorder_listens_to_nobody(tmp_path: Path) -> None:
    model, optimizer = made(SCHEDULES["published"])
    recorder = Recorder(model, tmp_path)
    recorder.close()
    recorder.close()
    for i in range(5):
        step(model, optimizer, i)
    assert not lines(tmp_path / "events.jsonl")
    with pytest.raises(RecordError, match="closed"):
        recorder.log(loss=1)


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    model, _ = made(None)
    (tmp_path / "file").write_text("")
    bad: dict[str, Any] = {
        "every": 0, "step": -1, "tokens_per_step": 1.5, "total_steps": "x", "label": 3, "notes": {"a": object()},
        "tensorboard": 1, "wandb": "yes", "overwrite": None, "rest": 1.0,
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(mst_compile.MSTError, match=name):
            Recorder(model, tmp_path / "new", **{name: value})
    with pytest.raises(ArgumentError, match="is a file"):
        Recorder(model, tmp_path / "file")
    with pytest.raises(ModelError):
        Recorder("model", tmp_path / "new")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists(), "what was refused has left something"
    with Recorder(model, tmp_path / "run") as recorder:
        for scalars in ({"loss": torch.zeros(2)}, {"loss": "low"}, {"flops": 1.0}, {"phase": 1}, {"loss": True}):
            with pytest.raises(ArgumentError):
                recorder.log(**scalars)  # type: ignore[arg-type]
        recorder.log(loss=1, step=5)
        with pytest.raises(RecordError, match="step 5 has been recorded, and now 3"):
            recorder.log(loss=1, step=3)
    assert [row["step"] for row in lines(tmp_path / "run" / "scalars.jsonl")] == [5]


def test_damaged_records(tmp_path: Path) -> None:
    model, _ = made(None)
    with Recorder(model, tmp_path) as recorder:
        for i in range(3):
            recorder.log(loss=i)
    file = tmp_path / "scalars.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace('"step": 2', '"step": 2 2'))
    with pytest.raises(RecordError, match="line 2 is no record"):
        read(tmp_path)
    file.write_text(whole)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(RecordError, match="format 99"):
        read(tmp_path)
    with pytest.raises(RecordError, match="no recorded run"):
        read(tmp_path / "elsewhere")


# -- TensorBoard, Weights & Biases -------------------------------------------------------------------------------------


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer = made(SCHEDULES["published"])
    with Recorder(model, tmp_path, tensorboard=True) as recorder:
        losses = []
        for i in range(STEPS):
            losses.append(step(model, optimizer, i).item())
            recorder.log(loss=losses[-1])
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [e.step for e in written.Scalars("loss")] == list(range(1, STEPS + 1))
    assert [e.value for e in written.Scalars("loss")] == pytest.approx(losses)
    assert written.Scalars("mst/density")[-1].value == 1.0
    assert any(tag.startswith("mst_density/layers.0") for tag in written.Tags()["scalars"])


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made(None)
    for module, argument in (("torch.utils.tensorboard", "tensorboard"), ("wandb", "wandb")):
        monkeypatch.setattr(
            "importlib.import_module",
            lambda name, module=module: (_ for _ in ()).throw(ModuleNotFoundError(name=module.split(".")[-1])),
        )
        with pytest.raises(MissingPackageError, match=f"pip install {argument}"):
            Recorder(model, tmp_path / "run", **{argument: True})
        assert not (tmp_path / "run").exists()
        monkeypatch.undo()


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its documented interface: a resumed run goes on in the one that there is."""
    calls: list[Any] = []

    def init(**arguments: Any) -> Any:
        calls.append(("init", arguments))
        run = types.SimpleNamespace(id=arguments.get("id", "abc"))
        run.log = lambda scalars, step: calls.append((step, scalars))
        run.finish = lambda: calls.append("finish")
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    model, optimizer = made(SCHEDULES["default"])
    with Recorder(model, tmp_path, wandb={"project": "mine"}) as recorder:
        recorder.log(loss=step(model, optimizer, 0))
    with Recorder(model, tmp_path, wandb=True) as recorder:
        recorder.log(loss=step(model, optimizer, 1))
    kinds = [call if isinstance(call, str) else call[0] for call in calls]
    assert kinds == ["init", 1, "finish", "init", 2, "finish"]
    assert calls[0][1]["project"] == "mine"
    assert "id" not in calls[0][1]
    assert (calls[3][1]["id"], calls[3][1]["resume"]) == ("abc", "allow")
    assert {"loss", "mst/density", "mst/flops_of_dense"} <= calls[1][1].keys()
