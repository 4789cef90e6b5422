"""Triton's interpreter, repaired: its numbers are those of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_same_bits
from pretend_gpu import Interpreter
from torch import Tensor

from .cases import FLOATS, by_hand


def bits(values: list[int], dtype: torch.dtype) -> Tensor:
    """Floating-point numbers by their bits."""
    raw = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    width = torch.iinfo(raw).bits
    return torch.tensor([v - (v >> (width - 1) << width) for v in values], dtype=raw).view(dtype)


ELEMENTWISE: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "add": ("x + y", lambda x, y: x + y),
    "multiply": ("x * y", lambda x, y: x * y),
    "constant": ("x * 1.5", lambda x, y: x * 1.5),
    # Triton 3.6 negates by subtracting from zero, which makes another zero of zero.
    "negate": ("tl.where(x == 0, x, -x)", lambda x, y: torch.where(x == 0, x, -x)),
    "absolute": ("tl.abs(x)", lambda x, y: x.abs()),
    "less": ("tl.where(x < y, x, y)", lambda x, y: torch.where(x < y, x, y)),
    "fma": ("tl.fma(x, y, y)", lambda x, y: (x.double() * y.double() + y.double()).float().bfloat16()),
}


sixteen_bf16 = st.lists(st.integers(0, 2**16 - 1), min_size=16, max_size=16)


@pytest.mark.parametrize("op", ELEMENTWISE)
@settings(max_examples=20, deadline=None)
@given(a=sixteen_bf16, b=sixteen_bf16)
def test_bf16_arithmetic_is_that_of_torch(interpreter: Interpreter, op: str, a: list[int], b: list[int]) -> None:
    expression, reference = ELEMENTWISE[op]
    x, y = bits(a, torch.bfloat16), bits(b, torch.bfloat16)
    source = by_hand(f"x = tl.load(a + i)\ny = tl.load(b + i)\ntl.store(out + i, {expression})")
    got = interpreter.run_on(source, [x, y, torch.empty_like(x)]).outputs[0]
    assert_same_bits(got, reference(x, y))


@settings(max_examples=40, deadline=None)
@given(a=st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16))
@example(a=[0x3F808000, 0x3F818000, 0x3F808001, 0x3F7FFFFF, 0xBF808000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000] * 2)
@example(a=[0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 1, 0x8000, 0x8001, 0x80000000, 0] * 2)
@pytest.mark.parametrize("cast", ["x.to(tl.bfloat16)", "x", "x.to(tl.bfloat16, fp_downcast_rounding='rtne')"])
def test_float32_is_rounded_to_the_nearest_bf16(interpreter: Interpreter, cast: str, a: list[int]) -> None:
    x = bits(a, torch.float32)
    out = torch.empty(16, dtype=torch.bfloat16)
    source = by_hand(f"x = tl.load(a + i)\ntl.store(out + i, {cast})")
    assert_same_bits(interpreter.run_on(source, [x, x, out]).outputs[0], x.bfloat16())


@pytest.mark.parametrize(
    ("source_type", "target_type"),
    [
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.int32),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_casts_convert_numbers_and_not_bits(
    interpreter: Interpreter, source_type: torch.dtype, target_type: torch.dtype
) -> None:
    x = (torch.linspace(-2000, 2000, 16, dtype=torch.float64)).to(source_type)
    source = by_hand("tl.store(out + i, tl.load(a + i))")
    got = interpreter.run_on(source, [x, x, torch.empty(16, dtype=target_type)]).outputs[0]
    assert_same_bits(got, x.to(target_type))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dot(interpreter: Interpreter, dtype: torch.dtype) -> None:
    # Small integers: every product and sum is exact, in any order.
    x, y = (torch.randint(-8, 9, (16, 16)).to(dtype) for _ in range(2))
    source = by_hand("tl.store(out + square, tl.dot(tl.load(a + square), tl.load(b + square)))")
    got = interpreter.run_on(source, [x, y, torch.empty(16, 16)]).outputs[0]
    assert torch.equal(got, x.float() @ y.float())


REDUCTIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "sum": ("tl.sum(x, 1)", lambda x: x.sum(1)),
    "max": ("tl.max(x, 0)", lambda x: x.amax(0)),
    "argmax": ("tl.argmax(x, 1)", lambda x: x.argmax(1)),
    "inductor's max": ("triton_helpers.max2(x, 1)", lambda x: x.amax(1)),
    "any order": ("tl.reduce(x, 0, triton_helpers.minimum)", lambda x: x.amin(0)),
    "kept": ("tl.reshape(tl.reduce(x, 0, triton_helpers.minimum, keep_dims=True), (16,))", lambda x: x.amin(0)),
    "all": ("tl.zeros((16,), tl.float32) + tl.reduce(x, None, triton_helpers.maximum)", lambda x: x.amax().expand(16)),
    "cumsum": ("tl.sum(tl.cumsum(x, 1), 1)", lambda x: x.cumsum(1).sum(1)),
    "scan": ("tl.sum(tl.associative_scan(x, 1, triton_helpers.maximum), 1)", lambda x: x.cummax(1).values.sum(1)),
    "down": ("tl.sum(tl.associative_scan(x, 0, triton_helpers.maximum), 0)", lambda x: x.cummax(0).values.sum(0)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(interpreter: Interpreter, name: str, dtype: torch.dtype) -> None:
    expression, reference = REDUCTIONS[name]
    x = torch.randint(-1, 2, (16, 16)).float()  # every partial sum fits in 8 bits
    x[torch.arange(16), torch.randperm(16)] = 2
    source = by_hand(f"x = tl.load(a + square)\ntl.store(out + i, {expression})")
    got = interpreter.run_on(source, [x.to(dtype), x, torch.empty(16)]).outputs[0]
    assert torch.equal(got, reference(x).float())


def test_libdevice_is_computed(interpreter: Interpreter) -> None:
    x = torch.linspace(-3, 3, 16)
    source = by_hand("x = tl.load(a + i)\ntl.store(out + i, tl.where(libdevice.isnan(x), 0.0, libdevice.erf(x)))")
    got = interpreter.run_on(source, [x, x, torch.empty(16)]).outputs[0]
    torch.testing.assert_close(got, x.erf())


def test_masks_and_loops_that_depend_on_loaded_scalars(interpreter: Interpreter) -> None:
    body = """
first = tl.load(a)
last = tl.load(a + 1)
total = tl.zeros((16,), tl.int32)
for t in range(first, last):
    total += tl.load(b + t)
live = (i < last) & (first > 0)
tl.store(out + i, total, mask=live)
"""
    bounds, values = torch.tensor([3, 9], dtype=torch.int32), torch.arange(16, dtype=torch.int32) ** 2
    out = torch.full((16,), -1, dtype=torch.int32)
    got = interpreter.run_on(by_hand(body), [bounds, values, out]).outputs[0]
    assert got.tolist() == [int(values[3:9].sum())] * 9 + [-1] * 7
