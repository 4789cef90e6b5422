"""Topology events: what will change is planned without changing anything, and then applied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import begins_a_pass, block_means, zero_all_inactive_, zero_blocks_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.shards import local_part
from mst_compile.errors import MSTWarning, OptimizerError
from mst_compile.rules.checks import check_share
from mst_compile.rules.growth import Growth
from mst_compile.rules.masks import generator, update_mask
from mst_compile.rules.schedule import Schedule

from .optimizers import zero_state_
from .strides import lay_out
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


Measure = Callable[[Sequence[tuple[SparseWeight, Tensor]], str], Iterator[Tensor]]


def by_values(own: Sequence[tuple[SparseWeight, Tensor]], magnitude: str) -> Iterator[Tensor]:
    """Magnitudes of the blocks of weights, ``[R, C]`` each, by the values that the model holds."""
    return block_means([(parameter, weight.grid) for weight, parameter in own], magnitude)


def plan_event(
    parameters: Iterable[tuple[SparseWeight, Tensor]],
    densities: Sequence[float],
    schedule: Schedule,
    step: int,
    seed: int,
    measure: Measure = by_values,
) -> Plan:
    """Drop and grow the blocks of each weight as ``schedule`` says after ``step`` steps; changes nothing.

    Args:
        parameters: the weights, with their growth scores, and their values.
        densities: target density of each.
        measure: as :func:`by_values`.
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
    measured = [(weight, parameter) for _, weight, parameter, _, _, only_grows in wanted if not only_grows]
    magnitudes = measure(measured, schedule.magnitude)
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
        new: blocks that were not active and will be, likewise.
        grown: blocks that have not been stepped since they grew, likewise; None if there are none.
        few: whether visiting the dropped blocks alone may beat a pass over the weight, where nothing else can be wrong.
    """

    mask: Tensor
    dropped: Tensor
    new: Tensor
    grown: Tensor | None
    few: bool


def change_to(weight: SparseWeight, parameter: Tensor, mask: Tensor) -> Change | None:
    """What a mask would change; None if it is the weight's."""
    if torch.equal(weight.mask, mask):
        return None
    dropped, new = weight.mask & ~mask, mask & ~weight.mask
    grown = new if weight.grown is None else new | weight.grown & mask
    few = int(dropped.count_nonzero()) < _FEW * dropped.numel() and weight.is_clean(parameter)
    return Change(mask, dropped, new, grown if bool(grown.any()) else weight.grown, few)


Item = tuple[Change, SparseWeight, nn.Parameter]
_Whole = tuple[Tensor, BlockGrid, Tensor, Tensor | None]


def carry_out(changes: Sequence[Item], optimizers: Iterable[Optimizer], *, again: bool = False) -> None:
    """Take over masks: dropped weights, their gradient and all their state in ``optimizers`` become exactly 0, and so
    does the state of grown blocks, whoever may have written to it.

    Outside the active blocks weights are 0 already, so grown blocks start at 0. What is to become 0 of all weights is
    written in one go, in one launch on a GPU, behind the indexes of all, which it goes by; and in one before that for
    state where blocks grow.

    Args:
        again: an earlier call may have been interrupted, anywhere.

    Raises:
        OptimizerError: state cannot be written. All else has happened, for all weights.
    """
    known, later, clean, failed = list(optimizers), [], [], _Failures()
    _clear_new(changes, known, failed, again)
    try:
        for change, weight, parameter in changes:
            weight.grown = change.grown
            weight.take_mask(change.mask)
            drops = bool(change.dropped.any())
            if drops or again:
                alone = change.few and not again and not begins_a_pass(parameter, weight.grid, weight.place_of_index)
                later += _cut(weight, parameter, known, change.dropped if alone else None, failed)
            if change.few or drops or again or weight.is_dense:
                clean.append((weight, parameter))
    finally:  # also of those before an interrupt
        write_taken(weight for _, weight, _ in changes)
        failed.zero(later)
        for weight, parameter in clean:
            weight.note_clean(parameter)
    failed.tell()


