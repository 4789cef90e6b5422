"""``mst::linear`` and its gradients on NVIDIA GPUs: Inductor lowerings to Triton templates.

A product is one of our tiles or the dense product of cuBLAS, whichever :mod:`.gpu_tiles` finds by table or the
autotuner by time, on index tensors of the density that training will mostly run at. Weights hold exact zeros outside
their active blocks, so the dense product and unions of block rows compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from mst_compile.kernels.triton import gather_gemm
from mst_compile.kernels.triton import grad_weight as grad_weight_kernel
from mst_compile.kernels.triton.tiles import GemmTile, GradWeightTile
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings, to_dtype
from torch._inductor.select_algorithm import ExternKernelChoice
from torch._inductor.virtualized import V, ops

from mst_compile.blocks.grid import BlockGrid, Lines
from mst_compile.blocks.index import DENSE_GRAD

from . import compat, crossover, gpu_operands, gpu_tiles, tuning
from .gpu_operands import static

# Tokens that all lines are multiplied with before the next ones: of 256 to 4096 the fastest on an H100 at density .1.
_GROUP_ROWS = 512
compat.on_tuned(crossover.from_tuning)


# -- choices -----------------------------------------------------------------------------------------------------------


def _index_generator(grid: BlockGrid, density: float) -> Any:
    return lambda index: tuning.realistic_index(grid, density, index.get_device())


def mark(choices: list[Any], grid: BlockGrid, product: str, x: Any, density: float) -> None:
    """Let :func:`crossover.from_tuning` know our own choices again, and what they compute."""
    name = f"{product} {x.get_dtype()} {compat.hint(x.get_size()[0])}"
    for choice in choices:
        choice.mst_product = grid, name, density


# -- forward and grad-input --------------------------------------------------------------------------------------------


def _dense_linear(a: Tensor, weight: Tensor, index: Tensor, *, transpose: bool, out: Tensor) -> Tensor:
    weight = weight.t() if transpose else weight
    depth = min(a.shape[1], weight.shape[0])  # either may be padded with zeros
    return torch.mm(a[:, :depth], weight[:depth, : out.shape[1]], out=out)


# Made on import: generated code that comes out of Inductor's cache calls it by its name.
_DENSE_LINEAR = ExternKernelChoice(_dense_linear, name="mst_dense_linear", has_out_variant=True)


# -- what templates of single matrices and of stacks share -------------------------------------------------------------


def add_choice(
    template: Any,
    choices: list[Any],
    inputs: Sequence[Any],
    layout: Any,
    tile: GemmTile | GradWeightTile,
    **constants: Any,
) -> None:
    """Offer a template with a tile; what it cannot take is an error of ours."""
    error = template.maybe_append_choice(
        choices,
        input_nodes=tuple(inputs),
        layout=layout,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **constants,
    )
    if error is not None:
        raise error


def gemm_constants(
    tile: GemmTile, lines: Lines, block: int, x: Any, weight: Any, by_rows: bool, out_features: int, reduced: int
) -> dict[str, Any]:
    """Of forward and grad-input: ``x`` ``[tokens, features]`` and ``weight`` (a stack's with all rows) as they lie."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_K": tile.depth,
        "WIDTH": tile.width(block),
        "BLOCK": block,
        "OUT": out_features,
        "REDUCE": reduced,
        **_line_constants(lines),
        "A_WIDTH": static(x.get_size()[1]),
        "W_WIDTH": static(weight.get_size()[1]),
        "A_STRIDE": static(x.get_stride()[0]),
        "W_STRIDE": static(weight.get_stride()[0]),
        "REDUCE_LAST": by_rows,
        "GROUP_M": max(1, _GROUP_ROWS // (tile.rows * tile.chain)),
        "PRECISION": gpu_tiles.precision(x.get_dtype()),
    }


def grad_weight_constants(
    tile: GradWeightTile, lines: Lines, grid: BlockGrid, x: Any, grad: Any, out_first: bool
) -> dict[str, Any]:
    """Of grad-weight: ``x`` and ``grad``, ``[tokens, features]``, as they lie; ``grid`` of one matrix."""
    out_features, in_features = (grid.rows, grid.cols) if out_first else (grid.cols, grid.rows)
    return {
        "GATHER": tile.gather,
        "GROUPS": -(-lines.length // tile.gather),
        "BLOCK_M": tile.tokens,
        "BLOCK": grid.block,
        "LENGTH": lines.length,
        **_line_constants(lines),
        "DENSE_GRAD": DENSE_GRAD,
        "OUT": out_features,
        "IN": in_features,
        "ROWS": grid.rows,
        "OUT_FIRST": out_first,
        "X_WIDTH": static(x.get_size()[1]),
        "DY_WIDTH": static(grad.get_size()[1]),
        "X_STRIDE": static(x.get_stride()[0]),
        "DY_STRIDE": static(grad.get_stride()[0]),
        "PRECISION": gpu_tiles.precision(x.get_dtype()),
    }


def _line_constants(lines: Lines) -> dict[str, int]:
    return {"LINES": lines.count, "PTR": lines.ptr, "IDX": lines.idx, "ORDER": lines.order}


# -- forward and grad-input --------------------------------------------------------------------------------------------


def linear(a: Any, weight: Any, index: Any, block: int, by_rows: bool, density: float) -> Any:
    """``a W^T`` if the output features are ``weight``'s rows (``by_rows``), else ``a W``; tuned for ``density``."""
    rows, cols = map(static, weight.get_size())
    grid = BlockGrid(rows, cols, block)
    tiles, dense = gpu_tiles.gemm(a, grid, by_rows, density)
    if tiles:
        weight = gpu_operands.weight(weight, 1, a.get_dtype())
        a, lead = gpu_operands.rows(a, 0)
    else:
        weight = ir.ExternKernel.realize_input(to_dtype(weight, a.get_dtype()))
        a, lead = gpu_operands.as_they_are(a)
    index = ir.ExternKernel.realize_input(index)
    out_features, reduced = (rows, cols) if by_rows else (cols, rows)
    m = a.get_size()[0]
    layout = ir.FixedLayout(a.get_device(), a.get_dtype(), [m, out_features])
    inputs = [a, weight, index]
    choices: list[Any] = []
    for tile in tiles:
        lines = grid.lines(by_rows, union=tile.union)
        even = bool(V.graph.sizevars.statically_known_multiple_of(m, tile.rows))
        constants = gemm_constants(tile, lines, block, a, weight, by_rows, out_features, reduced)
        add_choice(
            gather_gemm.template,
            choices,
            inputs,
            layout,
            tile,
            **constants,
            CHAIN=tile.chain,
            TMA=tile.tma,
            EVEN_M=even,
        )
    mark(choices, grid, "forward" if by_rows else "transposed", a, density)
    if dense:
        choices.append(_DENSE_LINEAR.bind(inputs, layout, transpose=by_rows))
    out = compat.select("mst_linear", choices, inputs, layout, input_gen_fns={2: _index_generator(grid, density)})
    return gpu_operands.unflatten(out, lead)


# -- grad-weight -------------------------------------------------------------------------------------------------------


def _dense_grad_weight(
    x: Tensor, dy: Tensor, index: Tensor, *rest: Tensor, out_first: bool, rows: int, out: Tensor
) -> Tensor:
    """The dense product as the first of the partials. The caller adds up the bias gradient itself."""
    a, b = (dy, x) if out_first else (x, dy)
    if a.shape[1] > rows:
        a = a[:, :rows]  # it may be padded, as the columns of b and with them those of the partials
    first = out
    if out.shape[0] > rows:  # partials of a tile's, of which there may be more
        first = out[:rows]
        out[rows:].zero_()
    if a.dtype != out.dtype and a.is_cuda:
        torch.mm(a.t(), b, out_dtype=out.dtype, out=first)
    else:  # other devices have no product of half precision into single
        torch.mm(a.t().to(out.dtype), b.to(out.dtype), out=first)
    return out


_DENSE_GRAD_WEIGHT = ExternKernelChoice(_dense_grad_weight, name="mst_dense_grad_weight", has_out_variant=True)


def grad_weight(
    grad: Any, x: Any, index: Any, block: int, transposed: bool, dtype: torch.dtype, bias: bool, density: float
) -> Any:
    """Gradients of the stored weight in ``dtype`` and of the bias in float32 (empty if ``bias`` is false)."""
    out_features, in_features = static(grad.get_size()[-1]), static(x.get_size()[-1])
    grid = BlockGrid(*((in_features, out_features) if transposed else (out_features, in_features)), block)
    tiles, dense = gpu_tiles.grad_weight(x, grid, density)
    if tiles:
        (grad, _), (x, _) = gpu_operands.rows(grad, 0), gpu_operands.rows(x, 1)
    else:
        (grad, _), (x, _) = gpu_operands.as_they_are(grad), gpu_operands.as_they_are(x)
    index = ir.ExternKernel.realize_input(index)
    partials, sums, split = _partials(grad, x, index, grid, not transposed, bias, density, tiles, dense)
    gw = _finish(partials, index, grid, split, dtype)
    if not bias:
        return gw, empty_strided([0], None, dtype=torch.float32, device=x.get_device())
    if sums is None:  # the dense product won
        total = lowerings[torch.ops.aten.sum.dim_IntList](grad, [0], False, dtype=torch.float32)
        return gw, lowerings[torch.ops.aten.slice.Tensor](total, 0, 0, out_features)
    loader = sums.make_loader()
    total = ir.Pointwise.create(
        device=x.get_device(),
        dtype=torch.float32,
        inner_fn=lambda i: functools.reduce(ops.add, [loader([i[0] + s * out_features]) for s in range(split)]),
        ranges=[out_features],
    )
    return gw, total


def _partials(
    grad: Any,
    x: Any,
    index: Any,
    grid: BlockGrid,
    out_first: bool,
    bias: bool,
    density: float,
    tiles: Sequence[GradWeightTile],
    with_dense: bool,
) -> tuple[Any, Any, int]:
    """Float32 partials ``[split * rows, cols or more]``, column sums ``[split * out]`` or None, and ``split``."""
    lines = grid.lines(out_first)
    split = gpu_tiles.parts(x, grid, out_first, tiles[0], density) if tiles else 1
    out_features = grid.rows if out_first else grid.cols
    x_width, dy_width = static(x.get_size()[1]), static(grad.get_size()[1])
    device = x.get_device()
    layout = ir.FixedLayout(device, torch.float32, [split * grid.rows, x_width if out_first else dy_width])
    inputs = [x, grad, index]
    sums = None
    if bias and tiles:  # beside the dense product nothing fills them
        sums = empty_strided([split * out_features], None, dtype=torch.float32, device=device)
        sums.realize()
        inputs.append(sums)
    choices: list[Any] = []
    for tile in tiles:
        constants = grad_weight_constants(tile, lines, grid, x, grad, out_first)
        more = {"mutated_inputs": None if sums is None else [sums], "SPLIT": split, "BIAS": bias}
        add_choice(grad_weight_kernel.template, choices, inputs, layout, tile, **constants, **more)
    mark(choices, grid, "grad-weight", x, density)
    if with_dense:
        choices.append(_DENSE_GRAD_WEIGHT.bind(inputs, layout, out_first=out_first, rows=grid.rows))
    # The caller must know which kind won: only the template fills the column sums.
    out = compat.select(
        "mst_grad_weight",
        choices,
        inputs,
        layout,
        input_gen_fns={2: _index_generator(grid, density)},
        return_multi_template=False,
    )
    # Nor may what follows be fused into the template, which stores nothing where no gradient is wanted.
    V.graph.no_fuse_buffer_names.add(out.get_name())
    dense = isinstance(out.data.data, ir.ExternKernel)
    return out, None if dense else sums, split


def _finish(partials: Any, index: Any, grid: BlockGrid, split: int, dtype: torch.dtype) -> Any:
    """The sum of the parts where a gradient is wanted, exact zeros elsewhere; what follows can be fused into it."""
    tile = grad_weight_kernel.SumTile.of(grid.block)
    layout = ir.FixedLayout(partials.get_device(), dtype, [grid.rows, grid.cols])
    inputs, choices = [partials, index], list[Any]()
    error = grad_weight_kernel.sum_template.maybe_append_choice(
        choices,
        input_nodes=tuple(inputs),
        layout=layout,
        num_warps=tile.warps,
        num_stages=1,
        BLOCK=grid.block,
        BLOCK_COLS=grid.block_cols,
        ROWS=grid.rows,
        COLS=grid.cols,
        WIDTH=static(partials.get_size()[1]),
        SPLIT=split,
        ACTIVE=grid.active,
        DENSE_GRAD=DENSE_GRAD,
        TILE_ROWS=tile.rows,
    )
    if error is not None:
        raise error
    return compat.select("mst_grad_weight_sum", choices, inputs, layout)
