"""Bad arguments of every public function, as a table of calls."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import nn

import mst_compile
from mst_compile import Constant, MixedSparsity, Override, Schedule, recipes, sparsifier, sparsify
from mst_compile.communication import ActiveBlocks, check_ranks, reduce_active_blocks
from mst_compile.flops import Meter, attention_saving, dense_linear_training, linear_training
from mst_compile.schedule import SET, Attention, GradualPruning, Growth, Mixed, NoGrowth, Parts, Pattern, RigL

SPARSE = Constant(0.7, growth="none")
NAN, INF = math.nan, math.inf


@dataclass
class Bench:
    """What calls are made on: a plain model, a sparse one, and the optimizer of that."""

    plain: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def own(self) -> mst_compile.Sparsifier:
        return sparsifier(self.model)


Call = Callable[[Bench, Any], Any]
NO_WHOLE = [2.5, 8.0, "10", True, NAN, INF, [3], np.float64(3.0), np.bool_(True), torch.tensor(3.0), torch.tensor([3])]
NO_STEPS = [0, -3, 2**63, None, *NO_WHOLE]
NO_SHARE = [-0.1, 1.1, NAN, INF, -INF, True, "0.5", None, [0.5], 0.5j, Decimal("0.5"), torch.tensor([0.5])]
NO_SPARSITY = [1.0, 90, *NO_SHARE]
NO_FLAG = [0, 1, "no", None, [], torch.tensor(True)]
NO_MODEL = [5, None, "model", nn.Linear, {}, [nn.Linear(8, 8)]]
NO_NUMBER = [-0.1, NAN, INF, -INF, True, "0.1", None, [0.1], torch.tensor([0.1]), 10**400]
BAD: list[tuple[str, Call, list[Any]]] = []


def bad(what: str, call: Call, values: list[Any]) -> None:
    """Calls that must be refused, each with one of ``values``, in a message that has ``what`` and the value."""
    BAD.append((what, call, values))


# -- schedules ---------------------------------------------------------------------------------------------------------

bad("total_steps", lambda b, v: MixedSparsity(v), NO_STEPS)
bad("sparsity", lambda b, v: MixedSparsity(100, v), NO_SPARSITY)
bad("sparsity", lambda b, v: MixedSparsity.published(100, v), [1.0, NAN])
bad("sparsity", lambda b, v: Constant(v), NO_SPARSITY)
bad("magnitude", lambda b, v: Constant(0.5, magnitude=v), ["l0", "L1", 1, None, True])
bad("magnitude", lambda b, v: MixedSparsity(100, magnitude=v), ["l0", 2, None])
bad("events", lambda b, v: Constant(0.5, total_steps=100, events=v), [v for v in NO_STEPS if v is not None] + [76])
bad("until", lambda b, v: Constant(0.5, total_steps=100, until=v), NO_SHARE)
bad("anneal", lambda b, v: Constant(0.5, total_steps=100, anneal=v), ["linear", None, True, 0])
bad("total_steps", lambda b, v: Constant(0.5, anneal=v), ["none"])
bad("total_steps", lambda b, v: GradualPruning(v), NO_STEPS)
for _name in ("sparsity", "initial_sparsity"):
    bad(_name, lambda b, v, n=_name: GradualPruning(100, **{n: v}), NO_SPARSITY)
for _name in ("start", "end"):
    bad(_name, lambda b, v, n=_name: GradualPruning(100, **{n: v}), [-1, -0.5, 1.5, 101, True, "10", None, NAN])
bad("interval", lambda b, v: GradualPruning(100, interval=v), [v for v in NO_STEPS if v is not None])
bad("drop_fraction", lambda b, v: GradualPruning(100, drop_fraction=v), NO_SHARE)
bad("total_steps", lambda b, v: recipes.dynsparse(v), NO_STEPS)
bad("total_steps", lambda b, v: recipes.granet(v), NO_STEPS)
bad("total_steps", lambda b, v: recipes.sparse_then_dense(v), NO_STEPS)
bad("sparsity", lambda b, v: recipes.sparse_evolutionary(v), NO_SPARSITY)
bad("interval", lambda b, v: Constant(0.5, interval=v), NO_STEPS)
bad("drop_fraction", lambda b, v: Constant(0.5, drop_fraction=v), NO_SHARE)
bad("gradient_share", lambda b, v: Constant(0.5, gradient_share=v), NO_SHARE)
bad("gradient_steps", lambda b, v: MixedSparsity(100, gradient_steps=v), [0, -1, 1.0, True, None, NAN])
for _name in ("warmup", "restoration", "settle"):
    bad(_name, lambda b, v, n=_name: MixedSparsity(100, **{n: v}), [-1, -0.1, 1.5, NAN, INF, True, "x", None, 2**63])
for _kind in (functools.partial(MixedSparsity, 100), functools.partial(Constant, 0.5)):
    bad("growth", lambda b, v, k=_kind: k(growth=v), ["fast", "", None, 3, SET, ["mixed"], np.array(["a", "b"])])
    bad("distribution", lambda b, v, k=_kind: k(distribution=v), ["even", None, ["uniform"], torch.tensor([1, 2])])
    bad("stride", lambda b, v, k=_kind: k(stride=v), [0, -1, 1.5, True, None, NAN])
    bad("span", lambda b, v, k=_kind: k(span=v), [0, 1.5, True, "4"])
    bad("attention", lambda b, v, k=_kind: k(attention=v), ["round", "", None, 3, ["local"], torch.tensor([1, 2])])
    bad("attention_window", lambda b, v, k=_kind: k(attention="local", attention_window=v), [
        5, "all", (1,), (1, 2, 3), (NAN, 5), (0, NAN), (0, INF), (True, 5), (-1, 5), (0, "5"), (9, 3), (7, 7),
        (0, 2**63),
    ])  # fmt: skip
bad("attention_window", lambda b, v: MixedSparsity(1000, attention="local", attention_window=v), [
    (0.5001, 0.5004), (0.9, 100), (1000, 2000), (1.0, 1.0), (0.5, 1.5),
])  # fmt: skip
bad("attention_window", lambda b, v: MixedSparsity(1000, attention_window=v), [(0.5001, 0.5004), (0.9, 100)])
bad("restoration_ramp", lambda b, v: MixedSparsity(100, restoration_ramp=v), ["late", None, ["early"]])
for _method in (
    "sparsity_at",
    "drop_fraction_at",
    "is_topology_event",
    "attention_at",
    "wants_gradient_after",
    "phases",
):
    bad("step", lambda b, v, m=_method: getattr(MixedSparsity(100), m)(v), ["3", NAN, True, None, torch.tensor([1, 2])])
    bad("step", lambda b, v, m=_method: getattr(Constant(0.5), m)(v), [2.5, "3"])
bad("share", lambda b, v: Mixed(v), NO_SHARE)
bad("gradient_steps", lambda b, v: RigL(gradient_steps=v), NO_STEPS)


def grow(rule: Growth, **changes: Any) -> Any:
    inactive = torch.ones(2, 3, dtype=torch.bool)
    given = {"inactive": inactive, "count": 2, "gradient": torch.ones(2, 3), "generator": torch.Generator("cpu")}
    return rule.grow(**{**given, **changes})


for _rule in (NoGrowth(), SET(), Mixed(), RigL()):
    bad("count", lambda b, v, r=_rule: grow(r, count=v), [-1, 7, 1.5, True])
    bad("inactive", lambda b, v, r=_rule: grow(r, inactive=v), [5, [True]])
    bad("generator", lambda b, v, r=_rule: grow(r, generator=v), [0, None])
bad("gradient", lambda b, v: grow(Mixed(), gradient=v), [5, torch.ones(3)])
bad("stride", lambda b, v: Attention("local", stride=v), NO_STEPS)
bad("window", lambda b, v: Attention("local", window=v), [0, -1, 1.5, True, "4"])
bad(
    "attention_window", lambda b, v: Attention("local", start=v[0], end=v[1]), [(NAN, 1), (True, 2), (3, 1), (0.2, "x")]
)
for _name in ("window", "chunk", "first", "step", "summary"):
    bad(_name, lambda b, v, n=_name: Parts(**{"window": 4, n: v}), [-1, 1.5, True, None, NAN, 2**63])


class Named(Pattern):
    """A pattern whose name and parts are given."""

    def __init__(self, name: Any, parts: Any) -> None:
        self._name, self._parts = name, parts

    @property
    def name(self) -> str:
        return self._name

    def parts(self, window: int, stride: int) -> Parts:
        return self._parts


bad("name", lambda b, v: Attention(Named(v, Parts(4))), ["", None, 3, b"x"])
bad("parts", lambda b, v: Attention(Named("own", v)), [None, (4, 0, 0, 0, 0), 5])
bad("stride", lambda b, v: Attention("sparse", stride=v), [0, "8"])


class Own:
    """A schedule by its methods alone."""

    def __init__(self, **changes: Any) -> None:
        self.max_sparsity: Any = 0.5
        self.first: Any = 0.5
        self.event: Any = False
        self.__dict__.update(changes)

    def sparsity_at(self, step: int) -> float:
        return self.first

    def is_topology_event(self, step: int) -> bool:
        return self.event


class Derived(Own, Schedule):
    """The same, derived from the base class."""


for _own in (Own, Derived):
    _try: Any = lambda b, v, name, kind: sparsify(b.plain, kind(**{name: v}))  # noqa: E731
    for _name, _values in {
        "max_sparsity": [1.0, NAN, -0.5, 1.5, "0.5", True],
        "min_sparsity": [1.0, NAN, -0.5, None],
        "growth": ["fast", None, 5, SET],
        "gradient_share": [2, NAN],
        "gradient_steps": [0, 1.5, True],
        "distribution": ["even", None],
        "attention": ["round", None],
        "attention_window": [5, (0.1, 0.2), (5, 3)],
        "stride": [0, 1.5],
        "sparsity_at": [5, 0.5],
        "drop_fraction_at": [0.5],
        "attention_steps": [(1, 2)],
    }.items():
        bad(_name, functools.partial(_try, name=_name, kind=_own), _values)
    bad(
        "sparsity_at(0)",
        functools.partial(_try, name="first", kind=_own),
        [NAN, -0.1, 1.0, 1.5, "0.5", None, 0.75, True],
    )
    bad("is_topology_event(1)", functools.partial(_try, name="event", kind=_own), ["no", 2.5])


def rule(name: str, value: Any) -> Growth:
    """A growth rule of one's own with one attribute given."""
    return type("Own", (SET,), {name: value})()


