"""What is measured, in which order, within which time, and against which goals. Plain Python, no torch."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The most telling densities first: a cell may be cut short.
DENSITIES = (0.3, 0.1, 1.0, 0.5, 0.2, 0.05)
BLOCKS = (128, 64, 32)
TOKENS = (16384, 8192, 32768)
GOAL = (16384, 4096, 4096)
SHAPES = ((4096, 4096), (3072, 768), (768, 3072), (768, 768), (8192, 8192), (1600, 1600), (6400, 1600), (1600, 6400))
TUNED_FOR = 0.2
FLOOR = 0.97
RIVALS = ("bsr", "stk")
# Speed-up over dense of the three products together, at M, N, K = GOAL, by block and density.
GOALS = {128: {0.3: 2.2, 0.1: 6.0}, 64: {0.3: 1.9, 0.1: 5.0}, 32: {0.3: 1.4, 0.1: 3.5}}


@dataclass(frozen=True)
class LayerCell:
    """One compilation: a weight ``[n, k]`` in blocks of ``block``, ``m`` tokens, and the densities fed to it."""

    m: int
    n: int
    k: int
    block: int
    densities: tuple[float, ...]
    tuned_for: float
    kind: str = "layer"

    @property
    def case(self) -> str:
        tuned = "" if self.tuned_for == TUNED_FOR else f" tuned={self.tuned_for:g}"
        return f"M={self.m} N={self.n} K={self.k} B={self.block}{tuned}"

    def goal(self, density: float) -> float | None:
        """Speed-up that is wanted here, if any."""
        if (self.m, self.n, self.k) != GOAL:
            return None
        return GOALS.get(self.block, {}).get(density)


@dataclass(frozen=True)
class ModelCell:
    """One GPT trained dense and sparse."""

    name: str
    width: int
    layers: int
    heads: int
    vocab: int
    batch: int
    context: int
    kind: str = "model"

    @property
    def case(self) -> str:
        return f"gpt-{self.name} d={self.width} L={self.layers} V={self.vocab} T={self.context} batch={self.batch}"


@dataclass(frozen=True)
class AttentionCell:
    """One attention, ``heads`` of ``size``, with a pattern of mst_compile.rules.patterns."""

    pattern: str
    length: int
    heads: int = 12
    size: int = 64
    batch: int = 8
    window: int = 128
    stride: int = 128
    kind: str = "attention"

    @property
    def case(self) -> str:
        return f"{self.pattern} T={self.length} heads={self.heads}x{self.size} batch={self.batch}"


Cell = LayerCell | ModelCell | AttentionCell

MODELS = (
    ModelCell("small", 768, 12, 12, 50304, 16, 1024),
    ModelCell("xl-width", 1600, 6, 25, 50304, 8, 1024),
    ModelCell("medium", 1024, 24, 16, 50304, 8, 1024),
)


ATTENTIONS = tuple(
    AttentionCell(pattern, length, batch=max(1, 16384 // length))
    for length in (4096, 1024, 16384) for pattern in ("sparse", "fixed", "full")
)  # fmt: skip


def by_importance(given: Sequence[float]) -> tuple[float, ...]:
    """Densities in the order of ``DENSITIES``, others last."""
    rank = {density: i for i, density in enumerate(DENSITIES)}
    return tuple(sorted(given, key=lambda d: (rank.get(d, len(rank)), d)))


def layer_cells(
    tokens: Sequence[int], shapes: Sequence[tuple[int, int]], blocks: Sequence[int], densities: Sequence[float],
    each: bool = False,
) -> list[LayerCell]:  # fmt: skip
    """Cells, those with a goal first, then token counts and shapes in the order given.

    Args:
        each: tune for every density anew, a compilation each, instead of once for ``TUNED_FOR``.
    """
    ordered = by_importance(densities)
    choices = [((d,), d) for d in ordered] if each else [(ordered, TUNED_FOR)]
    cells = [
        LayerCell(m, n, k, block, some, tuned)
        for m in tokens for n, k in shapes for block in blocks for some, tuned in choices
    ]  # fmt: skip
    return sorted(cells, key=lambda cell: (cell.m, cell.n, cell.k) != GOAL)


def order(
    layers: Sequence[LayerCell], models: Sequence[ModelCell], attentions: Sequence[AttentionCell] = ()
) -> list[Cell]:
    """Goal cells, then whole models, attention, and the other layers."""
    goals = [cell for cell in layers if (cell.m, cell.n, cell.k) == GOAL]
    return [*goals, *models, *attentions, *(cell for cell in layers if cell not in goals)]


class Budget:
    """The time that is left. A cell is begun only if one of its kind is expected to fit."""

    def __init__(self, minutes: float, guesses: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        """``guesses``: seconds that a cell of a kind takes, until one has been seen."""
        self._clock = clock
        self._end = clock() + 60 * minutes
        self._guesses = guesses
        self._seen: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds left, negative once it is over."""
        return self._end - self._clock()

    def allows(self, kind: str) -> bool:
        return self.left > self._seen.get(kind, self._guesses.get(kind, 0.0))

    def spent(self, kind: str, seconds: float) -> None:
        """Learn from a finished cell; the slowest counts."""
        self._seen[kind] = max(seconds, self._seen.get(kind, 0.0))


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """Density up to which sparse is as fast as dense, from points (density, ratio dense / sparse), in any order.

    Log-linear between the points around the first fall below 1; the highest density measured if there is none; None
    if the sparsest point is slower already, or without points.
    """
    points = sorted(points)
    if not points or points[0][1] < 1:
        return None
    for (d0, r0), (d1, r1) in itertools.pairwise(points):
        if r1 < 1:
            return d0 + (d1 - d0) * math.log(r0) / (math.log(r0) - math.log(r1))
    return points[-1][0]
