"""Optimizers beyond Adam and SGD: zeros, state of dropped blocks, resuming, compiled models; or what is said."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled
from mask_cases import element_masks
from oracles import assert_reordered, of_rounding
from torch import Tensor, nn
from training import batches, loss_of

from mst_compile import Constant, param_groups, sparsifier, sparsify
from mst_compile.errors import ArgumentError, MSTWarning, OptimizerError
from mst_compile.state import optimizers

STEPS = 14
SCHEDULE = Constant(0.6, interval=3)
Maker = Callable[[list[nn.Parameter]], Any]


class Lion(torch.optim.Optimizer):
    """The update of "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675), written out."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(lr * (b1 * m + (1 - b1) * p.grad).sign())
                m.lerp_(p.grad, 1 - b2)


class Whitened(torch.optim.Optimizer):
    """What Shampoo and SOAP do, in short: Adam's second moment in the basis of the rows' covariance."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["GG"], state["exp_avg_sq"] = [torch.zeros(p.shape[0], p.shape[0])], torch.zeros_like(p)
            g = p.grad.view(p.shape[0], -1)
            state["GG"][0].lerp_(g @ g.t(), 0.1)
            basis = torch.linalg.eigh(state["GG"][0] + 1e-6 * torch.eye(p.shape[0]))[1]
            turned = (basis.t() @ g).view_as(p)
            state["exp_avg_sq"].lerp_(turned.square(), 0.1)
            p -= self.param_groups[0]["lr"] * (
                basis @ (turned / (state["exp_avg_sq"].sqrt() + 1e-8)).view_as(g)
            ).view_as(p)


def packaged(module: str, name: str, **options: Any) -> Maker:
    """An optimizer of a package that may not be there."""

    def make(parameters: list[nn.Parameter]) -> Any:
        pytest.importorskip(module)
        return getattr(importlib.import_module(module), name)(parameters, **options)

    return make


def in_steps(make: Maker) -> Maker:
    """A wrapper that is no optimizer itself, around one."""

    def wrapped(parameters: list[nn.Parameter]) -> Any:
        schedulefree = pytest.importorskip("schedulefree")
        return schedulefree.ScheduleFreeWrapper(make(parameters), momentum=0.9)

    return wrapped


# State of single elements: dropped blocks keep nothing of it.
ELEMENTS: dict[str, Maker] = {
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3, decoupled_weight_decay=True, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "adagrad from above 0": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
    "asgd": lambda p: torch.optim.ASGD(p, 1e-2, t0=4),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], 1e-2),
    "lion": Lion,
    "lion-pytorch": packaged("lion_pytorch", "Lion", lr=1e-3, weight_decay=0.1),
    "schedulefree adamw": packaged("schedulefree", "AdamWScheduleFree", lr=1e-2, warmup_steps=3, weight_decay=0.1),
    "schedulefree sgd": packaged("schedulefree", "SGDScheduleFree", lr=1e-1, foreach=False),
    "schedulefree radam": packaged("schedulefree", "RAdamScheduleFree", lr=1e-2),
    "schedulefree wrapper": in_steps(lambda p: torch.optim.SGD(p, 1e-2)),
    "prodigy": packaged("pytorch_optimizer", "Prodigy"),
    "adan": packaged("pytorch_optimizer", "Adan", lr=1e-3),
    "torchao 8 bits": packaged("torchao.optim", "AdamW8bit", lr=1e-3, block_size=64),
    "bitsandbytes 8 bits": packaged("bitsandbytes.optim", "AdamW8bit", lr=1e-3, min_8bit_size=16),
    "bitsandbytes lion": packaged("bitsandbytes.optim", "Lion8bit", lr=1e-3, min_8bit_size=16),
    "bitsandbytes 32 bits": packaged("bitsandbytes.optim", "AdamW", lr=1e-3),
}
# Other state, which is said.
FOREIGN: dict[str, tuple[Maker, str]] = {
    "adafactor": (lambda p: torch.optim.Adafactor(p, 1e-2), "row_var of shape"),
    "whitened": (Whitened, "GG of shape .*exp_avg_sq, perhaps in the basis"),
    "lbfgs": (lambda p: torch.optim.LBFGS(p, 1e-2, max_iter=2), "prev_flat_grad of shape"),
    "soap": (packaged("pytorch_optimizer", "SOAP", lr=1e-3, precondition_frequency=2), "GG of shape .*exp_avg_sq, per"),
    "shampoo": (packaged("pytorch_optimizer", "Shampoo", lr=1e-3), "pre_cond_0 of shape .*momentum_buffer, perhaps"),
    "scalable shampoo": (packaged("pytorch_optimizer", "ScalableShampoo", lr=1e-3), "pre_conditioner of shape"),
    "came": (packaged("pytorch_optimizer", "CAME", lr=1e-3), "exp_avg_sq_row of shape"),
}
ALL: dict[str, Maker] = {**ELEMENTS, **{name: make for name, (make, _) in FOREIGN.items()}}


def wide() -> nn.Module:
    """Weights of 4096 elements and more: smaller ones have no 8-bit state."""
    torch.manual_seed(0)
    return Blocks(32, 2, 128)


def started(make: Maker, schedule: Constant = SCHEDULE) -> tuple[nn.Module, Any]:
    model = sparsify(wide(), schedule, block=8)
    optimizer = make(list(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return model, optimizer


def train(model: nn.Module, optimizer: Any, data: list[Tensor], run: Any = None) -> None:
    for x in data:

        def closure(x: Tensor = x) -> Tensor:
            model.zero_grad()
            loss = loss_of(model if run is None else run, x)
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)  # it is trained in eager mode
        warnings.filterwarnings("ignore", ".*keeps state that does not belong", MSTWarning)
        torch.manual_seed(0)  # some draw random numbers when they step
        yield


def numbers(state: dict[str, Any], key: str) -> Tensor:
    """What state says of each element: 8-bit codes by their book."""
    value = state[key]
    if value.dtype == torch.uint8:
        value = state[key.replace("state", "qmap")][value.long()]
    return torch.empty(value.shape).copy_(value)


@pytest.mark.parametrize("name", ALL)
def test_masked_weights_and_dropped_state_are_zero(name: str) -> None:
    model, optimizer = started(ALL[name])
    own, first = sparsifier(model), sparsifier(model).masks
    for step, x in enumerate(batches(STEPS), 1):
        train(model, optimizer, [x])
        assert own.step_count == step
        seen = 0
        for n, mask in element_masks(model).items():
            p = model.get_parameter(n)
            assert not p.detach()[~mask].any()
            assert bool(p.isfinite().all())
            for key, value in optimizer.state[p].items() if name in ELEMENTS else ():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    seen += 1
                    if value.dtype != torch.uint8 or step % 3 == 0:  # bitsandbytes rounds a 0 to a code beside it
                        # Adamax's own eps, Rprop's smallest step size.
                        least = {"adamax": 1e-8, "rprop": 1e-6 if key == "step_size" else 0.0}.get(name, 0.0)
                        least *= 1 + of_rounding(torch.float32)
                        assert not (numbers(optimizer.state[p], key)[~mask].abs() > least).any(), key
        assert seen >= len(own.masks) or name in FOREIGN
    assert all(not torch.equal(mask, first[n]) for n, mask in own.masks.items())


@pytest.mark.parametrize("name", ALL)
def test_what_is_said(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)
        train(*started(ALL[name]), list(batches(5)))
    told = [str(w.message) for w in caught if issubclass(w.category, MSTWarning)]
    assert len(told) == (name in FOREIGN), told
    if name in FOREIGN:
        with pytest.warns(MSTWarning, match=FOREIGN[name][1]):
            warnings.warn(told[0], MSTWarning, stacklevel=1)


@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("name", ALL)
def test_a_run_resumes_bit_for_bit(name: str, at: int) -> None:
    """Between events and right after one, from what ``state_dict`` of model and optimizer hold."""
    data = list(batches(STEPS))
    model, optimizer = started(ALL[name])
    train(model, optimizer, data[:at])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    random = torch.get_rng_state()
    train(model, optimizer, data[at:])
    again, other = started(ALL[name])
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert sparsifier(again).step_count == at
    torch.set_rng_state(random)
    train(again, other, data[at:])
    assert all(torch.equal(m, sparsifier(again).masks[n]) for n, m in sparsifier(model).masks.items())
    for (n, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), n


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor", "schedulefree adamw", "soap", "bitsandbytes 8 bits"])
def test_compiled_calls_equal_eager_ones(name: str) -> None:
    """At every step, of a model that is trained by compiled calls; under averaged weights too, where there are any."""
    torch._dynamo.reset()
    model, optimizer = started(ALL[name])
    run = compiled(model)
    for x in batches(8):
        train(model, optimizer, [x], run)
        for mode in ("eval", "train") if hasattr(optimizer, "eval") else ("train",):
            getattr(optimizer, mode, lambda: None)()
            with torch.no_grad():
                assert_reordered(run(x), model(x), 128)
    assert sparsifier(model).step_count == 8


# -- rates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "also"), [(0, ()), (0.25, ("muon",)), (0.3, "both"), (1.0, "both")])
@pytest.mark.parametrize("name", ["muon", "adafactor", "transformers adafactor"])
def test_optimizers_whose_updates_have_a_size_are_told_of_rates_that_grow(
    name: str, rate: float, also: str | tuple[str, ...]
) -> None:
    """Once, and only where the rate of the density makes their steps larger than was measured to be good."""
    model = sparsify(wide(), SCHEDULE, block=8)
    groups = [g for g in param_groups(model, density_rate=rate) if all(p.dim() == 2 for p in g["params"])]
    optimizer = SIZED[name](groups, 1e-2)
    told = told_of_rates(model, optimizer)
    assert len(told) == (also == "both" or name in also), told
    wanted = "density_rate=0)" if name == "muon" else "density_rate=0.25)"
    assert all(wanted in text and "multiplies its rate by" in text for text in told)


SIZED: dict[str, Any] = {
    "muon": torch.optim.Muon,
    "adafactor": torch.optim.Adafactor,
    "transformers adafactor": lambda p, lr: _transformers_adafactor()(
        p, lr=lr, scale_parameter=False, relative_step=False
    ),
}


def _transformers_adafactor() -> Any:
    return pytest.importorskip("transformers.optimization").Adafactor


def told_of_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """What warnings say of a law of the density in a few steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MSTWarning)
        train(model, optimizer, list(batches(4)))
    return [str(w.message) for w in caught if issubclass(w.category, MSTWarning) and "density_rate" in str(w.message)]


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_rates_of_zero_are_no_reason_to_warn(name: str) -> None:
    """As in the first step of a warm-up."""
    model = sparsify(wide(), SCHEDULE, block=8)
    groups = [g for g in param_groups(model) if all(p.dim() == 2 for p in g["params"])]
    assert told_of_rates(model, SIZED[name](groups, 0.0)) == []


