"""``mst::grouped_linear`` and its gradients on NVIDIA GPUs: lowerings to the templates of kernels/triton/grouped.py.

Offsets are read by the kernels alone: the host neither waits for them nor compiles anything anew when they change.
Whether a graph's products with stacks run sparse or dense is decided for all of it (:mod:`.cuda`): a product that is
lowered here has our tiles alone.
"""

from __future__ import annotations

from typing import Any

import torch
from mst_compile.kernels.triton import grouped
from torch._inductor import ir
from torch._inductor.lowering import lowerings

from mst_compile.blocks.grid import BlockGrid

from . import compat, gpu_operands, gpu_tiles, tuning
from .gpu import add_choice, gemm_constants, grad_weight_constants, mark
from .gpu_operands import static


def _listed(x: Any) -> Any:
    """Offsets, or an index, as kernels read them."""
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def _to_tune_on(grid: BlockGrid, x: Any, matrices: int, density: float) -> dict[int, Any]:
    """What the autotuner gives for the third and fourth operand: offsets of groups of one length, and random masks."""
    rows = compat.hint(x.get_size()[0])

    def offsets(node: Any) -> torch.Tensor:
        ends = torch.arange(1, matrices + 1, device="cpu") * rows // matrices
        return ends.to(node.get_device(), node.get_dtype())

    def index(node: Any) -> torch.Tensor:
        return tuning.realistic_index(grid, density, node.get_device()).expand(matrices, -1).contiguous()

    return {2: offsets, 3: index}


def _stack_constants(grid: BlockGrid, matrices: int) -> dict[str, int]:
    return {"MATRICES": matrices, "LANES": grouped.lanes(matrices), "INDEX_LENGTH": grid.index_length}


def linear(x: Any, weight: Any, offsets: Any, index: Any, block: int, by_rows: bool, density: float) -> Any:
    """``x[rows of e] W_e^T`` for every matrix ``e`` if the output features are the matrices' rows (``by_rows``), else
    ``x[rows of e] W_e``, and 0 for rows of none; None where no tile fits the GPU."""
    matrices, rows, cols = map(static, weight.get_size())
    grid = BlockGrid(rows, cols, block)
    tiles = gpu_tiles.grouped_gemm(x, grid, matrices, by_rows, density)
    if not tiles:
        return None
    weight, (x, _) = gpu_operands.weight(weight, 1, x.get_dtype()), gpu_operands.rows(x, 0)
    inputs = [x, weight, _listed(offsets), _listed(index)]
    out_features, reduced = (rows, cols) if by_rows else (cols, rows)
    layout = ir.FixedLayout(x.get_device(), x.get_dtype(), [x.get_size()[0], out_features])
    lines, stride = grid.lines(by_rows), static(weight.get_stride()[0])
    choices: list[Any] = []
    for tile in tiles:
        constants = gemm_constants(tile, lines, block, x, weight, by_rows, out_features, reduced)
        add_choice(
            grouped.gemm, choices, inputs, layout, tile, **constants, **_stack_constants(grid, matrices), TMA=False,
            W_MATRIX=rows * stride,
        )  # fmt: skip
    mark(choices, grid, "grouped-forward" if by_rows else "grouped-transposed", x, density)
    generators = _to_tune_on(grid, x, matrices, density)
    return compat.select("mst_grouped_linear", choices, inputs, layout, input_gen_fns=generators)


def grad_weight(
    grad: Any, x: Any, offsets: Any, index: Any, block: int, transposed: bool, dtype: torch.dtype, density: float
) -> Any:
    """Gradient of the stored stack in ``dtype``; None where no tile fits the GPU."""
    matrices = static(offsets.get_size()[0])
    out_features, in_features = static(grad.get_size()[1]), static(x.get_size()[1])
    rows, cols = (in_features, out_features) if transposed else (out_features, in_features)
    grid = BlockGrid(rows, cols, block)
    tiles = gpu_tiles.grouped_grad_weight(x, grid, density)
    if not tiles:
        return None
    (grad, _), (x, _) = gpu_operands.rows(grad, 0), gpu_operands.rows(x, 1)
    inputs = [x, grad, _listed(offsets), _listed(index)]
    layout = ir.FixedLayout(x.get_device(), dtype, [matrices * rows, cols])
    lines = grid.lines(not transposed)
    choices: list[Any] = []
    for tile in tiles:
        constants = grad_weight_constants(tile, lines, grid, x, grad, not transposed)
        add_choice(
            grouped.grad_weight, choices, inputs, layout, tile, **constants, **_stack_constants(grid, matrices),
            ACTIVE=grid.active, BLOCK_COLS=grid.block_cols,
        )  # fmt: skip
    mark(choices, grid, "grouped-grad-weight", x, density)
    generators = _to_tune_on(grid, x, matrices, density)
    found = compat.select("mst_grouped_grad_weight", choices, inputs, layout, input_gen_fns=generators)
    return lowerings[torch.ops.aten.view.default](found, [matrices, rows, cols])
