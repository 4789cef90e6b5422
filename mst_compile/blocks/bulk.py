"""Bulk operations on the blocks of a dense tensor: a device's own kernels, or plain PyTorch.

Tensors have the shape of the weight that a grid is over: ``[rows, cols]``, of a stack ``[matrices, rows, cols]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import read_mask, upload_
from mst_compile.blocks.layout import Part, are_one_matrix, as_matrix
from mst_compile.blocks.memory import is_plain
from mst_compile.blocks.shards import is_sharded, local_part, sum_over_shards, unsharded

# Of each block the sum of squares, that of absolute values, or 1 where any element is not 0 (as NaN is not), else 0.
Kind = Literal["squares", "magnitudes", "nonzero"]


class Average(NamedTuple):
    """A running average of a gradient's squares, which is to begin anew in some blocks, at its first estimate.

    Attributes:
        gradient, average: ``[rows, cols]`` each.
        blocks: bool ``[R, C]`` on the CPU, where it begins.
        beta: how the average decays where its owner divides it by ``1 - beta**steps``; 0 where it does not.
        steps: how many the owner has taken, where it keeps that; a number of a device's is left there.
    """

    gradient: Tensor
    average: Tensor
    grid: BlockGrid
    blocks: Tensor
    beta: float
    steps: Tensor | float


class Kernels(Protocol):
    """Passes over a whole tensor that a device computes faster than PyTorch."""

    def takes(self, tensor: Tensor, grid: BlockGrid) -> bool:
        """Whether there are kernels for this tensor, ``[rows, cols]``, under this grid; asked of plain ones."""

    launches: bool  # whether the host only begins a pass, which takes it as long for few blocks as for all

    def zero_inactive_(self, tensors: Sequence[Tensor], indexes: Sequence[Tensor], grids: Sequence[BlockGrid]) -> None:
        """Zero what lies outside the active blocks of each of the tensors, which are of one device, in place."""

    def measures(self, tensor: Tensor, kind: Kind) -> bool:
        """Whether :meth:`measure` is faster than PyTorch; asked of what it takes."""

    def measure(self, tensors: Sequence[Tensor], grids: Sequence[BlockGrid], kind: Kind) -> Tensor:
        """A number for each block of all the tensors, ``[rows, cols]`` each, of one device: float32 ``[blocks]`` there,
        row by row, one tensor after the other."""

    def begins(self, average: Average) -> bool:
        """Whether :meth:`begin` is faster than PyTorch; asked where it takes both tensors."""

    def begin(self, averages: Sequence[Average], scale: float) -> None:
        """Do what :func:`begin_averages` does, of one device."""


_kernels: dict[str, Kernels] = {}
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # mask -> its version, and its copy on a device


def register(device_type: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve the tensors of a device type (``torch.device.type``)."""
    _kernels[device_type] = kernels


def _native(tensor: Tensor, grid: BlockGrid, *more: Tensor) -> Kernels | None:
    """What passes over ``tensor`` with the help of ``more``; None where PyTorch does, as over tensor subclasses, and
    where they are not on one device."""
    here = tensor.device
    kernels = _kernels.get(here.type)
    if kernels is None or not is_plain(tensor):
        return None
    for other in more:
        if other.device != here or not (type(other) is Tensor or is_plain(other)):  # an index is never wrapped
            return None
    return kernels if kernels.takes(tensor, grid) else None


def begins_a_pass(tensor: Tensor, grid: BlockGrid, index: Tensor | None) -> bool:
    """Whether zeroing all inactive blocks of ``tensor`` costs the host no more than zeroing some of them."""
    kernels = None if index is None or is_sharded(tensor) else _native(tensor, grid, index)
    return kernels is not None and kernels.launches


def _there(mask: Tensor, device: torch.device) -> Tensor:
    """A mask on a device, copied there once: gradients are masked at every step, and a copy waits for a GPU."""
    if mask.device == device:
        return mask
    version, copy = _copies.get(mask, (None, None))
    if copy is None or version != mask._version or copy.device != device:
        copy = torch.empty_like(mask, device=device)
        upload_(copy, mask)
        _copies[mask] = mask._version, copy
    return copy