def test_adafactor_that_makes_its_own_rate_takes_no_law() -> None:
    model = sparsify(wide(), SCHEDULE, block=8)
    optimizer = _transformers_adafactor()(param_groups(model, density_rate=0), lr=None)
    assert told_of_rates(model, optimizer) == []
    with pytest.raises(ArgumentError, match="'density_rate' of a parameter group multiplies its lr, which is None"):
        train(model, _transformers_adafactor()(param_groups(model, density_rate=0.5), lr=None), list(batches(1)))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_updates_of_a_fixed_size_are_larger_on_fewer_elements(name: str) -> None:
    """Gradients are noise under masks of one weight: the norm of an update is the dense one's, spread over less."""
    sizes = []
    for sparsity in (0.0, 0.75):
        torch.manual_seed(0)
        model = nn.Linear(128, 128, bias=False)
        if sparsity:
            sparsify(model, Constant(sparsity, growth="none"), block=4, rescale=False)
        active = model.weight.detach() != 0
        optimizer = ALL[name](list(model.parameters()))
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn(128, 128) * active
        optimizer.step()
        change = (model.weight.detach() - before)[active]
        sizes.append(change.square().mean().sqrt().item() * (1.0 if name == "muon" else before.square().mean().rsqrt()))
    assert 1.6 <= sizes[1] / sizes[0] <= 2.1  # 2 were the whole norm kept, less as some is masked


