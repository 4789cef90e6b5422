"""Every tile of the block-sparse products on the card, forward and backward, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_cases import BLOCKS, TUNED, Product, check_backward, check_forward, product
from mst_compile.kernels.triton import tiles
from oracles import assert_same_bits
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
Take = Callable[[int], list[int]]
TF32 = 2.0**-10  # the relative error of an operand that a tensor core reads as TF32

DTYPES = ((BF16, "half", False), (F16, "half", False), (F32, "tf32", True), (F32, "ieee", False))
MOST = max(len(offered) for table in (tiles.GEMM, tiles.GRAD_WEIGHT) for offered in table.values())


def every_tile() -> list[Any]:
    """Parameters of a test for each tile; the first of each template, dtype and block ranks first."""
    found: list[Any] = []
    seen: set[tuple[Any, ...]] = set()
    for choice, (dtype, kind, allowed), block in itertools.product(range(MOST), DTYPES, BLOCKS):
        gemm = tiles.GEMM[block, kind]
        if choice >= max(len(gemm), len(tiles.GRAD_WEIGHT[block, kind])):
            continue
        tile = gemm[min(choice, len(gemm) - 1)]
        template = block, dtype, allowed, tile.union, tile.chain > 1, tile.tma
        marks = () if template in seen else pytest.mark.rank(0)
        seen.add(template)
        name = f"{block}-{dtype}-{kind}-{choice}".replace("torch.", "")
        found.append(pytest.param(block, dtype, allowed, choice, marks=marks, id=name))
    return found


def mask_of(rows: int, cols: int, block: int, density: float = 0.4) -> Tensor:
    mask = torch.rand(BlockGrid(rows, cols, block).shape, generator=torch.Generator().manual_seed(1)) < density
    mask[0] = False
    return mask


def run(case: Product) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, the gradient sent back, and the gradients of the operands."""
    arguments = case.arguments()
    leaves = [t for t in arguments[:3] if t is not None]
    y = torch.compile(case.function(), fullgraph=True, dynamic=False)(*arguments)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y)
    return y.detach(), upstream, list(torch.autograd.grad(y, leaves, upstream))


def check(case: Product, precision: float = 0.0) -> None:
    y, upstream, gradients = run(case)
    check_forward(case, [y], precision)
    check_backward(case, gradients, upstream, precision)


@pytest.mark.parametrize(("block", "dtype", "tf32", "choice"), every_tile(), indirect=["tf32"])
def test_every_tile(block: int, dtype: torch.dtype, tf32: bool, choice: int, device: torch.device, take: Take) -> None:
    asked = take(choice)
    transposed = choice % 2 == 1
    stored = (400, 272) if transposed else (272, 400)
    case = product(
        300, 400, 272, mask_of(*stored, block), block, dtype=dtype, transposed=transposed, epilogue="gelu", seed=choice
    )
    check(case.to(device), TF32 if tf32 else 0.0)
    assert len(asked) == (3 if device.type == "cuda" else 0)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("choice", range(MOST))
def test_many_programs_at_once(block: int, choice: int, device: torch.device, take: Take) -> None:
    """More programs than a GPU runs at a time, long lines, several parts of the tokens; twice the same bits."""
    take(choice)
    mask = mask_of(1536, 2048, block, 0.2)
    case = product(4096, 2048, 1536, mask, block, transposed=False, bias=choice != 1, seed=choice).to(device)
    check(case)
    first, second = run(case), run(case)
    for a, b in zip((first[0], *first[2]), (second[0], *second[2]), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("what", ["empty", "full", "one"])
def test_masks_at_the_edges(block: int, what: str, device: torch.device, take: Take) -> None:
    take(0)
    mask = torch.zeros(BlockGrid(200, 320, block).shape, dtype=torch.bool)
    if what != "empty":
        mask[-1 if what == "one" else slice(None), -1 if what == "one" else slice(None)] = True
    check(product((2, 33), 320, 200, mask, block, bias=what != "one").to(device))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 64), (7, 33, 129), (65, 1, 40), (130, 257, 1), (16, 64, 50257)])
def test_odd_sizes(m: int, k: int, n: int, device: torch.device, take: Take) -> None:
    take(0)
    check(product(m, k, n, mask_of(n, k, 32), 32, epilogue="silu", dense_grad=m == 7).to(device))


def test_float32_weights_under_half_activations(device: torch.device, take: Take) -> None:
    take(0)
    check(product(256, 192, 320, mask_of(320, 192, 64), 64, weight_dtype=F32, epilogue="tanh").to(device))


@pytest.mark.parametrize("how", ["rows of wider", "every other", "transposed", "expanded"])
def test_strides(how: str, device: torch.device, take: Take) -> None:
    take(0)
    case = product(64, 96, 80, mask_of(80, 96, 32), 32).to(device)
    if how == "expanded":
        case.x = case.x[:1].expand(64, -1)
    elif how == "transposed":
        case.x = case.x.t().contiguous().t()
    else:
        wide = torch.full((64, 2 * 96), torch.nan, dtype=BF16, device=device)
        view = wide[:, :96] if how == "rows of wider" else wide[:, ::2]
        case.x = view.copy_(case.x)
    check(case)


def test_one_code_serves_any_number_of_tokens(device: torch.device, take: Take) -> None:
    take(0)
    mask = mask_of(130, 192, 32)
    compiled, count = None, 0
    for m in (96, 2, 300, 1000):
        case = product(m, 192, 130, mask, 32, epilogue="gelu", seed=m).to(device)
        arguments = case.arguments()
        if compiled is None:
            compiled = torch.compile(case.function(), fullgraph=True, dynamic=True)
        check_forward(case, [compiled(*arguments).detach()])
        count = count or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count


@pytest.mark.parametrize("block", BLOCKS)
def test_the_autotuner_choosing(block: int, device: torch.device) -> None:
    """Whatever it takes, and whatever it benchmarked before, the result is right; and so is the table's tile."""
    for settings in (TUNED, {}):
        with torch._inductor.config.patch(settings):
            check(product(512, 1024, 768, mask_of(768, 1024, block, 0.2), block, epilogue="gelu").to(device))
        torch._dynamo.reset()


@pytest.mark.rank(9)
def test_more_elements_than_fit_32_bits(device: torch.device, take: Take) -> None:
    """The end of a result of 2**31 elements and more, and of its gradient, is where it belongs."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB on a GPU")
    take(0)
    m, k, n = 270_000, 64, 8192
    mask = mask_of(n, k, 128, 0.7)
    case = product(8, k, n, mask, 128, bias=False).to(device)
    x = torch.randn(m, k, device=device, dtype=BF16)
    x[-300:] = case.x[:1]
    x.requires_grad_()
    weight = case.weight.detach().requires_grad_()
    y = torch.compile(case.function(), fullgraph=True, dynamic=False)(x, weight, None, case.index)
    assert y.numel() > 2**31
    upstream = torch.zeros_like(y)
    upstream[-1] = 1
    gx, gw = torch.autograd.grad(y, (x, weight), upstream)
    end = product(1, k, n, mask, 128, bias=False).to(device)
    end.x, end.weight = x[-1:].detach(), case.weight
    check_forward(end, [y[-1:].detach()])
    assert torch.equal(y[-300].detach(), y[-1].detach())
    check_backward(end, [gx[-1:], gw], upstream[-1:])
    assert not gx[:-1].any()
