"""Whole generated code: what is right is found right, what is wrong is found wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import Exact, assert_as_good_as, assert_within, of_rounding, of_sum, product, smallest, total
from pretend_gpu import Generated, Interpreter, cross_compile, generate, kernels_of
from torch import Tensor
from torch.nn import functional as F

from .cases import FLOATS, TRITON_MM, mm_bias_gelu, operands

# Largest |gelu'| (at sqrt 2) and |gelu''| (2 phi(0), at 0).
GELU_1, GELU_2 = 1.129, 0.798


def wanted(x: Tensor, w: Tensor, b: Tensor, upstream: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Result and gradients in float64, each with a bound on what a kernel in `dtype` may deviate.

    Products are summed in float32; the pre-activation is rounded to `dtype` at most twice, each result once; erf and
    exp are good to a few ulp of float32.
    """
    once, functions = of_rounding(dtype), of_rounding(torch.float32, times=16)
    x, w, b, g = (t.detach().double() for t in (x, w, b, upstream))
    (m, k), n = x.shape, len(w)
    z, magnitude = product(x, w.t(), b)
    z_bound = of_sum(k) * magnitude + once * ((z - b).abs() + z.abs())
    phi = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    cdf = (1 + torch.erf(z / math.sqrt(2))) / 2
    d = g * (cdf + z * phi)
    d_bound = GELU_2 * g.abs() * z_bound + 2 * once * d.abs() + functions * g.abs() * (1 + z.abs())

    def bounded(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return value, error + once * value.abs() + smallest(dtype)

    def summed(exact: Exact, terms: int, of_terms: Tensor) -> tuple[Tensor, Tensor]:
        return bounded(exact.value, of_terms + of_sum(terms) * exact.magnitude)

    return {
        "y": bounded(z * cdf, GELU_1 * z_bound + functions * (1 + z.abs())),
        "x": summed(product(d, w), n, d_bound @ w.abs()),
        "w": summed(product(d.t(), x), m, d_bound.t() @ x.abs()),
        "b": summed(total(d), m, d_bound.sum(0)),
    }


def assert_matches(made: Generated, args: list[Tensor], interpreter: Interpreter, names: str = "yxwb") -> None:
    """Run both graphs and hold results and gradients against `wanted`."""
    forward, backward = interpreter.run(made.forward), interpreter.run(made.backward)
    # The upstream gradient is the one input of the backward graph with the result's shape that forward did not save.
    upstream = made.backward.inputs[-1]
    want = wanted(*args, upstream, args[0].dtype)
    got = {"y": forward[0]}
    for name, arg in zip("xwb", args, strict=True):
        place = next(i for i, o in enumerate(made.backward.outputs) if o is not None and torch.equal(o, arg.grad))
        got[name] = backward[place]
    for name in names:
        assert got[name].dtype == args[0].dtype
        assert_within(got[name], *want[name])


@settings(max_examples=4, deadline=None)
@given(
    m=st.integers(2, 130),
    n=st.integers(2, 80),
    k=st.integers(16, 100),
    dtype=st.sampled_from(FLOATS),
    dynamic=st.booleans(),
    choice=st.integers(0, 30),
    seed=st.integers(0, 2**31),
)
@example(m=100, n=72, k=96, dtype=torch.bfloat16, dynamic=False, choice=30, seed=0)
@example(m=65, n=33, k=17, dtype=torch.bfloat16, dynamic=True, choice=0, seed=0)
@example(m=65, n=33, k=17, dtype=torch.float16, dynamic=True, choice=5, seed=0)
@example(m=65, n=33, k=17, dtype=torch.float32, dynamic=False, choice=7, seed=0)
def test_a_template_gives_the_references_numbers(
    interpreter: Interpreter, m: int, n: int, k: int, dtype: torch.dtype, dynamic: bool, choice: int, seed: int
) -> None:
    torch.manual_seed(seed)
    args = operands(m, n, k, dtype)
    if dynamic:
        torch._dynamo.mark_dynamic(args[0], 0)
    made = generate(mm_bias_gelu, args, config=TRITON_MM, choose=lambda name, choices: min(choice, len(choices) - 1))
    for graph in made.graphs.values():
        assert "template" in [kernel.kind for kernel in kernels_of(graph.source)]
    assert any(isinstance(value, int) for value in made.forward.inputs) == dynamic
    assert_matches(made, args, interpreter)


@pytest.fixture(scope="module")
def good() -> tuple[Generated, list[Tensor]]:
    torch.manual_seed(0)
    args = operands(96, 64, 96, torch.bfloat16)
    return generate(mm_bias_gelu, args, config=TRITON_MM), args


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("acc += tl.dot(", "acc -= tl.dot("),
        ("tl.cdiv(K, BLOCK_K)", "tl.cdiv(K, BLOCK_K) - 1"),
        ("acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)", "acc = tl.full((BLOCK_M, BLOCK_N), 0.05, ACC_TYPE)"),
        ("mask = (idx_m < M) & (idx_n < N)", "mask = (idx_m < M - 1) & (idx_n < N)"),
    ],
)
def test_a_wrong_kernel_is_found(
    interpreter: Interpreter, good: tuple[Generated, list[Tensor]], right: str, wrong: str
) -> None:
    made, args = good
    assert_matches(made, args, interpreter)
    assert right in made.forward.source
    inputs = made.forward.inputs
    want = wanted(*args, made.backward.inputs[-1], torch.bfloat16)
    got = interpreter.run_on(made.forward.source.replace(right, wrong), inputs).outputs[0]
    with pytest.raises(AssertionError, match="beyond the bound"):
        assert_within(got, *want["y"])


