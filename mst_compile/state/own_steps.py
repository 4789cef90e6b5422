"""Bias corrections by a number of steps of a block's own, in optimizers that count those of the whole weight.

Adam keeps averages of gradients and of their squares that begin at 0::

    m[k] = beta1 m[k-1] + (1 - beta1) g[k]        v[k] = beta2 v[k-1] + (1 - beta2) g[k]**2

and divides them by ``1 - beta1**k`` and ``1 - beta2**k``, the weights that k gradients have in them. A block that has
regrown after t steps of its weight has averages of its own k gradients, but they are divided by ``1 - beta**(t + k)``,
nearly 1: its first update is ``(1 - beta1) / sqrt(1 - beta2)`` learning rates, 3.2 for the default betas. (The trouble,
and a count of its own for each regrown weight as the remedy, are SMET's, arXiv 2606.00888.)

The averages do not know k; corrections alone do. So the state that a step leaves is that of a count of one's own, and
nothing in the optimizer is touched: after its step the young blocks are computed anew from their values before it and
their averages after it::

    w[k] = (1 - lr wd) w[k-1] - lr (m[k] / (1 - beta1**k)) / (sqrt(v[k] / (1 - beta2**k)) + eps)

with the step's own learning rate and decay, in float32 and rounded once. That is exactly Adam for a Parameter that was
made when the block grew. A block is no longer young when its corrections are 1 up to float32's rounding: after 300
steps if beta2 is 0.95, after 15 thousand if it is 0.999.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim
from torch.nn import Parameter

from mst_compile.blocks.grid import BlockGrid

from .young import Young

_FAR = 2.0**40  # steps after which nothing is corrected
_SETTLED = torch.finfo(torch.float32).eps
_NOTHING = 2.0**-64  # of a product that is subtracted from 1

Factors = Callable[[Tensor, Mapping[str, Any]], Sequence[Tensor]]
Direction = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Rule:
    """How an optimizer's update depends on the number of a step.

    Attributes:
        keys: of its state, the averages that an update is made of.
        factors: float64 ``[n]`` each, by which they enter the update of step ``[n]``, given the parameter group.
        direction: the update in learning rates, given averages, factors, the gradient if it is read, and eps.
        reads_gradient: whether the update is made of the gradient, too.
    """

    keys: tuple[str, ...]
    factors: Factors
    direction: Direction
    reads_gradient: bool = False


def _corrected(steps: Tensor, beta: Any) -> Tensor:
    """``1 - beta ** steps``."""
    return 1.0 - float(beta) ** steps


def _adam(steps: Tensor, group: Mapping[str, Any]) -> Sequence[Tensor]:
    beta1, beta2 = group["betas"]
    return 1.0 / _corrected(steps, beta1), _corrected(steps, beta2).rsqrt()


def _normalised(averages: Sequence[Tensor], factors: Sequence[Tensor], _: Tensor | None, eps: float) -> Tensor:
    (first, second), (by, root) = averages, factors
    return first * by / (second.sqrt() * root + eps)


def _nadam(steps: Tensor, group: Mapping[str, Any]) -> Sequence[Tensor]:
    """Of the gradient and of the first moment, by NAdam's momentum of each step and the product of all so far."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    products = _products(beta1, float(group["momentum_decay"]))

    def product(steps: Tensor) -> Tensor:
        return torch.where(steps < len(products), products[steps.clamp(max=len(products) - 1).long()], 0.0)

    now, then = (_momentum(beta1, float(group["momentum_decay"]), s) for s in (steps, steps + 1))
    root = _corrected(steps, beta2).rsqrt()
    return (1 - now) / (1 - product(steps)), then / (1 - product(steps + 1)), root


def _momentum(beta1: float, decay: float, steps: Tensor) -> Tensor:
    return beta1 * (1.0 - 0.5 * 0.96 ** (steps * decay))


@functools.lru_cache(maxsize=8)
def _products(beta1: float, decay: float) -> Tensor:
    """Products of the momenta of steps 1 to k, at k, as long as they are anything beside 1."""
    count = math.ceil(math.log(_NOTHING) / math.log(beta1)) if beta1 > 0 else 0
    momenta = _momentum(beta1, decay, torch.arange(count + 1, dtype=torch.float64, device="cpu"))
    momenta[0] = 1.0
    return momenta.cumprod(0)


def _with_gradient(
    averages: Sequence[Tensor], factors: Sequence[Tensor], gradient: Tensor | None, eps: float
) -> Tensor:
    (first, second), (of_gradient, of_first, root) = averages, factors
    assert gradient is not None
    return (gradient * of_gradient + first * of_first) / (second.sqrt() * root + eps)