# -- what is assumed ---------------------------------------------------------------------------------------------------


def test_state_of_square_weights_is_told_from_a_basis() -> None:
    """A preconditioner has the shape of a square weight, but of no other parameter."""
    make = ALL["shampoo"]
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), SCHEDULE, block=8)
    optimizer = make(list(model.parameters()))
    for x in batches(7):
        model(x).square().mean().backward()
        optimizer.step()
        model.zero_grad()
    assert not optimizers.survey(optimizer).elements
    for weight, p in sparsifier(model).parameters():
        before = {key: optimizer.state[p][key].clone() for key in ("pre_cond_0", "inv_pre_cond_1", "momentum_buffer")}
        optimizers.zero_state_(optimizer, weight, p)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in before.items())
        assert before["pre_cond_0"].shape == p.shape


def test_state_in_containers_and_objects_is_seen() -> None:
    class Thing:
        def __init__(self) -> None:
            self.sketch = torch.ones(3, 5)

    model, optimizer = started(lambda p: torch.optim.SGD(p, 1e-2))
    p = next(q for q in model.parameters() if q.dim() == 2)
    optimizer.state[p] = {"a": {"b": [torch.ones(7)]}, "c": Thing(), "d": torch.tensor(1.0), "e": None, "f": 3}
    found = optimizers.survey(optimizer)
    assert found.foreign == {"a": "a of shape (7,)", "c": "c of shape (3, 5)"}
    assert not found.elements


def test_four_bits_are_refused() -> None:
    """Their code book has no 0: a dropped block would keep a second moment."""
    model, optimizer = started(packaged("torchao.optim", "AdamW4bit", lr=1e-3, block_size=64))
    with pytest.raises(OptimizerError, match="which does not hold a 0 exactly"):
        train(model, optimizer, list(batches(3)))
