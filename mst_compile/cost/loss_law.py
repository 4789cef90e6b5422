"""What a number of weights, of which some are masked, learns from a number of tokens: a fit to the study's runs.

Of hidden weights, those of the linear layers without the head, counts a geometric mean of how many took part in an
average step and how many there are; of tokens that are seen again each counts less than the time before:

    loss = floor + a (n / 10^6) ** -alpha + b (d / 10^6) ** -beta
    n = active ** (1 - gamma) * weights ** gamma
    d = unique * (1 + repeats (1 - exp(-(tokens / unique - 1) / repeats)))

The form for dense models is Hoffmann et al.'s (arXiv 2203.15556), that of repeated data Muennighoff et al.'s
(arXiv 2305.16264); that the average number of weights decides is arXiv 2501.12486. docs/theory.md has the fit and its
error; ``examples/quality/theory.py`` makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCALE = 1e6  # weights and tokens are counted in millions


@dataclass(frozen=True)
class LossLaw:
    """The constants of the law, the floor apart: that is the text's and the context's, and differences do not need it.

    ``gamma`` 0 says that a masked weight is worth nothing, 1 that it is worth as much as any other.
    """

    a: float
    alpha: float
    b: float
    beta: float
    gamma: float
    repeats: float

    def above_floor(self, active: float, weights: float, tokens: float, unique: float = math.inf) -> float:
        """Loss above the floor, in nats a token.

        Args:
            active: hidden weights that take part in a step, mean over the steps.
            weights: hidden weights there are.
            tokens: of the whole run.
            unique: tokens of the text, if it is repeated.
        """
        size = active ** (1 - self.gamma) * weights**self.gamma
        seen = min(unique, tokens)
        data = seen * (1 - self.repeats * math.expm1(-(tokens / seen - 1) / self.repeats))
        return self.a * (size / SCALE) ** -self.alpha + self.b * (data / SCALE) ** -self.beta


@dataclass(frozen=True)
class Fit:
    """A law, and how far to trust it.

    Attributes:
        error: root mean square difference from runs of configurations that the fit had not seen, nats a token.
        active: least and most active weights of the runs.
        tokens: least and most tokens of the runs.
        repeats: how often a text was seen at most.
    """

    law: LossLaw
    error: float
    active: tuple[float, float]
    tokens: tuple[float, float]
    repeats: float
