"""Topology events: what will change is planned without changing anything, and then applied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import begins_a_pass, block_means, zero_all_inactive_, zero_blocks_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.rules.checks import check_share
from mst_compile.rules.growth import Growth
from mst_compile.rules.masks import generator, update_mask
from mst_compile.rules.schedule import Schedule

from .optimizers import zero_state_
from .together import write_taken
from .weight import SparseWeight

_DROP = "drop_fraction_at(step) of the schedule"
_FEW = 0.05  # share of dropped blocks up to which visiting them alone beats a pass over the weight


@dataclass(frozen=True)
class Plan:
    """What an event will do.

    Attributes:
        masks: new block mask of each weight that changes, by its name.
        skipped: why nothing can be planned, else empty.
    """

    masks: dict[str, Tensor]
    skipped: str = ""


def plan_event(
    parameters: Iterable[tuple[SparseWeight, Tensor]],
    densities: Sequence[float],
    schedule: Schedule,
    step: int,
    seed: int,
) -> Plan:
    """Drop and grow the blocks of each weight as ``schedule`` says after ``step`` steps; changes nothing.

    Args:
        parameters: the weights, with their growth scores, and their values.
        densities: target density of each.
    """
    own = list(parameters)
    wanted = []
    for density, (weight, parameter) in zip(densities, own, strict=True):
        if rests(weight, parameter, own):
            continue
        count = weight.blocks_at(density)
        active = [int(mask.count_nonzero()) for mask in weight.grid.split(weight.mask)]
        drops = [_drop(schedule, step, density, n, count) for n in active]
        if not any(drops) and all(n == count for n in active):
            continue
        only_grows = not any(drops) and all(n <= count for n in active)
        wanted.append((density, weight, parameter, count, drops, only_grows))
    measured = [(parameter, weight.grid) for _, weight, parameter, _, _, only_grows in wanted if not only_grows]
    magnitudes = block_means(measured, schedule.magnitude)
    changes: dict[str, Tensor] = {}
    for density, weight, _, count, drops, only_grows in wanted:
        magnitude = weight.mask.float() if only_grows else next(magnitudes)
        for what, values in (("gradient", weight.scores), ("weight", magnitude)):
            if density < 1 and values is not None and not bool(values.isfinite().all()):
                return Plan({}, f"the {what} of {weight.name} is not finite")
        draws = [generator(seed, step, name) for name in weight.matrices]
        changes[weight.name] = _updated(weight, magnitude, count, drops, schedule.growth_rule, draws)
    return Plan(changes)


def _drop(schedule: Schedule, step: int, density: float, active: int, count: int) -> float:
    """Share of the ``active`` blocks of a matrix that an event drops on its way to ``count`` of them."""
    drop = schedule.drop_fraction_at(step) if density < 1 else 0.0
    if schedule.drop_after_pruning and count < active:
        drop = (active - count + check_share(_DROP, drop) * count) / active
    return drop


def _updated(
    weight: SparseWeight,
    magnitude: Tensor,
    count: int,
    drops: Sequence[float],
    growth: Growth,
    draws: Sequence[torch.Generator],
) -> Tensor:
    """The mask after an event, bool ``[R, C]``: each matrix of a stack has one of its own, of ``count`` blocks."""
    blocks = [weight.mask, weight.safe_blocks(magnitude), magnitude]
    scores = [None] * len(draws) if weight.scores is None else weight.grid.split(weight.scores)
    own = zip(*map(weight.grid.split, blocks), scores, drops, draws, strict=True)
    return torch.cat(
        [update_mask(mask, safe, m, score, count, drop, growth, draw) for mask, safe, m, score, drop, draw in own]
    )


def rests(weight: SparseWeight, parameter: Tensor, own: Sequence[tuple[SparseWeight, Tensor]]) -> bool:
    """Whether a weight keeps its topology: it is frozen, or others were trained since the last event and it was not,
    as an expert that saw no token."""
    return not parameter.requires_grad or (not weight.moved and any(w.moved for w, _ in own))


def apply(
    plan: Plan,
    parameters: Iterable[tuple[SparseWeight, nn.Parameter]],
    optimizers: Iterable[Optimizer],
    *,
    rescale: bool = False,
) -> None:
    """Let the masks of a plan take effect; with ``rescale`` the weights that stay grow by ``density ** -0.5``.

    What is interrupted is brought to its end, and then raises: other masks than those of some weights, or values and
    state outside of them, would stay for good.
    """
    known = list(optimizers)
    own = [(weight, parameter) for weight, parameter in parameters if weight.name in plan.masks]
    try:
        for weight, parameter in own:
            change_mask(weight, parameter, plan.masks[weight.name], known)
            if rescale:
                with torch.no_grad():
                    parameter.mul_(weight.density**-0.5)
                weight.note_clean(parameter)
    except BaseException:  # an interrupt
        if not rescale:  # of first masks, which are undone
            for weight, parameter in own:
                change_mask(weight, parameter, plan.masks[weight.name], known)
        raise


@dataclass(frozen=True)
class Change:
    """What another mask means for one weight: as it is before anything has changed, so that it can be done again.

    Attributes:
        dropped: blocks that were active and will not be, bool ``[R, C]``.
        grown: blocks that have not been stepped since they grew, likewise; None if there are none.
        few: whether visiting the dropped blocks alone may beat a pass over the weight, where nothing else can be wrong.
    """

    mask: Tensor
    dropped: Tensor
    grown: Tensor | None
    few: bool


def change_to(weight: SparseWeight, parameter: Tensor, mask: Tensor) -> Change | None:
    """What a mask would change; None if it is the weight's."""
    if torch.equal(weight.mask, mask):
        return None
    dropped, grown = weight.mask & ~mask, mask & ~weight.mask
    if weight.grown is not None:
        grown |= weight.grown & mask
    few = int(dropped.count_nonzero()) < _FEW * dropped.numel() and weight.is_clean(parameter)
    return Change(mask, dropped, grown if bool(grown.any()) else weight.grown, few)


