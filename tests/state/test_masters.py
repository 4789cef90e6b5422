"""Copies of weights that somebody's own optimizer trains in their place, in one tensor: DeepSpeed's, by a stand-in."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zero_stand_in import FP16_Optimizer, installed

import mst_compile
from mst_compile import Constant, MSTWarning, sparsifier, sparsify
from mst_compile.errors import OptimizerError, ParallelismError
from mst_compile.rules.schedule import Schedule
from tests.oracles import assert_same_bits, assert_same_course

STEPS, BF16 = 12, torch.bfloat16
SCHEDULES: dict[str, Schedule] = {
    "by gradient": Constant(0.5, interval=3, growth="gradient"),
    "own steps": Constant(0.5, interval=3, growth="gradient", regrown="own steps"),
    "warm-up": Constant(0.5, interval=3, regrown_warmup=4, magnitude="l1"),
}
GROWING = SCHEDULES["by gradient"]


@pytest.fixture(autouse=True)
def deepspeed() -> Iterator[None]:
    with installed():
        yield
    gc.collect()  # models that were not trained to their end would still say so, in other tests


def fresh(schedule: Schedule = GROWING, kind: Any = torch.optim.AdamW) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(36, 52), nn.GELU(), nn.Linear(52, 36))
    sparsify(model, schedule, block=4)
    return model, kind(mst_compile.param_groups(model, weight_decay=0.1), lr=1e-3)


def batches() -> Tensor:
    return torch.randn(STEPS, 16, 36, generator=torch.Generator().manual_seed(0))


def backward(model: nn.Module, x: Tensor) -> None:
    dtype = next(model.parameters()).dtype
    (model(x.to(dtype)) - x.flip(-1).to(dtype)).float().square().mean().backward()


def train(model: nn.Module, optimizer: Any, of: slice = slice(None)) -> Iterator[dict[str, Tensor]]:
    for x in batches()[of]:
        backward(model, x)
        optimizer.step()
        yield sparsifier(model).masks


def narrow(schedule: Schedule = GROWING, kind: Any = torch.optim.AdamW) -> tuple[nn.Module, FP16_Optimizer]:
    model, optimizer = fresh(schedule, kind)
    return model.to(BF16), FP16_Optimizer(optimizer)


def by_hand(schedule: Schedule, kind: Any = torch.optim.AdamW) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The sparse model is that of the masters."""
    masters, optimizer = fresh(schedule, kind)
    with torch.no_grad():
        for p in masters.parameters():
            p.copy_(p.to(BF16))
    course = []
    for x in batches():
        model = mst_compile.densify(copy.deepcopy(masters)).to(BF16)
        backward(model, x)
        for p, master in zip(model.parameters(), masters.parameters(), strict=True):
            master.grad = p.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        course.append(sparsifier(masters).masks)
    return masters, course


def copies(model: nn.Module, optimizer: FP16_Optimizer, key: str | None = None) -> Iterator[tuple[str, Tensor]]:
    names = {id(p): name for name, p in model.named_parameters()}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        source = flat if key is None else optimizer.optimizer.state[flat][key]
        for p, part in zip(group, source.split([p.numel() for p in group]), strict=True):
            yield names[id(p)], part.detach().view(p.shape)


def assert_zero_outside(model: nn.Module, optimizer: FP16_Optimizer, *keys: str | None) -> None:
    weights = sparsifier(model).weights
    for key in keys:
        for name, found in copies(model, optimizer, key):
            if name in weights:
                assert not found[weights[name].outside(found.device)].any(), (name, key)


@pytest.mark.parametrize("name", SCHEDULES)
def test_copies_are_trained_as_the_weights_would_be(name: str) -> None:
    model, optimizer = narrow(SCHEDULES[name])
    masters, course = by_hand(SCHEDULES[name])
    for got, want in zip(train(model, optimizer), course, strict=True):
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")
    assert sparsifier(model).step_count == STEPS
    assert not torch.equal(course[0]["0.weight"], course[-1]["0.weight"])
    want_all = dict(masters.named_parameters())
    for which, found in copies(model, optimizer):
        assert_same_course(found, want_all[which].detach(), parted=10)
        assert_same_bits(found.to(BF16), dict(model.named_parameters())[which].detach())


