"""A mixture of experts for a GPU as a whole: which products its stacks get, and when they are sparse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import static
from mst_compile.kernels.triton import table
from mst_compile.lowering import crossover, cuda, device
from pretend_gpu import Interpreter, kernels_of, pretend_h100
from through_backend import through_backend
from torch import Tensor, nn
from transformers.integrations import moe  # noqa: F401 - it registers what is called below

import mst_compile
from mst_compile.blocks.grid import BlockGrid

BF16 = torch.bfloat16
EXPERTS, WIDTH, HIDDEN = 4, 128, 192


class Experts(nn.Module):
    """As transformers routes: tokens sorted by expert, one product for all, its result back in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = (chosen == torch.arange(EXPERTS)[:, None]).sum(1).cumsum(0).int()
        hidden = F.silu(torch.ops.transformers.grouped_mm_fallback(x[order], self.up.mT, ends))
        out = torch.ops.transformers.grouped_mm_fallback(hidden, self.down.mT, ends)
        return x + out[order.argsort()] * share[:, None]


def code(source: str) -> str:
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))


def test_experts_through_the_backend(interpreter: Interpreter) -> None:
    """Forward and backward are our kernels, with what follows fused in, and read the offsets where they are made."""
    model = mst_compile.sparsify(Experts(), static(0.5), block=32, include=["up", "down"], rescale=False)
    made = through_backend(model, torch.randn(50, WIDTH, requires_grad=True))
    forward, backward = (
        [k for k in kernels_of(graph.source) if k.kind == "template" and "arg_OFFSETS" in k.source]
        for graph in (made.forward, made.backward)
    )
    assert len(forward) == 2
    assert sum("arg_DY" in kernel.source for kernel in backward) == 2
    assert sum("arg_W" in kernel.source for kernel in backward) == 2
    if torch.__version__ >= "2.13":
        assert any("silu" in kernel.name for kernel in forward), "the activation is in the kernel's store"
    for graph in made.graphs.values():
        assert "ops.mst" not in code(graph.source)
        for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


class Copied(Experts):
    """As transformers' ``batched_mm`` has it: a copy of the matrix for every token."""

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        hidden = F.silu(torch.bmm(self.up[chosen], x[..., None]))
        return x + torch.bmm(self.down[chosen], hidden).squeeze(-1) * share[:, None]


def test_copies_for_every_token_become_the_same_kernels(interpreter: Interpreter) -> None:
    model = mst_compile.sparsify(Copied(), static(0.5), block=32, include=["up", "down"], rescale=False)
    made = through_backend(model, torch.randn(50, WIDTH, requires_grad=True))
    forward = [k for k in kernels_of(made.forward.source) if k.kind == "template" and "arg_OFFSETS" in k.source]
    assert len(forward) == 2
    for graph in made.graphs.values():
        assert "ops.mst" not in code(graph.source)
        for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


class Loop(nn.Module):
    """One matrix of a stack after the other, each a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, HIDDEN, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x, matrix) for matrix in self.up.unbind()]).sum(0) + F.linear(x, self.up[1])


def test_single_matrices_of_a_stack_are_products_as_others_are(interpreter: Interpreter) -> None:
    """Their operands and indices begin within those of the stack."""
    model = mst_compile.sparsify(Loop(), static(0.5), block=32, include=["up"], rescale=False)
    made = through_backend(model, torch.randn(20, WIDTH))
    assert sum(k.kind == "template" for k in kernels_of(made.forward.source)) >= 1
    for graph in made.graphs.values():
        assert "ops.mst" not in code(graph.source)
        for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


# -- when they are sparse ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    """A pretend GPU on which nothing has been measured."""
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(crossover._kept, "own", {})
    crossover._folder.cache_clear()
    cuda._why_no_kernels.cache_clear()
    with pretend_h100():
        yield
    crossover._folder.cache_clear()
    cuda._why_no_kernels.cache_clear()


def layer(tokens: int, *, stacked: bool = True, trained: bool = True) -> device.Layer:
    grid, told = BlockGrid(4096, 4096, 128), (8, device.GROUPED) if stacked else (1, "")
    return device.Layer(grid, False, tokens, BF16, BF16, False, trained, *told)


@pytest.mark.usefixtures("gpu")
def test_stacks_have_a_crossover_of_their_own() -> None:
    """By the rows of one matrix; the weights beside it keep theirs."""
    grid = BlockGrid(4096, 4096, 128)
    stack, few, weight = device.of("cuda").times([layer(32768), layer(256), layer(32768, stacked=False)], False)
    expected = table.grouped_dense_from(grid, 4096), table.grouped_dense_from(grid, 32), table.dense_from(grid)
    for found, density in zip((stack, few, weight), expected, strict=True):
        assert [t.crossover for t in found.values()] == [pytest.approx(density)] * 3
    assert list(device.of("cuda").times([layer(32768, trained=False)], False)[0]) == ["forward"]


@pytest.mark.usefixtures("gpu")
def test_few_rows_are_dense_at_any_density() -> None:
    (times,) = device.of("cuda").times([layer(8 * 4)], False)
    assert all(t.crossover == 0 and t.saved(0.01) < 0 for t in times.values())


@pytest.mark.usefixtures("gpu")
def test_beside_copies_few_rows_are_sparse() -> None:
    """Whoever copies a matrix for every token reads and writes more than any product computes."""
    few = dataclasses.replace(layer(8 * 4), dense=device.COPIES)
    (times,) = device.of("cuda").times([few], False)
    assert all(t.crossover == math.inf and t.saved(1.0) > 0 for t in times.values())


@pytest.mark.usefixtures("gpu")
def test_what_a_product_takes_grows_with_its_tokens() -> None:
    """A graph is sparse or dense as a whole: a stack of few rows does not outvote what most of the time goes to."""
    few, many = device.of("cuda").times([layer(8 * 16), layer(1 << 16, stacked=False)], False)
    saved = {kind: sum(t.saved(0.2) for t in times.values()) for kind, times in (("few", few), ("many", many))}
    assert saved["few"] < 0 < saved["few"] + saved["many"]


def test_gpus_multiply_stacks() -> None:
    """So that a stack on one gets its index."""
    assert device.of("cuda").multiplies_stacks
    assert not device.of("mps").multiplies_stacks
