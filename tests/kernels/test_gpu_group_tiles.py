"""Every tile of the products with stacks of matrices as machine code for an H100; and which is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import BLOCKS, TUNED
from gpu_group_cases import groups
from gpu_machine_code import check_tile, kind_of, sizes_of_accesses
from hypothesis import given
from hypothesis import strategies as st
from mst_compile.kernels.triton import table, tiles
from pretend_gpu import GeneratedKernel, check, cross_compile, generate, kernels_of
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

BF16, F32 = torch.bfloat16, torch.float32
LEAST_SHARED = 99 << 10  # bytes a block may have on any GPU of compute capability 8.0 and up


def mask_of(rows: int, cols: int, block: int) -> Tensor:
    return torch.rand(BlockGrid(rows, cols, block).shape, generator=torch.Generator().manual_seed(1)) < 0.4


def templates(
    block: int,
    dtype: torch.dtype,
    choice: int,
    in_features: int,
    out_features: int,
    *,
    transposed: bool,
    dynamic: bool = False,
    **more: Any,
) -> dict[str, GeneratedKernel]:
    """Forward, grad-input and grad-weight of three groups, made with one of the tiles."""
    stored = (in_features, out_features) if transposed else (out_features, in_features)
    masks = [mask_of(*stored, block)] * 3
    case = groups([200, 0, 99], in_features, out_features, masks, block, dtype=dtype, transposed=transposed, **more)
    made = generate(
        case.function(),
        case.arguments(),
        choose=lambda _, found: min(choice, len(found) - 1),
        config=TUNED,
        dynamic=dynamic or None,
    )
    asked = {question.name: len(question.choices) for question in made.questions}
    kind = "half" if dtype != F32 else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    offered = {
        "mst_grouped_linear": len(tiles.GROUPED_GEMM[block, kind]),
        "mst_grouped_grad_weight": len(tiles.GROUPED_GRAD_WEIGHT[block, kind]),
    }
    # Inductor asks where there is a choice.
    assert asked == {name: count for name, count in offered.items() if count > 1}, "no dense product among them"
    forward, backward = (
        [k for k in kernels_of(graph.source) if k.kind == "template"] for graph in (made.forward, made.backward)
    )
    found = {kind_of(kernel): kernel for kernel in backward}
    return {"forward": forward[0], "grad-input": found["gemm"], "grad-weight": found["grad_weight"]}


@pytest.mark.parametrize(("kind", "tf32"), [("half", False), ("tf32", True), ("ieee", False)], indirect=["tf32"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_tile_of_groups_compiles_to_good_machine_code(block: int, kind: str, tf32: bool) -> None:
    """Tensor core instructions, no spills, buffers as deep as asked for, operands and gradients moved by 16 bytes."""
    gemm, grad_weight = tiles.GROUPED_GEMM[block, kind], tiles.GROUPED_GRAD_WEIGHT[block, kind]
    dtype = BF16 if kind == "half" else F32
    for choice in range(max(len(gemm), len(grad_weight))):
        # Forward of one layout is grad-input of the other.
        transposed, which = choice % 2 == 1, "forward" if choice < 2 else "grad-input"
        found = templates(block, dtype, choice, 512, 256, transposed=transposed, epilogue="gelu")
        if choice < len(gemm):
            check_tile(gemm[choice], found[which], block, dtype, kind)
        if choice < len(grad_weight):
            check_tile(grad_weight[choice], found["grad-weight"], block, dtype, kind)


@pytest.mark.parametrize(
    ("in_features", "out_features", "transposed", "names"),
    [(199, 33, False, ("grad-input",)), (33, 200, True, ("forward", "grad-weight"))],
)
def test_unaligned_widths_of_groups_are_loaded_as_aligned_ones_are(
    in_features: int, out_features: int, transposed: bool, names: tuple[str, ...]
) -> None:
    """With a number of tokens that is not known too."""
    found = templates(64, BF16, 0, in_features, out_features, transposed=transposed, dynamic=transposed)
    for name in names:
        kernel = found[name]
        sizes = sizes_of_accesses(kernel, BF16, tf32=False)
        if name == "grad-weight":
            sizes.pop("writes")  # rows of such a weight begin anywhere
        check(cross_compile(kernel), wgmma=True, stages=kernel.num_stages - 1, spills=0, atomics=0, **sizes)


# -- which is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "kind"), sorted(tiles.GROUPED_GEMM))
def test_a_tile_fits_every_gpu(block: int, kind: str) -> None:
    size = 2 if kind == "half" else 4
    for offered in (tiles.GROUPED_GEMM[block, kind], tiles.GROUPED_GRAD_WEIGHT[block, kind]):
        assert min(tile.shared(block, size) for tile in offered) <= LEAST_SHARED
    assert not any(t.chain > 1 or t.tma or t.union for t in tiles.GROUPED_GEMM[block, kind])


@given(
    st.sampled_from(sorted(tiles.GROUPED_GEMM)), st.floats(0, 1), st.integers(0, 10**6), st.integers(1, 300),
    st.integers(1, 200),
)  # fmt: skip
def test_the_table_takes_tiles_that_are_offered(
    key: tuple[int, str], density: float, tokens: int, matrices: int, lines: int
) -> None:
    block, kind = key
    grid = BlockGrid(512, 512, block)
    offered = tiles.GROUPED_GEMM[key]
    assert table.grouped_gemm(offered, grid, lines, kind, density, tokens, matrices, 132) in offered
    for some in (offered[:1], offered[-1:]):  # as on a GPU with less shared memory
        assert table.grouped_gemm(some, grid, lines, kind, density, tokens, matrices, 132) == some[0]
    assert table.grouped_grad_weight(tiles.GROUPED_GRAD_WEIGHT[key][:1], block, kind, density)


@pytest.mark.parametrize("block", BLOCKS)
def test_small_groups_get_small_tiles(block: int) -> None:
    grid = BlockGrid(4096, 4096, block)
    asked = tiles.GROUPED_GEMM[block, "half"], grid, 64, "half", 0.3
    rows = [table.grouped_gemm(*asked, tokens, 64, 132).rows for tokens in (64 * 8, 64 * 4096)]
    assert rows[0] < rows[1]


def test_dense_products_take_over_from_stacks_as_the_arithmetic_says() -> None:
    grid = BlockGrid(14336, 4096, 128)
    assert table.grouped_dense_from(grid, 4096) == pytest.approx(0.743, abs=0.001)
    assert table.grouped_dense_from(grid, 64) == pytest.approx(0.127, abs=0.001)
    assert table.grouped_dense_from(grid, 16) == 0
    assert table.grouped_dense_from(grid, 0) == 0


@given(st.sampled_from(BLOCKS), st.tuples(st.integers(1, 9000), st.integers(1, 9000)), st.integers(0, 10**6))
def test_stacks_are_dense_no_later_than_single_weights(block: int, shape: tuple[int, int], tokens: int) -> None:
    grid = BlockGrid(*shape, block)
    few, many = table.grouped_dense_from(grid, tokens), table.grouped_dense_from(grid, tokens + 100)
    assert 0 <= few <= many <= table.dense_from(grid)
