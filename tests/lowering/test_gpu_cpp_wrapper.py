"""Inductor's ``cpp_wrapper`` with the GPU's templates: the C++ that it writes launches them, and calls no operator of
ours. It is read, not compiled, which takes CUDA's headers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import mst_compile.lowering.inductor  # noqa: F401  (registers the lowerings)
import pytest
import torch
from attention_parts import combine
from gpu_attention_cases import case
from mask_cases import index_of
from pretend_gpu import compat, generate
from torch import Tensor

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="PyTorch 2.11 compiles kernels for a card that is there before it writes C++"
)

BF16 = torch.bfloat16
_FALLBACKS = ("custom_op_wrapper", "proxy_executor")  # how this C++ calls an operator that is Python's


@pytest.fixture
def texts() -> Iterator[list[str]]:
    """The C++ of each graph, forward pass first."""
    found: list[str] = []

    def written(graph: Any) -> str:
        found.append(str(graph.codegen()[0].value))
        return ""

    with mock.patch.object(compat, "wrapper_text", written):
        yield found


@pytest.mark.parametrize("block", [64, 128])
def test_a_layer(block: int, texts: list[str]) -> None:
    mask = torch.rand(512 // block, 512 // block, generator=torch.Generator().manual_seed(0)) < 0.4
    operands = [torch.randn(1024, 512, dtype=BF16), torch.randn(512, 512, dtype=BF16), torch.randn(512, dtype=BF16)]
    operands = [operand.requires_grad_() for operand in operands]

    def layer(x: Tensor, w: Tensor, bias: Tensor, index: Tensor) -> Tensor:
        return torch.nn.functional.gelu(torch.ops.mst.linear(x, w, bias, index, block, False))

    generate(layer, [*operands, index_of(mask, 512, 512, block)], config={"cpp_wrapper": True})
    forward, backward = texts
    _check(forward, 1)
    _check(backward, 2)  # of the input, and of the weight in parts


def test_attention(texts: list[str]) -> None:
    given = case(combine("window and distances", 40, 32), dtype=BF16)
    generate(given.function(), given.arguments(), config={"cpp_wrapper": True})
    forward, backward = texts
    _check(forward, 2)
    _check(backward, 2)


def _check(text: str, templates: int) -> None:
    launched = {line.split("(")[0].strip() for line in text.splitlines() if line.startswith("    call_triton_tem")}
    assert len(launched) >= templates, launched
    assert not [line for line in text.splitlines() for name in _FALLBACKS if name in line and "mst" in line]
