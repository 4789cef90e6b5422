"""Layers by name in PyTorch's profiler, and FLOPs of what Inductor's code calls, against arithmetic."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import compiled
from test_flops import count
from torch import Tensor, nn

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.flops import CompiledFlopCounter
from mst_compile.ops import watching

BATCH, LENGTH, HEADS, SIZE = 2, 32, 1, 64
WIDTH, TOKENS = HEADS * SIZE, BATCH * LENGTH
X = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


class Layer(nn.Module):
    """A transformer's layer; all weights are products of tokens, and there is one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (BATCH, LENGTH, HEADS, SIZE)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(x)))


ATTENTION = 2 * BATCH * HEADS * LENGTH**2 * SIZE  # one product over all pairs
DENSE = 6 * TOKENS * 12 * WIDTH**2


def model(sparsity: float, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return sparsify(Layer(), Constant(sparsity, growth="none", **options), block=8)


def step(run: Any) -> None:
    run(X).square().mean().backward()


def test_a_dense_model_under_inductor() -> None:
    """Two products of attention forward, five backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Layer()
    run = torch.compile(plain)
    assert count(lambda: step(plain), CompiledFlopCounter) == DENSE + 7 * ATTENTION
    for _ in range(2):  # compiled under the counter, and again
        assert count(lambda: step(run), CompiledFlopCounter) == DENSE + 7 * ATTENTION


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_a_sparse_model(inner: str) -> None:
    """The same numbers under Inductor and where every operator is dispatched, and names of all three products."""
    own = sparsifier(sparse := model(0.7, attention="full")).weights
    run = torch.compile(sparse, backend="mst", options={"mst.inner": inner, "mst.dense_threshold": 1.0})
    active = 6 * TOKENS * sum(weight.active for weight in own.values())
    for _ in range(2):
        assert count(lambda: step(run), CompiledFlopCounter) == active + 7 * ATTENTION
    with torch.profiler.profile() as profiler:
        step(run)
    seen = Counter(event.name for event in profiler.events() if event.name.startswith("mst::") and " " in event.name)
    for name, weight in own.items():
        for product in ("linear", "linear_grad_input", "linear_grad_weight"):
            assert seen.pop(f"mst::{product} {name} [{watching._shown(2 * TOKENS * weight.active)}]") == 1
    assert all(name.startswith("mst::attention") for name in seen), seen


def test_attention_is_named_after_the_product_before_it() -> None:
    sparse = model(0.5, attention="sparse", stride=8, span=4)
    run = torch.compile(sparse, backend="mst", options={"mst.dense_threshold": 1.0})
    step(run)
    with torch.profiler.profile() as profiler:
        step(run)
    names = [event.name.partition(" [")[0] for event in profiler.events()]
    assert names.count("mst::attention after qkv.weight") == 1
    assert names.count("mst::attention_backward after proj.weight") == 1


def test_the_profiler_compiles_nothing_and_changes_nothing() -> None:
    run = compiled(model(0.7), "inductor")
    step(run)
    with torch.no_grad():
        before = run(X)
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.profiler.profile(), torch.no_grad():
        assert torch.equal(run(X), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations


def test_the_table_needs_nothing_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tabulate", None)  # importing it fails
    with CompiledFlopCounter():
        torch.ones(4, 8) @ torch.ones(8, 2)
        torch.ops.aten.addmm(torch.ones(2), torch.ones(4, 8), torch.ones(8, 2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["aten.mm", "128", "FLOPs", "50.0%"],
        ["aten.addmm", "128", "FLOPs", "50.0%"],
        ["total", "256", "FLOPs", "100.0%"],
    ]


def test_a_counter_with_nothing_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    with CompiledFlopCounter():
        pass
    assert capsys.readouterr().out.split() == ["total", "0", "FLOPs", "0.0%"]
