"""What becomes of values that stand outside the active blocks when a step is taken.

They come from a checkpoint without its topology, or somebody has written them. Where a state dict brought them, masks
follow the values as far as the density of the moment allows; where a program wrote them, masks stay. What is cut is
said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn

from mst_compile.blocks.bulk import block_mean_square, outside_of_all, share_outside_here
from mst_compile.blocks.shards import is_sharded, written_at
from mst_compile.errors import MSTWarning
from mst_compile.rules.guard import safe_among_all
from mst_compile.rules.masks import following_mask

from .weight import SparseWeight

_SHOWN = 1e-4  # the smallest share that two digits of a percentage show


def settle(
    own: Iterable[tuple[SparseWeight, nn.Parameter]],
    before: Callable[[], None],
    *,
    look: bool = False,
    alone: bool = False,
) -> bool:
    """Let weights be 0 outside their active blocks; returns whether any was not, or a mask has changed.

    Args:
        before: is called before a mask changes.
        look: look at every weight, also where nobody is known to have written.
        alone: of those that are spread over ranks at what this rank holds, as others may not look now.
    """
    cut, changed = {}, False
    given, own, parts = own, [], []
    for weight, parameter in given:
        spread = is_sharded(parameter)
        if weight.is_clean(parameter) and not (look and not (alone and spread)):
            if spread and parameter.requires_grad and (look or weight.suspect or was_written_here(weight, parameter)):
                parts.append((weight, parameter))
        elif parameter.requires_grad:  # a frozen weight never changes
            own.append((weight, parameter))
    if not own and not parts:
        return False
    found = outside_of_all([(parameter, weight.grid, weight.mask) for weight, parameter in own])
    for (weight, parameter), outside_mask in zip(own, found, strict=True):
        if weight.look(parameter, outside_mask):
            continue
        whole = block_mean_square(parameter, weight.grid).double()
        if weight.follows:
            before()
            _follow(weight, _following(weight, whole))
            changed = True
        outside = whole[~weight.mask].sum()
        if bool(outside):
            cut[weight.name] = float(outside / whole.sum())
        weight.zero_inactive_(parameter)
        weight.note_clean(parameter)
    cut |= {weight.name: share for weight, parameter in parts if (share := _cut_here(weight, parameter))}
    if cut:
        _warn(cut)
    return changed or bool(cut)


def was_written_here(weight: SparseWeight, parameter: torch.Tensor) -> bool:
    """Whether somebody was seen to write to this rank's part of a spread weight since it was known to be 0 outside."""
    return not weight.is_dense and weight.clean_here != written_at(parameter)


def _cut_here(weight: SparseWeight, parameter: torch.Tensor) -> float:
    """Set this rank's part of a spread weight to 0 outside the active blocks; returns how much of it, by squares, was
    not. No other rank need know of it: masks stay, as nothing was loaded."""
    share = share_outside_here(parameter, weight.grid, weight.mask)
    if share:
        weight.zero_inactive_(parameter)
    weight.dirty, weight.clean_here = None, written_at(parameter)
    return share


def _follow(weight: SparseWeight, mask: torch.Tensor) -> None:
    """Take over a mask; what has just grown and is not in it is a block like any other that is not active."""
    if weight.grown is not None:
        left = weight.grown & mask
        weight.grown = left if bool(left.any()) else None
    weight.set_mask(mask)


def _following(weight: SparseWeight, magnitude: torch.Tensor) -> torch.Tensor:
    """As many active blocks as there are now, in each matrix, where the values are largest."""
    split, found = weight.grid.split, []
    for mask, own, backbone in zip(split(weight.mask), split(magnitude), split(weight.backbone), strict=True):
        count = int(mask.sum())
        found.append(following_mask(mask, own.float(), count, safe_among_all(weight.guard, own, count, backbone)))
    return torch.cat(found)


def _warn(cut: dict[str, float]) -> None:
    worst = max(cut, key=lambda name: cut[name])
    more = f" and of {len(cut) - 1} more" if len(cut) > 1 else ""
    share = f"{cut[worst]:.2%}" if cut[worst] >= _SHOWN else f"less than {_SHOWN:.2%}"
    warnings.warn(
        f"values stood outside the active blocks of {worst}{more}, loaded without their topology or written by the "
        f"program, and are set to 0 now that an optimizer steps: {share} of its squared magnitude. To keep "
        "them load the optimizer's or the sparsifier's state of the same checkpoint, give "
        "sparsifier(model).apply_mask(...) the blocks that they need, or densify(model)",
        MSTWarning,
        stacklevel=5,
    )
