"""First steps of regrown blocks in whole runs: resumed, compiled, in groups, scaled, nested; what is said."""

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
from regrown_cases import BOTH, COLS, OWN, ROWS, Maker, gradient_of, often, single
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from training import OPTIMIZERS, batches, fresh, loss_of, runner, train

from mst_compile import Constant, MixedSparsity, param_groups, sparsifier
from mst_compile.errors import CheckpointError, MSTWarning, ScheduleError
from mst_compile.rules.schedule import Schedule, as_schedule
from mst_compile.schedule import GradualPruning
from mst_compile.state import own_steps

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
