"""Rate and decay apart: the decay over a run is the dense model's, whatever the densities were; laws ride along."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import element_masks
from oracles import assert_within, of_rounding
from torch import Tensor, nn
from training import batches, fresh, loss_of, restored, train

from mst_compile import Constant, Schedule, param_groups, sparsifier, sparsify
from mst_compile.errors import ArgumentError, MSTError

Groups = list[dict[str, Any]]
Maker = Callable[[Groups, Any], torch.optim.Optimizer]
WEIGHT_DECAY = 0.3


class Path(Schedule):
    """Any sparsities one after the other, an event a step, some blocks dropped and regrown at each."""

    growth = "random"
    max_sparsity = 0.9

    def __init__(self, sparsities: list[float]) -> None:
        self.sparsities = sparsities

    def sparsity_at(self, step: int) -> float:
        return self.sparsities[min(max(step, 0), len(self.sparsities) - 1)]

    def is_topology_event(self, step: int) -> bool:
        return step >= 1

    def drop_fraction_at(self, step: int) -> float:
        return 0.1


# Those that take lr * weight_decay of a weight off at each step.
BY_RATE: dict[str, Maker] = {
    "sgd": lambda g, lr: torch.optim.SGD(g, lr, foreach=False, fused=False),
    "sgd foreach": lambda g, lr: torch.optim.SGD(g, lr, foreach=True),
    "sgd fused": lambda g, lr: torch.optim.SGD(g, lr, fused=True),
    "adamw": lambda g, lr: torch.optim.AdamW(g, lr, foreach=False, fused=False),
    "adamw foreach": lambda g, lr: torch.optim.AdamW(g, lr, foreach=not isinstance(lr, Tensor)),
    "adamw fused": lambda g, lr: torch.optim.AdamW(g, lr, fused=True),
    "decoupled adam": lambda g, lr: torch.optim.Adam(g, lr, decoupled_weight_decay=True),
    "decoupled nadam": lambda g, lr: torch.optim.NAdam(g, lr, decoupled_weight_decay=True),
    "decoupled radam": lambda g, lr: torch.optim.RAdam(g, lr, decoupled_weight_decay=True),
    "muon": lambda g, lr: torch.optim.Muon(g, float(lr)),
    "adafactor": lambda g, lr: torch.optim.Adafactor(g, lr),
}
# Those in which it is a part of a gradient that is normalised.
SCALE_FREE: dict[str, Maker] = {
    "adam": lambda g, lr: torch.optim.Adam(g, lr),
    "nadam": lambda g, lr: torch.optim.NAdam(g, lr),
    "radam": lambda g, lr: torch.optim.RAdam(g, lr),
    "adamax": lambda g, lr: torch.optim.Adamax(g, lr),
    "adagrad": lambda g, lr: torch.optim.Adagrad(g, lr),
    "adadelta": lambda g, lr: torch.optim.Adadelta(g, lr),
    "rmsprop": lambda g, lr: torch.optim.RMSprop(g, lr),
}
LAWS: list[Any] = [1.0, 0.5, 0, "graphcore", "none", lambda d: 3 - 2 * d]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Adafactor keeps state:mst_compile.MSTWarning", "ignore:no graph compiled:mst_compile.MSTWarning"
)


def single(schedule: Schedule, block: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(nn.Linear(24, 16, bias=False), schedule, block=block, guard="none")


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", BY_RATE)
@given(
    sparsities=st.lists(st.floats(0.0, 0.9), min_size=2, max_size=8),
    block=st.sampled_from([1, 4]),
    law=st.sampled_from(LAWS),
    by_tensor=st.booleans(),
    own_group=st.booleans(),
)
@settings(max_examples=12)
def test_the_decay_over_a_run_is_the_dense_models(
    maker: str, sparsities: list[float], block: int, law: Any, by_tensor: bool, own_group: bool
) -> None:
    """Without gradients a weight that is never dropped is multiplied by 1 - lr * weight_decay at each step, and by
    nothing else; a scheduler moves lr."""
    model = single(Path(sparsities), block)
    groups = param_groups(model, weight_decay=WEIGHT_DECAY, density_rate=law)
    if own_group:
        groups = [{"params": [model.weight], "weight_decay": WEIGHT_DECAY, "density_rate": law}]
    optimizer = BY_RATE[maker](groups, torch.tensor(0.1) if by_tensor else 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    kept, first, product = element_masks(model)["weight"], model.weight.detach().double(), 1.0
    for step in range(len(sparsities)):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        scheduler.step()
        kept = kept & element_masks(model)["weight"]
        product *= 1 - 0.1 / (1 + step) * WEIGHT_DECAY
    exact = (first * product)[kept]
    allowed = of_rounding(torch.float32, times=4 * len(sparsities)) * first.abs()[kept]
    assert_within(model.weight.detach()[kept], exact, allowed)


@pytest.mark.parametrize("maker", BY_RATE)
def test_it_is_not_where_decay_follows_the_rate(maker: str) -> None:
    """The same at one density, with the law that was the only one once: it decays faster by what the rate is."""
    model = single(Constant(0.75, growth="none"))
    optimizer = BY_RATE[maker](param_groups(model, weight_decay=WEIGHT_DECAY, density_decay=0), 0.1)
    first, kept, density = model.weight.detach().double(), element_masks(model)["weight"], sparsifier(model).density
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    exact = first * (1 - 0.1 / density * WEIGHT_DECAY)
    assert_within(model.weight.detach()[kept], exact[kept], of_rounding(torch.float32, times=8) * first.abs()[kept])


def seen_in_steps(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    """Learning rate and weight decay of the first group, as each step to come finds them."""
    found: list[tuple[float, float]] = []
    group = optimizer.param_groups[0]
    optimizer.register_step_pre_hook(lambda *_: found.append((float(group["lr"]), float(group["weight_decay"]))))
    return found


@pytest.mark.parametrize("maker", SCALE_FREE)
def test_l2_that_is_normalised_stays(maker: str) -> None:
    model = single(Constant(0.75, growth="none"))
    optimizer = SCALE_FREE[maker](param_groups(model, weight_decay=WEIGHT_DECAY), 0.125)
    seen = seen_in_steps(optimizer)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    ((rate, decay),) = seen
    assert rate == pytest.approx(0.125 / sparsifier(model).density)
    assert decay == WEIGHT_DECAY
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.125, WEIGHT_DECAY)


class Outer(torch.optim.Optimizer):
    """Lets another optimizer step, on the same groups."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


