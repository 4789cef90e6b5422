"""First steps of regrown blocks: by a number of their own, and warmed up; against an optimizer of each block's own."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mask_cases import element_masks
from oracles import assert_same_bits, assert_same_course, assert_within, of_rounding
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from training import OPTIMIZERS, assert_zero_outside, batches, fresh, loss_of, runner, train

from mst_compile import Constant, MixedSparsity, param_groups, sparsifier, sparsify
from mst_compile.errors import CheckpointError, MSTWarning, ScheduleError
from mst_compile.rules.schedule import Schedule, as_schedule
from mst_compile.schedule import GradualPruning
from mst_compile.state import own_steps, young

ROWS, COLS, BLOCK, STEPS = 44, 36, 8, 36  # ragged edges
Maker = Callable[[Any], torch.optim.Optimizer]
OWN: dict[str, Maker] = {
    **{n: OPTIMIZERS[n] for n in ("adamw", "adamw foreach", "adamw fused", "adamw amsgrad")},
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, maximize=True),
    "adam 1e-2": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.95), eps=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=0.1, maximize=True),
    "nadam decoupled": lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2, weight_decay=0.1),
}


def often(**changes: Any) -> Constant:
    return Constant(0.5, **{"interval": 5, "growth": "random", "drop_fraction": 0.4, "regrown": "own steps"} | changes)


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


def single(schedule: Schedule, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(nn.Linear(COLS, ROWS, bias=False, dtype=dtype), schedule, block=block)


def gradient_of(model: nn.Linear, step: int) -> Tensor:
    """Noise, masked unless growth reads it."""
    noise = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(step), dtype=model.weight.dtype)
    return noise if sparsifier(model).weights["weight"].dense_grad else noise * element_masks(model)["weight"]


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
    lives = 0
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
        assert_within(model.weight.detach(), exact, allowed, f"{name}, step {step}")
        if name != "adamax":  # it adds eps to the norm of a gradient of 0, here as in the Parameters of their own
            assert_zero_outside(model, optimizer)
    assert lives > 20


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
    eps = torch.finfo(torch.float32).eps
    settled = next(k for k in range(1, 400) if max(1 / (1 - 0.9**k), (1 - 0.95**k) ** -0.5) - 1 <= eps)
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


# -- what is around it -------------------------------------------------------------------------------------------------

BOTH = often(growth="mixed", interval=3, regrown_warmup=4)
RESUMED: dict[str, tuple[Schedule, Maker]] = {
    "adamw": (BOTH, OPTIMIZERS["adamw"]),
    "fused": (BOTH, OPTIMIZERS["adamw fused"]),
    "nadam": (BOTH, OWN["nadam"]),
    "sgd": (BOTH, OPTIMIZERS["sgd"]),
    "ends dense": (
        MixedSparsity.published(20, 0.8, settle=4, interval=3, ramp_interval=2, regrown="own steps", regrown_warmup=3),
        OPTIMIZERS["adamw"],
    ),
    "pruned": (GradualPruning(20, 0.8, interval=3, regrown="own steps", regrown_warmup=3), OPTIMIZERS["adamw"]),
}


@pytest.mark.parametrize("way", ["optimizer", "sparsifier", "distributed"])
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_bit_for_bit(name: str, way: str) -> None:
    """By the optimizer's state dict, the sparsifier's, or PyTorch's distributed state dicts."""
    schedule, make = RESUMED[name]
    data = list(batches(20))

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = fresh(schedule)
        return model, make(model.parameters())

    def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
        file = io.BytesIO()
        both = dsd.get_state_dict(model, optimizer) if way == "distributed" else (
            model.state_dict(), optimizer.state_dict(),
        )  # fmt: skip
        torch.save([*both, sparsifier(model).state_dict()], file)
        return file.getvalue()

    model, optimizer = begin()
    states, seen = [], 0
    for x in data:
        train(model, optimizer, "none", iter([x]))
        states.append(saved(model, optimizer))
        seen += sum(w.young is not None for w in sparsifier(model).weights.values())
    assert seen > 20
    for step in range(2, 20, 1 if (name, way) == ("adamw", "optimizer") else 6):
        again, other = begin()
        weights, state, own = torch.load(io.BytesIO(states[step - 1]), weights_only=True)
        if way == "distributed":
            dsd.set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
        else:
            again.load_state_dict(weights)
            if way == "sparsifier":  # the optimizer's state alone, as a loop that strips ours would have it
                kept = {k: {n: v for n, v in e.items() if "mst_" not in n} for k, e in state["state"].items()}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", MSTWarning)
                    other.load_state_dict({**state, "state": kept})
                sparsifier(again).load_state_dict(own)
            else:
                other.load_state_dict(state)
        train(again, other, "none", iter(data[step:]))
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert_same_bits(q.detach(), p.detach())


