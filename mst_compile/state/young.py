"""Blocks that have regrown and whose updates are not those of the others yet: which they are, and their elements."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.layout import Part
from mst_compile.blocks.shards import local_part

# Share of the blocks from which on a pass over all of the weight moves no more bytes than visits do: to visit an
# element takes the 8 bytes of its place and the 8 of its block beside the 4 of its value.
MANY = 0.25


@dataclass(eq=False)
class Young:
    """The young blocks of one weight. What they cost grows with their number, up to :data:`MANY` of them.

    Attributes:
        blocks: int64 ``[n]`` on the CPU, numbers of blocks, row by row, rising.
        steps: int64 ``[n]``, optimizer steps that each has taken since it grew.
    """

    blocks: Tensor
    steps: Tensor
    _where: tuple[tuple[object, ...], Tensor, Tensor] | None = field(default=None, repr=False)

    @staticmethod
    def joined(young: Young | None, grown: Tensor) -> Young | None:
        """``young`` and the blocks of ``grown`` (bool ``[R, C]``) that are not among them, which have taken no step."""
        new = grown.flatten()
        if young is not None:
            new = new.index_fill(0, young.blocks, False)
        more = new.nonzero().flatten()
        if not len(more):
            return young
        if young is None:
            return Young(more, torch.zeros_like(more))
        blocks, order = torch.cat([young.blocks, more]).sort()
        return Young(blocks, torch.cat([young.steps, torch.zeros_like(more)])[order])

    def older(self) -> Young:
        """The same blocks after one more step."""
        return Young(self.blocks, self.steps + 1, self._where)

    def where(self, chosen: Tensor) -> Young | None:
        """Those that ``chosen`` (bool ``[n]``) names; None if it names none."""
        if bool(chosen.all()):
            return self
        return Young(self.blocks[chosen], self.steps[chosen]) if bool(chosen.any()) else None

    def inside(self, mask: Tensor) -> Young | None:
        """Those that are active in ``mask``, bool ``[R, C]``."""
        return self.where(mask.flatten()[self.blocks])

    def numbers(self, grid: BlockGrid) -> Tensor:
        """The number of each young block's next step, from 1, and 0 for all other blocks: int32 ``[R, C]``."""
        found = torch.zeros(grid.blocks, dtype=torch.int32, device="cpu")
        found[self.blocks] = (self.steps + 1).int()
        return found.view(grid.shape)

    @staticmethod
    def of_numbers(numbers: Tensor) -> Young | None:
        """Inverse of :meth:`numbers`."""
        flat = numbers.detach().cpu().flatten()
        blocks = flat.nonzero().flatten()
        return Young(blocks, flat[blocks].long() - 1) if len(blocks) else None

    # -- elements --

    @torch.no_grad()
    def take(self, tensor: Tensor, grid: BlockGrid) -> Tensor:
        """The elements of the blocks in ``tensor`` (of the weight's shape), a copy, ``[e]``, float32, of float64
        float64; of a tensor that is spread over ranks those in this rank's part. Where there are many blocks, all
        elements of the tensor."""
        local, part = local_part(tensor.detach())
        dtype = torch.promote_types(local.dtype, torch.float32)
        if self._are_many(grid):
            return local.to(dtype, copy=True).reshape(-1)
        index, _ = self._places(local, part, grid)
        found = local.view(-1)[index] if local.is_contiguous() else local[index // part.cols, index % part.cols]
        return found.to(dtype)

    @torch.no_grad()
    def put(self, tensor: Tensor, grid: BlockGrid, values: Tensor) -> None:
        """Write to the elements of the blocks what :meth:`take` has read, changed; in place."""
        local, part = local_part(tensor.detach())
        values = values.to(local.dtype)
        if self._are_many(grid):
            blocks = torch.zeros(grid.blocks, dtype=torch.bool, device="cpu").index_fill(0, self.blocks, True)
            inside = self._of_elements(blocks, local, part, grid)
            local.copy_(torch.where(inside, values.view_as(inside), local))
            return
        index, _ = self._places(local, part, grid)
        if local.is_contiguous():
            local.view(-1)[index] = values
        else:
            local[index // part.cols, index % part.cols] = values

    def spread(self, of_blocks: Tensor, tensor: Tensor, grid: BlockGrid) -> Tensor:
        """Give each element what its block has in ``of_blocks``, ``[n]``; as many as :meth:`take` reads, those of other
        blocks 1."""
        local, part = local_part(tensor.detach())
        of_blocks = of_blocks.to(torch.promote_types(local.dtype, torch.float32))
        if self._are_many(grid):
            everywhere = torch.ones(grid.blocks, dtype=of_blocks.dtype, device="cpu").index_copy(
                0, self.blocks, of_blocks
            )
            return self._of_elements(everywhere, local, part, grid).reshape(-1)
        _, owner = self._places(local, part, grid)
        return of_blocks.to(local.device)[owner]

    def _are_many(self, grid: BlockGrid) -> bool:
        return len(self.blocks) > MANY * grid.blocks

    @staticmethod
    def _of_elements(of_blocks: Tensor, local: Tensor, part: Part, grid: BlockGrid) -> Tensor:
        """What each element of a part has of its block, of all blocks ``[R C]``."""
        return part.of(grid.expand(of_blocks.view(grid.shape).to(local.device)))

    def _places(self, local: Tensor, part: Part, grid: BlockGrid) -> tuple[Tensor, Tensor]:
        """Of each element where it is in the part that is here, and which of the young blocks it belongs to."""
        key = (grid, part, local.device)
        if self._where is None or self._where[0] != key:
            within = torch.arange(grid.block, device=local.device)
            blocks = self.blocks.to(local.device)
            r = ((blocks // grid.block_cols)[:, None] * grid.block + within)[:, :, None]
            c = ((blocks % grid.block_cols)[:, None] * grid.block + within)[:, None, :]
            r, c = r - part.row, c - part.col
            there = (r >= 0) & (r < part.rows) & (c >= 0) & (c < part.cols)  # ragged edges, other ranks' parts
            index, owner = r * part.cols + c, torch.arange(len(blocks), device=local.device)
            self._where = key, index[there], owner[:, None, None].expand_as(there)[there]
        return self._where[1:]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_where": None}  # quickly made, and larger than all the rest
