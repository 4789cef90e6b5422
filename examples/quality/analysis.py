"""What the recorded results say: means, noise, differences, and the dense model of equal FLOPs."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

from .config import Config
from .configurations import CONFIGURATIONS, KNOWN
from .records import Record


@dataclass(frozen=True)
class Verdict:
    """A difference of validation loss between two configurations, over the seeds they share."""

    name: str
    differences: tuple[float, ...]
    threshold: float | None

    @property
    def difference(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.differences)

    @property
    def word(self) -> str:
        """In a word or two; better or worse it is only if every seed says so."""
        if self.threshold is None:
            return "noise unknown"
        if abs(self.difference) < self.threshold:
            return "within noise"
        if min(self.differences) < 0 < max(self.differences):
            return "seeds disagree"
        return "better" if self.difference < 0 else "worse"


class Results:
    """The rows of the CSV, and what follows from them.

    Attributes:
        seeds: the seeds of the ``dense`` configuration.
        repeated: configurations with all of these.
        scatter: configuration -> how far its runs of two seeds lie apart, what these seeds do to all runs alike
            taken out; of the seeds that are furthest apart, if there are more.
        noise: standard deviation of one run's loss, what a seed does to all runs alike taken out; ``None`` if there
            are too few runs. From the median of ``scatter``: some configurations scatter much more than most (they
            end with most units dead, or early), and must not hide what the others show.
        frontier_names: the dense models of tuned learning rate, which differ in width and length alone.
    """

    def __init__(self, rows: list[Record]) -> None:
        self.rows = rows
        self.names = list(dict.fromkeys(r["name"] for r in rows))
        self.seeds = sorted(r["seed"] for r in rows if r["name"] == "dense")
        self.repeated = [n for n in self.names if set(self.seeds) <= {r["seed"] for r in self.of(n)}]
        dense = [c for c in CONFIGURATIONS if c.kind == "dense" and c.length != "match" and c.decay == "wsd"]
        self.frontier_names = [c.name for c in dense if c.learning_rate == c.hidden_rate == c.input_rate]
        self.scatter = self._scatter()
        self.noise = self._noise()

    def of(self, name: str) -> list[Record]:
        """Rows of a configuration, by seed."""
        return sorted((r for r in self.rows if r["name"] == name), key=lambda r: r["seed"])

    def mean(self, name: str, column: str) -> float:
        """Mean of a column over a configuration's seeds."""
        return statistics.fmean(r[column] for r in self.of(name))

    def loss(self, name: str) -> float:
        """Mean validation loss of a configuration."""
        return self.mean(name, "val_loss")

    def _scatter(self) -> dict[str, float]:
        """Differences between two seeds, less the median over the configurations of such differences."""
        found: dict[str, float] = dict.fromkeys(self.repeated, 0.0)
        by_seed = {n: {r["seed"]: r["val_loss"] for r in self.of(n)} for n in self.repeated}
        for one, other in itertools.combinations(self.seeds, 2):
            steps = {n: losses[other] - losses[one] for n, losses in by_seed.items()}
            usual = statistics.median(steps.values()) if steps else 0.0
            found = {n: max(found[n], abs(step - usual)) for n, step in steps.items()}
        return found

    def _noise(self) -> float | None:
        """Half of the differences of two runs are larger than 0.674 of their standard deviation."""
        if len(self.seeds) < 2 or len(self.repeated) < 3:
            return None
        return statistics.median(self.scatter.values()) / statistics.NormalDist().inv_cdf(0.75) / math.sqrt(2)

    def threshold(self, pairs: int) -> float | None:
        """Difference that counts as more than noise when so many pairs of runs are compared: two deviations."""
        return None if self.noise is None else 2 * self.noise * math.sqrt(2 / pairs)

    def compare(self, name: str, other: str) -> Verdict:
        """Loss of one configuration less that of another, over the seeds that both have."""
        losses, others = ({r["seed"]: r["val_loss"] for r in self.of(n)} for n in (name, other))
        shared = sorted(losses.keys() & others.keys())
        differences = tuple(losses[s] - others[s] for s in shared)
        return Verdict(name, differences, self.threshold(len(shared)))

    def dense_loss(
        self,
        cost: float,
        seed: int,
        length: str | int = "full",
        laws: tuple[str, str] = ("power", "rate"),
        column: str = "flops_relative",
    ) -> float | None:
        """Loss that a dense model of so much cost has, by default FLOPs (relative), between those trained with this
        seed and length, and with these laws of rate and decay; they change nothing at full width.

        Straight lines over the logarithm of the cost; ``None`` outside of them.
        """
        names = [
            n for n in self.frontier_names if _length(n) == length and (_config(n).width == "full" or _laws(n) == laws)
        ]
        rows = [r for r in self.rows if r["seed"] == seed and r["name"] in names]
        points = sorted((r[column], r["val_loss"]) for r in rows)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= cost <= x1:
                share = math.log(cost / x0) / math.log(x1 / x0)
                return y0 + share * (y1 - y0)
        return None

    def gaps(self, name: str, column: str = "flops_relative") -> list[float]:
        """Loss of a configuration less that of a dense model of equal cost, by default FLOPs, as many steps and the
        same laws of rate and decay, of each seed where that is known."""
        length = _length(name)
        length = "full" if length == "match" else length
        laws = _laws(name)
        pairs = [(r["val_loss"], self.dense_loss(r[column], r["seed"], length, laws, column)) for r in self.of(name)]
        return [loss - dense for loss, dense in pairs if dense is not None]

    def gap(self, name: str, column: str = "flops_relative") -> float | None:
        """Mean of :meth:`gaps`."""
        known = self.gaps(name, column)
        return statistics.fmean(known) if known else None


def _config(name: str) -> Config:
    return KNOWN[name]


def _length(name: str) -> str | int:
    return _config(name).length


def _laws(name: str) -> tuple[str, str]:
    return _config(name).rate_law, _config(name).decay_law