@pytest.mark.parametrize("maker", ["adam", "decoupled adam", "nadam", "decoupled nadam", "sgd"])
def test_who_steps_for_another_is_known_by_its_groups(maker: str) -> None:
    seen = []
    for wrap in (lambda o: o, Outer):
        model = single(Constant(0.75, growth="none"))
        inner = {**BY_RATE, **SCALE_FREE}[maker](param_groups(model, weight_decay=WEIGHT_DECAY), 0.125)
        optimizer = wrap(inner)
        found = seen_in_steps(inner)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        seen.append(found)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("maker", ["sgd", "adamw", "adam", "rmsprop", "decoupled nadam"])
@pytest.mark.parametrize("decay", [0, 1, -0.5, "graphcore", lambda d: d * d])
def test_a_law_of_its_own_multiplies_the_decay_in_any_optimizer(maker: str, decay: Any) -> None:
    model = single(Constant(0.75, growth="none"))
    make = {**BY_RATE, **SCALE_FREE}[maker]
    optimizer = make(param_groups(model, weight_decay=WEIGHT_DECAY, density_decay=decay), 0.125)
    seen = seen_in_steps(optimizer)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    d = sparsifier(model).density
    s = 1 - d
    by = math.exp(1.969 * s * s + 0.2905 * s) if decay == "graphcore" else decay(d) if callable(decay) else d**-decay
    assert seen == [(pytest.approx(0.125 / d), pytest.approx(WEIGHT_DECAY * by))]


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("law", LAWS)
def test_a_run_is_the_one_whose_groups_are_set_by_hand(law: Any, by_tensor: bool) -> None:
    """Bit for bit, gradients, events, scheduler and all."""
    factors = {
        "graphcore": lambda d: math.exp(1.969 * (1 - d) ** 2 + 0.2905 * (1 - d)),
        "none": lambda d: 1.0,
    }
    by = law if callable(law) else factors.get(law, lambda d: d**-law)
    runs = [fresh(restored()), fresh(restored())]
    lr = torch.tensor(1e-2) if by_tensor else 1e-2
    optimizers = []
    for model, own in zip(runs, (law, 0), strict=True):
        groups = param_groups(model, weight_decay=WEIGHT_DECAY, density_rate=own, density_decay="independent")
        optimizers.append(torch.optim.AdamW(groups, lr, foreach=False, fused=False))
    for step, x in enumerate(batches(20)):
        rate = 1e-2 / (1 + step)
        for model, optimizer, by_hand in zip(runs, optimizers, (False, True), strict=True):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(rate) if by_tensor else rate
                if by_hand and "density_rate" in group:
                    inside = {id(p) for p in group["params"]}
                    sparse = [w for n, w in sparsifier(model).weights.items() if id(model.get_parameter(n)) in inside]
                    scale = by(sum(w.active for w in sparse) / sum(w.numel for w in sparse))
                    group["lr"] = group["lr"] * scale
                    group["weight_decay"] = WEIGHT_DECAY * (1.0 / scale)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in runs), strict=True):
        assert torch.equal(p, q)


