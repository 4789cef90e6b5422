"""Machine code: what it says, and the bounds it is held against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from pretend_gpu import check, cross_compile, cross_compile_jit, generate, kernels_of

from .cases import TRITON_MM, mm_bias_gelu, operands


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
    assert facts.cp_async == sum(sum(facts.reads[f"arg_{name}"].values()) for name in "AB")
    check(facts, wgmma=True, reads={"arg_A": 16, "arg_B": 16}, writes={"out_ptr1": 16})
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


@triton.jit
def shifted(x, y, z, by, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    for t in range(by):
        value += tl.load(y + t * N + 1 + i)
    tl.store(z + i, value)


def test_the_size_of_reads_and_writes_by_argument() -> None:
    types = {"x": "*fp16", "y": "*fp16", "z": "*fp16", "by": "i64"}
    facts = cross_compile_jit(shifted, types, {"N": 1024}, num_warps=4)
    assert facts.reads == {"x": {16: 1}, "y": {2: 8}}
    assert facts.writes == {"z": {16: 1}}
    check(facts, wgmma=False, reads={"x": 16, "y": 2}, writes={"z": 16})
    with pytest.raises(AssertionError, match=r"shifted: reads of y by bytes are \{2: 8\}, all of 16 required"):
        check(facts, wgmma=False, reads={"x": 16, "y": 16})
    with pytest.raises(AssertionError, match=r"writes of x by bytes are \{\}, all of 16 required"):
        check(facts, wgmma=False, writes={"x": 16})


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
