"""Operands in any layout, empty ones and tensor subclasses: every operator gives what its reference does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_parts import COMBINATIONS, combine
from hypothesis import given
from hypothesis import strategies as st
from mask_cases import index_of
from mst_compile.kernels import cpu
from mst_compile.lowering import inductor  # noqa: F401  (registers the lowerings)
from oracles import assert_as_good_as
from torch import Tensor
from torch.utils._pytree import tree_map

from mst_compile.blocks.bulk import block_mean_square, zero_inactive_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.memory import is_plain
from mst_compile.ops.attention import attention_backward_reference, attention_reference
from mst_compile.ops.linear import grad_input_reference, grad_weight_reference, linear_reference

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
ops = torch.ops.mst
BLOCK = 8


class Drawing:
    """Draws tensors of normal numbers in any layout, with NaN in all gaps."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Dimensions in any order in memory, with steps, an offset, and some of them expanded (stride 0)."""
        draw = self.draw
        order = draw(st.permutations(range(len(shape))))
        steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
        sizes = [1 if draw(st.integers(0, 4)) == 0 else n * step for n, step in zip(shape, steps, strict=True)]
        offset = draw(st.integers(0, 3))
        memory = torch.full((offset + math.prod(sizes) + 3,), math.nan, dtype=dtype)
        dense = memory[offset : offset + math.prod(sizes)].view([sizes[d] for d in order])
        view = dense.permute([order.index(d) for d in range(len(shape))])
        view = view[tuple(slice(None, None, step) for step in steps)]
        view.copy_(torch.randn(view.shape, generator=self.generator))
        return view.expand(shape)


