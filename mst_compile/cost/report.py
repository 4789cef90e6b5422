"""``explain(model)``: one row a weight, what became of it and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from mst_compile.blocks.shards import is_sharded
from mst_compile.cost.flops import linear_training
from mst_compile.lowering import device
from mst_compile.rules.checks import check_model
from mst_compile.state.sparsifier import Part, some_parts_of
from mst_compile.state.weight import SparseWeight, of


@dataclass(frozen=True)
class Row:
    """One weight. ``flops`` counts forward, grad-input and grad-weight per token, ``dense_flops`` without sparsity.

    ``density`` is the mask's, ``nonzero`` the share of elements that are not 0: less where blocks have grown that did
    not train, be it that no step was taken yet or that the units they belong to are dead. Of a weight that FSDP2 has
    sharded it is about the rows on this rank.
    """

    name: str
    shape: tuple[int, int]
    block: int | None
    density: float
    nonzero: float
    target: float
    kernel: str
    status: str
    flops: int
    dense_flops: int


class Explanation:
    """Rows of :func:`explain`, what became of each attention that a schedule wants sparse, and how the first masks of
    each part were made; prints as a table."""

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

    def __str__(self) -> str:
        head = ("weight", "shape", "block", "density", "non-zero", "target", "kernel", "MFLOPs/token", "status")
        table = [head] + [
            (
                r.name,
                f"{r.shape[0]}x{r.shape[1]}",
                "-" if r.block is None else str(r.block),
                f"{r.density:.3f}",
                f"{r.nonzero:.3f}",
                f"{r.target:.3f}",
                r.kernel,
                f"{r.flops / 1e6:.3f} of {r.dense_flops / 1e6:.3f}",
                r.status,
            )
            for r in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head) - 1)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in table
        ]
        total, dense = sum(r.flops for r in self.rows), sum(r.dense_flops for r in self.rows)
        lines.append(
            f"linear layers: {total / 1e6:.3f} of {dense / 1e6:.3f} MFLOPs/token ({total / max(1, dense):.1%})"
        )
        lines += [f"attention in {where or 'the model'}: {what}" for where, what in self.attention.items()]
        lines += [f"first masks{f' of {part}' if part else ''}: {how}" for part, how in self.first_masks.items()]
        return "\n".join(lines)

    __repr__ = __str__


def explain(model: nn.Module) -> Explanation:
    """What became of each linear weight of a sparsified model: matched by the graph pass or why not, block, density
    now and at the schedule's highest sparsity, share of elements that are not 0, kernel, and training FLOPs per token.
    Compile and run the model first to see what the pass matched. Modules that were sparsified separately are all in it,
    and names are those of the whole model.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("explain", model)
    rows: list[Row] = []
    attention: dict[str, str] = {}
    first_masks: dict[str, str] = {}
    for part in some_parts_of(model):
        own = part.sparsifier
        rows += [_row(part.full(weight.name), weight, parameter) for weight, parameter in own.parameters()]
        rows += _skipped(part)
        attention |= own.attention.reasons
        first_masks[part.name] = own.first_masks
    return Explanation(rows, attention, first_masks)


def _skipped(part: Part) -> Iterator[Row]:
    """The linear weights of a sparsified module that stay dense."""
    parameters = dict(part.module.named_parameters())
    for name, reason in part.sparsifier.skipped.items():
        parameter = parameters.get(name)
        if of(parameter) is not None:
            continue  # it became sparse with a part of its own
        shape = tuple(parameter.shape) if parameter is not None and parameter.dim() == 2 else (0, 0)
        flops, nonzero = 6 * shape[0] * shape[1], 1.0 if parameter is None else _nonzero(parameter)
        why = f"skipped: {reason}"
        yield Row(part.full(name), shape, None, 1.0, nonzero, 1.0, "dense", why, flops, flops)  # type: ignore[arg-type]


def _row(name: str, weight: SparseWeight, parameter: nn.Parameter) -> Row:
    seen = weight.uses
    missing = device.of(parameter.device.type).why_unsupported(parameter.dtype, parameter.dtype, weight.grid.block)
    if seen.matched or seen.served:
        uses = f"{seen.matched} use{'s' * (seen.matched > 1)}" if seen.matched else "shared graph"
        kernel, status = "block-sparse", f"matched ({uses})"
        if seen.unmatched:
            status += f"; dense: {', '.join(seen.unmatched)}"
        if seen.dense_now:
            kernel = "dense"
            status += "; dense products at the present density, where they are faster"
        elif seen.dense_products:
            status += f"; dense {', '.join(seen.dense_products)} at the present density, where faster"
    elif seen.unmatched:
        kernel, status = "dense", f"not matched: {', '.join(seen.unmatched)}"
    else:
        kernel = "dense"
        status = missing or 'not seen by backend="mst" yet'
    if weight.index is not None and not (parameter.is_meta or is_sharded(parameter) or weight.look(parameter)):
        kernel = "dense"
        status += "; values stand outside the active blocks: dense products until an optimizer steps"
    if weight.note:
        status += f"; {weight.note}"
    if weight.tied:
        status += "; tied"
    grid = weight.grid
    return Row(
        name,
        (grid.rows, grid.cols),
        grid.block,
        weight.density,
        _nonzero(parameter),
        max(weight.density_target, 1 / min(grid.shape)),
        kernel,
        status,
        linear_training(weight),
        6 * weight.numel,
    )


def _nonzero(parameter: nn.Parameter) -> float:
    """Share of elements that are not 0, NaN without any.

    No other rank takes part: often one alone asks.
    """
    local = parameter.detach()
    if is_sharded(local):
        local = local.to_local()  # type: ignore[attr-defined]
    return math.nan if local.is_meta or not local.numel() else int(local.count_nonzero()) / local.numel()
