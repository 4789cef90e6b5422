"""Products with stacks of matrices on the card, forward and backward, each group against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_cases import BLOCKS
from gpu_group_cases import Groups, check_gradients, check_results, groups
from helpers import static
from mst_compile.kernels.triton import tiles
from oracles import assert_same_bits, of_rounding
from torch import Tensor, nn

from mst_compile import sparsifier, sparsify
from mst_compile.blocks.grid import BlockGrid

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Take = Callable[[int], list[int]]
TF32 = 2.0**-10  # the relative error of an operand that a tensor core reads as TF32
DTYPES = ((BF16, "half", False), (F16, "half", False), (F32, "tf32", True), (F32, "ieee", False))
OFFERED = tiles.GROUPED_GEMM, tiles.GROUPED_GRAD_WEIGHT


def every_tile() -> list[Any]:
    """Parameters of a test for each tile; the first of each dtype and block ranks first."""
    found = []
    for block, (dtype, kind, allowed) in itertools.product(BLOCKS, DTYPES):
        for choice in range(max(len(offered[block, kind]) for offered in OFFERED)):
            marks = () if choice else pytest.mark.rank(0)
            name = f"{block}-{dtype}-{kind}-{choice}".replace("torch.", "")
            found.append(pytest.param(block, dtype, allowed, choice, marks=marks, id=name))
    return found


def masks_of(rows: int, cols: int, block: int, matrices: int, density: float | None = None) -> list[Tensor]:
    """Each of another density unless one is given: the first empty, the last full."""
    generator, shape = torch.Generator().manual_seed(1), BlockGrid(rows, cols, block).shape
    each = [e / max(1, matrices - 1) if density is None else density for e in range(matrices)]
    return [torch.rand(shape, generator=generator) < d for d in each]


def run(case: Groups) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, the gradient sent back, and the gradients of the operands."""
    x, weight, offsets, index = case.arguments()
    y = torch.compile(case.function(), fullgraph=True, dynamic=False)(x, weight, offsets, index)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return y.detach(), upstream, list(torch.autograd.grad(y, (x, weight), upstream))


def check(case: Groups, precision: float = 0.0) -> None:
    y, upstream, (gx, gw) = run(case)
    check_results(case, y, precision)
    check_gradients(case, gx, gw, upstream, precision)


@pytest.mark.parametrize(("block", "dtype", "tf32", "choice"), every_tile(), indirect=["tf32"])
def test_every_tile_of_groups(
    block: int, dtype: torch.dtype, tf32: bool, choice: int, device: torch.device, take: Take
) -> None:
    """Groups that are empty, one token and several tiles, rows of none; NaN outside the masks."""
    asked = take(choice)
    transposed = choice % 2 == 1
    stored = (400, 272) if transposed else (272, 400)
    case = groups(
        [130, 0, 1, 300], 400, 272, masks_of(*stored, block, 4), block, more=70, dtype=dtype, transposed=transposed,
        epilogue="gelu", dense_grad=[False, True, False, False], poisoned=True, seed=choice,
    )  # fmt: skip
    check(case.to(device), TF32 if tf32 else 0.0)
    assert len(asked) == (3 if device.type == "cuda" else 0)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_many_programs_of_groups_at_once(block: int, transposed: bool, device: torch.device, take: Take) -> None:
    """More programs than a GPU runs at a time, uneven groups; twice the same bits."""
    take(0)
    stored = (1024, 1536) if transposed else (1536, 1024)
    sizes = [1500, 0, 40, 700, 3, 1000, 129, 600]
    masks = masks_of(*stored, block, 8, 0.2)
    case = groups(sizes, 1024, 1536, masks, block, more=28, transposed=transposed, poisoned=True).to(device)
    check(case)
    first, second = run(case), run(case)
    for a, b in zip((first[0], *first[2]), (second[0], *second[2]), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("matrices", "k", "n"), [(1, 33, 129), (60, 64, 96), (130, 1, 40), (5, 257, 1)])
def test_odd_sizes_of_groups(matrices: int, k: int, n: int, device: torch.device, take: Take) -> None:
    take(0)
    sizes = [(7 * e) % 11 for e in range(matrices)]
    check(groups(sizes, k, n, masks_of(n, k, 32, matrices, 0.5), 32, more=5, offsets_dtype=torch.int64).to(device))


def test_offsets_are_data(device: torch.device, take: Take) -> None:
    """They change from call to call without a compilation, and the host does not wait for them."""
    take(0)
    masks, compiled_, graphs = masks_of(192, 128, 64, 3, 0.5), None, 0
    for sizes in ([100, 0, 156], [0, 0, 0], [256, 0, 0], [1, 254, 1]):
        case = groups(sizes, 128, 192, masks, 64, more=256 - sum(sizes), seed=sizes[0]).to(device)
        if compiled_ is None:
            compiled_ = torch.compile(case.function(), fullgraph=True, dynamic=False)
        arguments = case.arguments()
        if graphs and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            y = compiled_(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default") if device.type == "cuda" else None
        check_results(case, y.detach())
        graphs = graphs or torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


class Experts(nn.Module):
    """A batch of products, an expert's share of the tokens each."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 256, 128) / 128**0.5)
        self.down = nn.Parameter(torch.randn(4, 128, 256) / 256**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(nn.functional.silu(torch.bmm(x, self.up.mT)), self.down.mT)


@pytest.mark.rank(1)
def test_experts_train_sparse(device: torch.device) -> None:
    """Through the backend: compiled equals eager, zeros stay zeros, and the stacks are served."""
    torch.manual_seed(0)
    model = sparsify(Experts(), static(0.5), block=32, include=["up", "down"]).to(device)
    fast = torch.compile(model, backend="mst", options={"mst.dense_threshold": 1.0})
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(3):
        found = {}
        for name, step in (("eager", model), ("compiled", fast)):
            with torch.autocast(device.type, dtype=BF16):
                step(x).float().square().mean().backward()
            found[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            adam.zero_grad()
        for ours, right in zip(found["compiled"], found["eager"], strict=True):
            assert float((ours - right).norm() / right.norm()) <= 16 * of_rounding(BF16)
        fast(x).square().mean().backward()
        adam.step()
        adam.zero_grad()
        for name, weight in sparsifier(model).weights.items():
            values = dict(model.named_parameters())[name].detach()
            assert not values.flatten(0, 1)[~weight.grid.expand(weight.mask).to(device)].any(), name
    assert all(weight.uses.served for weight in sparsifier(model).weights.values())
