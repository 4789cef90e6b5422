"""Fit the law of the loss to the study's runs: how many weights took part, how many there are, how many tokens.

The law is :mod:`mst_compile.cost.loss_law`'s. Its floor is one for each study, whose contexts and batches differ;
everything else is the same for all.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mst_compile.cost.loss_law import SCALE, Fit, LossLaw

from .configurations import KNOWN
from .model import Shape
from .records import Record

DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
# What a law of sizes cannot know: rates, decays, guards and first weights other than the rule's.
LEAST_STEPS = 600  # below, runs are short of steps, whatever their tokens: there the rule's rate is not the best either
APART = ("guard", "learning_rate", "hidden_rate", "input_rate", "rate_law", "rescale", "decay", "backbone")


@dataclass(frozen=True)
class Point:
    """A run, as the law sees it. Weights are hidden ones; ``active`` is their mean over the steps."""

    name: str
    seed: int
    study: str
    loss: float
    active: float
    weights: float
    tokens: float
    unique: float


@dataclass(frozen=True)
class Law:
    """The law with the floor of each study."""

    floor: dict[str, float]
    above: LossLaw

    def loss(self, study: str, active: float, weights: float, tokens: float, unique: float) -> float:
        """Predicted validation loss."""
        return self.floor[study] + self.above.above_floor(active, weights, tokens, unique)

    def of(self, point: Point) -> float:
        """Predicted loss of a run."""
        return self.loss(point.study, point.active, point.weights, point.tokens, point.unique)


def point_of(row: Record) -> Point:
    """A row of a CSV, its FLOPs of hidden weights divided by what one of them costs a token."""
    tokens = row["steps"] * row["batch"] * row["context"]
    shape = Shape(row["width"], row["layers"], 1, row["context"])
    rest = tokens * shape.step_flops(1, 0, 0)
    unique = row.get("unique") or math.inf
    study = f"{row['layers']} layers, context {row['context']}"
    active = (row["flops"] - rest) / (6 * tokens)
    return Point(row["name"], row["seed"], study, row["val_loss"], active, shape.hidden_size, tokens, unique)


def follows_the_rule(row: Record) -> bool:
    """Whether a run has the rates and first weights of all others, and steps enough."""
    return row["steps"] >= LEAST_STEPS and not any(key in json.loads(row["settings"]) for key in APART)


def drops(name: str) -> bool:
    """Whether a configuration takes trained weights away."""
    config = KNOWN[name]
    grows = config.schedule.get("growth", "none" if config.kind == "constant" else "mixed") != "none"
    begins_dense = config.kind == "mst" and config.schedule.get("initial_sparsity", 0) == 0
    return config.kind != "dense" and (grows or begins_dense)


def fit(points: Sequence[Point], near: Law | None = None) -> Law:
    """The constants that fit best, by the Huber loss of the differences (arXiv 2203.15556).

    Args:
        near: a law of almost the same points, to begin with.
    """
    studies = sorted({p.study for p in points})
    columns = (
        [studies.index(p.study) for p in points],
        [math.log(p.active / SCALE) for p in points],
        [math.log(p.weights / SCALE) for p in points],
        [p.tokens / SCALE for p in points],
        [min(p.unique, p.tokens) / SCALE for p in points],
        [p.loss for p in points],
    )
    of = torch.tensor(columns[0])
    active, weights, tokens, unique, loss = (torch.tensor(c, dtype=torch.float64) for c in columns[1:])
    # The floor of each study, log a, log alpha, log b, log beta, gamma, log repeats.
    start = [1.0] * len(studies) + [
        math.log(0.2),
        math.log(0.5),
        math.log(0.5),
        math.log(0.5),
        0.1,
        math.log(15.4),
    ]  # arXiv 2305.16264
    first = start if near is None else _constants(near, studies)
    constants = torch.tensor(first, dtype=torch.float64, requires_grad=True)

    def misfit() -> Tensor:
        floor, (a, alpha, b, beta, gamma, r) = constants[: len(studies)], constants[len(studies) :]
        data = unique * (1 - r.exp() * torch.expm1(-(tokens / unique - 1) / r.exp()))
        size = (1 - gamma) * active + gamma * weights
        found = floor[of] + torch.exp(a - alpha.exp() * size) + torch.exp(b - beta.exp() * data.log())
        # Where no text is repeated nothing else tells how much that is worth.
        held = 1e-6 * (constants - torch.tensor(start, dtype=torch.float64)).square().sum()
        return torch.nn.functional.huber_loss(found, loss, delta=0.01) / 0.01 + held

    _minimize(constants, misfit)
    values = constants.tolist()
    a, alpha, b, beta, gamma, r = values[len(studies) :]
    floors = dict(zip(studies, values, strict=False))
    return Law(floors, LossLaw(*map(math.exp, (a, alpha, b, beta)), gamma, math.exp(r)))


def _constants(law: Law, studies: Sequence[str]) -> list[float]:
    """What the fit looks for, of a known law."""
    above = law.above
    logs = [math.log(value) for value in (above.a, above.alpha, above.b, above.beta)]
    return [*(law.floor[study] for study in studies), *logs, above.gamma, math.log(above.repeats)]


def _minimize(constants: Tensor, misfit: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS([constants], max_iter=3000, line_search_fn="strong_wolfe", tolerance_change=1e-11)

    def closure() -> float:
        optimizer.zero_grad()
        value = misfit()
        value.backward()
        return value.item()

    optimizer.step(closure)


def held_out(points: Sequence[Point]) -> list[tuple[Point, float]]:
    """Each run with what a law predicts that was fitted without its configuration, where its study has others."""
    found, whole = [], fit(points)
    for name in dict.fromkeys(p.name for p in points):
        rest = [p for p in points if p.name != name]
        law = fit(rest, near=whole)
        found += [(p, law.of(p)) for p in points if p.name == name and p.study in law.floor]
    return found


def error(found: Sequence[tuple[Point, float]]) -> tuple[float, float]:
    """Root mean square and median of the absolute differences."""
    differences = [abs(loss - point.loss) for point, loss in found]
    return math.sqrt(statistics.fmean(d * d for d in differences)), statistics.median(differences)


@dataclass(frozen=True)
class Best:
    """The best use of a budget at one density: width, tokens and the loss that the law predicts."""

    density: float
    width: int
    tokens: float
    loss: float


def best_use(
    law: Law, study: str, shape: Shape, flops: float, density: float, unique: float = math.inf, most: int = 4096
) -> Best:
    """Width and tokens that lead to the lowest loss for so many training FLOPs, head and attention paid.

    Args:
        shape: layers and context; its width does not matter.
        density: of the hidden weights, the same for the whole run.
        unique: tokens of text there are.
        most: widest model looked at; widths are multiples of 8.
    """
    found = []
    for width in range(16, most + 1, 8):
        own = Shape(width, shape.layers, 1, shape.context)
        active = density * own.hidden_size
        tokens = flops / own.step_flops(1, active, active)
        found.append(Best(density, width, tokens, law.loss(study, active, own.hidden_size, tokens, unique)))
    return min(found, key=lambda best: best.loss)


class Fitted:
    """The law of all rows whose masks never take a trained weight away, and what it says.

    Attributes:
        points: the runs that the law was fitted to.
        dropping: runs that take trained weights away, which it was not.
        law: the law.
        unseen: runs with what a law predicts that was fitted without their configuration.
    """

    def __init__(self, rows: Sequence[Record]) -> None:
        known = [point_of(row) for row in rows if follows_the_rule(row)]
        self.points = [p for p in known if not drops(p.name)]
        self.law = fit(self.points)
        self.dropping = [p for p in known if drops(p.name) and p.study in self.law.floor]
        self.unseen = held_out(self.points)

    @property
    def result(self) -> Fit:
        """The law as the library has it, rounded to what the runs tell."""
        above = LossLaw(**{name: float(f"{value:.4g}") for name, value in asdict(self.law.above).items()})
        active, tokens = [p.active for p in self.points], [p.tokens for p in self.points]
        repeats = max(p.tokens / min(p.unique, p.tokens) for p in self.points)
        ends = (float(f"{end(values):.3g}") for values in (active, tokens) for end in (min, max))
        low, high, first, last = ends
        return Fit(above, round(error(self.unseen)[0], 3), (low, high), (first, last), round(repeats, 1))


def constants(fitted: Fitted) -> str:
    """The library's module of constants."""
    return (
        '"""The law of losses, fitted to the recorded study; written by ``examples/quality_theory.py --write``."""\n\n'
        "from mst_compile.cost.loss_law import Fit, LossLaw\n\n"
        "FIT = " + _call(fitted.result) + "\n"
    )


