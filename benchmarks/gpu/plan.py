"""What is measured, in which order, within which time, and against which goals. Plain Python, no torch."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# The most telling densities first: a cell may be cut short.
DENSITIES = (0.3, 0.1, 1.0, 0.5, 0.2, 0.05)
BLOCKS = (128, 64, 32)
TOKENS = (16384, 8192, 32768)
GOAL = (16384, 4096, 4096)
CUBE = (8192, 8192, 8192)
SHAPES = ((4096, 4096), (3072, 768), (768, 3072), (768, 768), (8192, 8192), (1600, 1600), (6400, 1600), (1600, 6400))
TUNED_FOR = 0.2
FLOOR = 0.97
RIVALS = ("bsr", "stk")
GOAL_DENSITIES, CUBE_DENSITY = (0.3, 0.1, 0.2), 0.125
# Speed-up over dense of the three products together, by shape, block and density.
GOALS = {
    GOAL: {128: {0.3: 2.2, 0.1: 6.0}, 64: {0.3: 1.9, 0.1: 5.0}, 32: {0.3: 1.4, 0.1: 3.5}},
    CUBE: {128: {CUBE_DENSITY: 4.5}},
}
MODEL_GOALS = {"small": 2.5}  # of a whole step at 90 % sparsity
ATTENTION_GOALS = {("sparse", 4096): 4.0}  # of forward and backward, over causal flash attention
_TUNED = " max-autotune"


def verdict(goal: float | None, ratio: float) -> str:
    """What a speed-up over the library is worth, for a note; nothing where nothing is wanted and nothing lost."""
    parts = [] if goal is None else [f"goal {goal:g}x {'met' if ratio >= goal else 'missed'}"]
    if ratio < FLOOR:
        parts.append(f"below {FLOOR:g}x of dense")
    return ", ".join(parts)


@dataclass(frozen=True)
class LayerCell:
    """One compilation: a weight ``[n, k]`` in blocks of ``block``, ``m`` tokens, and the densities fed to it.

    ``tune``, of every cell: Inductor times all choices of each product (``max_autotune_gemm``) and takes the fastest.
    """

    m: int
    n: int
    k: int
    block: int
    densities: tuple[float, ...]
    tuned_for: float
    tune: bool = False
    kind: str = "layer"

    @property
    def case(self) -> str:
        density = "" if self.tuned_for == TUNED_FOR else f" for={self.tuned_for:g}"
        return f"M={self.m} N={self.n} K={self.k} B={self.block}{density}{_TUNED * self.tune}"

    def goal(self, density: float) -> float | None:
        """Speed-up that is wanted here, if any."""
        return GOALS.get((self.m, self.n, self.k), {}).get(self.block, {}).get(density)


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
    tune: bool = False
    kind: str = "model"

    @property
    def case(self) -> str:
        size = f"d={self.width} L={self.layers} V={self.vocab} T={self.context} batch={self.batch}"
        return f"gpt-{self.name} {size}{_TUNED * self.tune}"

    @property
    def goal(self) -> float | None:
        """Speed-up of a step that is wanted, if any."""
        return MODEL_GOALS.get(self.name)


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
    tune: bool = False
    kind: str = "attention"

    @property
    def case(self) -> str:
        size = f"T={self.length} heads={self.heads}x{self.size} batch={self.batch}"
        return f"{self.pattern} {size}{_TUNED * self.tune}"

    @property
    def goal(self) -> float | None:
        """Speed-up of forward and backward that is wanted, if any."""
        return ATTENTION_GOALS.get((self.pattern, self.length))


@dataclass(frozen=True)
class ExpertsCell:
    """One layer of a mixture of experts: ``m`` rows, each multiplied by one of ``experts`` weights ``[n, k]``."""

    m: int
    experts: int
    n: int
    k: int
    block: int
    densities: tuple[float, ...]
    tuned_for: float = TUNED_FOR
    tune: bool = False
    kind: str = "experts"

    @property
    def case(self) -> str:
        return f"experts={self.experts} M={self.m} N={self.n} K={self.k} B={self.block}{_TUNED * self.tune}"

    def goal(self, density: float) -> float | None:
        """None: nothing is known of what they can do."""
        return None


Cell = LayerCell | ModelCell | AttentionCell | ExpertsCell

MODELS = (
    ModelCell("small", 768, 12, 12, 50304, 16, 1024),
    ModelCell("xl-width", 1600, 6, 25, 50304, 8, 1024),
    ModelCell("medium", 1024, 24, 16, 50304, 8, 1024),
)


ATTENTIONS = tuple(
    AttentionCell(pattern, length, batch=max(1, 16384 // length))
    for length in (4096, 1024, 16384) for pattern in ("sparse", "fixed", "full")
)  # fmt: skip


# As Mixtral's, of 16384 tokens that go to two experts each; the narrow matrix goes the other way, as grad-input does.
EXPERTS = tuple(ExpertsCell(32768, 8, 14336, 4096, block, GOAL_DENSITIES) for block in (128, 64))


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
    layers: Sequence[LayerCell],
    models: Sequence[ModelCell],
    attentions: Sequence[AttentionCell] = (),
    experts: Sequence[ExpertsCell] = (),
) -> list[Cell]:
    """Goal cells, then whole models, attention, experts, and the other layers."""
    goals = [cell for cell in layers if (cell.m, cell.n, cell.k) == GOAL]
    return [*goals, *models, *attentions, *experts, *(cell for cell in layers if cell not in goals)]


def tuned(cell: Cell) -> Cell:
    """The cell as the autotuner makes it."""
    return replace(cell, tune=True)


def speed_cells() -> list[Cell]:
    """What decides, most important first: all that has a goal, as users get it, experts, of which nothing is known, the
    goals tuned, and the rest.

    Each density is compiled for, as a schedule's is. No model is tuned: Inductor would tune all of its dense products
    too, a quarter of a minute each on an H100.
    """
    layers = [LayerCell(*GOAL, block, (density,), density) for block in BLOCKS for density in GOAL_DENSITIES]
    layers += [LayerCell(*CUBE, block, (CUBE_DENSITY,), CUBE_DENSITY) for block in (128, 64)]
    attentions = [cell for cell in ATTENTIONS if cell.goal is not None]
    wanted = [cell for cell in layers if cell.goal(cell.tuned_for) is not None]
    first = [*layers, MODELS[0], *attentions, *EXPERTS, *map(tuned, [*wanted, *attentions])]
    rest = order(layer_cells(TOKENS, SHAPES, BLOCKS, DENSITIES), MODELS, ATTENTIONS)
    return [*first, *(cell for cell in rest if cell not in first)]


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