bad("moves", lambda b, v: Constant(0.5, growth=rule("moves", v)), [0, "no", None])
bad("gradient_steps", lambda b, v: Constant(0.5, growth=rule("gradient_steps", v)), [-1, 1.5, True, None])

# -- sparsify and what works on its result -----------------------------------------------------------------------------

bad("sparsify", lambda b, v: sparsify(v, SPARSE), NO_MODEL)
bad("schedule", lambda b, v: sparsify(b.plain, v), [0.9, "mixed", None, MixedSparsity, [SPARSE], {}])
bad("block", lambda b, v: sparsify(b.plain, SPARSE, block=v), [
    0, -8, 3, 256, 8.0, "8", True, NAN, [8], np.float32(8), torch.tensor(8.0), torch.tensor([8]), 2**70, "",
])  # fmt: skip
for _name in ("include", "exclude"):
    bad(_name, lambda b, v, n=_name: sparsify(b.plain, SPARSE, **{n: v}), [
        5, 2.5, True, "", [], [""], [3], [None], b"layers.*", {}, {"layers.*": 1}, torch.zeros(2), "nowhere.*",
    ])  # fmt: skip
bad("override", lambda b, v: sparsify(b.plain, SPARSE, overrides=v), [
    [("*", Override(0.5))], "layers.*", 5, {"layers.*": 0.5}, {3: Override(0.5)}, {"": Override(0.5)},
])  # fmt: skip
bad("sparsity", lambda b, v: Override(sparsity=v), [v for v in NO_SPARSITY if v is not None])
bad("block", lambda b, v: Override(block=v), [0, 3, 256, 8.0, True, "8"])
bad("guard", lambda b, v: sparsify(b.plain, SPARSE, guard=v), ["", "all", None, True, ["none"], torch.tensor([1, 2])])
bad("masks", lambda b, v: sparsify(b.plain, SPARSE, masks=v), ["", "largest", True, 3, ["random"]])
bad("no sparse weight", lambda b, v: sparsify(b.plain, SPARSE, masks={v: None}), ["", "nowhere", 5, None])
bad("mask of layers.0.1.weight", lambda b, v: sparsify(b.plain, SPARSE, masks={"layers.0.1.weight": v}), [
    None, 0.5, "random", [[True]], np.ones((16, 8), bool),
])  # fmt: skip
bad("rescale", lambda b, v: sparsify(b.plain, SPARSE, rescale=v), NO_FLAG)
bad("auto_step", lambda b, v: sparsify(b.plain, SPARSE, auto_step=v), NO_FLAG)
bad("seed", lambda b, v: sparsify(b.plain, SPARSE, seed=v), [2**63, -(2**63) - 1, None, *NO_WHOLE])
for _function in (sparsifier, mst_compile.densify, mst_compile.explain, mst_compile.param_groups, check_ranks):
    bad(_function.__name__, lambda b, v, f=_function: f(v), NO_MODEL)
