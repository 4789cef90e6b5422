"""Runs that are long, and processes that make many of them: nothing grows, nothing drifts, nothing is counted wrong."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import compiled
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import optimizer as optimizers
from torch.utils.weak import WeakTensorKeyDictionary
from training import assert_zero_outside, fresh, loss_of

import mst_compile
from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.report import Recorder
from mst_compile.rules.density import active_count
from mst_compile.rules.schedule import Schedule, events_of
from mst_compile.schedule import GradualPruning
from mst_compile.state import packing

REGISTRIES = (dict, list, set, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
SWEEP: list[Schedule] = [
    MixedSparsity.published(10, 0.8, warmup=3, restoration=3, settle=1, interval=2, ramp_interval=1),
    Constant(0.7, interval=2, growth="gradient", regrown="own steps", regrown_warmup=3),
    GradualPruning(10, 0.8, interval=2, growth="random"),
]


def registries() -> dict[str, int]:
    """How much each container holds that a module or a class of the package keeps, and PyTorch for us."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "mst_compile" or module is None:
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, (*REGISTRIES, OrderedDict, WeakTensorKeyDictionary)) and not key.startswith("__"):
                found[f"{name}.{key}"] = len(value)
            elif isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{k}": len(v) for k, v in vars(value).items() if type(v) in (dict, list, set)}
    found["hooks before steps"] = len(optimizers._global_optimizer_pre_hooks)
    found["hooks after steps"] = len(optimizers._global_optimizer_post_hooks)
    return found


def sweep(number: int, folder: Any) -> list[weakref.ref[Any]]:
    """Sparsify, compile, train, evaluate, record, save, load and copy; what of it must not live on."""
    torch.manual_seed(number)
    model = fresh(SWEEP[number % len(SWEEP)])
    optimizer = torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), 1e-2)
    run, own = compiled(model), sparsifier(model)
    with Recorder(model, folder / str(number)) as recorder:
        for step in range(6):
            loss = loss_of(run, torch.randn(16, 32))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=loss)
            if step == 3:
                with torch.no_grad():
                    run(torch.randn(16, 32))
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), file)
                file.seek(0)
                weights, state = torch.load(file)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
    twin = copy.deepcopy(model)
    held = [model, own, own._run, own._stepping, own._checkpoints, optimizer, recorder, twin, sparsifier(twin)]
    return [weakref.ref(x) for x in held] + [weakref.ref(p) for p in model.parameters()]


def test_sweeps_leave_nothing_behind(tmp_path: Any) -> None:
    alive, sizes, graphs = [], [], []
    for number in range(12):
        alive += sweep(number, tmp_path)
        gc.collect()
        sizes.append(registries())
        graphs.append(counters["stats"]["unique_graphs"])
    assert [reference() for reference in alive if reference() is not None] == []
    assert sizes[-1] == sizes[2], {k: (sizes[2].get(k), n) for k, n in sizes[-1].items() if sizes[2].get(k) != n}
    assert graphs[-1] == graphs[2], "Dynamo compiles nothing again"


def test_nothing_grows_within_a_run() -> None:
    schedule = Constant(0.7, interval=2, growth="mixed", regrown="own steps", regrown_warmup=4)
    model = fresh(schedule)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run, own, seen, objects = compiled(model), sparsifier(model), [], []
    for step in range(240):
        loss_of(run, torch.randn(16, 32)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 0:
            with torch.no_grad():
                run(torch.randn(16, 32))
        if step % 80 == 79:
            gc.collect()
            found = gc.get_objects()
            objects.append(len(found))
            sparse = [w for w in found if type(w) is mst_compile.SparseWeight]
            del found
            within = {n: len(w.uses.places) + len(w.uses.unmatched) for n, w in own.weights.items()}
            stepping = {k: len(v) for k, v in vars(own._stepping).items() if isinstance(v, REGISTRIES)}
            seen.append((registries(), len(sparse), within, stepping, counters["stats"]["unique_graphs"]))
    assert seen[0] == seen[1] == seen[2]
    assert objects[2] - objects[1] < 40, "less than an object is left of each of 40 events and 80 steps"
    assert not counters["graph_break"]
    assert_zero_outside(model, optimizer, gradients=False)


def test_densities_are_the_schedules_at_every_step_of_a_long_one() -> None:
    """Of 50 000 steps with 1700 events, without a step that is not counted or a block too many."""
    steps = 50_000
    schedule = MixedSparsity.published(steps, 0.9, interval=50, ramp_interval=10, growth="random")
    model = sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)), schedule, block=4, auto_step=False)
    own = sparsifier(model)
    weights, targets = list(own.weights.values()), own.densities(0.0)
    events = 0
    for step in range(1, steps + 1):
        own.step()
        if schedule.is_topology_event(step):
            events += 1
            targets = own.densities(schedule.sparsity_at(step))
            for weight, target in zip(weights, targets, strict=True):
                wanted, grid = active_count(target, weight.grid.blocks, int(weight.backbone.sum())), weight.grid.shape
                active = int(weight.mask.sum())
                assert active == wanted or wanted < active < sum(grid), (step, weight.name)
                assert weight.active == active * weight.grid.block**2
    assert own.step_count == steps
    assert events == len(events_of(schedule, steps)) == 1700
    assert own.density == 1.0
    assert targets == [1.0, 1.0]


@pytest.mark.parametrize("step", [2**24 + 1, 2**31 + 1, 10**12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_counted_beyond_what_floats_hold(step: int, dtype: torch.dtype) -> None:
    """Far into a run: counts, masks and laws of a checkpoint, also in a dtype that holds few whole numbers."""
    schedule = Constant(0.7, interval=10, growth="random")
    model = sparsify(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(dtype), schedule)
    own = sparsifier(model)
    own.load_state_dict(own.state_dict() | {"step": step})
    optimizer = torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), 1e-2)
    for _ in range(3):
        model(torch.randn(8, 32, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert own.step_count == step + 3
    state = copy.deepcopy(optimizer.state_dict())
    other = sparsify(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32)).to(dtype), schedule, seed=9)
    resumed = torch.optim.AdamW(mst_compile.param_groups(other, weight_decay=0.1), 1e-2)
    resumed.load_state_dict(state)
    assert sparsifier(other).step_count == step + 3
    assert sparsifier(other).seed == own.seed
    assert all(torch.equal(m, own.masks[n]) for n, m in sparsifier(other).masks.items())
    assert packing.unpack_progress(packing.pack_progress(step, 3)) == (step, 3)
