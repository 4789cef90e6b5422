"""FLOPs: formulas for PyTorch's counter against arithmetic, and what a compiled model and a run come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Blocks, compiled
from mask_cases import index_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from training import batches, loss_of

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.cost.flops import CompiledFlopCounter, Meter, dense_linear_training
from mst_compile.rules.patterns import PATTERNS, allowed

ROWS = 16


def count(run: Any, mode: type[FlopCounterMode] = FlopCounterMode) -> int:
    counter = mode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense_grad", [False, True])
def test_products_count_active_elements(transposed: bool, dense_grad: bool) -> None:
    """Ragged edges by their elements: 19 x 13 in blocks of 8 has 3 x 2 blocks."""
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    active = 8 * 8 + 8 * 5 + 3 * 8 + 3 * 5
    index = index_of(mask, 19, 13, 8, dense_grad=dense_grad)
    weight, bias = torch.randn(19, 13), torch.randn(13 if transposed else 19)
    x = torch.randn(2, 7, 19 if transposed else 13)
    grad = torch.randn(2, 7, 13 if transposed else 19)
    mst = torch.ops.mst
    assert count(lambda: mst.linear(x, weight, bias, index, 8, transposed)) == 2 * 14 * active
    assert count(lambda: mst.linear_grad_input(grad, weight, index, 8, transposed)) == 2 * 14 * active
    by_weight = count(lambda: mst.linear_grad_weight(grad, x, index, 8, transposed, torch.float32, True))
    assert by_weight == 2 * 14 * (19 * 13 if dense_grad else active)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dense_grad", [False, True])
def test_grouped_products_count_rows_of_groups_and_active_elements(transposed: bool, dense_grad: bool) -> None:
    """Of 9 rows 5, 0 and 2 are of matrices with 64 active elements, all and 64; two are of none."""
    masks = [torch.eye(2, 3).bool(), torch.ones(2, 3).bool(), torch.eye(2, 3).bool()]
    index = torch.stack([index_of(mask, 16, 19, 8, dense_grad=dense_grad) for mask in masks])
    active, offsets = 128, torch.tensor([5, 5, 7])
    weight = torch.randn(3, 16, 19)
    x, grad = torch.randn(9, 16 if transposed else 19), torch.randn(9, 19 if transposed else 16)
    mst, given = torch.ops.mst, (offsets, index, 8, transposed)
    assert count(lambda: mst.grouped_linear(x, weight, *given)) == 2 * 7 * active
    assert count(lambda: mst.grouped_linear_grad_input(grad, weight, *given)) == 2 * 7 * active
    by_weight = count(lambda: mst.grouped_linear_grad_weight(grad, x, *given, torch.float32))
    assert by_weight == 2 * 7 * (16 * 19 if dense_grad else active)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, weight, offsets, index)]
        assert count(lambda: mst.grouped_linear(*fakes, 8, transposed)) == 2 * 9 * 16 * 19, "all, where none are known"


def test_dense_grouped_products_count_the_rows_of_groups() -> None:
    """PyTorch's own and that of transformers, which its counter leaves out, forward and backward."""
    pytest.importorskip("transformers.integrations.moe")
    x, weight = torch.randn(9, 16, requires_grad=True), torch.randn(3, 16, 8, requires_grad=True)
    offsets = torch.tensor([5, 5, 7], dtype=torch.int32)
    for run in (
        lambda: torch._grouped_mm(x, weight, offs=offsets),
        lambda: torch.ops.transformers.grouped_mm_fallback(x, weight, offsets),
    ):
        total = count(lambda run=run: (run() * torch.randn(9, 8)).sum().backward(), CompiledFlopCounter)
        assert total == 3 * 2 * 7 * 16 * 8
    batched = count(lambda: torch._grouped_mm(torch.randn(3, 4, 16), weight), CompiledFlopCounter)
    assert batched == 2 * 3 * 4 * 16 * 8


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_counts_the_patterns_pairs(pattern: str) -> None:
    """All pairs where attention is full: it stands in for PyTorch's own, which counts so."""
    q, k, v = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 5)
    parts = PATTERNS[pattern].parts(12, 8)
    pairs = 40 * 40 if pattern == "full" else int(allowed(parts, 40).sum())
    call = (q, k, v, None, parts.numbers, 0.3)
    assert count(lambda: torch.ops.mst.attention(*call)) == 2 * (2 * 4) * pairs * (8 + 5)
    out, lse = torch.ops.mst.attention(*call)
    backward = (out, q, k, v, out, lse, *call[3:])
    assert count(lambda: torch.ops.mst.attention_backward(*backward)) == 2 * (2 * 4) * pairs * (3 * 8 + 2 * 5)


