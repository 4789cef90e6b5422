"""What a configuration of the study is, and the schedules and rates that it means."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import mst_compile
from mst_compile.rules.schedule import Schedule

from .guards import Form
from .sizes import Study

Kind = Literal["dense", "mst", "constant"]


@dataclass(frozen=True)
class Config:
    """One configuration.

    Args:
        name: unique; runs are known by it.
        note: what it is, for the table.
        kind: which schedule, if any.
        schedule: arguments of the schedule that differ from :func:`schedule_of`'s.
        block, backbone, rescale, overrides: of ``sparsify``; an override is (pattern, sparsity or None, block or None).
        width: ``"full"``, a number, or ``"match"`` for the dense model of the same depth and the training FLOPs of
            the study's ``base``.
        length: ``"full"``; ``"match"`` for as many steps as give the training FLOPs of ``base``; or so many times the
            study's steps.
        budget: factor on the FLOPs that are matched: what a dense model makes of the time a sparse one takes.
        learning_rate: factor on the study's.
        decay: ``"wsd"`` or ``"cosine"`` (to 10 %).
        input_rate: the rate of a hidden weight is multiplied by ``inputs ** -input_rate``, where inputs is the number
            of inputs that an output sums over, relative to the dense model of full width: its density, times the
            relative width. 1 is the rule of muP and of SµPar (arXiv 2405.15743); 0 gives all weights the rate that
            suits the dense model.
        rate_law: ``"power"`` is that; ``"graphcore"`` is the library's law of this name in place of it, of the same
            number of inputs.
        decay_law: ``"rate"``, weight decay grows with the learning rate, as it did in all runs recorded without a
            word about it; ``"independent"``, learning rate times weight decay are the dense model's.
        hidden_rate: factor on the learning rate of the hidden weights alone.
        beta2: of AdamW.
        guard: what keeps pairs of block rows and columns alive where there is no backbone, see ``guards.py``.
        main: trained with two seeds at least.
    """

    name: str
    note: str
    kind: Kind = "mst"
    schedule: dict[str, Any] = field(default_factory=dict)
    block: int = 8
    backbone: bool = True
    rescale: bool = True
    overrides: tuple[tuple[str, float | None, int | None], ...] = ()
    width: Literal["full", "match"] | int = "full"
    length: Literal["full", "match"] | int = "full"
    budget: float = 1.0
    learning_rate: float = 1.0
    decay: Literal["wsd", "cosine"] = "wsd"
    input_rate: float = 1.0
    rate_law: Literal["power", "graphcore"] = "power"
    decay_law: Literal["rate", "independent"] = "rate"
    hidden_rate: float = 1.0
    beta2: float = 0.95
    guard: Form = "none"
    main: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything but name and note that differs from the defaults, as plain JSON values."""
        defaults = asdict(Config("", ""))
        own = {k: v for k, v in asdict(self).items() if k not in ("name", "note", "main")}
        return {k: v for k, v in own.items() if v != defaults[k] or k == "kind"}


def lengthened(config: Config, study: Study) -> Study:
    """The study with as many steps as the configuration multiplies them to."""
    return replace(study, steps=study.steps * config.length) if isinstance(config.length, int) else study


def schedule_of(config: Config, study: Study) -> Schedule | None:
    """The schedule of a configuration. What is not in ``config.schedule`` is as published, except that Mixed
    Sparsity is dense for as long as the learning rate decays."""
    if config.kind == "constant":
        events = {
            "interval": mst_compile.MixedSparsity.published(study.steps).plateau_interval,
            "total_steps": study.steps,
        }
        return mst_compile.Constant(**{"sparsity": 0.8, "growth": "none"} | events | config.schedule)
    if config.kind == "mst":
        settings = {"total_steps": study.steps, "settle": study.decay} | config.schedule
        if settings["settle"] is None:  # stays sparse: as if the restoration came just after the end
            events = mst_compile.MixedSparsity.published(study.steps)
            warmup = round(settings.get("warmup", 0.1) * study.steps)
            settings |= {"total_steps": study.steps + 1, "warmup": warmup, "restoration": 0, "settle": 0}
            settings |= {"interval": events.plateau_interval, "ramp_interval": events.ramp_interval_steps}
        return mst_compile.MixedSparsity.published(**settings)
    return None


def overrides_of(config: Config) -> dict[str, mst_compile.Override] | None:
    """The overrides as ``sparsify`` takes them."""
    found = {p: mst_compile.Override(sparsity=sparsity, block=block) for p, sparsity, block in config.overrides}
    return found or None


def learning_rate(config: Config, study: Study, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``."""
    peak, warmup = study.learning_rate * config.learning_rate, max(1, round(study.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.decay == "cosine":
        return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * min(1.0, (steps - step) / max(1, round(study.decay * steps)))


def config(name: str, note: str, **changes: Any) -> Config:
    """A configuration; what is no field of it is an argument of its schedule."""
    known = set(Config.__dataclass_fields__)
    schedule = {k: v for k, v in changes.items() if k not in known}
    return replace(Config(name, note, schedule=schedule), **{k: v for k, v in changes.items() if k in known})


def static(name: str, note: str, **changes: Any) -> Config:
    """One whose sparsity is constant."""
    return config(name, note, kind="constant", **changes)


START_80: dict[str, Any] = {"sparsity": 0.8, "initial_sparsity": 0.8, "warmup": 0, "growth": "none"}
