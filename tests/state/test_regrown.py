"""First steps of regrown blocks: by a number of their own, and warmed up; against an optimizer of each block's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mask_cases import element_masks
from oracles import assert_same_bits, assert_within, of_rounding
from regrown_cases import BLOCK, BOTH, COLS, OWN, ROWS, STEPS, Maker, gradient_of, often, single
from torch import Tensor, nn
from training import OPTIMIZERS, assert_zero_outside, batches, fresh, train

from mst_compile import Constant, sparsifier
from mst_compile.state import young


def block_of(tensor: Tensor, r: int, c: int, block: int) -> Tensor:
    return tensor[r * block : (r + 1) * block, c * block : (c + 1) * block]


class Alone:
    """A weight whose active blocks are Parameters of their own in float64, each made when its block grew, each with an
    optimizer of its own: what steps of their own mean."""

    def __init__(self, weight: Tensor, mask: Tensor, block: int, make: Maker, warmup: int) -> None:
        self.block, self.make, self.warmup = block, make, warmup
        self.known: dict[tuple[int, int], tuple[nn.Parameter, torch.optim.Optimizer, list[int]]] = {}
        self.follow(mask, weight, first=True)

    def follow(self, mask: Tensor, weight: Tensor, first: bool = False) -> None:
        places = {(r, c) for r, c in mask.nonzero().tolist()}
        self.known = {place: found for place, found in self.known.items() if place in places}
        for place in places - self.known.keys():
            p = nn.Parameter(block_of(weight, *place, self.block).detach().double().clone())
            assert first or not p.any()
            self.known[place] = p, self.make([p]), [self.warmup if first else 0]

    def step(self, gradient: Tensor) -> None:
        for place, (p, optimizer, count) in self.known.items():
            old = p.detach().clone()
            p.grad = block_of(gradient, *place, self.block).double().clone()
            optimizer.step()
            count[0] += 1
            with torch.no_grad():
                p.copy_(old + min(1.0, count[0] / max(1, self.warmup)) * (p - old))

    def value(self, like: Tensor) -> Tensor:
        found = torch.zeros(like.shape, dtype=torch.float64)
        for place, (p, _, _) in self.known.items():
            block_of(found, *place, self.block).copy_(p.detach())
        return found


def steps_as_alone(model: Any, optimizer: torch.optim.Optimizer, alone: Alone) -> Iterator[int]:
    """Take steps; after each the weight is where ``alone`` puts its blocks, and enough of them live and end."""
    own, lives = sparsifier(model), 0
    for step in range(STEPS):
        model.weight.grad = gradient_of(model, step)
        mask = own.masks["weight"]
        optimizer.step()
        alone.step(model.weight.grad)
        lives += int((mask & ~own.masks["weight"]).sum())
        alone.follow(own.masks["weight"], model.weight)
        exact = alone.value(model.weight)
        # A few roundings a step of averages, quotient and sum; RAdam's and NAdam's factors lose a digit at first.
        allowed = of_rounding(torch.float32, times=32 * (step + 1)) * (exact.abs() + 1e-2)
        assert_within(model.weight.detach(), exact, allowed, f"step {step}")
        yield step
    assert lives > 20


@pytest.mark.parametrize(("warmup", "many"), [(0, 2.0), (3, young.MANY), (12, 0.0)])
@pytest.mark.parametrize("name", OWN)
def test_a_regrown_block_steps_as_a_parameter_of_its_own(
    name: str, warmup: int, many: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each active block is where an optimizer of its own, made when it grew, puts it: in every step of several lives.
    Noise decides the gradients, so that errors add up and do not grow."""
    monkeypatch.setattr(young, "MANY", many)  # visited one by one, or in passes over all of the weight
    model = single(often(regrown_warmup=warmup))
    own, optimizer = sparsifier(model), OWN[name](model.parameters())
    # Blocks of the first masks are not regrown and have no warm-up.
    alone = Alone(model.weight, own.masks["weight"], BLOCK, OWN[name.replace(" fused", "")], warmup)
    for _ in steps_as_alone(model, optimizer, alone):
        if name != "adamax":  # it adds eps to the norm of a gradient of 0, here as in the Parameters of their own
            assert_zero_outside(model, optimizer)


