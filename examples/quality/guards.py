"""Guards against dead units: trials of what is not part of the library, and the library's own on blocks so coarse that
``sparsify`` would take finer ones.

A pair is what one block of hidden units hangs on: a block row of the weight that makes them and the matching block
column of the weight that reads them (up and down, value and output), or block rows of queries and keys. Where both
sides are zero, both gradients are exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import mst_compile
from mst_compile import SparseWeight
from mst_compile.rules.guard import backbone

from .model import GPT, Block

Form = Literal["none", "backbone", "pair", "coverage", "revive"]


@dataclass(frozen=True)
class Side:
    """One side of all pairs of a kind: views whose block rows are the pairs' blocks.

    Attributes:
        weight: sparse state of the weight that this is a part of.
        values: the weights, ``[units, others]``, a view.
        mask, backbone: the part of the block mask and of the blocks safe from being dropped, bool ``[pairs, others]``.
    """

    weight: SparseWeight
    values: Tensor
    mask: Tensor
    backbone: Tensor

    @property
    def magnitude(self) -> Tensor:
        """Largest magnitude in each block, ``[pairs, others]``; -1 outside the active ones."""
        block = self.weight.grid.block
        rows, columns = self.mask.shape
        found = self.values.detach().abs().view(rows, block, columns, block).amax((1, 3))
        return found.masked_fill(~self.mask, -1.0)

    @property
    def zero(self) -> Tensor:
        """Which pairs have nothing but zeros on this side, bool ``[pairs]``."""
        return (self.values == 0).reshape(len(self.mask), -1).all(1)


class Guard:
    """Keeps pairs alive, or revives them, at the topology events of a model.

    Args:
        form: ``"coverage"`` and ``"backbone"`` are the library's, see ``mst_compile.sparsify``; ``"pair"`` never drops
            the largest block of the two sides of a pair; ``"revive"`` gives a pair that died new random weights in the
            active blocks of its first side; the other stays zero, so what the model computes does not change, but the
            other has a gradient again.
    """

    def __init__(self, model: GPT, form: Form) -> None:
        self.model, self.form = model, form
        self.sparsifier = mst_compile.sparsifier(model) if form != "none" else None
        self._generator = torch.Generator().manual_seed(0)
        for weight in self.sparsifier.weights.values() if self.sparsifier is not None else ():
            if form == "backbone":
                weight.backbone.copy_(backbone(weight.grid.shape))
            elif form == "coverage":
                weight.guard = "coverage"

    def before_step(self) -> None:
        """Before an optimizer step that a topology event follows: say which blocks it must not drop."""
        own = self.sparsifier
        if own is None or self.form != "pair" or not own.schedule.is_topology_event(own.step_count + 1):
            return
        for weight in own.weights.values():
            weight.backbone.zero_()
        for one, other in self.pairs():
            both = torch.cat([one.magnitude, other.magnitude], 1)
            best, place = both.max(1)
            for side, shift in ((one, 0), (other, one.mask.shape[1])):
                here = (best > 0) & (place >= shift) & (place < shift + side.mask.shape[1])
                side.backbone[here, place[here] - shift] = True

    @torch.no_grad()
    def after_step(self) -> None:
        """After an optimizer step: if a topology event followed it, give dead pairs a new beginning."""
        own = self.sparsifier
        if own is None or self.form != "revive" or not own.schedule.is_topology_event(own.step_count):
            return
        for one, other in self.pairs():
            dead = one.zero & other.zero
            block = one.weight.grid.block
            for pair in (dead & one.mask.any(1)).nonzero().flatten().tolist():
                rows = one.values[pair * block : (pair + 1) * block].view(block, -1, block)
                active = one.mask[pair]
                # As large as first weights of rows that sum over as few inputs.
                std = (int(active.sum()) * block) ** -0.5
                rows.copy_(torch.randn(rows.shape, generator=self._generator) * std * active[None, :, None])

    def pairs(self) -> Iterator[tuple[Side, Side]]:
        """The two sides of all pairs of each kind, layer by layer."""
        for block in self.model.blocks:
            assert isinstance(block, Block)
            width = block.attention.proj.in_features
            q, k, v = (self._side(block.attention.qkv.weight, i * width, width) for i in range(3))
            yield self._side(block.up.weight), self._side(block.down.weight, columns=True)
            yield v, self._side(block.attention.proj.weight, columns=True)
            yield q, k

    def _side(self, parameter: Tensor, start: int = 0, length: int = -1, columns: bool = False) -> Side:
        assert self.sparsifier is not None
        weight = next(w for w, p in self.sparsifier.parameters() if p is parameter)
        parts = [parameter.data, weight.mask, weight.backbone]
        if columns:
            parts = [part.t() for part in parts]
        block = weight.grid.block
        if length >= 0:
            parts = [p[s : s + n] for p, s, n in zip(parts, *_ranges(start, length, block), strict=True)]
        return Side(weight, *parts)


def _ranges(start: int, length: int, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Start and length of the same rows in a weight, its mask and its backbone."""
    return (start, start // block, start // block), (length, length // block, length // block)
