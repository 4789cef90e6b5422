"""How blocks that have regrown take their first steps, as the schedule says: ``regrown`` and ``regrown_warmup``.

An optimizer's step is taken as it is, and the young blocks are written once more after it: by bias corrections of their
own count (``own_steps.py``), and then, over the first n steps of a warm-up, as ::

    w[k] = w[k-1] + k / n (w[k] - w[k-1])

which scales all of the update, decoupled weight decay included, as the warm-up of a learning rate does. (Regrown
weights begin at 0, so hardly anything is there to decay: what a warm-up of 100 steps leaves out comes to 50 ``lr wd``
of a weight.) Moments are the optimizer's, and see every gradient in full.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.errors import MSTWarning
from mst_compile.rules.schedule import Schedule

from . import own_steps
from .masters import original_of
from .optimizers import survey
from .weight import SparseWeight
from .young import Young

# Keys of averages and factors of averages: what is under them moves weights, and is none of them itself.
_MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "exp_inf", "square_avg", "grad_avg", "acc_delta", "sum",
    "momentum_buffer", "previous_grad", "row_var", "col_var", "variance", "state1", "state2",
}  # fmt: skip
_told: weakref.WeakKeyDictionary[Optimizer, set[str]] = weakref.WeakKeyDictionary()

Own = Iterable[tuple[SparseWeight, nn.Parameter]]


def follows(schedule: Schedule) -> bool:
    """Whether a schedule asks for anything that needs to know how many steps a block has taken."""
    return schedule.regrown == "own steps" or schedule.regrown_warmup > 1


def by_own_steps(schedule: Schedule, optimizer: Optimizer) -> bool:
    """Whether regrown blocks shall begin with moments of 0 and bias corrections of their own, and can."""
    return schedule.regrown == "own steps" and type(optimizer) in own_steps.RULES


def values_before(schedule: Schedule, own: Own) -> dict[str, Tensor]:
    """Before a step: the young elements of each weight that has any, by its name."""
    found: dict[str, Tensor] = {}
    if not follows(schedule):
        return found
    for weight, parameter in own:
        if weight.grown is not None:
            weight.young = Young.joined(weight.young, weight.grown)
        if weight.young is not None:  # a frozen weight, too: an optimizer steps it by a gradient that was left over
            found[weight.name] = weight.young.take(parameter, weight.grid)
    return found


class Stepped(NamedTuple):
    """What the young blocks of one weight are after a step.

    Attributes:
        written: those that were, and their elements; None where they are as the optimizer has left them.
        young: those that are young still.
    """

    written: tuple[Young, Tensor] | None
    young: Young | None


@torch.no_grad()
def after_step(
    schedule: Schedule, optimizer: Optimizer, own: Own, before: dict[str, Tensor], stepped: dict[str, Stepped]
) -> set[str]:
    """After a step: write the young blocks of the weights that took it, and count the step for them.

    Args:
        before: what :func:`values_before` returned.
        stepped: takes up what is written before it is: a call that was interrupted can be made again.

    Returns:
        Names of these weights.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for weight, parameter in own:
        name, young = weight.name, weight.young
        if parameter.grad is None or name not in before:
            continue
        if name not in stepped and young is not None:
            stepped[name] = _stepped(schedule, optimizer, groups[id(parameter)], parameter, weight, young, before[name])
        if name in stepped:
            written, left = stepped[name]
            if written is not None:
                written[0].put(parameter, weight.grid, written[1])
            weight.young = left
    return set(stepped)


def _stepped(
    schedule: Schedule,
    optimizer: Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    weight: SparseWeight,
    young: Young,
    old: Tensor,
) -> Stepped:
    """What the young blocks of one weight become, from what they were and what the optimizer has made of them."""
    grid, length = weight.grid, schedule.regrown_warmup
    corrects = schedule.regrown == "own steps" and _can_correct(optimizer)
    warms = length > 1 and bool((young.steps + 1 < length).any()) and _can_warm_up(optimizer, length)
    new = None
    if corrects or warms:
        new = young.take(parameter, grid)
        if corrects:
            new = own_steps.stepped(optimizer, group, parameter, grid, young, old)
        if warms:
            share = ((young.steps + 1).double() / length).clamp(max=1.0)
            new = old + young.spread(share, parameter, grid) * (new - old)
    last = max(length - 1, own_steps.young_for(optimizer, group) if corrects else 0)
    return Stepped(None if new is None else (young, new), young.older().where(young.steps + 1 < last))


def _can_correct(optimizer: Optimizer) -> bool:
    if type(optimizer) in own_steps.RULES:
        return True
    if type(optimizer) not in own_steps.WITHOUT:
        known = ", ".join(cls.__name__ for cls in own_steps.RULES)
        _tell(
            optimizer,
            f"regrown='own steps' of the schedule is known of {known}, and {type(optimizer).__name__} is none of them: "
            "blocks that grow begin in it with regrown='first estimate', their second moment at its first estimate "
            "where it has one",
        )
    return False


def _can_warm_up(optimizer: Optimizer, length: int) -> bool:
    known = survey(optimizer)
    other = sorted({*known.elements, *known.codes, *known.foreign} - _MOMENTS)
    if other:
        _tell(
            optimizer,
            f"regrown_warmup={length} of the schedule scales what a step adds to blocks that have grown, and "
            f"{type(optimizer).__name__} keeps {', '.join(other)}, which may be other forms of the weights that "
            "would part from them: their updates are as it makes them",
        )
    return not other


def _tell(optimizer: Optimizer, text: str) -> None:
    told = _told.setdefault(original_of(optimizer), set())
    if text not in told:
        told.add(text)
        warnings.warn(text, MSTWarning, stacklevel=6)