def zero_inactive_(tensor: Tensor, grid: BlockGrid, mask: Tensor, index: Tensor | None) -> None:
    """Set every element of ``tensor`` (any dtype) outside the active blocks to 0, in place.

    Of a tensor that is spread over ranks, every rank zeroes its own part.

    Args:
        mask: bool ``[R, C]``, the active blocks.
        index: the packed index of the same blocks on the tensor's device, if there is one; it serves the kernels.
    """
    zero_all_inactive_([(tensor, grid, mask, index)])


def zero_all_inactive_(whole: Sequence[tuple[Tensor, BlockGrid, Tensor, Tensor | None]]) -> None:
    """What :func:`zero_inactive_` does, to each (tensor, grid, mask, index); kernels of a device take all in one call.

    The tensors must not overlap.
    """
    taken: dict[torch.device, list[tuple[Tensor, Tensor, BlockGrid]]] = {}
    for tensor, grid, mask, index in _matrices(whole):
        if is_sharded(tensor):
            _zero_sharded_(tensor, grid, ~mask)
        elif index is not None and _native(tensor, grid, index) is not None:
            taken.setdefault(tensor.device, []).append((tensor, index, grid))
        else:
            # On a GPU the index already holds the mask: copying the host's would wait for the device.
            here = index is not None and grid.tiled and index.device == tensor.device
            blocks = read_mask(index, grid) if here else _there(mask, tensor.device)  # type: ignore[arg-type]
            _fill_(tensor, Part(0, 0, grid.rows, grid.cols), grid.block, ~blocks)
    for device, items in taken.items():
        tensors, indexes, grids = zip(*items, strict=True)
        _kernels[device.type].zero_inactive_(tensors, indexes, grids)
        # Autograd cannot see what a kernel writes: a change between forward and backward must not pass unnoticed.
        torch.autograd.graph.increment_version(tensors)


def _matrices(
    whole: Iterable[tuple[Tensor, BlockGrid, Tensor, Tensor | None]],
) -> Iterator[tuple[Tensor, BlockGrid, Tensor, Tensor | None]]:
    """The same with matrices in the place of stacks, of which every rank has all: those that an index tells of one by
    one, others as one matrix, if their strides allow it."""
    for tensor, grid, mask, index in whole:
        if not grid.matrices or is_sharded(tensor):
            yield tensor, grid, mask, index
        elif index is None and are_one_matrix(tensor):
            yield as_matrix(tensor.detach()), replace(grid, matrices=0), mask, None
        else:
            indexes = [None] * grid.matrices if index is None else index
            for one, part, own in zip(tensor.detach(), grid.split(mask), indexes, strict=True):
                yield one, grid.matrix, part, own


@torch.no_grad()
def _zero_sharded_(tensor: Tensor, grid: BlockGrid, blocks: Tensor) -> None:
    """Zero ``blocks`` in this rank's part, and in the copy of the weight that FSDP2 has gathered if it is in use."""
    for one in (tensor, unsharded(tensor)):
        if one is not None:
            local, part = local_part(one)
            _fill_(local, part, grid.block, blocks.to(local.device))


@torch.no_grad()
def _fill_(local: Tensor, part: Part, block: int, blocks: Tensor) -> None:
    """Zero ``blocks`` (bool ``[R, C]``, of the whole weight) in ``local``, a part of a weight."""
    for r, c, of_blocks, size in _pieces(part, block):
        inside = local[r, c].unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0]))
        inside.masked_fill_(blocks[of_blocks][:, None, :, None], 0)


def _pieces(part: Part, block: int) -> Iterator[tuple[slice, slice, tuple[slice, slice], tuple[int, int]]]:
    """Cut a part where whole blocks begin and end; yields, for each piece, its rows and columns in the part, the blocks
    that it lies in, and how many rows and columns of each of them it has."""
    for r, block_rows, height in _parts(part.row, part.rows, block):
        for c, block_cols, width in _parts(part.col, part.cols, block):
            yield r, c, (block_rows, block_cols), (height, width)


