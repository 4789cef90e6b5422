"""Whether a weight may be as an initialiser left it. Pure functions on tensors, all on the CPU.

What ``torch.nn.init`` draws is independent from element to element, and uniform, normal or truncated normal. Training
makes rows and columns of different length and tails of another form. Both are tested.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FALSE_ALARMS = 1e-6  # freshly initialised models that are taken for trained ones
SIDE = 128  # rows and columns of a sample
_TESTS = 3  # of a weight: form, rows, columns
_WIDEST, _NARROWEST = 0.05, 40.0  # bounds of a truncated normal, in its standard deviations: as good as uniform, normal


def looks_trained(sample: Tensor, eps: float, weights: int = 1, false_alarms: float = FALSE_ALARMS) -> bool:
    """Whether values cannot be as drawn by an initialiser: uniform, normal or truncated normal, each for itself.

    Of models whose weights all are, at most the share ``false_alarms`` is taken for trained. Which trained ones are
    found depends on how many values there are and how far training went. Rows of zeros (of a padding token) do not
    count, weights that are all alike say nothing, and values that are not finite neither.

    Args:
        sample: float64 ``[n, m]``, elements of a weight that stand in ``n`` rows and ``m`` columns of it.
        eps: of the weight's dtype (``torch.finfo``): what is rounded coarsely has another form than what was drawn.
        weights: how many weights of the model are asked about.
    """
    sample = sample[(sample != 0).any(1)]
    if not sample.numel() or not bool(sample.isfinite().all()) or bool((sample == sample[0, 0]).all()):
        return False
    level = false_alarms / (_TESTS * weights)
    return form(sample.flatten(), eps) < level or min(lines(sample)) < level


def form(values: Tensor, eps: float = 0.0) -> float:
    """Bound of the probability that values, ``[n]``, which are (truncated) normal or uniform, look as little like it.

    The distance of Kolmogorov and Smirnov to the truncated normal distribution of the same mean, variance and bounds,
    by the inequality of Dvoretzky, Kiefer and Wolfowitz; the fit makes it smaller still.
    """
    values = values.sort().values
    mean = values.mean()
    bound = float((values - mean).abs().max())
    a = _bound_in_deviations(float(values.var(correction=0)) / bound**2)
    z = (values - mean) / bound * (a / math.sqrt(2))
    expected = (torch.special.erf(z) / math.erf(a / math.sqrt(2)) + 1) / 2
    n = values.numel()
    steps = torch.arange(n + 1, dtype=torch.float64, device="cpu") / n
    distance = max(float((steps[1:] - expected).max()), float((expected - steps[:-1]).max()))
    return min(1.0, 2 * math.exp(-2 * n * max(0.0, distance - eps / 2) ** 2))


def _bound_in_deviations(ratio: float) -> float:
    """``b / s`` of a normal distribution of deviation ``s`` cut off at ``-b`` and ``b``, whose variance is ``ratio``
    times ``b ** 2``: between 0 and a third, of the uniform one."""
    low, high = _WIDEST, _NARROWEST
    for _ in range(60):
        a = (low + high) / 2
        density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        if (1 - 2 * a * density / math.erf(a / math.sqrt(2))) / a**2 > ratio:
            low = a
        else:
            high = a
    return (low + high) / 2


def lines(sample: Tensor) -> tuple[float, float]:
    """Probabilities that the rows, and the columns, of independent values, ``[n, m]``, differ as much in size.

    The test of Kruskal and Wallis on the values' squares, which is on the safe side where lines are short.
    """
    _, which, counts = sample.square().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[which]  # equal values share a rank
    ranks = ranks - (ranks.numel() + 1) / 2
    return _probability(ranks), _probability(ranks.t())


def _probability(ranks: Tensor) -> float:
    """That the rows of ranks, ``[n, m]`` and 0 on average, are as far from each other."""
    rows, length = ranks.shape
    spread = float(ranks.square().sum()) / max(1, ranks.numel() - 1)
    if rows < 2 or spread == 0:
        return 1.0
    h = length * float(ranks.mean(1).square().sum()) / spread
    half = torch.tensor([rows - 1, h], dtype=torch.float64, device="cpu") / 2
    return float(torch.special.gammaincc(half[0], half[1]))