Item = tuple[Change, SparseWeight, nn.Parameter]


def carry_out(changes: Sequence[Item], optimizers: Iterable[Optimizer], *, again: bool = False) -> None:
    """Take over masks: dropped weights, their gradient and all their state in ``optimizers`` become exactly 0.

    Outside the active blocks weights and optimizer state are 0 already, so grown blocks start at 0. What is to become 0
    of all weights is written in one go, in one launch on a GPU, behind the indexes of all, which it goes by.

    Args:
        again: an earlier call may have been interrupted, anywhere.
    """
    known, later, clean = list(optimizers), [], []
    try:
        for change, weight, parameter in changes:
            weight.grown = change.grown
            weight.take_mask(change.mask)
            drops = bool(change.dropped.any())
            if drops or again:
                alone = change.few and not again and not begins_a_pass(parameter, weight.grid, weight.place_of_index)
                later += _cut(weight, parameter, known, change.dropped if alone else None)
            if change.few or drops or again or weight.is_dense:
                clean.append((weight, parameter))
    finally:  # also of those before one whose state cannot be written
        write_taken(weight for _, weight, _ in changes)
        zero_all_inactive_(later)
        for weight, parameter in clean:
            weight.note_clean(parameter)


def change_mask(weight: SparseWeight, parameter: nn.Parameter, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """:func:`carry_out` what a mask changes; what is interrupted is brought to its end, and then raises."""
    change, known = change_to(weight, parameter, mask), list(optimizers)
    if change is None:
        return
    try:
        carry_out([(change, weight, parameter)], known)
    except BaseException:  # an interrupt, anywhere
        carry_out([(change, weight, parameter)], known, again=True)
        raise


def _cut(
    weight: SparseWeight, parameter: nn.Parameter, optimizers: Iterable[Optimizer], dropped: Tensor | None
) -> list[tuple[Tensor, BlockGrid, Tensor, Tensor | None]]:
    """Make values, gradient and state 0 in the blocks ``dropped``, or in all that are not active; returns what is left
    to become 0 in these."""
    later: list[Tensor] = []
    for tensor in [parameter, *([] if parameter.grad is None else [parameter.grad])]:
        if dropped is not None:
            zero_blocks_(tensor, weight.grid, dropped)
        else:
            later.append(tensor)
    for optimizer in optimizers:
        zero_state_(optimizer, weight, parameter, dropped, later=later)
    one_each = {id(tensor): tensor for tensor in later}  # an optimizer and what wraps it have the same state
    index = weight.place_of_index
    return [] if weight.is_dense else [(tensor, weight.grid, weight.mask, index) for tensor in one_each.values()]