bad("weight_decay", lambda b, v: mst_compile.param_groups(b.model, weight_decay=v), NO_NUMBER)
bad("density_rate", lambda b, v: mst_compile.param_groups(b.model, density_rate=v), NO_NUMBER)
bad("density_decay", lambda b, v: mst_compile.param_groups(b.model, density_decay=v), NO_NUMBER[1:])
bad("group", lambda b, v: check_ranks(b.model, v), [5, "world"])
bad("reduce_active_blocks", lambda b, v: reduce_active_blocks(v), NO_MODEL)
bad("group", lambda b, v: ActiveBlocks(v), [5, "world"])
bad("bucket", lambda b, v: ActiveBlocks().reduce(v), [5, None])
bad("sparsity", lambda b, v: b.own.densities(v), NO_SPARSITY)
bad(
    "no sparse weight",
    lambda b, v: b.own.apply_mask(v, b.own.masks["layers.0.1.weight"]),
    ["", "nowhere", 5, None, [1]],
)
bad("mask", lambda b, v: b.own.apply_mask("layers.0.1.weight", v), [5, None, [[True]], np.ones((16, 8), bool)])


def masks() -> list[Any]:
    """Tensors that are no mask of 16 x 8 blocks; their message says shape and dtype."""
    return [torch.ones(8, 16, dtype=torch.bool), torch.ones(16, 8), torch.ones(16, 8, dtype=torch.bool, device="meta")]