def _parts(first: int, length: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Split the elements ``first`` to ``first + length`` of a dimension into those of whole blocks and those of the
    blocks that are cut at either end; yields, for each, its elements counted from ``first``, its blocks, and how many
    elements of a block there are."""
    end = first + length
    start = first
    while start < end:
        stop = end - end % block
        if start % block or start == stop:
            stop = min(end, (start // block + 1) * block)
        yield slice(start - first, stop - first), slice(start // block, -(-stop // block)), min(stop - start, block)
        start = stop


@torch.no_grad()
def zero_blocks_(tensor: Tensor, grid: BlockGrid, blocks: Tensor) -> None:
    """Set the given ``blocks`` (bool ``[R, C]``) of ``tensor`` to 0, in place; cheap where they are few.

    Of a tensor that is spread over ranks, every rank zeroes its own part.
    """
    if is_sharded(tensor):
        _zero_sharded_(tensor, grid, blocks)
        return
    rows, cols = (i.to(tensor.device) for i in blocks.nonzero(as_tuple=True))
    if grid.matrices and not are_one_matrix(tensor):
        for one, part in zip(tensor, grid.split(blocks), strict=True):
            zero_blocks_(one, grid.matrix, part)
        return
    if grid.edge == (grid.block, grid.block) and tensor.is_contiguous():
        tensor.view(grid.block_rows, grid.block, grid.block_cols, grid.block)[rows, :, cols] = 0
        return
    r, c = elements_of(grid, rows, cols)
    as_matrix(tensor)[r, c] = 0


def elements_of(grid: BlockGrid, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ``[n, B, 1]`` and ``[n, 1, B]`` of the elements of ``n`` blocks, given by block row and column.

    Those past a ragged edge are clamped: they name the edge's own elements, which belong to the same block, again.
    """
    within = torch.arange(grid.block, device=rows.device)
    r = (rows[:, None] * grid.block + within).clamp_(max=grid.rows - 1)
    c = (cols[:, None] * grid.block + within).clamp_(max=grid.cols - 1)
    return r[:, :, None], c[:, None, :]


@torch.no_grad()
def block_mean_square(tensor: Tensor, grid: BlockGrid) -> Tensor:
    """Mean square of each block of ``tensor``: float32 ``[R, C]`` on the CPU.

    Of a tensor that is spread over ranks, every rank gets the scores of the whole tensor, bit for bit the same; all
    must call it.
    """
    return _block_mean(tensor, grid, "squares")


@torch.no_grad()
def block_mean_abs(tensor: Tensor, grid: BlockGrid) -> Tensor:
    """Mean absolute value of each block, as :func:`block_mean_square` has the mean square."""
    return _block_mean(tensor, grid, "magnitudes")


def _block_mean(tensor: Tensor, grid: BlockGrid, kind: Kind) -> Tensor:
    if is_sharded(tensor):
        return grid.mean_of_sums_(_sums_of_shards(tensor, grid, kind)).float().cpu()
    if grid.block == 1:
        return _MEASURES[kind](as_matrix(tensor).detach().to(torch.float32, copy=True)).cpu()
    return grid.mean_of_sums_(_measured([(tensor, grid)], kind)[0])


@torch.no_grad()
def block_means(whole: Sequence[tuple[Tensor, BlockGrid]], magnitude: str = "l2") -> Iterator[Tensor]:
    """:func:`block_mean_square` of each tensor, or :func:`block_mean_abs` (``"l1"``), in their order.

    Those on a GPU are computed at once, and one copy brings them: the host waits for the device once, not at each.
    Others are computed when they are asked for.
    """
    kind: Kind = "magnitudes" if magnitude == "l1" else "squares"
    together = [i for i, (tensor, _) in enumerate(whole) if _waits(tensor)]
    sums = dict(zip(together, _measured([whole[i] for i in together], kind), strict=True))
    for i, (tensor, grid) in enumerate(whole):
        yield grid.mean_of_sums_(sums[i]) if i in sums else _block_mean(tensor, grid, kind)


def _waits(tensor: Tensor) -> bool:
    """Whether the host waits for the device when it copies numbers from it, and the tensor is this rank's alone."""
    return tensor.is_cuda and not is_sharded(tensor)


@torch.no_grad()
def outside_of_all(whole: Sequence[tuple[Tensor, BlockGrid, Tensor]]) -> list[bool | None]:
    """Whether any element of each tensor is not 0 outside the blocks of its mask (bool ``[R, C]`` on the CPU), where
    looking at all of them at once saves the host from waiting for the device at each; None where it does not."""
    found: list[bool | None] = [None] * len(whole)
    together = [i for i, (tensor, _, _) in enumerate(whole) if _waits(tensor) and is_plain(tensor)]
    for i, held in zip(together, _measured([whole[i][:2] for i in together], "nonzero"), strict=True):
        found[i] = bool((held != 0)[~whole[i][2]].any())
    return found


@torch.no_grad()
def any_outside(tensor: Tensor, grid: BlockGrid, mask: Tensor) -> bool:
    """Whether a matrix that is not spread over ranks holds anything outside the blocks of its mask (bool ``[R, C]`` on
    the CPU), by its blocks' sums of squares: what is so small that its square is 0 is not seen."""
    if grid.block == 1:
        held = tensor
    elif (kernels := _native(tensor, grid)) is not None and kernels.measures(tensor, "squares"):
        held = kernels.measure([tensor], [grid], "squares").view(grid.shape)
    else:
        held = _measure(tensor, grid, "squares")
    return bool(held.cpu().masked_fill(mask, 0).any())


@torch.no_grad()
def share_outside_here(tensor: Tensor, grid: BlockGrid, mask: Tensor, looked: slice = slice(None)) -> float:
    """How much of what this rank holds of a tensor, by squares, is outside the blocks of its mask (bool ``[R, C]`` on
    the CPU): from 0 to 1, 0 where it holds zeros there. No other rank takes part.

    Args:
        looked: which rows of what it holds are looked at.
    """
    local, part = local_part(tensor)
    first, end, _ = looked.indices(part.rows)
    part, local = Part(part.row + first, part.col, end - first, part.cols), local[first:end]
    outside = total = 0.0
    for r, c, of_blocks, size in _pieces(part, grid.block):
        squares = local[r, c].unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0])).float().square().sum((1, 3)).cpu()
        outside += float(squares.masked_fill(mask[of_blocks], 0).sum())
        total += float(squares.sum())
    return outside / total if outside else 0.0