def _call(result: Fit) -> str:
    law = ", ".join(f"{name}={value!r}" for name, value in asdict(result.law).items())
    rest = "".join(f"    {name}={getattr(result, name)!r},\n" for name in ("error", "active", "tokens", "repeats"))
    return f"Fit(\n    law=LossLaw({law}),\n{rest})"


def page(fitted: Fitted) -> str:
    """The generated part of docs/theory.md."""
    law, result = fitted.law.above, fitted.result
    seen = error([(p, fitted.law.of(p)) for p in fitted.points])
    unseen = error(fitted.unseen)
    lines = [
        f"{len(fitted.points)} runs of {len({p.name for p in fitted.points})} configurations, "
        f"{result.active[0] / 1e6:.2g} to {result.active[1] / 1e6:.2g} M active hidden weights, "
        f"{result.tokens[0] / 1e6:.2g} to {result.tokens[1] / 1e6:.3g} M tokens, each seen {result.repeats:g} times at "
        "most.",
        "",
        "| constant | a | alpha | b | beta | gamma | repeats |",
        "|---|---|---|---|---|---|---|",
        f"| value | {' | '.join(f'{value:.3g}' for value in asdict(law).values())} |",
        "",
        "| difference from the measured loss | root mean square | median |",
        "|---|---|---|",
        f"| runs of the fit | {seen[0]:.3f} | {seen[1]:.3f} |",
        f"| runs of configurations left out of the fit, one at a time | {unseen[0]:.3f} | {unseen[1]:.3f} |",
        "",
        "What the law predicts at best for a budget of training FLOPs, head and attention paid, by the density of "
        "hidden weights (loss, in brackets the width and the tokens a hidden weight):",
        "",
        f"| FLOPs | {' | '.join(f'{d:g}' for d in DENSITIES)} |",
        "|---|" + "---|" * len(DENSITIES),
    ]
    shape = Shape(64, 2, 1, 128)
    for flops in (1e12, 1e13, 1e14):
        cells = []
        for density in DENSITIES:
            best = best_use(fitted.law, "2 layers, context 128", shape, flops, density)
            weights = Shape(best.width, 2, 1, 128).hidden_size
            cells.append(f"{best.loss:.3f} ({best.width}, {best.tokens / weights:.2g})")
        lines.append(f"| {flops:.0e} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _worse_than_the_law(fitted)])


def _worse_than_the_law(fitted: Fitted) -> str:
    """How far runs that drop trained weights lie above the law."""
    above: dict[str, list[float]] = {}
    for p in fitted.dropping:
        above.setdefault(p.name, []).append(p.loss - fitted.law.of(p))
    listed = (f"`{name}` {statistics.fmean(values):+.3f}" for name, values in above.items())
    return f"Runs that take trained weights away, less what the law says of them: {', '.join(listed)}."


def write(file: Path, fitted: Fitted) -> None:
    """Bring the generated part of the page up to date."""
    text = file.read_text(encoding="utf-8")
    before, rest = text.split("<!-- study:law -->\n")
    file.write_text(f"{before}<!-- study:law -->\n{page(fitted)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}")
