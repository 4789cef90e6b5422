"""DeepSpeed's engine trains sparse models as PyTorch does: with ZeRO and without, and with master weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_cases import (
    BF16,
    F16,
    NARROW,
    SCHEDULES,
    STEPS,
    WIDE,
    Case,
    assert_zero_outside,
    batches,
    by_hand,
    dense,
    engine_of,
    fresh,
    loss_of,
    master_of,
    train,
    zero,
)
from torch import Tensor, nn

import mst_compile
from mst_compile import MSTWarning, explain, sparsifier, sparsify
from mst_compile.errors import CheckpointError, ParallelismError
from tests.oracles import assert_same_bits, assert_same_course

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.xdist_group("deepspeed")  # one process group, at one port
GROWING = SCHEDULES["by gradient"]
RESTORED = SCHEDULES["restored"]
CASES = {case.name: case for case in [Case("no ZeRO", zero(0)), *WIDE, *NARROW]}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    deepspeed.init_distributed(dist_backend="gloo")
    yield
    dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def nothing_to_say() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled", MSTWarning)
        yield


def made(case: Case, schedule: Any = GROWING) -> Any:
    return engine_of(case, *fresh(schedule, case.decay))


def masters(engine: Any) -> list[Tensor]:
    return [master_of(engine, p).clone() for p in engine.module.parameters()]


def assert_as_by_hand(case: Case, name: str) -> None:
    engine = made(case, SCHEDULES[name])
    expected, course = by_hand(case, SCHEDULES[name])
    for step, (got, want) in enumerate(zip(train(case, engine), course, strict=True)):
        assert all(torch.equal(got[n], want[n]) for n in want), step
        assert_zero_outside(engine)
    assert sparsifier(engine.module).step_count == STEPS
    assert len({tuple(m["a.weight"].flatten().tolist()) for m in course}) > 2
    for one, other in zip(masters(engine), expected.parameters(), strict=True):
        assert_same_course(one, other.detach(), parted=100)


@pytest.mark.parametrize(("stage", "compiled"), [(0, False), (2, True)])
def test_it_trains_as_pytorch_does(stage: int, compiled: bool) -> None:
    """Events, restoration, accumulated and clipped gradients, rates that follow the density."""
    case, kernels = Case("", zero(stage)), []
    engine = made(case, RESTORED)
    if compiled:
        engine.compile(backend="mst")
    for step, _ in enumerate(train(case, engine)):
        if step == STEPS // 2:
            kernels = [row.kernel for row in explain(engine.module)]
    if compiled:
        assert kernels == ["block-sparse"] * 4
    expected, _ = by_hand(case, RESTORED)
    assert sparsifier(engine.module).step_count == STEPS
    assert sparsifier(engine.module).density == 1
    for one, other in zip(engine.module.parameters(), expected.parameters(), strict=True):
        assert_same_course(one.detach(), other.detach(), parted=1000)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", WIDE[:2], ids=lambda case: case.name)
def test_stages_1_and_2(case: Case, name: str) -> None:
    assert_as_by_hand(case, name)


@pytest.mark.parametrize("case", WIDE[2:], ids=lambda case: case.name)
def test_copies_on_the_host(case: Case) -> None:
    assert_as_by_hand(case, "by gradient")


@pytest.mark.parametrize("case", NARROW, ids=lambda case: case.name)
def test_masters_of_a_narrow_model(case: Case) -> None:
    assert_as_by_hand(case, "by gradient")


@pytest.mark.parametrize("name", ["own steps", "restored"])
def test_masters_over_other_schedules(name: str) -> None:
    assert_as_by_hand(NARROW[1], name)


def test_masters_in_one_tensor_without_zero() -> None:
    """``FP16_Optimizer``, which DeepSpeed makes around its own fused Adam, whose kernel is for GPUs."""
    case = NARROW[0]
    model, optimizer = fresh(GROWING, 0.0)
    model.to(BF16)
    wrapped = deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer(optimizer, low_precision_dtype=BF16, clip_grad=0.2)
    expected, course = by_hand(case, GROWING)
    for parts, want in zip(batches(), course, strict=True):
        for x in parts:
            (loss_of(model, x, BF16) / len(parts)).backward()
        wrapped.step()
        assert all(torch.equal(sparsifier(model).masks[n], want[n]) for n in want)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_bits(one.detach(), other.detach().to(BF16))


def test_grown_blocks_begin_with_nothing() -> None:
    case = NARROW[1]
    engine = made(case)
    seen = []

    def look(event: Any) -> None:
        for weight, parameter in sparsifier(engine.module).parameters():
            new = weight.grid.expand(weight.grown)
            seen.append(int(new.sum()))
            for key in (None, "exp_avg", "exp_avg_sq"):
                assert not master_of(engine, parameter, key)[new].any()

    sparsifier(engine.module).on_event(look)
    list(train(case, engine))
    assert len(seen) == 4 * (STEPS // 4 - 1) or len(seen) == 4 * (STEPS // 4)
    assert all(seen)


def test_steps_that_overflow_are_not_counted() -> None:
    case = Case("", zero(2) | {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}, F16)
    engine = made(case)
    before = masters(engine)
    list(train(case, engine, slice(1)))
    assert engine.skipped_steps == 1
    assert sparsifier(engine.module).step_count == 0
    assert all(torch.equal(a, b) for a, b in zip(before, masters(engine), strict=True))
    list(train(case, engine, slice(1, None)))
    assert 1 < engine.skipped_steps < STEPS - 4
    assert sparsifier(engine.module).step_count == STEPS - engine.skipped_steps
    assert_zero_outside(engine)


@pytest.mark.parametrize("name", ["no ZeRO", "stage 1", "stage 2", *(case.name for case in NARROW[:4])])
def test_a_checkpoint_goes_on(name: str, tmp_path: Path) -> None:
    """Also in the step before an event, whose growth scores are to come, and the one after."""
    case = CASES[name]
    whole = made(case)
    course = list(train(case, whole))
    for at in (3, 4):
        first = made(case)
        list(train(case, first, slice(at)))
        first.save_checkpoint(str(tmp_path), tag=str(at))
        other = made(case)
        assert other.load_checkpoint(str(tmp_path), tag=str(at))[0]
        assert sparsifier(other.module).step_count == at
        assert all(torch.equal(mask, course[at - 1][n]) for n, mask in sparsifier(other.module).masks.items())
        for got, want in zip(train(case, other, slice(at, None)), course[at:], strict=True):
            assert all(torch.equal(got[n], want[n]) for n in want)
        for one, two in zip(other.module.parameters(), whole.module.parameters(), strict=True):
            assert_same_bits(one.detach(), two.detach())


def test_a_checkpoint_without_masks_is_told_of(tmp_path: Path) -> None:
    case = CASES["stage 1"]
    engine = engine_of(case, *dense())
    for x in batches()[0]:
        engine.backward(loss_of(engine, x, case.dtype))
        engine.step()
    engine.save_checkpoint(str(tmp_path))
    sparse = made(case)
    with pytest.warns(MSTWarning, match="no topology of a.weight"):
        sparse.load_checkpoint(str(tmp_path))
    sparse.save_checkpoint(str(tmp_path), tag="sparse")
    with pytest.warns(MSTWarning, match="call sparsify"):
        engine.load_checkpoint(str(tmp_path), tag="sparse")


def test_masks_of_another_grid_are_refused(tmp_path: Path) -> None:
    case = CASES["stage 1"]
    first = made(case)
    list(train(case, first, slice(2)))
    first.save_checkpoint(str(tmp_path))
    model, _ = fresh(GROWING)
    sparsify(mst_compile.densify(model), GROWING, block=2)
    other = engine_of(case, model, torch.optim.AdamW(mst_compile.param_groups(model), lr=1e-3))
    with pytest.raises(CheckpointError, match="block 2"):
        other.load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "case", [Case("stage 2", zero(2, reduce_bucket_size=500)), NARROW[0], NARROW[2]], ids=lambda case: case.name
)
def test_a_model_that_becomes_sparse_afterwards(case: Case) -> None:
    """The engine has copies of what it was, and hooks on its gradients that stand before those of the masks."""
    expected = made(case)
    want = list(train(case, expected))
    model, optimizer = dense(case.decay)
    engine = engine_of(case, model, optimizer)
    masks = sparsifier(fresh(GROWING)[0]).masks
    sparsify(model, GROWING, block=8, masks=masks, rescale=False)
    for got, expected_masks in zip(train(case, engine), want, strict=True):
        assert all(torch.equal(got[n], expected_masks[n]) for n in masks)
        assert_zero_outside(engine)
    for one, other in zip(masters(engine), masters(expected), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("case", [WIDE[0], NARROW[0], NARROW[2]], ids=lambda case: case.name)
def test_masks_that_are_given_between_steps(case: Case) -> None:
    engine = made(case)
    list(train(case, engine, slice(2)))
    sparse = sparsifier(engine.module)
    mask = sparse.masks["b.weight"].roll(1, 0)
    sparse.apply_mask("b.weight", mask)
    assert_zero_outside(engine)
    parameter = engine.module.b.weight
    new = sparse.weights["b.weight"].grid.expand(sparse.weights["b.weight"].grown)
    assert new.any()
    assert not parameter[new].any()
    assert not master_of(engine, parameter, "exp_avg_sq")[new].any()
    list(train(case, engine, slice(2, 3)))
    assert torch.equal(sparse.masks["b.weight"], mask)
    assert_zero_outside(engine)
    assert master_of(engine, parameter)[new].any()


def test_what_a_program_writes_to_the_model_is_what_is_trained() -> None:
    """As without ZeRO; DeepSpeed alone would write it over."""
    case = NARROW[1]
    engine = made(case)
    list(train(case, engine, slice(2)))
    inside = sparsifier(engine.module).weights["a.weight"].grid.expand(sparsifier(engine.module).masks["a.weight"])
    with torch.no_grad():
        engine.module.a.weight.mul_(-2)
    want = engine.module.a.weight.detach().float()
    list(train(case, engine, slice(2, 3)))
    assert ((engine.module.a.weight.float() - want)[inside].abs() < 0.02).all()


def test_an_engine_that_counts_nothing_by_itself() -> None:
    case = WIDE[1]
    torch.manual_seed(0)
    model = mst_compile.densify(fresh(GROWING)[0])
    sparsify(model, GROWING, block=8, auto_step=False)
    engine = engine_of(case, model, torch.optim.AdamW(mst_compile.param_groups(model), lr=1e-3))
    for step, _ in enumerate(train(case, engine, slice(5))):
        assert sparsifier(model).step_count == step
        sparsifier(model).step()
    assert_zero_outside(engine)


def test_another_models_optimizer_is_none_of_the_copies() -> None:
    made(CASES["stage 1"])
    other = nn.Linear(4, 4)
    dense = torch.optim.SGD(other.parameters(), 0.1)
    other(torch.ones(2, 4)).sum().backward()
    dense.step()


def test_stage_3_is_refused() -> None:
    model, optimizer = fresh(GROWING)
    engine = engine_of(Case("", zero(3)), model, optimizer)
    with pytest.raises(ParallelismError, match=r"DeepSpeed trains a copy of a.weight.*stage 3 is not: use stage 2"):
        list(train(Case("", zero(3)), engine, slice(1)))


def test_classes_that_are_derived_are_refused() -> None:
    """As that of ZenFlow is, which does other things in between."""
    case = CASES["stage 1"]
    engine = made(case)
    served = type(engine.optimizer)
    engine.optimizer.__class__ = type("Derived", (served,), {})
    with pytest.raises(ParallelismError, match=r"DeepSpeed trains a copy of a.weight.*fully_shard"):
        list(train(case, engine, slice(1)))