def plain(args: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """The same values without gaps; those of floating point in ``dtype``."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype if x.is_floating_point() else None, copy=True).contiguous()

    return [one(x) for x in args]


def assert_as_the_reference(operator: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]) -> None:
    got, usual = operator(*args), reference(*plain(args))
    exact = reference(*(F64 if isinstance(x, torch.dtype) else x for x in plain(args, F64)))
    if isinstance(got, Tensor):
        got, usual, exact = (got,), (usual,), (exact,)
    for i, (a, b, c) in enumerate(zip(got, usual, exact, strict=True)):
        # Sums that cancel are known to the size of their terms alone.
        size = math.prod(x.double().abs().max().item() for x in args[:2] if x.numel()) * 8
        assert torch.equal(a.isinf(), c.isinf()), "of a query without keys the log-denominator is -inf"
        a, b, c = (t.masked_fill(c.isinf(), 0) for t in (a, b, c))
        assert_as_good_as(a, b, c.double(), b.dtype, f"result {i}", size)


LEADS = [(), (1,), (7,), (0,), (3, 5), (0, 3), (3, 0), (2, 0, 3), (2, 3, 4)]


@st.composite
def products(draw: st.DrawFn) -> tuple[Any, ...]:
    """x, weight, bias, grad, index, transposed."""
    drawing = Drawing(draw)
    rows, cols, transposed = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.booleans())
    x_dtype, w_dtype = draw(st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F64, F64)]))
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    lead = draw(st.sampled_from(LEADS))
    mask = torch.rand(BlockGrid(rows, cols, BLOCK).shape, generator=drawing.generator) < 0.6
    index = index_of(mask, rows, cols, BLOCK, dense_grad=draw(st.integers(0, 4)) == 0)
    if draw(st.booleans()):
        index = torch.stack([index, index + 1], 1)[:, 0]
    bias_dtype = draw(st.sampled_from([None, x_dtype, w_dtype, F64]))
    return (
        drawing.tensor((*lead, inputs), x_dtype),
        drawing.tensor((rows, cols), w_dtype),
        None if bias_dtype is None else drawing.tensor((outputs,), bias_dtype),
        drawing.tensor((*lead, outputs), x_dtype),
        index,
        transposed,
    )


@given(products())
def test_products(operands: tuple[Any, ...]) -> None:
    x, weight, bias, grad, index, transposed = operands
    assert_as_the_reference(ops.linear, linear_reference, (x, weight, bias, index, BLOCK, transposed))
    assert_as_the_reference(ops.linear_grad_input, grad_input_reference, (grad, weight, index, BLOCK, transposed))
    assert_as_the_reference(
        ops.linear_grad_weight, grad_weight_reference, (grad, x, index, BLOCK, transposed, weight.dtype, True)
    )


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Any, ...]:
    """grad, q, k, v, and the settings."""
    drawing = Drawing(draw)
    batch, length = draw(st.sampled_from([(2, 20), (1, 33), (0, 20), (2, 0), (3, 1)]))
    heads, key_heads = draw(st.sampled_from([(2, 2), (4, 2), (1, 1), (0, 0)]))
    dtype, size, value_size = draw(
        st.sampled_from([(F32, 32, 32), (BF16, 32, 32), (F32, 39, 5), (BF16, 17, 30), (F64, 8, 3)])
    )
    of_heads = (heads, value_size), (heads, size), (key_heads, size), (key_heads, value_size)
    shapes = [(batch, n, length, numbers) for n, numbers in of_heads]
    grad, q, k, v = (drawing.tensor(shape, dtype) for shape in shapes)
    mask = drawing.tensor((draw(st.sampled_from([batch, 1])), length), F32) > -1 if draw(st.booleans()) else None
    parts = combine(draw(st.sampled_from(COMBINATIONS)), 5, 4, gap=1, times=2).numbers
    return grad, q, k, v, mask, parts, size**-0.5


@given(attentions(), st.data())
def test_attention(operands: tuple[Any, ...], data: st.DataObject) -> None:
    grad, q, k, v, *rest = operands
    assert_as_the_reference(ops.attention, attention_reference, (q, k, v, *rest))
    out, lse = attention_reference(*plain((q, k, v)), *rest)
    spread = Drawing(data.draw)
    for_out, for_lse = (spread.tensor(t.shape, t.dtype).clone(memory_format=torch.preserve_format) for t in (out, lse))
    saved = [t.copy_(values) if t.numel() else values for t, values in ((for_out, out), (for_lse, lse))]
    assert_as_the_reference(ops.attention_backward, attention_backward_reference, (grad, q, k, v, *saved, *rest))


# -- compiled ----------------------------------------------------------------------------------------------------------


def spread_out(*lead: int) -> dict[str, Tensor]:
    """Operands none of which is contiguous, and a bias in a dtype that has no kernel."""
    return {
        "x": torch.randn(*lead, 1).expand(*lead, 24),
        "weight": torch.randn(24, 1, 32)[:, 0].t(),
        "bias": torch.randn(1, dtype=F64).expand(32),
        "grad": torch.randn(32, *lead).movedim(0, -1),
    }


def gradients(run: Callable[..., Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    leaves = [tensors[name].detach().requires_grad_() for name in ("x", "weight", "bias")]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors["grad"])]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize(("lead", "bias"), [((3, 5), F64), ((3, 5), F32), ((2, 0), F32)])
def test_compiled(backend: str, lead: tuple[int, ...], bias: torch.dtype) -> None:
    mask = torch.rand(4, 3) < 0.6
    index = torch.stack([index_of(mask, 32, 24, 8)] * 2, 1)[:, 0]
    tensors = spread_out(*lead)
    tensors["bias"] = tensors["bias"][:1].to(bias).expand(32)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear(x, weight, bias, index, 8, False)

    got = gradients(torch.compile(run, backend=backend, fullgraph=True), tensors)
    plain_ones = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    usual = gradients(lambda x, w, b: linear_as_reference(x, w, b, mask), plain_ones)
    exact = gradients(
        lambda x, w, b: linear_as_reference(x, w, b, mask), {name: t.double() for name, t in plain_ones.items()}
    )
    for name, a, b, c in zip(("y", "x", "weight", "bias"), got, usual, exact, strict=True):
        assert_as_good_as(a, b, c, F32, name, 100.0)


def linear_as_reference(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    kept = weight * mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return torch.nn.functional.linear(x, kept, bias.to(x.dtype))


# -- subclasses --------------------------------------------------------------------------------------------------------


class Wrapper(Tensor):
    """Has no memory of its own: its pointer leads nowhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        return tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


class Named(Tensor):
    """Intercepts nothing: an ordinary tensor under another name."""


def test_what_is_plain() -> None:
    t = torch.randn(4, 4)
    for yes in (t, t.t(), torch.nn.Parameter(t), t.as_subclass(Named), t[:1].expand(4, 4), torch.empty(0)):
        assert is_plain(yes)
    within: list[bool] = []
    torch.vmap(lambda x: within.append(is_plain(x)) or x)(t)
    torch.func.grad(lambda x: within.append(is_plain(x)) or x.sum())(t)
    with torch._subclasses.FakeTensorMode():
        fake = torch.randn(4, 4)
    lazy = (torch._neg_view(t), torch._efficientzerotensor(4), t.to_sparse(), t.to("meta"))
    for no in (Wrapper(t), fake, torch._to_functional_tensor(t), *lazy):
        within.append(is_plain(no))
    assert not any(within)


@pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")
def test_kernels_take_no_pointer_of_a_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, mask = BlockGrid(32, 24, 8), torch.rand(4, 3) < 0.6
    index, weight, x = index_of(mask, 32, 24, 8), torch.randn(32, 24), torch.randn(5, 24)
    with pytest.raises(ValueError, match="plain tensors on the CPU, not Wrapper"):
        cpu.block_sumsq(Wrapper(weight), 8)
    with pytest.raises(ValueError, match="on meta"):
        cpu.spmm(x, weight.to("meta"), None, index, 8, True, torch.empty(5, 32))

    assert torch.equal(block_mean_square(Wrapper(weight), grid).inner, block_mean_square(weight.double(), grid))
    for wrapped_index in (index, Wrapper(index)):
        one, other = weight.clone(), weight.clone()
        zero_inactive_(one, grid, mask, index)
        zero_inactive_(Wrapper(other), grid, mask, wrapped_index)
        assert torch.equal(one, other)
        other = weight.clone()
        zero_inactive_(other, grid, mask, wrapped_index)
        assert torch.equal(one, other)

    y = ops.linear(Wrapper(x), weight, None, index, 8, False)
    assert torch.equal(y.inner, ops.linear(x, weight, None, index, 8, False))
    asked: list[Any] = []
    monkeypatch.setattr(cpu, "spmm", lambda *args: asked.append(args))
    with torch._C._DisableTorchDispatch(), pytest.raises((RuntimeError, NotImplementedError)):
        ops.linear(Wrapper(x), weight, None, index, 8, False)  # PyTorch's own kernels refuse it as well
    assert not asked
