"""What must be the same on all ranks that train one model, as plain values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from mst_compile.rules.constant import Constant
from mst_compile.rules.gradual_pruning import GradualPruning
from mst_compile.rules.mixed_sparsity import MixedSparsity
from mst_compile.rules.schedule import Schedule
from mst_compile.state.run import Run
from mst_compile.state.weight import SparseWeight

_AHEAD = 1000  # steps of a schedule of the user's own that are compared


def describe(run: Run) -> dict[str, Any]:
    """Seed, step count, schedule and weights of a run, as JSON has them."""
    found = {
        "schedule": _schedule(run.schedule, run.step_count),
        "seed": run.seed,
        "steps taken": run.step_count,
        "weights": {w.name: {"block": w.grid.block, "guard": w.guard, "mask": digest(w)} for w in run.weights},
    }
    described: dict[str, Any] = json.loads(json.dumps(found, default=str))  # as other ranks will see it
    return described


def digest(weight: SparseWeight) -> str:
    """Of the block grid and the mask."""
    data = f"{'x'.join(map(str, weight.shape))}/{weight.grid.block}".encode()
    return hashlib.sha256(data + weight.mask.numpy().tobytes()).hexdigest()


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What differs between two descriptions, for a message."""
    found = [
        f"{what} {one[what]!r} and {other[what]!r}" for what in ("seed", "steps taken") if one[what] != other[what]
    ]
    a, b = one["schedule"], other["schedule"]
    found += [f"schedule: {n} {a.get(n)!r} and {b.get(n)!r}" for n in {**a, **b} if a.get(n) != b.get(n)]
    first, second = one["weights"], other["weights"]
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    for name in names[:1]:
        if name not in first or name not in second:
            found.append(f"{name} is sparse on one of them alone")
            continue
        what = next(what for what in first[name] if first[name][what] != second[name][what])
        values = "" if what == "mask" else f" ({first[name][what]!r} and {second[name][what]!r})"
        found.append(f"the {what} of {name}{values}, one of {len(names)} weights that differ of {len(first)}")
    return "; ".join(found)


def _schedule(schedule: Schedule, step: int) -> dict[str, Any]:
    """Our own schedules by their arguments. One of the user's own, which may hold anything, by what it does next."""
    rule, attention = schedule.growth_rule, schedule.attention_value
    found: dict[str, Any] = {
        "class": type(schedule).__qualname__,
        "growth": type(rule).__qualname__,
        "gradient_steps": rule.gradient_steps,
        "distribution": schedule.distribution,
        "magnitude": schedule.magnitude,
        "drop_after_pruning": schedule.drop_after_pruning,
        "regrown": schedule.regrown,
        "regrown_warmup": schedule.regrown_warmup,
        "attention": [attention.name, attention.window, attention.stride, list(schedule.attention_steps())],
    }
    if type(schedule) in (MixedSparsity, Constant, GradualPruning):
        values = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}  # type: ignore[arg-type]
        return found | {n: v for n, v in values.items() if isinstance(v, int | float | str | None) and n != "attention"}
    return found | {"sparsity": float(schedule.sparsity_at(step)), "topology events": _events(schedule, step)}


def _events(schedule: Schedule, step: int) -> list[tuple[int, float, float]]:
    """Step, sparsity and drop fraction of the next topology events."""
    found = []
    for s in range(step, step + _AHEAD):
        try:
            if schedule.is_topology_event(s):
                found.append((s, float(schedule.sparsity_at(s)), float(schedule.drop_fraction_at(s))))
        except Exception:
            break  # it need not know steps that the run may never take; the run asks itself if it gets there
    return found