def test_a_copy_goes_on_alike() -> None:
    model = fresh(BOTH)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, "none", batches(7))
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters(), 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, "none", batches(6))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def trained(schedule: Schedule, groups: Callable[[nn.Module], Any], mode: str) -> list[Tensor]:
    """Weights after some steps with clipped gradients."""
    torch._dynamo.reset()
    model = fresh(schedule)
    optimizer, run = torch.optim.AdamW(groups(model), 1e-2, weight_decay=0.0), runner(model, mode)
    for x in batches(14):
        optimizer.zero_grad()
        loss_of(run, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_compiled_and_in_groups_as_in_eager_mode_and_one() -> None:
    plain = trained(BOTH, lambda m: m.parameters(), "none")
    other = trained(often(interval=3), lambda m: m.parameters(), "none")
    assert not all(torch.equal(p, q) for p, q in zip(plain, other, strict=True))
    for found in (
        trained(BOTH, lambda m: [{"params": [p]} for p in m.parameters()], "none"),
        trained(BOTH, lambda m: param_groups(m, density_rate=0), "none"),
    ):
        assert all(torch.equal(p, q) for p, q in zip(plain, found, strict=True))
    for p, q in zip(plain, trained(BOTH, lambda m: m.parameters(), "aot_eager"), strict=True):
        assert_same_course(q, p, 10**3)


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, torch.tensor(1e-2)), OPTIMIZERS["adamw foreach"]])
def test_a_compiled_step(make: Maker) -> None:
    """Young blocks are written outside of its graphs, which their ages do not compile anew."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return graph.forward

    model, eager = single(BOTH), single(BOTH)
    optimizer, plain = make(model.parameters()), make(eager.parameters())
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(20):
        for own, take in ((model, step), (eager, plain.step)):
            own.weight.grad = gradient_of(own, i)
            take()
    assert len(graphs) == 1
    want = eager.weight.detach().double()
    assert_within(model.weight.detach(), want, of_rounding(torch.float32, times=32 * 20) * (want.abs() + 1e-2))


def test_groups_keep_their_rates_and_laws() -> None:
    """A block's own step is taken with its group's rate and decay, as the law of the density has them."""
    model = single(often(interval=50, drop_fraction=0.6))
    groups = param_groups(model, weight_decay=0.1, density_rate=1.0)
    optimizer, first = torch.optim.AdamW(groups, 1e-2, eps=0.0), element_masks(model)["weight"]
    for step in range(1, 53):
        mask, before = element_masks(model)["weight"], model.weight.detach().double()
        density = sparsifier(model).density
        model.weight.grad = torch.full((ROWS, COLS), -3.0) * mask
        optimizer.step()
        if step > 50:
            grown = mask & ~first
            right = before * (1 - 1e-2 * 0.1) + 1e-2 / density
            allowed = of_rounding(torch.float32, times=16) * right.abs()
            assert_within(model.weight.detach()[grown], right[grown], allowed[grown])
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_under_a_scaler_that_skips() -> None:
    """Steps that are skipped are none of a block's; powers of two change no rounding."""
    plain, scaled = fresh(BOTH), fresh(BOTH)
    make, data = OPTIMIZERS["adamw fused"], list(batches(14))
    train(plain, make(plain.parameters()), "none", iter(data))
    optimizer, scaler = make(scaled.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)
    for step, x in enumerate(data):
        for broken in (True, False) if step in (0, 3, 4, 8) else (False,):
            optimizer.zero_grad()
            scaler.scale(loss_of(scaled, x) * (float("inf") if broken else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update(new_scale=2.0 ** (5 + step % 4))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), scaled.parameters(), strict=True))


class Around(torch.optim.Optimizer):
    """An optimizer that steps another, as ZeroRedundancyOptimizer does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_a_step_within_a_step_is_scaled_once() -> None:
    plain, model = fresh(BOTH), fresh(BOTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)
        train(plain, torch.optim.AdamW(plain.parameters(), 1e-2), "none", batches(12))
        train(model, Around(torch.optim.AdamW(model.parameters(), 1e-2)), "none", batches(12))
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_dropped_block_is_young_anew_when_it_grows_again() -> None:
    model = single(often(interval=10**6))
    own, optimizer = sparsifier(model), torch.optim.AdamW(model.parameters(), 1e-2)
    weight, mask = own.weights["weight"], own.masks["weight"]
    r, c = (~mask).nonzero()[0].tolist()
    more = mask.clone()
    more[r, c] = True

    def steps(n: int) -> list[int]:
        for step in range(n):
            model.weight.grad = gradient_of(model, step)
            optimizer.step()
        return [] if weight.young is None else weight.young.steps.tolist()

    assert steps(2) == []
    own.apply_mask("weight", more)
    assert steps(3) == [3]
    own.apply_mask("weight", mask)
    assert weight.young is None
    own.apply_mask("weight", more)  # at once
    assert steps(2) == [2]


# -- optimizers that are not known, and mistakes -----------------------------------------------------------------------


class Iterate(torch.optim.SGD):
    """Keeps another form of the weights, as schedule-free optimizers do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("z", p.detach().clone())