@torch.no_grad()
def _measured(whole: Sequence[tuple[Tensor, BlockGrid]], kind: Kind) -> list[Tensor]:
    """A number for each block of tensors of which none is spread over ranks: float32 ``[R, C]`` each, on the CPU.

    One copy brings those of a device, and where it has kernels for them one call of these computes all.
    """
    found: dict[int, Tensor] = {}
    matrices = [as_matrix(tensor.detach()) for tensor, _ in whole]
    for device in {matrix.device for matrix in matrices}:
        here = [i for i, matrix in enumerate(matrices) if matrix.device == device]
        kernels = {i: _native(matrices[i], whole[i][1]) for i in here}
        taken = [i for i in here if (own := kernels[i]) is not None and own.measures(matrices[i], kind)]
        parts = [_measure(matrices[i], whole[i][1], kind).flatten() for i in here if i not in taken]
        if taken:
            grids = [whole[i][1] for i in taken]
            parts.append(_kernels[device.type].measure([matrices[i] for i in taken], grids, kind))
        order = [*(i for i in here if i not in taken), *taken]
        numbers = (parts[0] if len(parts) == 1 else torch.cat(parts)).cpu()
        split = numbers.split([whole[i][1].blocks for i in order])
        found |= {i: own.view(whole[i][1].shape) for i, own in zip(order, split, strict=True)}
    return [found[i] for i in range(len(whole))]


def _by_blocks(tensor: Tensor, grid: BlockGrid) -> Tensor:
    """A tensor as ``[R, B, C, B]``, filled up with zeros at ragged edges."""
    pad = (0, grid.block_cols * grid.block - grid.cols, 0, grid.block_rows * grid.block - grid.rows)
    whole = torch.nn.functional.pad(tensor, pad) if any(pad) else tensor
    return whole.reshape(grid.block_rows, grid.block, grid.block_cols, grid.block)