bad("16, 8", lambda b, v: b.own.apply_mask("layers.0.1.weight", v), masks())
bad("on_event", lambda b, v: b.own.on_event(v), [None, 5, "print", []])

# -- costs -------------------------------------------------------------------------------------------------------------

NO_TOKENS = [0, -10, 0.5, NAN, INF, True, "8", None, [8], 10**400]
bad("Meter", lambda b, v: Meter(v, 8), NO_MODEL)
bad("tokens_per_step", lambda b, v: Meter(b.model, v), NO_TOKENS)
bad("rest", lambda b, v: Meter(b.model, 8, rest=v), [v for v in NO_NUMBER if v is not None])
bad("attention_saved", lambda b, v: Meter(b.model, 8, attention_saved=v), NO_NUMBER)
bad("dense_linear_training", lambda b, v: dense_linear_training(v), NO_MODEL)
bad("weight", lambda b, v: linear_training(v), [5, None, "layers.0.1.weight"])
bad("dense_grad", lambda b, v: linear_training(b.own.weights["layers.0.1.weight"], dense_grad=v), NO_FLAG)
bad(
    "query",
    lambda b, v: attention_saving(v, Parts(4)),
    [5, None, (), (8,), (2, 0, 8), (-1, 4, 8), (2, 4.0, 8), (2, True, 8)],
)
bad("parts", lambda b, v: attention_saving((2, 4, 8), v), [None, 4, (4, 0, 0, 0, 0)])
bad("value_size", lambda b, v: attention_saving((2, 4, 8), Parts(4), v), [-1, 4.0, True, "8", NAN])
_forecast: Any = functools.partial(mst_compile.forecast, tokens=80, tokens_per_step=8)
bad("forecast", lambda b, v: _forecast(v), NO_MODEL)
bad(
    "tokens",
    lambda b, v: mst_compile.forecast(b.model, tokens=v, tokens_per_step=8),
    [v for v in NO_TOKENS if v != 0.5],
)
bad("tokens", lambda b, v: mst_compile.forecast(b.model, tokens=v, tokens_per_step=1), [1e300, 10**30])
bad("tokens_per_step", lambda b, v: mst_compile.forecast(b.model, tokens=80, tokens_per_step=v), NO_TOKENS)
bad("loss", lambda b, v: _forecast(b.model, loss=v), [5, 0.0, "loss", torch.tensor(1.0)])
bad("loss", lambda b, v: _forecast(b.model, loss=lambda: v), [None, 0.5, torch.tensor(1.0)])
bad("optimizer", lambda b, v: _forecast(b.model, optimizer=v), [5, "adam", torch.optim.SGD])
bad("hardware", lambda b, v: _forecast(b.model, hardware=v), ["A100", "h100", "", 5, True])
bad("ranks", lambda b, v: _forecast(b.model, ranks=v, bandwidth=1e9), [0, -1, 1.5, True, "8", None, 3])
bad("bandwidth", lambda b, v: _forecast(b.model, ranks=2, bandwidth=v), [0, -1.0, NAN, "fast", True])
bad("price_per_hour", lambda b, v: _forecast(b.model, price_per_hour=v), [-1, NAN, "3", True])
bad("schedule", lambda b, v: _forecast(b.plain, v), [0.9, "mixed", MixedSparsity])

