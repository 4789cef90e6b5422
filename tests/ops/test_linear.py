"""``mst::linear`` and its gradients against a masked dense product in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import block_masks, expand, index_of
from mst_compile.lowering import cpu_choice, cpu_dense, cpu_linear
from oracles import Exact, assert_within, of_rounding, of_sum, product, total
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mst_compile.ops.linear  # noqa: F401  (registers the operators)
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import DENSE_GRAD
from mst_compile.ops.linear import DENSITY, grad_input_reference, grad_weight_reference, linear_reference

linear = torch.ops.mst.linear
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
BLOCKS = (4, 8, 16, 32, 64)


class Case(NamedTuple):
    """One product. ``weight`` is stored ``[in, out]`` if ``transposed``; ``keep`` is its elementwise mask."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    keep: Tensor
    block: int
    transposed: bool
    grad: Tensor

    def index(self, dense_grad: bool = False) -> Tensor:
        return index_of(self.mask, *self.weight.shape, self.block, dense_grad=dense_grad)


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another layout."""
    if how == "transposed" and t.dim() >= 2:
        return t.transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    if how == "every other":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), torch.nan, dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if how == "rows of wider":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), torch.nan, dtype=t.dtype)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]
    return t


LAYOUTS = ["contiguous", "transposed", "every other", "rows of wider"]
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F64, F64)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    block = draw(st.sampled_from(BLOCKS))
    rows, cols = draw(st.integers(1, 80)), draw(st.integers(1, 80))
    transposed = draw(st.booleans())
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    lead = draw(st.sampled_from([(), (1,), (2,), (7,), (33,), (3, 5), (1, 1), (2, 3, 4)]))
    x_dtype, w_dtype = draw(st.sampled_from(DTYPES))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=gen).to(dtype)

    mask = draw(block_masks(-(-rows // block), -(-cols // block)))
    keep = expand(mask, rows, cols, block)
    # Values outside the mask must not be read: the operator, not the storage, is what is tested here.
    weight = normal(rows, cols, dtype=w_dtype)
    bias_dtype = draw(st.sampled_from([None, x_dtype, w_dtype]))
    bias = None if bias_dtype is None else normal(outputs, dtype=bias_dtype)
    x = strided(normal(*lead, inputs, dtype=x_dtype), draw(st.sampled_from(LAYOUTS)))
    grad = normal(*lead, outputs, dtype=x_dtype)
    if draw(st.integers(0, 5)) == 0:
        grad = normal(1, dtype=x_dtype).expand(grad.shape)  # what sum().backward() sends
    else:
        grad = strided(grad, draw(st.sampled_from(LAYOUTS)))
    return Case(x, weight, bias, mask, keep, block, transposed, grad)


def assert_summed(got: Tensor, exact: Exact, terms: int, what: str, *dtypes: torch.dtype) -> None:
    """A sum of ``terms`` products in float32 (float64 for float64).

    Each dtype that a factor or the result is rounded to adds its own rounding, twice where a result is rounded before
    and after a bias is added.
    """
    error = of_sum(terms, dtype=F64 if dtypes[0] == F64 else F32) + of_rounding(*dtypes, times=2)
    assert_within(got, exact.value, error * exact.magnitude, what)


def check(case: Case, dense_grad: bool, choose: bool = False) -> None:
    x, w, b = case.x, case.weight * case.keep, case.bias
    W = w if case.transposed else w.t()  # [in, out]
    g = case.grad
    rows, grad_rows = x.reshape(-1, W.shape[0]), g.reshape(-1, W.shape[1])
    xd, wd = case.x.dtype, case.weight.dtype

    stored = w if choose else case.weight  # dense products read zeros where there are any
    leaves = [t.detach().requires_grad_() for t in (case.x, stored)]
    bias = None if b is None else b.clone().requires_grad_()
    y = linear(leaves[0], leaves[1], bias, case.index(dense_grad), case.block, case.transposed, DENSITY, choose)
    assert y.dtype == xd
    assert y.shape == (*case.x.shape[:-1], W.shape[1])
    assert_summed(y, product(x, W, b), W.shape[0], "forward", xd, wd)

    y.backward(case.grad)
    gx, gw = leaves[0].grad, leaves[1].grad
    assert gx is not None
    assert gw is not None
    assert (gx.dtype, gx.shape, gw.dtype, gw.shape) == (xd, case.x.shape, wd, case.weight.shape)
    assert_summed(gx, product(g, W.t()), W.shape[1], "grad-input", xd, wd)
    a, c = (rows, grad_rows) if case.transposed else (grad_rows, rows)
    exact = product(a.t(), c)
    if not dense_grad:
        assert not gw[~case.keep].any(), "the gradient is not exactly zero outside the active blocks"
        exact = Exact(exact.value * case.keep, exact.magnitude * case.keep)
    assert_summed(gw, exact, len(rows), "grad-weight", xd, wd)
    if bias is not None:
        assert bias.grad is not None
        assert bias.grad.dtype == bias.dtype
        assert_summed(bias.grad, total(grad_rows), len(rows), "grad-bias", bias.dtype, wd)


@settings(max_examples=300)
@given(cases(), st.sampled_from([False, False, False, True]))
def test_linear_and_gradients(case: Case, dense_grad: bool) -> None:
    check(case, dense_grad)


@pytest.fixture(scope="module")
def dense_is_faster() -> Iterator[list[str]]:
    """As where every dense product was measured to be faster; the kinds of those that were asked about."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_choice, "is_dense_faster", lambda product, active: asked.append(product.kind) or True)
        yield asked