_MEASURES: dict[Kind, Callable[[Tensor], Tensor]] = {"squares": Tensor.square_, "magnitudes": Tensor.abs_}  # in place


def _measure(tensor: Tensor, grid: BlockGrid, kind: Kind) -> Tensor:
    """A number for each block of a matrix: float32 ``[R, C]`` on its device."""
    values = _by_blocks(tensor, grid)
    if kind == "nonzero":
        return (torch.linalg.vector_norm(values, torch.inf, dim=(1, 3)) != 0).float()
    if values.dtype == torch.float32:  # no copy for what makes one
        return (values.abs() if kind == "magnitudes" else values.square()).sum((1, 3))
    return _MEASURES[kind](values.float()).sum((1, 3))


@torch.no_grad()
def begin_averages(averages: Sequence[Average], scale: float) -> list[Average]:
    """Set averages, in their blocks, to the square of each element's gradient or to the block's mean square where that
    is larger, times ``1 - beta**(steps + 1)``, as far as there are kernels for it; returns the others.

    Args:
        scale: factor by which the gradients are too large.
    """
    taken: dict[torch.device, list[Average]] = {}
    left = []
    for one in averages:
        gradient, average, grid = one[:3]
        matrices = gradient.dim() == average.dim() == 2 and not is_sharded(gradient) and not is_sharded(average)
        kernels = _native(gradient, grid, average) if matrices else None
        if kernels is not None and kernels.takes(average, grid) and kernels.begins(one):
            taken.setdefault(average.device, []).append(one)
        else:
            left.append(one)
    for device, own in taken.items():
        _kernels[device.type].begin(own, scale)
        torch.autograd.graph.increment_version([one.average for one in own])
    return left


def _sums_of_shards(tensor: Tensor, grid: BlockGrid, kind: Kind) -> Tensor:
    """Sum over each block of what is measured, float64 ``[R, C]``: a block may be spread over several ranks."""
    local, part = local_part(tensor)
    sums = torch.zeros(grid.shape, dtype=torch.float64, device=local.device)
    for r, c, of_blocks, size in _pieces(part, grid.block):
        inside = _MEASURES[kind](local[r, c].to(torch.float64, copy=True))
        sums[of_blocks] = inside.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0])).sum((1, 3))
    return sum_over_shards(sums, tensor)


@torch.no_grad()
def block_sums(matrix: Tensor, grid: BlockGrid, magnitude: str = "l2") -> Tensor:
    """Sum over each block of a matrix that is not spread over ranks, of squares or (``"l1"``) absolute values: float64
    ``[R, C]`` on its device, of which sums over ranks do not depend on who holds what."""
    kind: Kind = "magnitudes" if magnitude == "l1" else "squares"
    return _MEASURES[kind](_by_blocks(matrix.detach(), grid).to(torch.float64, copy=True)).sum((1, 3))


@torch.no_grad()
def sample_of(tensor: Tensor, side: int) -> Tensor:
    """Elements of up to ``side`` rows and columns of ``tensor``, evenly spaced: float64 on the CPU.

    Of a tensor that is spread over ranks, every rank gets the same; all must call it.
    """
    local, part = local_part(tensor)
    shape = tensor.shape[:-1].numel(), tensor.shape[-1]
    steps = [-(-length // side) for length in shape]
    sides = [-(-length // step) for length, step in zip(shape, steps, strict=True)]
    found = torch.zeros(sides, dtype=torch.float64, device="cpu")
    # Of the sampled rows and columns, the first that are here.
    first = [-(-start // step) for start, step in zip((part.row, part.col), steps, strict=True)]
    here = local[first[0] * steps[0] - part.row :: steps[0], first[1] * steps[1] - part.col :: steps[1]]
    found[first[0] : first[0] + here.shape[0], first[1] : first[1] + here.shape[1]] = here.cpu()
    return sum_over_shards(found, tensor).cpu()


def mask_like(index: Tensor, grid: BlockGrid) -> Tensor:
    """Elementwise mask, bool, of the weight's shape, of a packed index."""
    return grid.expand(read_mask(index, grid)).view(grid.dims)