class Restless(torch.optim.AdamW):
    """Moves what has no gradient."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1e-4)
        return result


def test_an_optimizer_that_does_not_keep_zeros() -> None:
    model, optimizer = narrow(kind=Restless)
    _, course = by_hand(GROWING, Restless)
    for got, want in zip(train(model, optimizer), course, strict=True):
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")


def test_products_that_stay_dense_are_told_of() -> None:
    """Where no gradients are left in the model when a step is over."""
    model, optimizer = narrow()
    with pytest.warns(MSTWarning, match=r'no graph compiled by backend="mst" has taken 0.weight, 2.weight'):
        list(train(model, optimizer))


def test_a_step_that_overflows_is_none() -> None:
    model, optimizer = narrow()
    optimizer.overflow = True
    list(train(model, optimizer, slice(2)))
    assert sparsifier(model).step_count == 0
    optimizer.overflow = False
    list(train(model, optimizer, slice(2, 4)))
    assert sparsifier(model).step_count == 2


def test_grown_blocks_and_dropped_ones() -> None:
    model, optimizer = narrow()
    list(train(model, optimizer, slice(2)))
    before = sparsifier(model).masks
    list(train(model, optimizer, slice(2, 3)))
    for name, weight in sparsifier(model).weights.items():
        changed = weight.grid.expand(before[name] ^ weight.mask)
        assert changed.any()
        assert torch.equal(weight.grown, weight.mask & ~before[name])
        for key in (None, "exp_avg", "exp_avg_sq"):
            assert not dict(copies(model, optimizer, key))[name][changed].any()
        assert not dict(model.named_parameters())[name][changed].any()


def test_rates_follow_the_density_of_all_that_is_in_a_tensor() -> None:
    model, optimizer = narrow()
    seen: list[float] = []
    inner = optimizer.optimizer
    inner.register_step_pre_hook(lambda *_: seen.append(inner.param_groups[0]["lr"]))
    sparsifier(model).apply_mask("2.weight", torch.ones_like(sparsifier(model).masks["2.weight"]))
    list(train(model, optimizer, slice(1)))
    weights = list(sparsifier(model).weights.values())
    density = sum(w.active for w in weights) / sum(w.numel for w in weights)
    assert seen == [pytest.approx(1e-3 / density)]
    assert inner.param_groups[0]["lr"] == 1e-3


def test_a_checkpoint_goes_on() -> None:
    whole, optimizer = narrow()
    course = list(train(whole, optimizer))
    first, one = narrow()
    list(train(first, one, slice(5)))
    file = io.BytesIO()
    torch.save([first.state_dict(), one.fp32_groups_flat, one.optimizer.state_dict()], file)
    file.seek(0)
    state, flats, inner = torch.load(file)
    second, plain = fresh()
    plain.state_dict()  # before it was DeepSpeed's
    second.to(BF16)
    two = FP16_Optimizer(plain)
    second.load_state_dict(state)
    two.optimizer.load_state_dict(inner)
    with torch.no_grad():
        for flat, saved in zip(two.fp32_groups_flat, flats, strict=True):
            flat.copy_(saved)
    assert sparsifier(second).step_count == 5
    for got, want in zip(train(second, two, slice(5, None)), course[5:], strict=True):
        assert all(torch.equal(got[n], want[n]) for n in want)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_masks_of_a_checkpoint_that_nobody_takes_are_told_of() -> None:
    model, optimizer = narrow()
    list(train(model, optimizer, slice(2)))
    state = optimizer.optimizer.state_dict()
    mst_compile.densify(model)
    with pytest.warns(MSTWarning, match="call sparsify"):
        optimizer.optimizer.load_state_dict(state)


def test_what_is_written_to_the_model_goes_into_the_copies() -> None:
    model, optimizer = narrow()
    list(train(model, optimizer, slice(1)))
    weight = sparsifier(model).weights["0.weight"]
    mask = weight.mask.roll(1, 0)
    with torch.no_grad():
        model[0].weight.copy_(weight.grid.expand(mask) * 2.0)
    with pytest.warns(MSTWarning, match="outside the active blocks"):
        list(train(model, optimizer, slice(1, 2)))
    assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")
    inside = weight.grid.expand(mask & weight.mask)
    assert (dict(copies(model, optimizer))["0.weight"][inside] > 1.9).all()


def test_an_optimizer_of_the_weights_takes_over_and_gives_back() -> None:
    """Old copies decide nothing, and are what the model is when they are trained again."""
    model, optimizer = narrow(Constant(0.5, interval=3))
    list(train(model, optimizer, slice(1)))
    expected, kept = copy.deepcopy(model), [flat.clone() for flat in optimizer.fp32_groups_flat]
    for one in (model, expected):
        plain = torch.optim.SGD(one.parameters(), lr=0.5)
        for x in batches()[1:3]:
            backward(one, x)
            plain.step()
            plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(kept, optimizer.fp32_groups_flat, strict=True))
    assert all(torch.equal(a, sparsifier(expected).masks[n]) for n, a in sparsifier(model).masks.items())
    before = [p.detach().float() for p in model.parameters()]
    list(train(model, optimizer, slice(3, 4)))
    assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")
    for p, was in zip(model.parameters(), before, strict=True):
        assert (p.float() - was).abs().max() < 0.02


def test_masks_that_are_given() -> None:
    model, optimizer = narrow()
    list(train(model, optimizer, slice(1)))
    mask = sparsifier(model).masks["0.weight"].roll(1, 0)
    sparsifier(model).apply_mask("0.weight", mask)
    assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")
    list(train(model, optimizer, slice(1, 2)))
    assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")


def test_a_step_that_raises_after_the_copies_have_moved_is_one() -> None:
    model, optimizer = narrow()
    list(train(model, optimizer, slice(1)))

    def stop(*_: object) -> None:
        raise RuntimeError("stopped")

    handle = optimizer.optimizer.register_step_post_hook(stop)
    backward(model, batches()[1])
    with pytest.raises(RuntimeError, match="stopped"):
        optimizer.step()
    handle.remove()
    assert sparsifier(model).step_count == 2
    assert_zero_outside(model, optimizer, None, "exp_avg", "exp_avg_sq")
    assert optimizer.optimizer.param_groups[0]["lr"] == 1e-3


class Coded(torch.optim.SGD):
    """Keeps a code for each element, with a book, as 8-bit optimizers do."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["state1"] = torch.zeros(p.shape, dtype=torch.uint8)
                self.state[p]["qmap1"] = torch.linspace(0, 1, 256)
                self.state[p]["momentum"] = torch.zeros_like(p)
        return super().step(closure)