@settings(max_examples=150)
@given(case=cases(), dense_grad=st.sampled_from([False, False, True]))
def test_products_that_run_dense(dense_is_faster: list[str], case: Case, dense_grad: bool) -> None:
    """The library's products are as right as ours, and their gradients exactly 0 outside the active blocks."""
    dense_is_faster.clear()
    check(case, dense_grad, choose=True)
    on_kernels = cpu_linear.why_unsupported(case.x.dtype, case.weight.dtype, case.block) is None
    if on_kernels and case.x.numel() and case.grad.numel() and not dense_grad:
        assert (
            dense_is_faster == ["cols", "rows", "grad-weight"] if case.transposed else ["rows", "cols", "grad-weight"]
        )


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_shapes_of_real_layers(block: int, transposed: bool) -> None:
    """More rows than any tile, several panels in both directions."""
    rows, cols, m = 200, 328, 131
    mask = torch.rand(-(-rows // block), -(-cols // block)) < 0.3
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    case = Case(
        torch.randn(m, inputs), torch.randn(rows, cols), torch.randn(outputs), mask, expand(mask, rows, cols, block),
        block, transposed, torch.randn(m, outputs),
    )  # fmt: skip
    check(case, False)
    for values in (case._replace(x=case.x.bfloat16(), grad=case.grad.bfloat16()),):
        check(values, False)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_rows(dtype: torch.dtype, transposed: bool) -> None:
    """An empty batch gives empty outputs and zero gradients."""
    x = torch.randn(0, 3, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(16, 16, dtype=dtype, requires_grad=True)
    y = linear(x, w, None, index_of(torch.eye(2, dtype=torch.bool), 16, 16, 8), 8, transposed)
    assert y.shape == (0, 3, 16)
    y.sum().backward()
    assert w.grad is not None
    assert x.grad is not None
    assert not w.grad.any()
    assert x.grad.shape == x.shape


WANTS = [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]


@given(cases(), st.sampled_from(WANTS))
def test_only_the_wanted_gradients(case: Case, wants: tuple[bool, bool, bool]) -> None:
    """Each gradient is the same whichever others are asked for."""
    bias = case.bias if case.bias is not None else torch.randn(case.grad.shape[-1]).to(case.x.dtype)

    def run(wants: tuple[bool, ...]) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(w) for t, w in zip((case.x, case.weight, bias), wants, strict=True)]
        linear(*leaves, case.index(), case.block, case.transposed).backward(case.grad)
        return [t.grad for t in leaves]

    every, some = run((True, True, True)), run(wants)
    for full, part, wanted in zip(every, some, wants, strict=True):
        assert (part is not None) == wanted
        if part is not None:
            torch.testing.assert_close(part, full, rtol=of_rounding(part.dtype, times=4), atol=1e-6)


@given(cases())
def test_the_reference_is_what_other_devices_run(case: Case) -> None:
    """The plain PyTorch reference agrees with what the dispatcher chose on this device."""
    index, block, transposed = case.index(), case.block, case.transposed
    x, w, g = case.x, case.weight * case.keep, case.grad
    W = w if transposed else w.t()
    dtypes = (x.dtype, x.dtype, w.dtype)
    y = linear_reference(x, case.weight, case.bias, index, block, transposed)
    assert_summed(y, product(x, W, case.bias), W.shape[0], "forward", *dtypes)
    gx = grad_input_reference(g, case.weight, index, block, transposed)
    assert_summed(gx, product(g, W.t()), W.shape[1], "grad-input", *dtypes)
    gw, gb = grad_weight_reference(g, x, index, block, transposed, w.dtype, True)
    rows, grads = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    a, b = (rows, grads) if transposed else (grads, rows)
    exact = product(a.t(), b)
    assert_summed(gw, Exact(exact.value * case.keep, exact.magnitude), len(a), "grad-weight", *dtypes)
    assert_summed(gb, total(grads), len(a), "grad-bias", *dtypes)


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_gradients_are_as_precise_as_ordinary_ones(transposed: bool) -> None:
    """Under autocast: of bfloat16 operands, the gradient of a float32 weight is summed and stored in float32."""
    x, grad = torch.randn(64, 48).bfloat16(), torch.randn(64, 40).bfloat16()
    stored = (48, 40) if transposed else (40, 48)
    mask = torch.ones(BlockGrid(*stored, 8).shape, dtype=torch.bool)
    a, b = (x, grad) if transposed else (grad, x)
    exact = product(a.t(), b)
    for dense in (False, True):
        index = index_of(mask, *stored, 8, dense_grad=dense)
        for compute in (torch.ops.mst.linear_grad_weight, grad_weight_reference):
            gw, _ = compute(grad, x, index, 8, transposed, F32, False)
            assert gw.dtype == F32
            assert_summed(gw, exact, len(x), f"dense {dense}", F32)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default, torch.ops.aten.addmm.out)


class Operands(TorchDispatchMode):
    """Checks that the matrices which PyTorch's products get have rows without gaps, or are transposes of such."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            for matrix in args[-2:]:
                assert matrix.is_contiguous() or matrix.t().is_contiguous(), f"{func}: strides {matrix.stride()}"
            self.products += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["rows of wider", "every other", "every other row"])
def test_products_of_the_reference_get_rows_without_gaps(layout: str) -> None:
    """PyTorch's bfloat16 product reads into the gaps on CPUs with AMX, and a NaN there becomes a NaN in the result."""

    def gaps(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, 0)[::2] if layout == "every other row" else strided(t, layout)

    x, grad = gaps(torch.randn(6, 199).bfloat16()), gaps(torch.randn(6, 57).bfloat16())
    weight = torch.randn(57, 199).bfloat16()
    mask = torch.ones(BlockGrid(57, 199, 8).shape, dtype=torch.bool)
    index = index_of(mask, 57, 199, 8, dense_grad=True)
    with Operands() as seen:
        linear_reference(x, weight, None, index, 8, False)
        grad_input_reference(grad, weight, index, 8, False)
        grad_weight_reference(grad, x, index, 8, False, BF16, True)
        torch.ops.mst.linear_grad_weight(grad, x, index, 8, False, BF16, True)
        # What runs where dense products are faster, with results that are given.
        index = index_of(mask, 57, 199, 8)
        cpu_dense.linear(x, weight, None, True, torch.empty(6, 57).bfloat16())
        cpu_dense.linear(grad, weight, None, False, torch.empty(6, 199).bfloat16())
        cpu_dense.grad_weight(grad, x, index, 8, torch.empty(57, 199), None, False)
    assert seen.products >= 6, "the operator's own runs below the mode"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(transposed: bool, with_bias: bool) -> None:
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    w = torch.randn(10, 12, dtype=F64, requires_grad=True)
    x = torch.randn(2, 3, 10 if transposed else 12, dtype=F64, requires_grad=True)
    b = torch.randn(12 if transposed else 10, dtype=F64, requires_grad=True) if with_bias else None
    index = index_of(mask, 10, 12, 4)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return linear(x, w, b, index, 4, transposed)

    leaves = (x, w, b) if with_bias else (x, w)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    index[DENSE_GRAD] = 1  # growth reads gradients outside the mask too, which no finite difference sees
    grads = torch.autograd.grad(run(*leaves).square().sum(), leaves[:2], create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), x)[0]  # type: ignore[union-attr]
    kept = w.detach() * expand(mask, 10, 12, 4)

    def dense(x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, kept.t() if transposed else kept, None if b is None else b.detach())
        a, c = (x, 2 * y) if transposed else (2 * y, x)
        of_weight = a.reshape(-1, a.shape[-1]).t() @ c.reshape(-1, c.shape[-1])
        return (2 * y @ (kept.t() if transposed else kept)).square().sum() + of_weight.square().sum()

    torch.testing.assert_close(again, torch.func.grad(dense)(x.detach()))


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(dtype: torch.dtype, transposed: bool, with_bias: bool) -> None:
    mask = torch.rand(4, 3) < 0.5
    w = torch.randn(30, 20, dtype=dtype, requires_grad=True)
    inputs, outputs = (30, 20) if transposed else (20, 30)
    x = torch.randn(2, 5, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, outputs, dtype=dtype)
    b = torch.randn(outputs, dtype=dtype, requires_grad=True) if with_bias else None
    index = index_of(mask, 30, 20, 8)

    def opcheck(op: Any, *args: Any) -> None:
        few = of_rounding(dtype, times=16)
        torch.library.opcheck(op, args, rtol=few, atol=few)

    opcheck(torch.ops.mst.linear.default, x, w, b, index, 8, transposed)
    opcheck(torch.ops.mst.linear_grad_input.default, grad, w.detach(), index, 8, transposed)
    opcheck(torch.ops.mst.linear_grad_weight.default, grad, x.detach(), index, 8, transposed, dtype, with_bias)
