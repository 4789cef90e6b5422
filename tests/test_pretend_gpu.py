"""The harness that stands in for a GPU: it finds right code right, wrong code wrong, and says what it could not run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretend_gpu
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pretend_gpu import (
    Generated,
    Interpreter,
    WorkerError,
    check,
    cross_compile,
    cross_compile_jit,
    generate,
    kernels_of,
    pretend_h100,
    snapshot,
)
from torch import Tensor
from torch.nn import functional as F

TRITON_MM = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running


def mm_bias_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x @ w.t() + b)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((m, k), (n, k), (n,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """Elementwise |got - want| <= bound, NaN nowhere."""
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - bound
    assert bool((excess <= 0).all()), f"off by up to {float(excess.max())} beyond the bound"


# -- a template, forward and backward, against float64 -----------------------------------------------------------------

# Largest |gelu'| (at sqrt 2) and |gelu''| (2 phi(0), at 0).
GELU_1, GELU_2 = 1.129, 0.798


def wanted(x: Tensor, w: Tensor, b: Tensor, upstream: Tensor, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Result and gradients in float64, each with a bound on what a kernel in `dtype` may deviate.

    Products are summed in float32 (an error of at most K ulp of the sum of magnitudes); the pre-activation is rounded
    to `dtype` at most twice, each result once; erf and exp are good to a few ulp of float32.
    """
    u, v = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    x, w, b, g = (t.detach().double() for t in (x, w, b, upstream))
    (m, k), n = x.shape, len(w)
    product = x @ w.t()
    z = product + b
    magnitude = x.abs() @ w.abs().t() + b.abs()
    z_bound = (k + 2) * v * magnitude + u * (product.abs() + z.abs())
    phi = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    cdf = (1 + torch.erf(z / math.sqrt(2))) / 2
    y = z * cdf
    d = g * (cdf + z * phi)
    d_bound = GELU_2 * g.abs() * z_bound + 2 * u * d.abs() + 16 * v * g.abs() * (1 + z.abs())
    # A denormal result is rounded by half the smallest denormal, whatever its size.
    tiny = torch.finfo(dtype).smallest_normal * u

    def bounded(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        return value, error + u * value.abs() + tiny

    return {
        "y": bounded(y, GELU_1 * z_bound + 16 * v * (1 + z.abs())),
        "x": bounded(d @ w, d_bound @ w.abs() + (n + 2) * v * (d.abs() @ w.abs())),
        "w": bounded(d.t() @ x, d_bound.t() @ x.abs() + (m + 2) * v * (d.t().abs() @ x.abs())),
        "b": bounded(d.sum(0), d_bound.sum(0) + (m + 2) * v * d.abs().sum(0)),
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


# -- the interpreter's repairs -----------------------------------------------------------------------------------------

KERNEL = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.triton_helpers import libdevice

@triton_heuristics.template(
    num_stages=1,
    num_warps=4,
    triton_meta={"signature": {}, "constants": {}, "configs": [{}]},
    inductor_meta={"grid_type": "FixedGrid", "fixed_grid": ["x", "y", "z"], "extra_launcher_args": ["x", "y", "z"]},
)
@triton.jit
def kernel(a, b, out):
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    BODY
"""

WRAPPER = """
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
async_compile = AsyncCompile()
kernel = async_compile.triton('kernel', '''KERNEL''', device_str='cuda')
async_compile.wait(globals())
def call(args):
    a, b, out = args
    args.clear()
    with torch.cuda._DeviceGuard(0):
        kernel.run(a, b, out, 1, 1, 1, stream=0)
    return (out,)
"""


def by_hand(body: str) -> str:
    """A wrapper as Inductor writes it, around a kernel with this body."""
    return WRAPPER.replace("KERNEL", KERNEL.replace("BODY", body.strip().replace("\n", "\n    ")))


def bits(values: list[int], dtype: torch.dtype) -> Tensor:
    """Floating-point numbers by their bits."""
    raw = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    width = torch.iinfo(raw).bits
    return torch.tensor([v - (v >> (width - 1) << width) for v in values], dtype=raw).view(dtype)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Bit for bit, any NaN for any NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    nan = want.isnan() if want.is_floating_point() else torch.zeros_like(want, dtype=torch.bool)
    assert torch.equal(got[~nan].signbit(), want[~nan].signbit())


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
    assert_same(got, reference(x, y))


@settings(max_examples=40, deadline=None)
@given(a=st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16))
@example(a=[0x3F808000, 0x3F818000, 0x3F808001, 0x3F7FFFFF, 0xBF808000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000] * 2)
@example(a=[0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 1, 0x8000, 0x8001, 0x80000000, 0] * 2)
@pytest.mark.parametrize("cast", ["x.to(tl.bfloat16)", "x", "x.to(tl.bfloat16, fp_downcast_rounding='rtne')"])
def test_float32_is_rounded_to_the_nearest_bf16(interpreter: Interpreter, cast: str, a: list[int]) -> None:
    x = bits(a, torch.float32)
    out = torch.empty(16, dtype=torch.bfloat16)
    source = by_hand(f"x = tl.load(a + i)\ntl.store(out + i, {cast})")
    assert_same(interpreter.run_on(source, [x, x, out]).outputs[0], x.bfloat16())


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
    assert_same(got, x.to(target_type))


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


# -- other kernels -----------------------------------------------------------------------------------------------------


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
                scale = want.double().abs().max()
                bound = (4 * torch.finfo(dtype).eps + 290 * torch.finfo(torch.float32).eps) * scale
                assert got.dtype == want.dtype
                assert_within(got, want.double(), bound.expand(want.shape))


def gather(i: Tensor, w: Tensor) -> Tensor:
    return F.embedding(i, w).relu()


def test_atomics_and_operators_without_meta_kernels(interpreter: Interpreter) -> None:
    made = generate(gather, [torch.randint(0, 9, (40,)), torch.randn(9, 8, requires_grad=True)])
    kernels = kernels_of(made.backward.source)
    assert any(cross_compile(kernel).atomics for kernel in kernels)
    got = [x for x in interpreter.run(made.backward) if x is not None]
    want = [x for x in made.backward.outputs if x is not None]
    torch.testing.assert_close(got, want)


def increment(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y)
    return x * 2


def test_inputs_that_the_graph_mutates(interpreter: Interpreter) -> None:
    x, y = torch.randn(5, 7), torch.randn(5, 7)
    before = x.clone()
    made = generate(increment, [x, y])
    assert list(made.graphs) == ["forward"]
    ran = interpreter.run_on(made.forward.source, made.forward.inputs)
    places = [i for i, value in enumerate(made.forward.inputs) if torch.equal(value, before)]
    assert len(places) == 1
    assert torch.equal(ran.inputs[places[0]], before + y)
    assert torch.equal(made.forward.inputs_after[places[0]], before + y)
    assert torch.equal(made.forward.inputs[places[0]], before)
    assert torch.equal(ran.outputs[0], (before + y) * 2)


# -- machine code ------------------------------------------------------------------------------------------------------


def tile_of_64_by_128(name: str, choices: list[Any]) -> int:
    """A choice for the tensor cores: tiles of 64 x 128 x 64, three stages."""
    texts = [str(choice) for choice in choices]
    tile = "BLOCK_K=64, BLOCK_M=64, BLOCK_N=128"
    return next(i for i, text in enumerate(texts) if tile in text and "num_stages=3" in text)


def test_machine_code_of_a_template() -> None:
    args = [x.detach() for x in operands(256, 256, 512, torch.bfloat16)]
    made = generate(mm_bias_gelu, args, config=TRITON_MM, choose=tile_of_64_by_128)
    (kernel,) = kernels_of(made.forward.source)
    assert (kernel.kind, kernel.num_stages, kernel.num_warps) == ("template", 3, 4)
    facts = cross_compile(kernel)
    check(facts, wgmma=True, stages=3)
    assert set(facts.wgmma) == {"m64n128k16"}
    assert facts.buffers == ((3, 64, 64), (3, 64, 128))
    assert facts.shared >= 3 * (64 + 128) * 64 * 2
    assert facts.cp_async > 0
    assert len(repr(facts)) < 2000
    with pytest.raises(AssertionError, match=rf"^{kernel.name}: depth is 3, at least 4 required"):
        check(facts, wgmma=True, stages=4)


def test_float32_products_have_no_tensor_core() -> None:
    args = [x.detach() for x in operands(64, 64, 64, torch.float32)]
    (kernel,) = kernels_of(generate(mm_bias_gelu, args, config=TRITON_MM).forward.source)
    facts = cross_compile(kernel)
    check(facts, wgmma=False)
    assert not facts.wgmma
    assert not facts.mma_v2
    with pytest.raises(AssertionError, match=rf"^{kernel.name}: wgmma is empty"):
        check(facts, wgmma=True)


@triton.jit
def hungry(x, y, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + i)
    tl.store(y + i, value * tl.sum(value))


def test_spills_are_found() -> None:
    types = {"x": "*fp32", "y": "*fp32"}
    modest = cross_compile_jit(hungry, types, {"N": 32}, num_warps=4)
    check(modest, wgmma=False)
    assert modest.spills == 0
    spilling = cross_compile_jit(hungry, types, {"N": 128}, num_warps=2)
    assert spilling.spills > 0
    with pytest.raises(AssertionError, match=rf"hungry: spills is {spilling.spills}, at most 0 allowed"):
        check(spilling, wgmma=False)
    check(spilling, wgmma=False, spills=spilling.spills)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"registers": 5}, r"registers is \d+, at most 5"),
        ({"stages": 2}, "depth is 0, at least 2"),
        ({"shared": -1}, r"shared is \d+, at most -1"),
        ({"wgmma": True, "atomics": -1}, "atomics is 0, at most -1 allowed; wgmma is empty"),
    ],
)
def test_check_names_the_fact_and_the_bound(bounds: dict[str, Any], message: str) -> None:
    facts = cross_compile_jit(hungry, {"x": "*fp32", "y": "*fp32"}, {"N": 32})
    with pytest.raises(AssertionError, match=f"^hungry: {message}"):
        check(facts, **({"wgmma": False} | bounds))


def test_the_configurations_of_a_pointwise_kernel() -> None:
    made = generate(lambda x, y: (x.t() + y).exp(), [torch.randn(300, 500), torch.randn(500, 300)])
    (kernel,) = kernels_of(made.forward.source)
    assert kernel.kind == "pointwise"
    assert len(kernel.configs) > 1
    code = set()
    for config in kernel.configs[:2]:
        assert {"XBLOCK", "YBLOCK"} <= set(config.blocks)
        code.add(cross_compile(kernel, config).sass)
    assert len(code) == 2


# -- choices, backends, errors -----------------------------------------------------------------------------------------


def test_walking_the_choices(interpreter: Interpreter) -> None:
    config = TRITON_MM | {"max_autotune_gemm_backends": "ATEN,TRITON"}
    seen: dict[int, str] = {}
    for pick in (0, 1, 2):
        args = [torch.randn(48, 40), torch.randn(40, 24)]
        made = generate(torch.matmul, args, config=config, choose=lambda name, choices, pick=pick: pick)
        assert [(q.name, q.picked) for q in made.questions] == [("mm", pick)]
        assert len(made.questions[0].choices) > 3
        seen[pick] = made.forward.source
        torch.testing.assert_close(interpreter.run(made.forward)[0], made.result)
    assert "extern_kernels.mm(" in seen[0]
    assert not kernels_of(seen[0])
    notes = [kernels_of(seen[pick])[0].inductor_meta["config_args"] for pick in (1, 2)]
    assert notes[0] != notes[1]
    with pytest.raises(Exception, match="choice 1000 of mm: there are"):
        generate(torch.matmul, args, config=config, choose=lambda name, choices: 1000)


def test_a_backend_of_ones_own() -> None:
    from torch._inductor.compile_fx import compile_fx

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any], inner: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return compile_fx(graph, inputs, inner_compile=inner)

    made = generate(mm_bias_gelu, operands(4, 5, 6, torch.float32), backend_wrapper=backend)
    assert len(graphs) == 1
    assert list(made.graphs) == ["forward", "backward"]


def test_errors_reach_the_parent_and_the_worker_goes_on(interpreter: Interpreter) -> None:
    x = torch.ones(16)
    with pytest.raises(WorkerError, match="not enough values to unpack") as raised:
        interpreter.run_on(by_hand("pass"), [x])
    assert "in the worker:\nTraceback" in str(raised.value)
    with pytest.raises(WorkerError, match=r"(?s)no_such_name.*in kernel kernel, grid \(1, 1, 1\)"):
        interpreter.run_on(by_hand("tl.store(out + i, no_such_name)"), [x, x, x])
    with pytest.raises(WorkerError, match="atomic addition of bfloat16"):
        interpreter.run_on(by_hand("tl.atomic_add(out + i, tl.load(a + i))"), [x.bfloat16()] * 3)
    made = generate(torch.sin, [torch.randn(4)])
    with pytest.raises(WorkerError, match="expected size 5==4"):  # sizes are asserted as generated
        interpreter.run_on(made.forward.source, [torch.randn(5)])
    source = by_hand("tl.store(out + i, tl.load(a + i) + tl.load(b + i))")
    assert torch.equal(interpreter.run_on(source, [x, x, x]).outputs[0], x + x)


EXTERN = """
import torch
from torch._inductor.select_algorithm import ExternKernelChoice

def thrice(x, *, out):
    return torch.mul(x, 3, out=out)

print("noise on standard output")
ExternKernelChoice(thrice, name="pretend_gpu_test_thrice", has_out_variant=True)
"""


def test_worker_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tf32, modules to import first, noise on stdout, and a worker that dies."""
    (tmp_path / "pretend_gpu_test_extern.py").write_text(EXTERN)
    monkeypatch.syspath_prepend(str(tmp_path))
    dot = "tl.dot(tl.load(a + square), tl.load(b + square), input_precision='PRECISION')"
    eye = torch.eye(16)
    x = torch.full((16, 16), 1 + 2**-10 + 2**-11)
    call = "extern_kernels.pretend_gpu_test_thrice(a, out=out); _ = (a, b, out, 1, 1, 1)"
    extern = by_hand("pass").replace("kernel.run(a, b, out, 1, 1, 1, stream=0)", call)
    with Interpreter(tf32=True, preload=["pretend_gpu_test_extern"]) as interpreter:
        for precision, kept in (("tf32", 1 + 2**-10), ("ieee", 1 + 2**-10 + 2**-11)):
            source = by_hand(f"tl.store(out + square, {dot.replace('PRECISION', precision)})")
            got = interpreter.run_on(source, [x, eye, torch.empty(16, 16)]).outputs[0]
            assert torch.equal(got, torch.full((16, 16), kept))
        assert torch.equal(interpreter.run_on(extern, [x, x, torch.empty(16, 16)]).outputs[0], 3 * x)
        with pytest.raises(WorkerError, match="exit code 3"):
            interpreter.run_on("import os\nos._exit(3)", [])
    with pytest.raises(WorkerError, match="context manager"):
        interpreter.run_on(extern, [])


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_the_pretend_device_is_seen_and_forgotten() -> None:
    from torch._inductor.utils import is_big_gpu
    from torch.utils._triton import has_triton

    before = (torch.cuda.is_available(), torch.version.cuda, has_triton())
    with pretend_h100():
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        assert is_big_gpu(0)
        assert has_triton()
    assert (torch.cuda.is_available(), torch.version.cuda, has_triton()) == before


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(3.0)[:, None].expand(3, 4),
        torch.arange(12.0)[3:9:2],
        torch.arange(8.0).as_strided((3, 4), (1, 1)),
        torch.empty(0, 3),
        torch.tensor(2.0),
    ],
)
def test_snapshots_keep_strides(view: Tensor) -> None:
    copy = snapshot(view)
    assert torch.equal(copy, view)
    assert copy.stride() == view.stride()
    if view.numel():
        view.as_strided((1,), (1,)).add_(1)
        assert not torch.equal(copy, view)