BEGINS: dict[str, Maker] = {
    "rprop": lambda p: torch.optim.Rprop(p, 3e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.5),
    "adagrad fused": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", BEGINS)
def test_state_begins_where_the_optimizer_begins_it(name: str) -> None:
    """Which is not at 0 for Rprop's step sizes and Adagrad's sums. Each block is where an optimizer of its own puts it,
    made when it grew."""
    model = single(often(regrown="first estimate", regrown_warmup=0))
    own, optimizer = sparsifier(model), BEGINS[name](model.parameters())
    alone = Alone(model.weight, own.masks["weight"], BLOCK, BEGINS[name.replace(" fused", "")], 0)
    for _ in steps_as_alone(model, optimizer, alone):
        pass


@pytest.mark.parametrize("block", [1, 8, 32])
@pytest.mark.parametrize("warmup", [0, 4])
def test_adam_moves_by_its_learning_rate_from_the_first_step_on(warmup: int, block: int) -> None:
    """A gradient that stays is its own average: corrected, m / sqrt(v) is its sign. By hand, no optimizer asked."""
    model = single(often(regrown_warmup=warmup, interval=50, drop_fraction=0.6), block)
    own, lr = sparsifier(model), 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, eps=0.0)
    first = element_masks(model)["weight"]
    for step in range(1, 70):
        before, mask = model.weight.detach().clone(), element_masks(model)["weight"]
        model.weight.grad = torch.full((ROWS, COLS), -3.0) * mask
        optimizer.step()
        if step > 50:
            grown, k = mask & ~first, step - 50
            moved = (model.weight.detach() - before)[grown].double()
            right = torch.full_like(moved, lr * (min(1.0, k / warmup) if warmup else 1.0))
            assert_within(moved, right, of_rounding(torch.float32, times=16) * (before[grown].double().abs() + right))
            assert grown.any()
    assert own.step_count == 69


def test_a_warm_up_in_float64_has_its_digits() -> None:
    """A third of an update, not what float32 makes of a third."""
    model = single(often(growth="random", interval=2, regrown="first estimate", regrown_warmup=3), dtype=torch.float64)
    optimizer, first = torch.optim.SGD(model.parameters(), 1.0), element_masks(model)["weight"]
    for step in range(3):
        mask = element_masks(model)["weight"]
        model.weight.grad = gradient_of(model, step)
        optimizer.step()
    grown = mask & ~first
    exact = -model.weight.grad[grown] / 3
    assert grown.any()
    assert_within(model.weight.detach()[grown], exact, of_rounding(torch.float64, times=4) * exact.abs())


class Lion(torch.optim.Optimizer):
    """No bias correction, and unknown: its update is a sign."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.mul_(1 - 1e-3).sub_(1e-2 * (0.9 * m + 0.1 * p.grad).sign())
            m.lerp_(p.grad, 0.01)


WARMED: dict[str, Maker] = {
    "adamw": OPTIMIZERS["adamw"],
    "sgd": OPTIMIZERS["sgd"],
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "lion": lambda p: Lion(p, {}),
    "muon": lambda p: torch.optim.Muon(p, 1e-2),
}


@pytest.mark.parametrize("name", WARMED)
def test_a_warm_up_scales_what_the_optimizer_does(name: str) -> None:
    """Whoever steps: the k-th step of a regrown block is k / n of the one that a twin without a warm-up takes from the
    same weights and state; all other blocks take the twin's."""
    n = 4
    model = single(often(regrown="first estimate", regrown_warmup=n))
    own, optimizer, ages = sparsifier(model), WARMED[name](model.parameters()), torch.full((ROWS, COLS), 99)
    scaled = 0
    for step in range(24):
        gradient, mask = gradient_of(model, step), element_masks(model)["weight"]
        twin = single(often(regrown="first estimate"))
        other, weight = WARMED[name](twin.parameters()), sparsifier(twin).weights["weight"]
        sparsifier(twin).load_state_dict(own.state_dict())
        with torch.no_grad():
            twin.weight.copy_(model.weight)
        saved = optimizer.state_dict()
        other.load_state_dict({**saved, "state": copy.deepcopy(saved["state"])})
        weight.grown = own.weights["weight"].grown
        before = model.weight.detach().clone()
        for m, o in ((model, optimizer), (twin, other)):
            m.weight.grad = gradient.clone()
            o.step()
        ages += 1
        both = mask & element_masks(model)["weight"]
        share = (ages / n).clamp(max=1.0)
        right = before.double() + share.double() * (twin.weight.detach().double() - before.double())
        allowed = of_rounding(torch.float32, times=4) * (before.abs() + twin.weight.detach().abs()).double()
        assert_within(model.weight.detach()[both], right[both], allowed[both], f"{name}, step {step}")
        assert torch.equal(model.weight.detach()[both & (ages >= n)], twin.weight.detach()[both & (ages >= n)])
        scaled += int((both & (ages < n)).sum())
        ages[element_masks(model)["weight"] & ~mask] = 0
    assert scaled > 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stored", ["rows", "columns"])
