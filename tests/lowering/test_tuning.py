"""Kernels are tuned for the density that training will mostly run at, each product for its own weight's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from gpu_cases import TUNED
from helpers import static
from mst_compile.lowering import tuning
from pretend_gpu import generate
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache

import mst_compile
from mst_compile.blocks.grid import BlockGrid
from mst_compile.graph import backend


def densities_asked_for(model: nn.Module) -> set[float]:
    """Those that Inductor tunes the products of a model for, on a pretend GPU."""
    asked: set[float] = set()

    def choose(_: str, choices: list[Any]) -> int:
        asked.update(choice.mst_product[2] for choice in choices if hasattr(choice, "mst_product"))
        return 0

    def through_backend(graph_module: Any, examples: Any, inner: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "compile_fx", functools.partial(compile_fx, inner_compile=inner))
            return backend.mst(graph_module, examples, options={"mst.keep_memory": False, "mst.dense_threshold": 1.0})

    generate(model, [torch.randn(4, 256)], choose=choose, backend_wrapper=through_backend, config=TUNED)
    return asked


def test_each_product_is_tuned_for_its_own_weight() -> None:
    """Of two weights on the same grid, and whatever another model with such weights expects."""
    overrides = {"0.*": mst_compile.Override(sparsity=0.5), "1.*": mst_compile.Override(sparsity=0.7)}
    layers = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    model = mst_compile.sparsify(layers, static(0.7), block=32, overrides=overrides)
    other = mst_compile.sparsify(nn.Linear(256, 256), static(0.6), block=32)
    assert densities_asked_for(other) == {0.4}
    assert densities_asked_for(model) == {0.5, 0.3}


def test_code_tuned_for_another_density_is_not_served_from_the_cache() -> None:
    def misses(sparsity: float) -> int:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = mst_compile.sparsify(nn.Linear(64, 64), static(sparsity), block=8)
        torch.compile(model, backend="mst", options={"mst.dense_threshold": 1.0})(torch.ones(2, 64)).sum().backward()
        found = counters["aot_autograd"]
        assert found["autograd_cache_hit"] + found["autograd_cache_miss"] == 1
        return found["autograd_cache_miss"]

    with fresh_cache():
        assert [misses(s) for s in (0.5, 0.5, 0.7, 0.5)] == [1, 0, 1, 0]


def test_a_realistic_index_has_the_density() -> None:
    grid = BlockGrid(1024, 1024, 32)
    index: Tensor = tuning.realistic_index(grid, 0.1, "cpu")
    assert int(index[0]) == pytest.approx(0.1 * grid.blocks, rel=0.2)
    assert index.numel() == grid.index_length