def test_a_group_across_layers_takes_the_mean_density() -> None:
    model = sparsify(Blocks(), Constant(0.75, growth="none"))
    weights = [model.get_parameter(name) for name in sparsifier(model).weights]
    group = {"params": weights, "weight_decay": WEIGHT_DECAY, "density_rate": "graphcore"}
    optimizer = torch.optim.AdamW([group], 0.125)
    seen = seen_in_steps(optimizer)
    loss_of(model, torch.randn(4, 32)).backward()
    optimizer.step()
    s = 1 - sparsifier(model).density
    scale = math.exp(1.969 * s * s + 0.2905 * s)
    assert seen == [(pytest.approx(0.125 * scale), pytest.approx(WEIGHT_DECAY / scale))]


def test_a_group_without_sparse_weights_is_as_it_was() -> None:
    model = fresh(restored())
    asked: list[float] = []
    vectors = [p for p in model.parameters() if p.dim() == 1]
    weights = [p for p in model.parameters() if p.dim() == 2]
    optimizer = torch.optim.AdamW(
        [{"params": vectors, "density_rate": lambda d: asked.append(d) or 2.0}, {"params": weights}], 0.125
    )
    seen = seen_in_steps(optimizer)
    train(model, optimizer, "none", batches(3))
    assert seen == [(0.125, 0.01)] * 3
    assert not asked


def test_the_guides_numbers_as_a_hook_of_ones_own_reads_them() -> None:
    """Groups of one's own, each with its laws; the optimizer's own decay reaches no group of ``param_groups``."""
    models = [single(Path([0.8])) for _ in range(4)]
    laws: Groups = [
        {"density_rate": 1.0},
        {"density_rate": "graphcore"},
        {"density_rate": "graphcore", "density_decay": "none"},
        {},
    ]
    groups = [{"params": [m.weight], "weight_decay": 0.1, **own} for m, own in zip(models, laws, strict=True)]
    optimizer, seen = torch.optim.AdamW(groups, 1e-3), []
    optimizer.register_step_pre_hook(
        lambda own, *_: seen.extend((g["lr"], g["weight_decay"]) for g in own.param_groups)
    )
    for model in models:
        model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    d = sparsifier(models[0]).density
    fit = math.exp(1.969 * (1 - d) ** 2 + 0.2905 * (1 - d))
    want = [(1e-3 / d, 0.1 * d), (1e-3 * fit, 0.1 / fit), (1e-3 * fit, 0.1), (1e-3, 0.1)]
    assert seen == [pytest.approx(pair) for pair in want]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(1e-3, 0.1)] * 4
    given = torch.optim.AdamW(param_groups(models[0]), 1e-3, weight_decay=0.1)
    assert {group["weight_decay"] for group in given.param_groups} == {0.0}