def test_the_package_stands_alone() -> None:
    for file in Path(pretend_gpu.__file__).parent.glob("*.py"):
        assert "mst_compile" not in file.read_text(), file.name
    assert set(pretend_gpu.__all__) <= set(dir(pretend_gpu))


def test_memory_that_was_never_written_is_seen(interpreter: Interpreter) -> None:
    made = generate(lambda x: (x + 1).relu(), [torch.randn(40)])
    store = "tl.store(out_ptr0 + (x0), "
    assert store in made.forward.source
    unwritten = "\n".join(x for x in made.forward.source.splitlines() if store not in x)
    (y,) = interpreter.run_on(unwritten, made.forward.inputs).outputs
    assert y.isnan().all()


def test_scattered_rows_of_one_program_each(interpreter: Interpreter) -> None:
    """Atomic additions of a whole row under a mask of one element."""
    table, tokens = torch.randn(500, 256, requires_grad=True), torch.randint(500, (3, 41))

    def normalised(table: Tensor, tokens: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(torch.nn.functional.embedding(tokens, table), (256,))

    made = generate(normalised, [table, tokens])
    assert "tl.atomic_add" in made.backward.source
    gradient = next(t for t in interpreter.run(made.backward) if t is not None)
    torch.testing.assert_close(gradient, table.grad, rtol=1e-5, atol=1e-5)