# -- checkpoints -------------------------------------------------------------------------------------------------------

FIRST = "layers.0.1.weight"


def load(b: Bench, value: Any, key: str, weight: str | None = None) -> None:
    state = b.own.state_dict()
    if weight is None:
        state[key] = value
    else:
        state[key][weight] = value
    b.own.load_state_dict(state)


bad("sparsifier state", lambda b, v: b.own.load_state_dict(v), [5, None, [1, 2], "state", {}])
bad("version", functools.partial(load, key="version"), [True, 99, "2", None])
bad("step", functools.partial(load, key="step"), [-1, 2**63, None, *NO_WHOLE])
bad("seed", functools.partial(load, key="seed"), [2**63, -(2**63) - 1, None, *NO_WHOLE])
for _key in ("masks", "grown", "scores"):
    bad(_key, functools.partial(load, key=_key), [5, None, [1]])
    bad("16, 8", functools.partial(load, key=_key, weight=FIRST), [5, None])
    bad("", functools.partial(load, key=_key, weight="more"), [torch.ones(2, 2, dtype=torch.bool)])
bad("16, 8", functools.partial(load, key="masks", weight=FIRST), masks())
bad("16, 8", functools.partial(load, key="grown", weight=FIRST), masks())
bad("16, 8", functools.partial(load, key="scores", weight=FIRST), [torch.zeros(8, 16), torch.zeros(16, 8).double()])
for _number in (NAN, -1.0, -INF):
    bad(repr(_number), functools.partial(load, key="scores", weight=FIRST), [torch.full((16, 8), _number)])


def resume(b: Bench, value: Any, key: str, at: int | None = None) -> None:
    """Load an optimizer's state dict with one entry changed: replaced, or one of its numbers."""
    state = b.optimizer.state_dict()
    index = [n for n, _ in b.model.named_parameters()].index(FIRST)
    entry = dict(state["state"][index])
    if at is None:
        entry[key] = value
    else:
        entry[key] = entry[key].to(torch.float32).clone()
        entry[key].view(-1)[at] = value
    b.optimizer.load_state_dict({**state, "state": {**state["state"], index: entry}})


for _key in ("mst_topology", "mst_progress", "mst_scores"):
    bad(_key, functools.partial(resume, key=_key), [5, None, [1], "x"])
    bad(_key, functools.partial(resume, key=_key, at=3), [-1.0, 0.5, 256.0, NAN, INF])
bad("mst_topology", functools.partial(resume, key="mst_topology", at=0), [6.0])
# The top byte: a step below 0, or one beyond 64 bits with a sign.
bad("step count", lambda b, v: resume(b, 255.0, "mst_progress", 7), [255 * 2**56 + 2])
for _tensor in (torch.ones(16, dtype=torch.bool), torch.ones(16, device="meta"), torch.ones(16, dtype=torch.complex64)):
    bad(str(_tensor.dtype), functools.partial(resume, key="mst_progress"), [_tensor])


def negative_score(b: Bench, value: float) -> None:
    packed = torch.full((16, 8), value).view(torch.uint8).view(16, 8, 4).movedim(-1, 0).contiguous()
    resume(b, packed, "mst_scores")


bad("mst_scores", negative_score, [NAN, -1.0])