@pytest.mark.parametrize(
    ("make", "schedule", "text"),
    [
        (lambda p: torch.optim.RMSprop(p, 1e-3), often(), r"own steps' .* RMSprop is none of them"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p, 1e-3), often(), "Mine is none of them"),
        (lambda p: torch.optim.Adadelta(p), often(), "Adadelta is none of them"),
        (lambda p: Iterate(p, 1e-3), often(regrown="first estimate", regrown_warmup=3), "Iterate keeps z"),
        (lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9), often(regrown_warmup=3), ""),
        (lambda p: torch.optim.AdamW(p, 1e-3), often(regrown_warmup=3), ""),
    ],
)
def test_what_cannot_be_done_is_said_once(make: Maker, schedule: Schedule, text: str) -> None:
    """And done as by default instead."""
    model, plain = fresh(schedule), fresh(often(regrown="first estimate"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, make(model.parameters()), "none", batches(14))
    told = [str(w.message) for w in caught if "regrown" in str(w.message)]
    assert len(told) == bool(text)
    if text:
        assert re.search(text, told[0])
        train(plain, make(plain.parameters()), "none", batches(14))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_only_exact_classes_are_known() -> None:
    assert type("Mine", (torch.optim.AdamW,), {}) not in own_steps.RULES
    assert {cls.__name__ for cls in own_steps.RULES} == {"Adam", "AdamW", "NAdam", "RAdam", "Adamax"}


class Mine(Schedule):
    max_sparsity, growth, regrown, regrown_warmup = 0.5, "random", "own steps", 3

    def sparsity_at(self, step: int) -> float:
        return 0.5

    def is_topology_event(self, step: int) -> bool:
        return step % 3 == 0

    def drop_fraction_at(self, step: int) -> float:
        return 0.3


def test_a_schedule_of_ones_own_says_it_by_attributes() -> None:
    model = fresh(Mine())
    train(model, torch.optim.AdamW(model.parameters(), 1e-2), "none", batches(7))
    assert all(w.young is not None for w in sparsifier(model).weights.values())


@pytest.mark.parametrize("make", [lambda **o: Constant(0.5, **o), lambda **o: MixedSparsity(100, **o),
                                  lambda **o: GradualPruning(100, **o)])  # fmt: skip
@pytest.mark.parametrize(
    ("changes", "text"),
    [({"regrown": v}, "regrown must be one of 'first estimate', 'own steps', got ") for v in ("zero", None, 1, True)]
    + [({"regrown_warmup": v}, "regrown_warmup must be a whole number of optimizer steps, at least 0, got ")
       for v in (-1, 0.5, None, True, "9")],
)  # fmt: skip
def test_mistakes(make: Callable[..., Schedule], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ScheduleError, match=text + repr(next(iter(changes.values())))):
        make(**changes)
    with pytest.raises(ScheduleError, match=text):
        as_schedule(type("Other", (Mine,), changes)())


def test_checkpoints_that_do_not_fit_are_refused() -> None:
    model = fresh(BOTH)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, "none", batches(7))
    own = sparsifier(model)
    name, numbers = next(iter(own.state_dict()["young"].items()))
    before = own.state_dict()
    bad: list[Any] = [
        5,
        {name: 5},
        {name: numbers.float()},
        {name: numbers[:1]},
        {name: numbers - 9},
        {"more": numbers},
    ]
    for value in bad:
        with pytest.raises(CheckpointError, match="young"):
            own.load_state_dict({**own.state_dict(), "young": value})
    assert all(torch.equal(v, before["young"][n]) for n, v in own.state_dict()["young"].items())
    state = optimizer.state_dict()
    key = next(k for k, entry in state["state"].items() if "mst_young" in entry)
    for packed in (state["state"][key]["mst_young"] + 0.5, torch.full_like(state["state"][key]["mst_young"], 255), 5):
        entry = {**state["state"][key], "mst_young": packed}
        with pytest.raises(CheckpointError, match="mst_young"):
            optimizer.load_state_dict({**state, "state": {**state["state"], key: entry}})


def test_a_checkpoint_without_young_blocks_has_none() -> None:
    """One from before there were any, or of a run without them."""
    plain, model = fresh(often(regrown="first estimate")), fresh(often())
    train(plain, torch.optim.AdamW(plain.parameters(), 1e-2), "none", batches(7))
    train(model, torch.optim.AdamW(model.parameters(), 1e-2), "none", batches(7))
    state = sparsifier(model).state_dict()
    sparsifier(model).load_state_dict(sparsifier(plain).state_dict())
    assert all(w.young is None for w in sparsifier(model).weights.values())
    sparsifier(plain).load_state_dict(state)
    assert all(w.young is None for w in sparsifier(plain).weights.values())