class _Failures:
    """State of optimizers that could not be written: everything else is done before it is said."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def clear(
        self,
        optimizer: Optimizer,
        weight: SparseWeight,
        parameter: nn.Parameter,
        blocks: Tensor | None,
        later: list[Tensor] | None,
    ) -> None:
        """As :func:`zero_state_`."""
        try:
            zero_state_(optimizer, weight, parameter, blocks, later=later)
        except Exception as error:
            self._errors.append(error)

    def zero(self, whole: Sequence[_Whole]) -> None:
        """As :func:`zero_all_inactive_`; one by one, if that fails."""
        if not whole:
            return
        try:
            zero_all_inactive_(whole)
        except Exception as error:
            if len(whole) == 1:
                self._errors.append(error)
            for one in whole if len(whole) > 1 else ():
                self.zero([one])

    def tell(self) -> None:
        """Raise what has failed first."""
        for error in self._errors[:1]:
            if isinstance(error, OptimizerError):
                raise error
            raise OptimizerError(
                f"what an optimizer keeps of a weight cannot be written ({error}), so that dropped or grown blocks "
                "would keep old state. Masks have changed all the same"
            ) from error


def _clear_new(changes: Sequence[Item], known: Sequence[Optimizer], failed: _Failures, again: bool) -> None:
    """Make the optimizers' state 0 in blocks that grow, before they do."""
    before: list[_Whole] = []
    for change, weight, parameter in changes:
        if not bool(change.new.any()):
            continue
        index = weight.index_of_whole
        # Of all that is inactive, where that is one launch for all; after an interrupt, the new mask may be set.
        together = not again and begins_a_pass(parameter, weight.grid, index)
        states: list[Tensor] = []
        for optimizer in known:
            failed.clear(optimizer, weight, parameter, None if together else change.new, states)
        before += _inactive(weight, states)
    failed.zero(before)


def change_mask(weight: SparseWeight, parameter: nn.Parameter, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """:func:`carry_out` what a mask changes; what is interrupted is brought to its end, and then raises."""
    loaded = weight.follows
    if not weight.is_dense:
        weight.look_here(parameter)  # .data leaves no trace
    change, known = change_to(weight, parameter, mask), list(optimizers)
    if change is None:
        return
    if weight.dirty is not None and not loaded:
        _warn_of_values(weight, parameter, change.new)
    try:
        carry_out([(change, weight, parameter)], known)
    except OptimizerError:
        raise
    except BaseException:  # an interrupt, anywhere
        carry_out([(change, weight, parameter)], known, again=True)
        raise


def _warn_of_values(weight: SparseWeight, parameter: Tensor, new: Tensor) -> None:
    """Say that blocks do not begin at 0: what a program has written where a mask was to be given stays, as what it has
    loaded does."""
    local, part = local_part(parameter.detach())
    if not bool(((local != 0) & part.of(weight.grid.expand(new)).to(local.device).view_as(local)).any()):
        return
    warnings.warn(
        f"{weight.name} now has in its mask blocks that the program has written values to: they keep them, and do not "
        "start at 0 as blocks that grow do. If that was not meant, write to weights after apply_mask",
        MSTWarning,
        stacklevel=5,
    )


def _cut(
    weight: SparseWeight,
    parameter: nn.Parameter,
    optimizers: Iterable[Optimizer],
    dropped: Tensor | None,
    failed: _Failures,
) -> list[_Whole]:
    """Make values, gradient and state 0 in the blocks ``dropped``, or in all that are not active; returns what is left
    to become 0 in these."""
    later: list[Tensor] = []
    lay_out(parameter, set())  # an expanded gradient cannot be written in parts
    for tensor in [parameter, *([] if parameter.grad is None else [parameter.grad])]:
        if dropped is not None:
            zero_blocks_(tensor, weight.grid, dropped)
        else:
            later.append(tensor)
    for optimizer in optimizers:
        failed.clear(optimizer, weight, parameter, dropped, later)
    return _inactive(weight, later)


def _inactive(weight: SparseWeight, tensors: Iterable[Tensor]) -> list[_Whole]:
    """What says that tensors of the weight's shape shall become 0 outside its active blocks, as its index will have
    them by then."""
    one_each = {id(tensor): tensor for tensor in tensors}  # an optimizer and what wraps it have the same state
    index = weight.place_of_index
    return [] if weight.is_dense else [(tensor, weight.grid, weight.mask, index) for tensor in one_each.values()]
