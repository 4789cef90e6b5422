"""``mst::grouped_linear`` and its gradients against masked dense products in float64, matrix by matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import block_masks, expand, index_of
from mst_compile.lowering import cpu_choice, cpu_linear
from oracles import Exact, assert_within, of_rounding, of_sum, product
from torch import Tensor

from mst_compile.blocks.index import DENSE_GRAD
from mst_compile.ops.grouped import (
    grouped_grad_input_reference,
    grouped_grad_weight_reference,
    grouped_linear_reference,
    groups,
)
from mst_compile.ops.linear import DENSITY

grouped_linear = torch.ops.mst.grouped_linear
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32), (F16, F16), (F64, F64)]
LAYOUTS = ["contiguous", "transposed", "every other", "rows of wider"]


class Case(NamedTuple):
    """A product of a stack. ``weight`` is ``[E, in, out]`` if ``transposed``; ``keep`` is its elementwise mask."""

    x: Tensor
    weight: Tensor
    sizes: list[int]  # rows of each group; x may have more
    masks: list[Tensor]
    keep: Tensor
    block: int
    transposed: bool
    grad: Tensor
    offsets_dtype: torch.dtype

    @property
    def offsets(self) -> Tensor:
        return torch.tensor(self.sizes).cumsum(0).to(self.offsets_dtype)

    def index(self, dense_grad: bool = False) -> Tensor:
        shape = self.weight.shape[1:]
        return torch.stack([index_of(mask, *shape, self.block, dense_grad=dense_grad) for mask in self.masks])

    def parts(self) -> Iterator[tuple[int, slice]]:
        start = 0
        for e, size in enumerate(self.sizes):
            yield e, slice(start, start + size)
            start += size


def laid_out(t: Tensor, how: str) -> Tensor:
    """The same values in another layout, NaN between them."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "contiguous":
        return t
    apart, width = (2, 2 * t.shape[-1]) if how == "every other" else (1, t.shape[-1] + 3)
    wide = torch.full((*t.shape[:-1], width), torch.nan, dtype=t.dtype)
    part = wide[..., : apart * t.shape[-1] : apart]
    part.copy_(t)
    return part


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block = draw(st.sampled_from((4, 8, 16, 32)))
    matrices = draw(st.integers(1, 5))
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    transposed = draw(st.booleans())
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 33]), min_size=matrices, max_size=matrices))
    if draw(st.integers(0, 4)) == 0:  # all rows with one
        sizes = [sum(sizes) if e == sizes[0] % matrices else 0 for e in range(matrices)]
    total = sum(sizes) + draw(st.sampled_from([0, 0, 1, 5]))
    x_dtype, w_dtype = draw(st.sampled_from(DTYPES))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=gen).to(dtype)

    masks = [draw(block_masks(-(-rows // block), -(-cols // block))) for _ in range(matrices)]
    keep = torch.stack([expand(mask, rows, cols, block) for mask in masks])
    # Values outside the masks must not be read: the operator, not the storage, is what is tested here.
    weight = laid_out(normal(matrices, rows, cols, dtype=w_dtype), draw(st.sampled_from(LAYOUTS)))
    x = laid_out(normal(total, inputs, dtype=x_dtype), draw(st.sampled_from(LAYOUTS)))
    grad = laid_out(normal(total, outputs, dtype=x_dtype), draw(st.sampled_from(LAYOUTS)))
    if draw(st.integers(0, 5)) == 0:
        grad = normal(1, dtype=x_dtype).expand(grad.shape)  # what sum().backward() sends
    return Case(
        x, weight, sizes, masks, keep, block, transposed, grad, draw(st.sampled_from([torch.int32, torch.int64]))
    )


def assert_summed(got: Tensor, exact: Exact, terms: int, what: str, *dtypes: torch.dtype) -> None:
    """A sum of ``terms`` products in float32 (float64 for float64), with factors and result rounded to the dtypes.

    PyTorch's float16 product on a CPU, which the reference runs, may keep its sums in float16.
    """
    kept = dtypes[0] if dtypes[0] in (F16, F64) else F32
    allowed = (of_sum(terms, dtype=kept) + of_rounding(*dtypes, times=2)) * exact.magnitude
    assert_within(got, exact.value, allowed, what)


def assert_right(case: Case, y: Tensor, gx: Tensor, gw: Tensor, dense_grad: bool) -> None:
    """Result and gradients of a case, in all their rows and matrices."""
    xd, wd = case.x.dtype, case.weight.dtype
    assert (y.dtype, gx.dtype, gw.dtype) == (xd, xd, wd)
    assert (y.shape, gx.shape, gw.shape) == (case.grad.shape, case.x.shape, case.weight.shape)
    kept = case.weight * case.keep
    for e, at in case.parts():
        W = kept[e] if case.transposed else kept[e].t()  # [in, out]
        x, g = case.x[at], case.grad[at]
        assert_summed(y[at], product(x, W), W.shape[0], f"forward {e}", xd, wd)
        assert_summed(gx[at], product(g, W.t()), W.shape[1], f"grad-input {e}", xd, wd)
        a, b = (x, g) if case.transposed else (g, x)
        exact = product(a.t(), b)
        if not dense_grad:
            assert not gw[e][~case.keep[e]].any(), "the gradient is not exactly zero outside the active blocks"
            exact = Exact(exact.value * case.keep[e], exact.magnitude * case.keep[e])
        assert_summed(gw[e], exact, len(a), f"grad-weight {e}", xd, wd)
        if not len(a):
            assert not gw[e].any(), "of a matrix without rows"
    assert not y[sum(case.sizes) :].any(), "rows of no group"
    assert not gx[sum(case.sizes) :].any(), "rows of no group"


def check(case: Case, dense_grad: bool, choose: bool = False) -> None:
    stored = case.weight * case.keep if choose else case.weight  # dense products read zeros where there are any
    x, weight = (t.detach().requires_grad_() for t in (case.x, stored))
    y = grouped_linear(x, weight, case.offsets, case.index(dense_grad), case.block, case.transposed, DENSITY, choose)
    y.backward(case.grad)
    assert x.grad is not None
    assert weight.grad is not None
    assert_right(case, y.detach(), x.grad, weight.grad, dense_grad)


@settings(max_examples=200)
@given(cases(), st.sampled_from([False, False, False, True]))
def test_grouped_products_and_gradients(case: Case, dense_grad: bool) -> None:
    check(case, dense_grad)


@pytest.fixture(scope="module")
def dense_is_faster() -> Iterator[list[tuple[str, int]]]:
    """As where every dense product was measured to be faster; the kinds and tokens of those that were asked about."""
    asked: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu_choice, "is_dense_faster", lambda product, active: asked.append((product.kind, product.tokens)) or True
        )
        yield asked


@settings(max_examples=100)
@given(case=cases(), dense_grad=st.sampled_from([False, False, True]))
def test_grouped_products_that_run_dense(dense_is_faster: list[tuple[str, int]], case: Case, dense_grad: bool) -> None:
    """The library's products are as right as ours; each group with rows is asked about by itself."""
    dense_is_faster.clear()
    check(case, dense_grad, choose=True)
    if cpu_linear.why_unsupported(case.x.dtype, case.weight.dtype, case.block) is None:
        kinds = ["cols", "rows"] if case.transposed else ["rows", "cols"]
        kinds += [] if dense_grad else ["grad-weight"]
        assert [kind for kind, _ in dense_is_faster] == [k for k in kinds for size in case.sizes if size]


@given(cases())
def test_the_grouped_reference_is_what_other_devices_run(case: Case) -> None:
    operands = case.offsets, case.index(), case.block, case.transposed
    y = grouped_linear_reference(case.x, case.weight, *operands)
    gx = grouped_grad_input_reference(case.grad, case.weight, *operands)
    gw = grouped_grad_weight_reference(case.grad, case.x, *operands, case.weight.dtype)
    assert_right(case, y, gx, gw, False)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_that_ask_for_dense_gradients_alone_get_them(transposed: bool) -> None:
    """The header of each matrix's index is its own."""
    masks = [torch.eye(2, dtype=torch.bool)] * 2
    index = torch.stack([index_of(mask, 16, 16, 8, dense_grad=e == 1) for e, mask in enumerate(masks)])
    x, grad = torch.randn(6, 16), torch.randn(6, 16)
    gw = torch.ops.mst.grouped_linear_grad_weight(grad, x, torch.tensor([2, 6]), index, 8, transposed, F32)
    keep = expand(masks[0], 16, 16, 8)
    assert not gw[0][~keep].any()
    assert gw[1].all()


@pytest.mark.parametrize(
    ("offsets", "expected"),
    [
        ([2, 5], [(0, 2), (2, 5)]),
        ([2, 9], [(0, 2), (2, 6)]),  # behind the last row
        ([4, 2], [(0, 4), (4, 4)]),  # below the one before
        ([-3, 6], [(0, 0), (0, 6)]),
        ([], []),
    ],
)
def test_no_offsets_read_rows_that_do_not_exist(offsets: list[int], expected: list[tuple[int, int]]) -> None:
    assert groups(torch.tensor(offsets, dtype=torch.int32), 6) == expected
    if offsets:
        x, weight = torch.randn(6, 16), torch.randn(len(offsets), 16, 16)
        index = torch.stack([index_of(torch.ones(2, 2, dtype=torch.bool), 16, 16, 8)] * len(offsets))
        y = grouped_linear(x, weight, torch.tensor(offsets), index, 8, True)
        for e, (start, end) in enumerate(expected):
            torch.testing.assert_close(y[start:end], x[start:end] @ weight[e])
        assert not y[expected[-1][1] :].any()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_no_rows_and_no_matrices(dtype: torch.dtype) -> None:
    mask = torch.eye(2, dtype=torch.bool)
    for matrices in (0, 2):
        x = torch.randn(0, 16, dtype=dtype, requires_grad=True)
        weight = torch.randn(matrices, 16, 16, dtype=dtype, requires_grad=True)
        index = torch.stack([index_of(mask, 16, 16, 8)] * 2)[:matrices]
        y = grouped_linear(x, weight, torch.zeros(matrices, dtype=torch.int32), index, 8, False)
        assert y.shape == (0, 16)
        y.sum().backward()
        assert weight.grad is not None
        assert not weight.grad.any()


@pytest.mark.parametrize("wanted", ["x", "weight"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_only_the_wanted_gradients_of_groups(wanted: str, dtype: torch.dtype) -> None:
    mask = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    index = torch.stack([index_of(mask, 16, 16, 8)] * 2)
    x, weight = torch.randn(6, 16, dtype=dtype), torch.randn(2, 16, 16, dtype=dtype)

    def run(*names: str) -> dict[str, Tensor | None]:
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in (("x", x), ("weight", weight))}
        grouped_linear(*leaves.values(), torch.tensor([2, 6]), index, 8, False).square().sum().backward()
        return {n: t.grad for n, t in leaves.items()}

    every, some = run("x", "weight"), run(wanted)
    assert [n for n, grad in some.items() if grad is not None] == [wanted]
    torch.testing.assert_close(some[wanted], every[wanted], rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_of_groups(transposed: bool) -> None:
    masks = [torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool), torch.tensor([[0, 1, 0], [1, 1, 1]]).bool()]
    index = torch.stack([index_of(mask, 7, 10, 4) for mask in masks])
    weight = torch.randn(2, 7, 10, dtype=F64, requires_grad=True)
    x = torch.randn(5, 7 if transposed else 10, dtype=F64, requires_grad=True)
    offsets = torch.tensor([3, 4], dtype=torch.int32)  # and a row of no group

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_linear(x, weight, offsets, index, 4, transposed)

    assert torch.autograd.gradcheck(run, (x, weight))
    assert torch.autograd.gradgradcheck(run, (x, weight))
    index[:, DENSE_GRAD] = 1  # growth reads gradients outside the masks too, which no finite difference sees
    kept = weight.detach() * torch.stack([expand(mask, 7, 10, 4) for mask in masks])

    def summed(make: Any, x: Tensor, w: Tensor) -> Tensor:
        """The gradient of the squares of both first gradients with respect to ``x``."""
        grads = torch.autograd.grad(make(x, w).square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), x)[0]  # type: ignore[no-any-return]

    def dense(x: Tensor, w: Tensor) -> Tensor:
        first, second = w if transposed else w.mT
        return torch.cat([x[:3] @ first, x[3:4] @ second])

    torch.testing.assert_close(summed(run, x, weight), summed(dense, x, kept.requires_grad_()))


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_groups(dtype: torch.dtype, transposed: bool) -> None:
    masks = torch.rand(3, 4, 3) < 0.5
    index = torch.stack([index_of(mask, 30, 20, 8) for mask in masks])
    weight = torch.randn(3, 30, 20, dtype=dtype, requires_grad=True)
    inputs, outputs = (30, 20) if transposed else (20, 30)
    x = torch.randn(10, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(10, outputs, dtype=dtype)
    given_ = torch.tensor([4, 4, 9], dtype=torch.int32), index, 8, transposed
    few = of_rounding(dtype, times=16)
    for op, args in (
        (torch.ops.mst.grouped_linear.default, (x, weight, *given_)),
        (torch.ops.mst.grouped_linear_grad_input.default, (grad, weight.detach(), *given_)),
        (torch.ops.mst.grouped_linear_grad_weight.default, (grad, x.detach(), *given_, dtype)),
    ):
        torch.library.opcheck(op, args, rtol=few, atol=few)
