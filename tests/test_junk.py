"""Whatever is passed for an argument of a public function, no raw error of Python or PyTorch comes back."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Blocks
from torch import nn

import mst_compile
from mst_compile import Constant, MixedSparsity, Override, recipes, sparsifier, sparsify
from mst_compile.communication import ActiveBlocks, check_ranks, reduce_active_blocks
from mst_compile.errors import MSTError
from mst_compile.flops import CompiledFlopCounter, Meter, attention_saving, dense_linear_training, linear_training
from mst_compile.rules.patterns import PATTERNS
from mst_compile.schedule import Attention, GradualPruning, Mixed, Parts, RigL

SPARSE = Constant(0.7, growth="none")


def hostile(**methods: Any) -> Any:
    """An object of a class with such methods."""
    return type("Hostile", (), methods)()


def fail(*_: Any) -> Any:
    raise ZeroDivisionError


SHARED: list[Any] = [
    *[None, True, 0, -1, 3, 2**70, 10**400, 0.5, -0.5, math.nan, math.inf, 1j, NotImplemented, Fraction(1, 2)],
    *[Fraction(10**400), Fraction(-(10**400), 3)],
    *["", "x", b"x", [], [1], (), (1, 2), {}, {"a": 1}, set(), range(3), slice(3), object(), int, nn.Linear],
    *[np.int64(3), np.float32(0.5), np.array([1.0, 2.0]), np.array(None), np.bool_(True)],
    *[torch.tensor(3), torch.tensor(math.nan), torch.ones(2), torch.ones((), device="meta"), torch.float32],
    *[hostile(__repr__=fail), hostile(__eq__=fail, __hash__=None), hostile(__bool__=fail, __len__=fail)],
    *[hostile(__index__=lambda self: "x", __float__=fail, __int__=fail)],
]
JUNK: list[Callable[[], Any]] = [
    *[lambda v=v: v for v in SHARED],
    lambda: nn.Linear(8, 8),
    lambda: iter([]),
    lambda: torch.ones(2).to_sparse(),
]

Doors = dict[str, tuple[Callable[..., Any], dict[str, Any]]]


def doors() -> Doors:
    """What is public, with arguments that it takes."""
    plain, model = Blocks(), sparsify(Blocks(), SPARSE, block=4)
    own = sparsifier(model)
    first, mask = next(iter(own.masks.items()))
    counts = {"tokens": 80, "tokens_per_step": 8}
    options = {"block": 4, "include": "*1*", "exclude": "*3*", "overrides": {}, "guard": "none", "seed": 1}
    options["masks"] = "random"
    flags = {"rescale": True, "auto_step": True}
    asked = {"inactive": mask, "count": 2, "gradient": None, "generator": torch.Generator("cpu")}
    parts = {"candidates": [], "schedule": SPARSE, "seed": 0, "auto_step": True, "skipped": {}}
    found: Doors = {
        "MixedSparsity": (MixedSparsity, {"total_steps": 100}),
        "published": (MixedSparsity.published, {"total_steps": 100, "warmup": 0.1, "attention_window": (1, 5)}),
        "Constant": (Constant, {"sparsity": 0.5}),
        "GradualPruning": (GradualPruning, {"total_steps": 100}),
        "dynsparse": (recipes.dynsparse, {"total_steps": 1000}),
        "granet": (recipes.granet, {"total_steps": 100}),
        "rigl": (recipes.rigl, {"total_steps": 1000}),
        "sparse_evolutionary": (recipes.sparse_evolutionary, {"sparsity": 0.5}),
        "sparse_then_dense": (recipes.sparse_then_dense, {"total_steps": 100}),
        "mixed_sparsity_training": (recipes.mixed_sparsity_training, {"total_steps": 100}),
        "Override": (Override, {}),
        "Attention": (Attention, {}),
        "Parts": (Parts, {"window": 4}),
        "Mixed": (Mixed, {}),
        "RigL": (RigL, {}),
        "grow": (Mixed().grow, asked),
        "sparsify": (sparsify, {"model": plain, "schedule": SPARSE}),
        "sparsify with options": (lambda **a: sparsify(Blocks(), SPARSE, **a), {**options, **flags}),
        "densify": (mst_compile.densify, {"model": None}),
        "explain": (mst_compile.explain, {"model": model}),
        "sparsifier": (sparsifier, {"model": model}),
        "param_groups": (mst_compile.param_groups, {"model": model}),
        "forecast": (mst_compile.forecast, {"model": model, **counts}),
        "forecast of a plain one": (mst_compile.forecast, {"model": plain, "schedule": SPARSE, **counts, **options}),
        "Forecast": (mst_compile.Forecast, {"phases": [], "rest": 0.0, "rates": None, "expressions": {}}),
        "Sparsifier": (mst_compile.Sparsifier, parts),
        "densities": (own.densities, {"sparsity": 0.5}),
        "on_event": (own.on_event, {"callback": print}),
        "apply_mask": (own.apply_mask, {"name": first, "mask": mask}),
        "load_state_dict": (own.load_state_dict, {"state": own.state_dict()}),
        "Meter": (Meter, {"model": model, "tokens_per_step": 8}),
        "attention_saving": (attention_saving, {"query": (2, 4, 8), "parts": Parts(4)}),
        "linear_training": (linear_training, {"weight": own.weights[first]}),
        "dense_linear_training": (dense_linear_training, {"model": model}),
        "CompiledFlopCounter": (CompiledFlopCounter, {}),
        "check_ranks": (check_ranks, {"model": model}),
        "reduce_active_blocks": (reduce_active_blocks, {"model": None}),
        "ActiveBlocks": (ActiveBlocks, {}),
        "reduce": (ActiveBlocks().reduce, {"bucket": None}),
    }
    for method in ("sparsity_at", "drop_fraction_at", "is_topology_event", "attention_at", "phases"):
        for kind in (MixedSparsity, GradualPruning):
            found[f"{kind.__name__} {method}"] = getattr(kind(100), method), {}
    for name, pattern in PATTERNS.items():
        found[f"pattern {name}"] = pattern.parts, {"window": 4, "stride": 4}
    return found


@pytest.mark.filterwarnings("ignore:mods argument is not needed:UserWarning")
@pytest.mark.parametrize("name", doors())
def test_junk_never_raises_a_raw_error(name: str) -> None:
    """It is taken, or refused by an error of ours."""
    function, good = doors()[name]
    signature = inspect.signature(function).parameters.values()
    parameters = {p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | set(good)
    outcomes = []
    for parameter, make in itertools.product(sorted(parameters), JUNK):
        value = make()
        if parameter == "loss" and callable(value):
            continue  # it is called, and what it raises is its own
        outcomes.append(outcome(function, {**good, parameter: value}, parameter))
    assert [found for found in outcomes if found.startswith("raw")] == []
    assert outcomes.count("refused") > len(JUNK) // 2


def outcome(function: Callable[..., Any], arguments: dict[str, Any], parameter: str) -> str:
    try:
        function(**arguments)
    except MSTError:
        return "refused"
    except Exception as error:
        return f"raw {type(error).__name__} with {parameter} of type {type(arguments[parameter]).__name__}: {error}"
    return "taken"
