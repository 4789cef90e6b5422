"""Which tiles are offered, with tuning and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_parts import combine
from gpu_attention_cases import case as attention_case
from gpu_cases import BLOCKS, Product, product
from hypothesis import given
from hypothesis import strategies as st
from mst_compile.kernels.triton import splits, table
from mst_compile.kernels.triton.tiles import GEMM, GRAD_WEIGHT
from pretend_gpu import Generated, generate
from pretend_gpu.device.h100 import H100

from mst_compile.blocks.grid import BlockGrid

BF16, F32 = torch.bfloat16, torch.float32
KINDS = ("half", "tf32", "ieee")


# -- the table ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(BLOCKS), st.sampled_from(KINDS), st.floats(0, 1), st.integers(1, 10**6),
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_table_names_tiles_that_are_tested(
    block: int, kind: str, density: float, tokens: int, shape: tuple[int, int], by_rows: bool, tma: bool
) -> None:
    """Every one is compiled to machine code by the tests of the list that it is from."""
    grid = BlockGrid(*shape, block)
    tile = table.gemm(grid, by_rows, kind, density, tokens, 132, tma)
    other = table.grad_weight(grid, kind, density)
    assert (tile is None) == (density >= table.dense_from(grid))
    assert tile is None or (tile in GEMM[block, kind] and (tma or not tile.tma))
    assert other is None or other in GRAD_WEIGHT[block, kind]


@pytest.mark.parametrize("block", BLOCKS)
def test_few_tokens_get_small_tiles(block: int) -> None:
    grid = BlockGrid(768, 768, block)
    many, few = (table.gemm(grid, True, "half", 0.2, tokens, 132, True) for tokens in (65536, 256))
    assert few is not None
    assert many is not None
    assert few.rows < many.rows
    assert not few.union
    assert not few.tma


@pytest.mark.parametrize("block", BLOCKS)
def test_narrow_weights_are_dense_earlier(block: int) -> None:
    """Short products have no time to hide their beginnings and ends."""
    wide, narrow = BlockGrid(4096, 4096, block), BlockGrid(3072, 768, block)
    assert table.dense_from(narrow) <= table.dense_from(wide)
    assert table.grad_weight(wide, "half", 0.1) is not None
    assert (table.grad_weight(narrow, "half", 0.1) is None) == (block == 32)


@given(
    tokens=st.integers(1, 10**6), programs=st.integers(1, 5000), at_once=st.integers(1, 1000),
    partial=st.integers(1, 10**9),
)  # fmt: skip
def test_parts_of_the_tokens(tokens: int, programs: int, at_once: int, partial: int) -> None:
    parts = splits.parts(tokens, programs, at_once, partial)
    assert parts == 1 or (parts * 512 <= tokens and parts * partial <= 384 << 20)


@pytest.mark.parametrize(("programs", "at_once", "parts"), [(102, 264, 5), (264, 264, 1), (265, 264, 5), (1, 264, 32)])
def test_parts_fill_whole_waves(programs: int, at_once: int, parts: int) -> None:
    """As many programs as run at once end together; one more would run alone, were the tokens not cut."""
    assert splits.parts(16384, programs, at_once, 1 << 20) == parts


# -- what is generated -------------------------------------------------------------------------------------------------


def some(density: float, *, block: int = 64, m: int = 4096, features: int = 512, dtype: torch.dtype = BF16) -> Case:
    mask = torch.ones(BlockGrid(512, features, block).shape, dtype=torch.bool)
    return Case(product(m, features, 512, mask, block, dtype=dtype, bias=False), density)


class Case:
    """A product whose operator says the density that it is to be made for."""

    def __init__(self, of: Product, density: float) -> None:
        self.of, self.density = of, density

    def function(self) -> Callable[..., torch.Tensor]:
        block, density = self.of.block, self.density

        def run(x: torch.Tensor, weight: torch.Tensor, bias: None, index: torch.Tensor) -> torch.Tensor:
            return torch.ops.mst.linear(x, weight, bias, index, block, False, density)

        return run

    def generate(self, **config: Any) -> Generated:
        return generate(self.function(), self.of.arguments(), config=config)


def code(made: Generated) -> str:
    return made.forward.source + made.backward.source


def test_nothing_is_tuned_unless_asked_for() -> None:
    """No choice is benchmarked, so that a first step does not wait for it."""
    made = some(0.1).generate()
    assert not made.questions
    assert "mst_dense" not in code(made)
    assert "BLOCK_M : tl.constexpr = 128" in made.forward.source, "the table's tile"
    attention = attention_case(combine("window and distances", 40, 32))
    assert not generate(attention.function(), attention.arguments()).questions


@pytest.mark.parametrize("setting", ["max_autotune", "max_autotune_gemm"])
def test_all_is_offered_when_asked_for(setting: str) -> None:
    made = some(0.1).generate(**{setting: True})
    counts = sorted(len(q.choices) for q in made.questions)
    gemm, grad_weight = len(GEMM[64, "half"]) + 1, len(GRAD_WEIGHT[64, "half"]) + 1
    assert counts == sorted([gemm, gemm, grad_weight]), "each list and the dense product"


@pytest.mark.parametrize(("block", "density", "dense"), [(32, 0.2, "grad_weight"), (32, 0.3, "linear grad_weight")])
def test_dense_products_where_they_are_known_to_be_faster(block: int, density: float, dense: str) -> None:
    text = code(some(density, block=block).generate())
    for name in ("linear", "grad_weight"):
        assert (f"mst_dense_{name}" in text) == (name in dense.split()), name


# -- other GPUs, other operands ----------------------------------------------------------------------------------------


@pytest.fixture
def properties() -> Iterator[Callable[..., None]]:
    """Changes what the pretended GPU says of itself."""
    kept = vars(H100).copy()
    yield vars(H100).update
    vars(H100).update(kept)


def offered(made: Generated) -> str:
    return " ".join(choice for q in made.questions for choice in q.choices)


def test_a_gpu_without_tensor_memory_accelerator(properties: Callable[..., None]) -> None:
    case = some(0.1, block=128)
    assert "TMA=True" in offered(case.generate(max_autotune_gemm=True))
    properties(multi_processor_count=8)  # so that few tokens are many
    assert "tensor_descriptor" in code(some(0.3, block=128).generate())
    properties(major=8)
    assert "TMA=True" not in offered(case.generate(max_autotune_gemm=True))
    made = code(some(0.3, block=128).generate())
    assert "mst_dense" not in made
    assert "tensor_descriptor" not in made, "another tile of ours takes its place"


def test_a_gpu_with_less_shared_memory(properties: Callable[..., None]) -> None:
    case = some(0.1, block=128)
    assert "BLOCK_M=256" in offered(case.generate(max_autotune_gemm=True))
    properties(shared_memory_per_block_optin=100 << 10)
    assert "BLOCK_M=256" not in offered(case.generate(max_autotune_gemm=True))
    assert "mst_dense" not in code(case.generate()), "the table's tile fits"
    properties(shared_memory_per_block_optin=64 << 10)
    text = code(case.generate())
    assert "mst_dense_linear" in text
    assert "mst_dense_grad_weight" in text, "no tile fits"
    assert "BLOCK_M" not in text
