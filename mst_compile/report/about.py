"""What ``run.json`` holds: what is trained, how and where."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mst_compile.cost.flops import Meter
from mst_compile.errors import ArgumentError
from mst_compile.rules.checks import check_instance, shown
from mst_compile.state.sparsifier import Part

from . import history
from .machine import machine


def about_run(
    model: nn.Module,
    parts: Sequence[Part],
    label: str,
    total: int | None,
    meter: Meter | None,
    notes: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A run that begins, as JSON can hold it.

    Args:
        parts: sparse parts of the model, none of a plain one.
        total: optimizer steps of the run, if they are known otherwise than by its schedules.
        meter: counts the FLOPs of a step; None where tokens are not counted.

    Raises:
        ArgumentError: ``notes`` are no mapping, or JSON cannot hold them.
    """
    check_instance("notes", notes, Mapping | None, "a mapping of names to values that JSON can hold")
    schedules = list({id(part.sparsifier.schedule): part.sparsifier.schedule for part in parts}.values())
    known = [t for s in schedules if isinstance(t := getattr(s, "total_steps", None), int)]
    total = total or max(known, default=None)
    phases = schedules[0].phases(total) if len(schedules) == 1 and total else []
    weights = {part.full(name): w for part in parts for name, w in part.sparsifier.weights.items()}
    first = next(model.parameters(), torch.empty(0, device="cpu"))
    about = {
        "format": history.FORMAT,
        "label": label,
        "model": type(getattr(model, "_orig_mod", model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "sparse": [{"name": n, "shape": [w.grid.rows, w.grid.cols], "block": w.grid.block} for n, w in weights.items()],
        "schedule": "; ".join(history.described(schedule) for schedule in schedules),
        "first_masks": "; ".join(dict.fromkeys(part.sparsifier.first_masks for part in parts)),
        "total_steps": total,
        "phases": [list(phase) for phase in phases],
        "tokens_per_step": None if meter is None else meter.tokens_per_step,
        "dense_flops_per_step": None if meter is None else meter.dense,
        "machine": machine(first.device),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "resumed": [],
        "notes": {str(name): value for name, value in (notes or {}).items()},
    }
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"notes must hold what JSON can, got {shown(notes)} ({error})") from error
    return about
