"""``explain(model)``: what became of each weight and why, groups of alike layers, exceptions first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from mst_compile.cost import layout
from mst_compile.cost.layout import Group
from mst_compile.cost.rows import Row, rows_of
from mst_compile.rules.checks import check_model
from mst_compile.state.sparsifier import some_parts_of

FORMAT = 1  # of to_dict: raised when a key changes its meaning or goes


class Explanation:
    """Rows of :func:`explain`, what became of each attention that a schedule wants sparse, and how the first masks of
    each part were made. Prints groups of alike layers in at most 100 columns; iterates over the rows, one a weight."""

    def __init__(
        self, rows: list[Row], attention: dict[str, str] | None = None, first_masks: dict[str, str] | None = None
    ) -> None:
        self.rows = rows
        self.attention = attention or {}
        self.first_masks = first_masks or {}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> list[Group]:
        """Layers of the same shape, block, density (to three digits), kernel and status; exceptions first, then sparse
        weights, then those that stay dense."""
        return layout.groups(self.rows)

    def summary(self) -> str:
        """A few lines: how many weights run sparse, what does not and why, and what of the FLOPs is left."""
        return "\n".join([*layout.counts(self.rows), *layout.reasons(self.groups), self._total()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that ``json.dumps`` takes.

        Keys, which stay as they are while ``format`` is 1: ``format``; ``flops`` and ``dense_flops`` per token, of all
        linear layers; ``weights``, a list of dicts of the fields of :class:`~mst_compile.cost.rows.Row`; ``groups``, a
        list of dicts of ``names`` and, alike for these, ``shape``, ``block``, ``density``, ``kernel``, ``status`` and
        ``exception``; ``attention``, place -> what became of it; ``first_masks``, part of the model (empty: the model
        itself) -> how they were made. ``nonzero`` is None where nothing can be read, ``block`` where there is none.
        """
        return {
            "format": FORMAT,
            "flops": sum(r.flops for r in self.rows),
            "dense_flops": sum(r.dense_flops for r in self.rows),
            "weights": [
                vars(r) | {"shape": list(r.shape), "nonzero": None if math.isnan(r.nonzero) else r.nonzero}
                for r in self.rows
            ],
            "groups": [
                {
                    "names": [r.name for r in group.rows],
                    "shape": list(group.first.shape),
                    "block": group.first.block,
                    "density": group.first.density,
                    "kernel": group.first.kernel,
                    "status": group.first.status,
                    "exception": group.first.exception,
                }
                for group in self.groups
            ],
            "attention": dict(self.attention),
            "first_masks": dict(self.first_masks),
        }

    def __str__(self) -> str:
        lines = layout.table(self.groups)
        lines.append(self._total())
        for where, what in self.attention.items():
            lines += layout.wrapped(f"attention in {where or 'the model'}: {what}")
        for part, how in self.first_masks.items():
            lines += layout.wrapped(f"first masks{f' of {part}' if part else ''}: {how}")
        return "\n".join(lines)

    __repr__ = __str__

    def _total(self) -> str:
        total, dense = sum(r.flops for r in self.rows), sum(r.dense_flops for r in self.rows)
        stacks = sum(len(r.shape) > 2 and r.block is None for r in self.rows)
        more = f"; without {stacks} stack{'s' * (stacks > 1)} of matrices" if stacks else ""
        return f"linear layers: {total / 1e6:.3f} of {dense / 1e6:.3f} MFLOPs/token ({total / max(1, dense):.1%}){more}"


def explain(model: nn.Module) -> Explanation:
    """What became of each linear weight of a sparsified model: matched by the graph pass or why not, block, density
    now and at the schedule's highest sparsity, share of elements that are not 0, kernel, and training FLOPs per token.
    Compile and run the model first to see what the pass matched. Modules that were sparsified separately are all in it,
    and names are those of the whole model. Weights that were quantised, resized or replaced after ``sparsify`` are
    told as what the model holds now.

    Returns:
        An :class:`Explanation`: print it, or take its ``summary()``, ``to_dict()``, ``groups`` or rows.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("explain", model)
    rows: list[Row] = []
    attention: dict[str, str] = {}
    first_masks: dict[str, str] = {}
    for part in some_parts_of(model):
        rows += rows_of(part)
        attention |= part.sparsifier.attention.reasons
        first_masks[part.name] = part.sparsifier.first_masks
    return Explanation(rows, attention, first_masks)