def test_many_young_blocks_are_written_as_few_are(
    stored: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, whichever way their elements are found, and in weights that are not contiguous."""
    found = []
    for many in (0.0, 2.0):
        monkeypatch.setattr(young, "MANY", many)
        model = single(BOTH, dtype=dtype)
        if stored == "columns":
            model.weight.data = model.weight.data.t().contiguous().t()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)
        for step in range(16):
            model.weight.grad = gradient_of(model, step).to(dtype)
            optimizer.step()
        assert model.weight.is_contiguous() == (stored == "rows")
        found.append(model.weight.detach())
    assert_same_bits(*found)


def test_off_is_as_if_there_was_no_such_option() -> None:
    model = fresh(often())
    plain = fresh(often(regrown="first estimate"))
    for m in (model, plain):
        train(m, torch.optim.AdamW(m.parameters(), 1e-2), "none", batches(14))
    weights = sparsifier(plain).weights.values()
    assert all(w.young is None for w in weights)
    assert all(w.young is not None for w in sparsifier(model).weights.values())
    optimizer = torch.optim.AdamW(plain.parameters())
    assert "young" not in sparsifier(plain).state_dict()
    assert all("mst_young" not in entry for entry in optimizer.state_dict()["state"].values())


def test_blocks_are_young_no_longer_than_they_differ() -> None:
    """300 steps if the betas are 0.9 and 0.95; a warm-up alone ends with its length."""
    least = of_rounding(torch.float32)
    settled = next(k for k in range(1, 400) if max(1 / (1 - 0.9**k), (1 - 0.95**k) ** -0.5) - 1 <= least)
    assert 290 < settled < 310
    for schedule, k in ((often(), settled), (often(regrown="first estimate", regrown_warmup=7), 7)):
        model = single(Constant(0.5, **{**vars_of(schedule), "interval": 3, "total_steps": 8}))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95))
        weight, last = sparsifier(model).weights["weight"], 0
        for step in range(1, 400):
            model.weight.grad = gradient_of(model, step)
            optimizer.step()
            last = step if weight.young is not None else last
        assert weight.young is None
        assert last == 3 + k - 2, "the last event is after step 3; after k - 1 steps nothing is left to correct"


def vars_of(schedule: Constant) -> dict[str, Any]:
    return {n: getattr(schedule, n) for n in ("growth", "drop_fraction", "regrown", "regrown_warmup")}


@pytest.mark.parametrize("frozen", [range(5, 7), range(6, 8)])
def test_a_frozen_weight_that_is_stepped_all_the_same(frozen: range) -> None:
    """PyTorch's optimizers step whatever has a gradient, one that was left over too: its young blocks step their way,
    those that have just grown and those that have begun."""
    model = single(often(regrown_warmup=4))
    own, optimizer = sparsifier(model), OWN["adamw"](model.parameters())
    alone = Alone(model.weight, own.masks["weight"], BLOCK, OWN["adamw"], 4)
    for step in range(9):
        model.weight.requires_grad_(step not in frozen)
        model.weight.grad = gradient_of(model, step)
        optimizer.step()
        alone.step(model.weight.grad)
        alone.follow(own.masks["weight"], model.weight)
    exact = alone.value(model.weight)
    assert_within(model.weight.detach(), exact, of_rounding(torch.float32, times=STEPS) * (exact.abs() + 0.1))