def test_a_function_is_asked_at_every_step_dense_ones_too() -> None:
    model, asked = fresh(restored()), list[float]()
    optimizer = torch.optim.AdamW(param_groups(model, density_rate=lambda d: asked.append(d) or 2.0), 0.125)
    seen, densities = seen_in_steps(optimizer), []
    for x in batches(20):
        densities.append(sparsifier(model).density)
        train(model, optimizer, "none", iter([x]))
    assert [rate for rate, _ in seen] == [0.25] * 20
    assert asked == pytest.approx(densities)
    assert {asked[0], asked[-1]} == {1.0}


# -- what is refused ---------------------------------------------------------------------------------------------------


def raising(density: float) -> float:
    raise RuntimeError("no idea")


@pytest.mark.parametrize("key", ["density_rate", "density_decay"])
@pytest.mark.parametrize("law", ["SµPar", math.nan, True, [1.0], lambda d: -1.0, lambda d: "1", lambda d: math.nan])
def test_a_law_that_is_none_changes_nothing(key: str, law: Any) -> None:
    """Refused before any group has changed, the first of which was right."""
    model = fresh(restored())
    rest = list(model.parameters())
    first = next(p for p in rest if p.dim() == 2)
    rest = [p for p in rest if p is not first]
    groups = [{"params": [first], "density_rate": 1.0}, {"params": rest, "weight_decay": 0.1, key: law}]
    optimizer, before = torch.optim.SGD(groups, 0.125), [p.detach().clone() for p in model.parameters()]
    loss_of(model, torch.randn(4, 32)).backward()
    with pytest.raises(ArgumentError, match=key):
        optimizer.step()
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.125, 0), (0.125, 0.1)]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert sparsifier(model).step_count == 0


def test_the_error_of_a_function_is_its_own() -> None:
    model = fresh(restored())
    optimizer = torch.optim.SGD(param_groups(model, density_rate=raising), 0.125)
    loss_of(model, torch.randn(4, 32)).backward()
    with pytest.raises(RuntimeError, match="no idea"):
        optimizer.step()
    assert {g["lr"] for g in optimizer.param_groups} == {0.125}


@pytest.mark.parametrize("law", ["independent of all", -1.0, None, True, "1"])
def test_arguments_are_checked(law: Any) -> None:
    with pytest.raises(MSTError, match="density_rate"):
        param_groups(fresh(restored()), density_rate=law)
    if law != -1.0:
        with pytest.raises(MSTError, match="density_decay"):
            param_groups(fresh(restored()), density_decay=law)


def test_a_rate_that_is_no_number_is_named() -> None:
    model = fresh(Constant(0.75, growth="none"))
    optimizer = torch.optim.SGD(param_groups(model), 0.125)
    optimizer.param_groups[0]["lr"] = None
    loss_of(model, torch.randn(4, 32)).backward()
    with pytest.raises(ArgumentError, match=r"multiplies its lr, which is None"):
        optimizer.step()


# -- compiled steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("maker", [torch.optim.AdamW, torch.optim.SGD])
def test_a_compiled_step_is_compiled_twice_at_most(maker: Any, by_tensor: bool) -> None:
    """However often the density changes: Dynamo takes a float that has changed once for one that may be anything."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(1)
        return graph.forward

    def build(capturable: bool) -> tuple[nn.Linear, torch.optim.Optimizer]:
        model = single(Path([0.0, 0.1, 0.3, 0.5, 0.8, 0.9, 0.7, 0.6, 0.4, 0.2, 0.0]))
        lr = torch.tensor(1e-2) if capturable else 1e-2
        return model, maker(param_groups(model, weight_decay=WEIGHT_DECAY), lr, foreach=False)

    (model, optimizer), (eager, plain) = build(by_tensor), build(by_tensor)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(11):
        for own, take in ((model, step), (eager, plain.step)):
            own.weight.grad = torch.randn(own.weight.shape, generator=torch.Generator().manual_seed(i))
            take()
    assert len(graphs) <= 2
    assert_within(
        model.weight.detach(),
        eager.weight.detach().double(),
        of_rounding(torch.float32, times=8 * 11) * eager.weight.detach().abs().max().double().expand(16, 24),
    )