@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.7])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_compiled_model_counts_what_its_kernels_do(inner: str, sparsity: float, dense_grad: bool) -> None:
    """Density 1 gives exactly the dense model's total; ``Meter`` says the same of a step as PyTorch's counter.

    The second count is of a graph that is compiled already."""
    x = next(batches()).requires_grad_()  # so that the first layer has a grad-input too
    model = Blocks()
    dense = count(lambda: loss_of(model, x).backward())
    sparsify(model, Constant(sparsity, growth="none"))
    for weight in sparsifier(model).weights.values():
        weight.set_dense_grad(dense_grad)
    meter = Meter(model, ROWS)
    meter.step()
    run = compiled(model, inner)
    for _ in range(2):
        counted = count(lambda: loss_of(run, x).backward(), CompiledFlopCounter)
        assert counted == meter.flops
        assert (counted == dense) == (sparsity == 0.0)


def test_a_compiled_model_counts_the_pairs_of_its_pattern() -> None:
    """Query, key and value are the same tensor: of an attention and its gradient nothing else is counted."""
    schedule = Constant(0.5, growth="none", attention="sparse", stride=8, span=4)
    model = sparsify(SelfAttention(), schedule)
    x = torch.randn(2, 4, 40, 64, requires_grad=True)
    counter = CompiledFlopCounter(display=False)
    with counter:
        compiled(model)(x).square().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    pairs = int(allowed(PATTERNS["sparse"].parts(4, 8), 40).sum())
    assert counts[torch.ops.mst.attention] == 2 * 2 * (2 * 4) * pairs * 64
    assert counts[torch.ops.mst.attention_backward] == 5 * 2 * (2 * 4) * pairs * 64


class SelfAttention(nn.Module):
    """Attention after a layer that can be sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)


def test_under_pytorchs_own_counter_a_compiled_model_runs_dense() -> None:
    """Why there is another counter; should this fail one day, there need be none."""
    model, x = sparsify(Blocks(), Constant(0.7, growth="none")), next(batches())
    run = compiled(model)
    sparse = count(lambda: run(x), CompiledFlopCounter)
    assert count(lambda: run(x), CompiledFlopCounter) == sparse  # this one leaves what is compiled as it is
    assert count(lambda: run(x)) == count(lambda: model(x)) > sparse


def test_an_index_without_data_counts_as_dense() -> None:
    """As in a graph that is only traced."""
    real = index_of(torch.eye(3, 2, dtype=torch.bool), 24, 16, 8)
    mode = FakeTensorMode()
    x, weight, index = (mode.from_tensor(t) for t in (torch.randn(6, 16), torch.randn(24, 16), real))
    assert count(lambda: torch.ops.mst.linear(x, weight, None, index, 8, False)) == 2 * 6 * 24 * 16


def test_a_counter_can_be_used_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counter, x = CompiledFlopCounter(), torch.randn(4, 4)
    monkeypatch.setattr(counter, "get_table", lambda depth: f"{counter.get_total_flops()} FLOPs")  # needs tabulate
    for _ in range(2):
        with counter:
            x @ x
        assert capsys.readouterr().out == "128 FLOPs\n"
    x @ x
    assert counter.get_total_flops() == 128


def test_a_meter_of_a_plain_model_counts_its_linear_layers() -> None:
    """A dense baseline; frozen weights have no grad-weight, tied ones count once, both as layers of PyTorch's."""
    model = Blocks()
    model.layers[0][1].weight.requires_grad_(False)
    meter = Meter(model, 10)
    meter.step()
    meter.step()
    weights = [p for p in model.parameters() if p.dim() == 2]
    assert meter.flops == 2 * 10 * sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
    assert dense_linear_training(sparsify(model, Constant(0.5, growth="none"), exclude="layers.0.*")) == sum(
        (6 if p.requires_grad else 4) * p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "s.0" in n
    )


def test_conv1d_is_a_linear_layer() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(16, 32), conv1d(24, 32))
    assert dense_linear_training(sparsify(model, Constant(0.5, growth="none"), exclude="1.*")) == 6 * 24 * 32
