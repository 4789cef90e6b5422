"""Models of one budget of FLOPs, whatever their width and number of steps: what they reach, and in what time.

Differences are of runs of the same seed, their mean over seeds and its standard error.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

from .configurations import KNOWN
from .model import narrowed
from .records import Record, by_name
from .sizes import BUDGET

_SEEDS = 3  # at the least, to say how far they lie apart
_EQUAL = 1.02  # FLOPs of runs that were given the same, whose numbers of steps are whole; times of rivals
_NOT_OF_A_STEP = ("learning_rate", "decay_law", "budget", "length", "width")  # what its time does not depend on
_HEAD = (
    "run",
    "configuration",
    "seeds",
    "steps",
    "tokens an active weight",
    "FLOPs",
    "validation loss",
    "against the best dense width of equal FLOPs",
    "CPU seconds",
    "against dense widths of equal time",
    "hidden share of FLOPs",
    "density at the end",
)


def table(rows: Sequence[Record], times: Sequence[Record]) -> str:
    """Models of one budget, a table for each amount of text, each model against the dense ones there, best first.

    Args:
        rows: of the runs.
        times: of steps, measured in turn on one processor, see :mod:`.step_times`.
    """
    lines = []
    for text in dict.fromkeys(text_of(r) for r in rows):
        own = [r | {"time": seconds_of(r, times)} for r in rows if text_of(r) == text]
        named = by_name(own)
        loss = {name: statistics.fmean(r["val_loss"] for r in found) for name, found in named.items()}
        spread = noise(own)
        scatter = "" if spread is None else f": a run's loss has a standard deviation of {spread:.3f} over seeds"
        lines += [f"**{text}**{scatter}", "", f"| {' | '.join(_HEAD)} |", "|---|" + "---|" * (len(_HEAD) - 1)]
        for name in sorted(named, key=loss.__getitem__):
            cells = [f"`{name}`", KNOWN[name].note, *_cells(named[name], own)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    where = sorted({f"torch {r['torch']}, {r['dtype']}" for r in rows})
    timed = sorted({f"{t['cpu']}, {t['threads']} thread" + "s" * (t["threads"] > 1) for t in times})
    said = (
        f"CPU seconds: steps times the median of {times[0]['rounds']} rounds on {', '.join(timed)}; " if times else ""
    )
    return "\n".join([*lines, f"{said}{'; '.join(where)}."])


def _cells(found: Sequence[Record], own: Sequence[Record]) -> list[str]:
    """What the table says of a configuration's runs, given all runs on the same text."""
    first = found[0]
    tokens = first["steps"] * BUDGET.tokens
    shape = narrowed(BUDGET.shape, first["width"])
    hidden = 1 - tokens * shape.step_flops(1, 0, 0) / first["flops"]
    active = hidden * first["flops"] / (6 * tokens)
    gaps = [r["val_loss"] - rival for r in found if (rival := rival_of_equal_flops(r, own)) is not None]
    in_time = [r["val_loss"] - rival for r in found if (rival := rival_of_equal_time(r, own)) is not None]
    return [
        str(len(found)),
        str(first["steps"]),
        f"{tokens / active:.0f}",
        f"{first['flops_relative']:.2f}",
        f"{statistics.fmean(r['val_loss'] for r in found):.3f}",
        with_error(gaps) if gaps else "",
        "" if first["time"] is None else f"{first['time']:.0f}",
        with_error(in_time) if len(in_time) == len(found) else "",
        f"{hidden:.2f}",
        f"{first['density']:.2f}",
    ]


def rival_of_equal_flops(run: Record, own: Sequence[Record]) -> float | None:
    """Loss, with the seed of ``run``, of the best dense configuration of no more FLOPs; None if none had this seed.

    The best is that of the lowest mean among those with the most seeds: the best run of one seed is the luckiest as
    well, and what looked best with the first seed was given the others.
    """
    found = [r for r in own if is_dense(r) and r["seed"] == run["seed"] and r["flops"] <= _EQUAL * run["flops"]]
    return min(_proven(found, own), key=lambda r: _mean_loss(r["name"], own))["val_loss"] if found else None


def rival_of_equal_time(run: Record, own: Sequence[Record]) -> float | None:
    """Loss that dense runs of the same seed reach in the time of ``run``: between the best configuration of those that
    took less and the best of those that took more, on a line over the logarithm of the time; None outside of them.
    The best ones are found as in :func:`rival_of_equal_flops`."""
    timed = [r for r in own if is_dense(r) and r["seed"] == run["seed"] and r["time"]]
    dense = sorted((r["time"], _mean_loss(r["name"], own), r["val_loss"]) for r in _proven(timed, own))
    best: list[tuple[float, float, float]] = []
    for point in dense:
        if not best or point[1] < best[-1][1]:
            best.append(point)
    if run["time"] is None or not best or not dense[0][0] <= run["time"] <= _EQUAL * dense[-1][0]:
        return None
    for (t0, _, y0), (t1, _, y1) in itertools.pairwise(best):
        if t0 <= run["time"] <= t1:
            return y0 + math.log(run["time"] / t0) / math.log(t1 / t0) * (y1 - y0)
    return best[-1][2]  # those that took more did no better


def _proven(found: Sequence[Record], own: Sequence[Record]) -> list[Record]:
    """Those whose configuration has the most seeds."""
    named = by_name(own)
    counts = [len(named[r["name"]]) for r in found]
    return [r for r, count in zip(found, counts, strict=True) if count == max(counts)]


def _mean_loss(name: str, own: Sequence[Record]) -> float:
    return statistics.fmean(r["val_loss"] for r in own if r["name"] == name)


def noise(own: Sequence[Record]) -> float | None:
    """Standard deviation of a run's loss, pooled over the configurations with three seeds and more; None: none has."""
    spreads = [[r["val_loss"] for r in found] for found in by_name(own).values()]
    free = [(len(losses) - 1, statistics.variance(losses)) for losses in spreads if len(losses) >= _SEEDS]
    return math.sqrt(sum(n * v for n, v in free) / sum(n for n, _ in free)) if free else None


def with_error(differences: Sequence[float]) -> str:
    """Their mean, and where there are enough of them its standard error."""
    mean = f"{statistics.fmean(differences):+.3f}"
    if len(differences) < _SEEDS or not any(differences):
        return mean
    return f"{mean} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.3f}"


def text_of(row: Record) -> str:
    """How much of which text a run was given, and how often the base sees it."""
    tokens = row["flops"] / row["flops_relative"] / BUDGET.shape.dense_flops(1)
    corpus = f" (corpus {row['text'] or 'not recorded'})"
    if row["unique"] is None:
        return f"{tokens / 1e6:.1f} MB, hardly repeated{corpus}"
    return f"{row['unique'] / 1e6:.2f} MB, {tokens / row['unique']:.0f} times{corpus}"


def seconds_of(row: Record, times: Sequence[Record]) -> float | None:
    """Of all steps of a run, by the time measured of a step of its shape; None if none was."""
    step = next((t["milliseconds"] for t in times if _step(t) == _step(row)), None)
    return None if step is None else row["steps"] * step / 1000


def _step(row: Record) -> dict[str, object]:
    """What the time of a step depends on."""
    settings = KNOWN[row["name"]].settings()
    return {key: value for key, value in settings.items() if key not in _NOT_OF_A_STEP} | {"width": row["width"]}


def is_dense(row: Record) -> bool:
    return KNOWN[row["name"]].kind == "dense"