def test_state_in_codes_is_refused() -> None:
    model, optimizer = narrow(kind=Coded)
    with pytest.raises(OptimizerError, match=r"state1 of the copy of 0.weight in codes"):
        list(train(model, optimizer, slice(1)))


class MuonWithAuxAdam(torch.optim.AdamW):
    """Of this name DeepSpeed's is."""


def test_updates_that_deepspeed_makes_itself_are_refused() -> None:
    model, optimizer = narrow(kind=MuonWithAuxAdam)
    before = [flat.clone() for flat in optimizer.fp32_groups_flat]
    with pytest.raises(ParallelismError, match="orthogonalises gradients before MuonWithAuxAdam"):
        list(train(model, optimizer, slice(1)))
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.fp32_groups_flat, strict=True))
    assert sparsifier(model).step_count == 0


def test_checkpoints_that_hold_no_masks_are_told_of_once() -> None:
    model, optimizer = narrow()
    optimizer.elastic_checkpoint = True  # type: ignore[attr-defined]
    with pytest.warns(MSTWarning, match="elastic checkpoints hold no masks") as caught:
        list(train(model, optimizer, slice(3)))
    assert len([w for w in caught if "elastic" in str(w.message)]) == 1


def test_a_copy_of_the_model_knows_no_copies_of_its_weights() -> None:
    model, optimizer = narrow()
    list(train(model, optimizer, slice(1)))
    other = copy.deepcopy(model)
    list(train(model, optimizer, slice(1, 4)))
    assert sparsifier(model).step_count == 4
    assert sparsifier(other).step_count == 1
    assert not torch.equal(sparsifier(model).masks["0.weight"], sparsifier(other).masks["0.weight"])
    optimizer_of_it = torch.optim.SGD(other.parameters(), 1e-3)
    backward(other, batches()[0])
    optimizer_of_it.step()
    assert sparsifier(other).step_count == 2