def normalised(x: Tensor, w: Tensor) -> Tensor:
    return F.softmax(F.layer_norm(x, (x.shape[-1],), w), -1)


def several(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return x.exp().sum(0), x.amax(1), (x * w).mean(), (x.permute(1, 0) * 2).contiguous(), x[:, 3:7].clone()


def products(x: Tensor, w: Tensor) -> Tensor:
    return torch.addmm(w, x, x.t() @ x)  # two calls of CPU libraries, no kernel of Triton's in forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fn", "rows", "dynamic", "kinds"),
    [
        (normalised, 40, None, {"persistent_reduction"}),
        (normalised, 70, True, {"reduction"}),
        (several, 290, None, {"reduction", "pointwise", "persistent_reduction"}),
        (products, 70, None, set()),
    ],
)
def test_other_kernels(
    interpreter: Interpreter,
    fn: Callable[..., Any],
    rows: int,
    dynamic: bool | None,
    kinds: set[str],
    dtype: torch.dtype,
) -> None:
    args = [torch.randn(rows, 24).to(dtype).requires_grad_(), torch.randn(24).to(dtype).requires_grad_()]
    made = generate(fn, args, dynamic=dynamic)
    found = {kernel.kind for graph in made.graphs.values() for kernel in kernels_of(graph.source)}
    assert kinds <= found
    for graph in made.graphs.values():
        for got, want in zip(interpreter.run(graph), graph.outputs, strict=True):
            if isinstance(want, Tensor):
                # Both sides round: the reference after every operation, the kernel at its end; sums are of 290.
                bound = (of_rounding(dtype, times=4) + of_sum(290, beside=0)) * want.double().abs().max()
                assert got.dtype == want.dtype
                assert_within(got, want.double(), bound)


def gather(i: Tensor, w: Tensor) -> Tensor:
    return F.embedding(i, w).relu()


def test_atomics_and_operators_without_meta_kernels(interpreter: Interpreter) -> None:
    made = generate(gather, [torch.randint(0, 9, (40,)), torch.randn(9, 8, requires_grad=True)])
    kernels = kernels_of(made.backward.source)
    assert any(cross_compile(kernel).atomics for kernel in kernels)
    got = [x for x in interpreter.run(made.backward) if x is not None]
    want = [x for x in made.backward.outputs if x is not None]
    torch.testing.assert_close(got, want)


def test_scattered_rows_of_one_program_each(interpreter: Interpreter) -> None:
    """Atomic additions of a whole row under a mask of one element."""
    table, tokens = torch.randn(500, 256, requires_grad=True), torch.randint(500, (3, 41))

    def normalised(table: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(torch.nn.functional.embedding(tokens, table), (256,))

    made = generate(normalised, [table, tokens])
    assert "tl.atomic_add" in made.backward.source
    gradient = next(t for t in interpreter.run(made.backward) if t is not None)
    wide = table.detach().double().requires_grad_()
    upstream = torch.randn(made.result.shape, generator=torch.Generator().manual_seed(0))  # that of `generate`
    normalised(wide, tokens).backward(upstream.double())
    assert_as_good_as(gradient, table.grad, wide.grad, torch.float32)
