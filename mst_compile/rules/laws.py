"""Laws of the density: what the learning rate or the weight decay of a sparse weight is multiplied by. Pure functions.

A law is a number r for ``density ** -r``, a name of :data:`NAMED`, or a function of the density of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from mst_compile.errors import ArgumentError

from .checks import as_number, check_choice, check_number, shown

_LARGEST = 700.0  # exp of it is a float
Law: TypeAlias = float | str | Callable[[float], float]


def graphcore(density: float) -> float:
    """``exp(1.969 s**2 + 0.2905 s)`` with the sparsity ``s = 1 - density``: 4.4 at a density of 0.2, 6.4 at 0.1.

    A fit to the best learning rates of BERT-Medium under Adam at sparsities of 0 to 0.9 (arXiv 2108.06277, appendix
    "Learning rate for sparse models").
    """
    sparsity = 1.0 - density
    return math.exp(1.969 * sparsity**2 + 0.2905 * sparsity)


def none(density: float) -> float:
    """1 at every density: no law."""
    return 1.0


NAMED: dict[str, Callable[[float], float]] = {"graphcore": graphcore, "none": none}


def check_law(name: str, law: object, *, least: float = -math.inf) -> Law:
    """``law`` in plain Python values.

    Args:
        name: of the argument, for the message.
        least: of r, if the law is ``density ** -r``.

    Raises:
        ArgumentError: it is no law.
    """
    if isinstance(law, str):
        return check_choice(f"{name}, if it is a name,", law, NAMED, ArgumentError)
    if callable(law) and as_number(law) is None:
        return law
    if as_number(law) is None:
        raise ArgumentError(
            f"{name} must be a finite number r for density ** -r, a name ({', '.join(map(repr, NAMED))}) or a function "
            f"of the density, got {shown(law)}"
        )
    return check_number(name, law, least=least)


def factor(name: str, law: Law, density: float, *, positive: bool) -> float:
    """What ``law`` multiplies by at a ``density`` in (0, 1].

    Args:
        name: of the law, for the message.
        positive: whether 0 is refused.

    Raises:
        ArgumentError: it is no finite number, or below 0.
    """
    if isinstance(law, str):
        found = NAMED[law](density)
    elif callable(law):
        found = law(density)
    else:  # no float is large enough for some powers
        found = density**-law if -law * math.log(density) < _LARGEST else math.inf
    return check_number(f"what {name} returns at density {density:g}", found, least=0, positive=positive)