def _radam(steps: Tensor, group: Mapping[str, Any]) -> Sequence[Tensor]:
    """Of the first moment, and of its quotient by the second's root: 0 as long as RAdam does not divide."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    most, corrected = 2.0 / (1.0 - beta2) - 1.0, _corrected(steps, beta2)
    length = most - 2.0 * steps * beta2**steps / corrected
    rectified = (length - 4) * (length - 2) * most / ((most - 4) * (most - 2) * length)
    return 1.0 / _corrected(steps, beta1), torch.where(length > 5.0, (rectified.clamp(min=0.0) * corrected).sqrt(), 0.0)


def _rectified(averages: Sequence[Tensor], factors: Sequence[Tensor], _: Tensor | None, eps: float) -> Tensor:
    (first, second), (by, rectified) = averages, factors
    return first * by * torch.where(rectified > 0, rectified / (second.sqrt() + eps), 1.0)


def _adamax(steps: Tensor, group: Mapping[str, Any]) -> Sequence[Tensor]:
    return (1.0 / _corrected(steps, group["betas"][0]),)


def _by_largest(averages: Sequence[Tensor], factors: Sequence[Tensor], _: Tensor | None, eps: float) -> Tensor:
    return averages[0] * factors[0] / averages[1]


_ADAM = Rule(("exp_avg", "exp_avg_sq"), _adam, _normalised)
RULES: dict[type[optim.Optimizer], Rule] = {
    optim.Adam: _ADAM,
    optim.AdamW: _ADAM,
    optim.NAdam: Rule(_ADAM.keys, _nadam, _with_gradient, reads_gradient=True),
    optim.RAdam: Rule(_ADAM.keys, _radam, _rectified),
    optim.Adamax: Rule(("exp_avg", "exp_inf"), _adamax, _by_largest),
}
# Their state corrects no bias: a weight of theirs that begins late begins as any other does.
WITHOUT = (optim.SGD, optim.Muon, optim.Adagrad)


def stepped(
    optimizer: optim.Optimizer,
    group: Mapping[str, Any],
    parameter: Parameter,
    grid: BlockGrid,
    young: Young,
    old: Tensor,
) -> Tensor:
    """The young elements of ``parameter`` after the step that ``optimizer`` has just taken, by their own counts.

    Args:
        group: the parameter group, with the learning rate and the decay of the step.
        young: with the steps taken before this one.
        old: the elements before the step, as :meth:`Young.take` gives them, ``[e]``.
    """
    rule, state = RULES[type(optimizer)], optimizer.state[parameter]
    factors = [young.spread(f, parameter, grid) for f in rule.factors((young.steps + 1).double(), group)]
    keys = [rule.keys[0], "max_exp_avg_sq" if group.get("amsgrad") else rule.keys[1]]
    averages = [young.take(state[key], grid) for key in keys]
    lr, decay, decoupled = group["lr"], group["weight_decay"], group.get("decoupled_weight_decay", False)
    gradient = None
    if rule.reads_gradient and parameter.grad is not None:
        gradient = young.take(parameter.grad, grid) * (-1.0 if group["maximize"] else 1.0)
        gradient += 0.0 if decoupled else decay * old
    kept = old * (1.0 - lr * decay) if decoupled else old
    return kept - lr * rule.direction(averages, factors, gradient, group["eps"])


def young_for(optimizer: optim.Optimizer, group: Mapping[str, Any]) -> int:
    """Steps after which a block's corrections are as good as none, and it is as any other."""
    beta1, beta2 = group["betas"]
    return _settled(RULES[type(optimizer)], float(beta1), float(beta2), float(group.get("momentum_decay", 0.0)))


@functools.lru_cache(maxsize=32)
def _settled(rule: Rule, beta1: float, beta2: float, momentum_decay: float) -> int:
    """The number of the last step whose factors are not those of steps without end up to float32's rounding."""
    group = {"betas": (beta1, beta2), "momentum_decay": momentum_decay}

    def at(steps: float) -> Sequence[Tensor]:
        return rule.factors(torch.tensor([steps], dtype=torch.float64, device="cpu"), group)

    limits = at(_FAR)

    def differs(steps: int) -> bool:
        pairs = zip(at(steps), limits, strict=True)
        return any(bool((factor - limit).abs() > _SETTLED * limit.abs()) for factor, limit in pairs)

    more = 1
    while differs(more):
        more *= 2
    least = more // 2
    while more - least > 1:  # least differs (or is 0), more does not
        middle = (least + more) // 2
        least, more = (middle, more) if differs(middle) else (least, middle)
    return least
