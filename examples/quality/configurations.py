"""What the study trains: the configurations in order of importance, on the models of ``sizes.py``."""

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


def _config(name: str, note: str, **changes: Any) -> Config:
    known = set(Config.__dataclass_fields__)
    schedule = {k: v for k, v in changes.items() if k not in known}
    return replace(Config(name, note, schedule=schedule), **{k: v for k, v in changes.items() if k in known})


def _static(name: str, note: str, **changes: Any) -> Config:
    return _config(name, note, kind="constant", **changes)


AT_ONCE: dict[str, Any] = {
    "sparsity": 0.8,
    "initial_sparsity": 0.8,
    "warmup": 0,
    "growth": "none",
    "restoration": 1,
    "settle": 0.2,
}
START_80: dict[str, Any] = {"sparsity": 0.8, "initial_sparsity": 0.8, "warmup": 0, "growth": "none"}
STATIC: dict[str, Any] = {"kind": "constant"}
FIRST_DENSER = (("blocks.0.*", 0.8, None),)

CONFIGURATIONS: tuple[Config, ...] = (
    # The method and its rivals.
    _config("dense", "dense", kind="dense", main=True),
    _config("mst-b8", "MST 90 %, B = 8: the base of the variants below", main=True),
    _config("dense-small", "dense, narrower: the base's FLOPs", kind="dense", width="match", main=True),
    _static("static-b8", "static 80 %, B = 8", main=True),
    _config("dense-hidden-double", "dense, twice the rate of hidden weights", kind="dense", hidden_rate=2.0),
    _config("mst-b1", "MST 90 %, unstructured", block=1, main=True),
    _static("static-b4", "static 80 %, B = 4", block=4, main=True),
    _config("mst-b4", "MST 90 %, B = 4", block=4, main=True),
    _config("mst-b8-free", "MST 90 %, B = 8, no backbone", backbone=False, main=True),
    _config("mst-b32-free", "MST 90 %, B = 32, no backbone", block=32, backbone=False, main=True),
    _config("mst-b8-stays", "MST 90 %, B = 8, never restored", settle=None, main=True),
    _static("rigl-b8", "RigL 80 %, B = 8", growth="gradient", main=True),
    _config("no-regrow", "no drop-and-grow", growth="none", main=True),
    _config("at-once-80", "static 80 %, dense at once for the last 20 %", **AT_ONCE, main=True),
    _config("restore-30", "restoration over 30 %", restoration=0.3, main=True),
    _static("static-b1", "static 80 %, unstructured", block=1, main=True),
    _config("dense-128", "dense, width 128", kind="dense", width=128, main=True),
    _config("mst-b16-free", "MST 90 %, B = 16, no backbone", block=16, backbone=False, main=True),
    _config("mst-b64-free", "MST 90 %, B = 64, no backbone", block=64, backbone=False, main=True),
    # Guards against dead units; B = 8 with a backbone is mst-b8.
    *(
        _config(
            f"mst-b{block}-{guard}",
            f"as mst-b{block}-free, {note}",
            block=block,
            backbone=False,
            guard=guard,
            main=True,
        )
        for guard, note, sizes in (
            ("pair", "one side of each pair kept", (8, 32)),
            ("coverage", "a block of each row and column kept", (8, 16, 32, 64)),
            ("revive", "dead pairs revived", (8, 32)),
            ("backbone", "wrapped diagonal kept", (16, 32, 64)),
        )
        for block in sizes
    ),
    _static("rigl-b8-coverage", "RigL 80 %, B = 8, coverage", growth="gradient", guard="coverage", main=True),
    _config("dense-short", "dense, fewer steps: the base's FLOPs", kind="dense", length="match", main=True),
    _config("early", "restoration ramp early", restoration_ramp="early", main=True),
    _config("start-sparse", "starts sparse, no warm-up", initial_sparsity=0.9, warmup=0),
    _config("plateau-80", "plateau at 80 %", sparsity=0.8),
    _config("restore-50", "restoration over 50 %", restoration=0.5),
    _config("dense-rate-double", "dense, twice the learning rate", kind="dense", learning_rate=2.0),
    _config("restore-20", "restoration over 20 %", restoration=0.2),
    _config("plateau-85", "plateau at 85 %, warm-up and restoration 5 %", sparsity=0.85, warmup=0.05, restoration=0.05),
    _config("gentle", "drop 10 %, every 96 steps", drop_fraction=0.1, interval=96),
    _config("gradient-8", "growth reads 8 gradients", gradient_steps=8),
    _config("fine-ramp", "an event every 4 steps of the ramps", ramp_interval=4),
    _config("attention-60", "attention at 60 %", overrides=(("*.attention.*", 0.6, None),)),
    _config("first-80", "first layer at 80 %", overrides=FIRST_DENSER),
    _config("attention-b4", "attention in blocks of 4", overrides=(("*.attention.*", None, 4),)),
    _static("static-b16", "static 80 %, B = 16", block=16),
    _static("static-b8-free", "static 80 %, B = 8, no backbone", backbone=False),
    _static("static-90", "static 90 %, B = 8", sparsity=0.9),
    _static("static-b32-free", "static 80 %, B = 32, no backbone", block=32, backbone=False),
    _config("dense-112", "dense, width 112", kind="dense", width=112, main=True),
    _config("dense-192", "dense, width 192", kind="dense", width=192, main=True),
    _config("dense-cosine", "dense, cosine", kind="dense", decay="cosine"),
    _config("mst-cosine", "cosine", decay="cosine"),
    _static("static-b8-unscaled", "static 80 %, B = 8, first weights not rescaled", rescale=False),
    _static("static-b4-unscaled", "static 80 %, B = 4, first weights not rescaled", block=4, rescale=False),
    _static("rigl-b8-unscaled", "RigL 80 %, B = 8, first weights not rescaled", growth="gradient", rescale=False),
    _static(
        "static-b8-unscaled-rate0",
        "static 80 %, B = 8, the dense model's learning rate, first weights not rescaled",
        input_rate=0.0,
        rescale=False,
    ),
    _config("at-once-80-b4", "static 80 %, B = 4, dense at once for the last 20 %", block=4, **AT_ONCE),
    # The library's default, and changes of one thing each.
    _config("start-80", "80 % from the start, no drop-and-grow", **START_80, main=True),
    _config("start-80-b1", "start-80, unstructured", block=1, **START_80),
    _config("start-80-b4", "start-80, B = 4", block=4, **START_80, main=True),
    _config("start-80-b16", "start-80, B = 16", block=16, **START_80, main=True),
    _config("start-80-free", "start-80, no backbone", backbone=False, **START_80),
    _config("start-80-restore-5", "start-80, restoration over 5 %", restoration=0.05, **START_80),
    _config("start-80-restore-20", "start-80, restoration over 20 %", restoration=0.2, **START_80),
    _config("start-80-restore-30", "start-80, restoration over 30 %", restoration=0.3, **START_80),
    _config("start-80-early", "start-80, restoration ramp early", restoration_ramp="early", **START_80),
    _config(
        "start-80-regrow",
        "start-80, drop 10 %, every 96 steps",
        drop_fraction=0.1,
        interval=96,
        **START_80 | {"growth": "mixed"},
    ),
    _config(
        "start-80-regrow-coverage",
        "start-80, drop 10 %, every 96 steps, coverage",
        drop_fraction=0.1,
        interval=96,
        guard="coverage",
        **START_80 | {"growth": "mixed"},
    ),
    _config("start-80-uniform", "start-80, the same density in every layer", distribution="uniform", **START_80),
    _config("start-70", "start-80 at 70 %", **START_80 | {"sparsity": 0.7, "initial_sparsity": 0.7}, main=True),
    _config("start-90", "start-80 at 90 %", **START_80 | {"sparsity": 0.9, "initial_sparsity": 0.9}, main=True),
    # Three times as long.
    _config("dense-long", "dense, three times as long", kind="dense", length=3, main=True),
    _config("dense-152-long", "dense, width 152, three times as long", kind="dense", width=152, length=3, main=True),
    _config("dense-128-long", "dense, width 128, three times as long", kind="dense", width=128, length=3, main=True),
    _config(
        "start-80-long", "80 % from the start, no drop-and-grow, three times as long", length=3, **START_80, main=True
    ),
    _static("static-b8-long", "static 80 %, B = 8, three times as long", length=3, main=True),
    _config("mst-b8-long", "MST 90 %, B = 8, three times as long", length=3, main=True),
    _config(
        "start-80-b4-long",
        "start-80, B = 4, three times as long",
        block=4,
        length=3,
        **START_80,
        main=True,
    ),
    *(
        _config(
            f"start-{percent}-long",
            f"start-80 at {percent} %, three times as long",
            length=3,
            **START_80 | {"sparsity": percent / 100, "initial_sparsity": percent / 100},
            main=True,
        )
        for percent in (70, 60)
    ),
    _config(
        "start-80-restore-30-long",
        "start-80, restoration over 30 %, three times as long",
        restoration=0.3,
        length=3,
        **START_80,
        main=True,
    ),
    # Whether the rate that suits the short runs suits the long ones.
    *(
        _config(
            f"{name}-long-rate-half",
            f"{note}, three times as long, half the learning rate",
            learning_rate=0.5,
            length=3,
            **settings,
        )
        for name, note, settings in (
            ("dense-152", "dense, width 152", {"kind": "dense", "width": 152}),
            ("start-80", "start-80", START_80),
        )
    ),
    _static("static-b8-hidden-double", "static 80 %, B = 8, twice the rate of hidden weights", hidden_rate=2.0),
    _config("mst-b8-hidden-double", "twice the rate of hidden weights", hidden_rate=2.0),
    _static("set-b8", "SET 80 %, B = 8", growth="random"),
    _config("dense-rate-half", "dense, half the learning rate", kind="dense", learning_rate=0.5),
    # The learning rate of the dense model for all weights, however few inputs they have.
    _config("mst-b8-rate0", "MST 90 %, B = 8, the dense model's learning rate", input_rate=0.0),
    _static("static-b8-rate0", "static 80 %, B = 8, the dense model's learning rate", input_rate=0.0),
    _config(
        "dense-small-rate0",
        "dense, narrower, the full model's learning rate",
        kind="dense",
        width="match",
        input_rate=0.0,
    ),
    _config("mst-b8-rate-half", "learning rate by the root of the inputs", input_rate=0.5),
    # Weight decay apart from the learning rate, for sparse models and their narrower rivals alike.
    *(
        _config(
            f"{name}-apart{'-long' if length == 3 else ''}",
            f"{note}, decay apart from the rate{', three times as long' if length == 3 else ''}",
            length=length,
            decay_law="independent",
            main=True,
            **settings,
        )
        for length in ("full", 3)
        for name, note, settings in (
            ("start-80", "start-80", START_80),
            ("static-b8", "static 80 %, B = 8", STATIC),
            ("dense-152", "dense, width 152", {"kind": "dense", "width": 152}),
            ("dense-128", "dense, width 128", {"kind": "dense", "width": 128}),
        )
    ),
    # Laws of the learning rate, with the decay apart.
    _static(
        "static-b8-graphcore-apart",
        "static 80 %, B = 8, Graphcore's rate, decay apart from it",
        rate_law="graphcore",
        decay_law="independent",
    ),
    _static(
        "static-b8-rate-half-apart",
        "static 80 %, B = 8, rate by the root of the inputs, decay apart from it",
        input_rate=0.5,
        decay_law="independent",
    ),
)

# On a GPU, whose kernels begin with blocks of 32. Decay apart from the rate, as the library does it.
ON_GPU: tuple[Config, ...] = (
    _static("static-b64", "static 80 %, B = 64", block=64, decay_law="independent"),
    _static(
        "set-b64",
        "SET 80 %, B = 64, drop 30 % every 100 steps",
        block=64,
        growth="random",
        drop_fraction=0.3,
        interval=100,
        decay_law="independent",
    ),
    _config("start-80-b64", "start-80, B = 64", block=64, decay_law="independent", **START_80),
    _config("dense-512", "dense, width 512", kind="dense", width=512, decay_law="independent"),
    *(
        _config(
            f"dense-{width}-match",
            f"dense, width {width}, as many steps as have the base's FLOPs",
            kind="dense",
            width=width,
            length="match",
            decay_law="independent",
        )
        for width in (384, 512)
    ),
)

# Of one budget (``BUDGET``): dense models of every width, and sparse ones that are wider, with the steps it allows.
_SET: dict[str, Any] = {"growth": "random", "drop_fraction": 0.3, "interval": 50}


def _budgeted(name: str, note: str, width: int, **changes: Any) -> Config:
    settings: dict[str, Any] = {"width": width, "length": "match", "decay_law": "independent"}
    return _config(name, f"{note}, width {width}", **settings | changes)


ON_BUDGET: tuple[Config, ...] = (
    *(_budgeted(f"dense-{width}-match", "dense", width, kind="dense") for width in (80, 48, 96, 128)),
    _budgeted("wide-128-b8", "static 80 %, B = 8", 128, kind="constant"),
    _budgeted("wide-128-b1-set", "SET 80 %, unstructured", 128, kind="constant", block=1, **_SET),
    _budgeted("wide-96-60", "static 60 %, B = 8", 96, kind="constant", sparsity=0.6),
    _budgeted("wide-128-b8-set", "SET 80 %, B = 8", 128, kind="constant", **_SET),
    _budgeted("wide-128-b4", "static 80 %, B = 4", 128, kind="constant", block=4),
    _budgeted("wide-128-b1", "static 80 %, unstructured", 128, kind="constant", block=1),
    _budgeted("wide-192-90", "static 90 %, B = 8", 192, kind="constant", sparsity=0.9),
    _budgeted("wide-96-start", "80 % from the start, no drop-and-grow", 96, **START_80),
    *(
        _budgeted(f"{name}-rate-{word}", f"{note}, {word} the rate", width, learning_rate=factor, **changes)
        for word, factor in (("half", 0.5), ("double", 2.0), ("quadruple", 4.0))
        for name, note, width, changes in (
            ("dense-80-match", "dense", 80, {"kind": "dense"}),
            ("dense-64-match", "dense", 64, {"kind": "dense"}),
            ("wide-128-b8", "static 80 %, B = 8", 128, {"kind": "constant"}),
            ("wide-128-b1-set", "SET 80 %, unstructured", 128, {"kind": "constant", "block": 1, **_SET}),
        )
    ),
    *(
        _budgeted(f"dense-{width}-{word}", f"dense, {note}, double the rate", width, **more, kind="dense")
        for width in (48, 64, 80)
        for word, note, more in (
            ("more", "half as many FLOPs again", {"budget": 1.5, "learning_rate": 2.0}),
            ("some-more", "a fifth more FLOPs", {"budget": 1.2, "learning_rate": 2.0}),
        )
    ),
    *(
        _budgeted(f"dense-{width}-match-rate-double", "dense, double the rate", width, kind="dense", learning_rate=2.0)
        for width in (32, 40, 48, 56, 96)
    ),
    _budgeted("dense-48-match-rate-quadruple", "dense, quadruple the rate", 48, kind="dense", learning_rate=4.0),
    _budgeted("wide-96-b8-rate-double", "static 80 %, B = 8, double the rate", 96, kind="constant", learning_rate=2.0),
    *(
        _budgeted(
            f"wide-96-b{block}-set-rate-double",
            f"SET 80 %, {'unstructured' if block == 1 else f'B = {block}'}, double the rate",
            96,
            kind="constant",
            block=block,
            learning_rate=2.0,
            **_SET,
        )
        for block in (1, 2, 4, 8)
    ),
    *(
        _budgeted(
            f"wide-{width}{'' if percent == 80 else f'-{percent}'}-b2-set-rate-double",
            f"SET {percent} %, B = 2, double the rate",
            width,
            kind="constant",
            block=2,
            learning_rate=2.0,
            **_SET if percent == 80 else _SET | {"sparsity": percent / 100},
        )
        for width, percent in ((128, 80), (80, 80), (80, 70), (96, 90))
    ),
    _budgeted("dense-32-match", "dense", 32, kind="dense"),
)
BUDGET_QUEUE = ("dense", *(config.name for config in ON_BUDGET))
LARGE_QUEUE = (
    "static-b64",
    "dense-384-match",
    "dense-512-match",
    "dense-short",
    "set-b64",
    "start-80-b64",
    "dense-512",
    "dense",
)

# How regrown blocks take their first steps. A count of their own changes the more, the nearer beta2 is to 1.
_MOVING: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("set-b8", "SET 80 %, B = 8", STATIC | {"growth": "random"}),
    ("mst-b8", "MST 90 %, B = 8", {}),
)
_FIRST_STEPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "", {}),
    ("-own", ", regrown blocks count their own steps", {"regrown": "own steps"}),
    ("-warm", ", regrown blocks warmed up over 100 steps", {"regrown_warmup": 100}),
    (
        "-own-warm",
        ", regrown blocks count their own steps, warmed up over 100",
        {"regrown": "own steps", "regrown_warmup": 100},
    ),
)
ON_REGROWN: tuple[Config, ...] = tuple(
    _config(f"{name}{beta}{ending}", f"{note}{law}{what}", **settings, **steps, **changes)
    for beta, law, changes in (("", "", {}), ("-999", ", beta2 = 0.999", {"beta2": 0.999}))
    for name, note, settings in _MOVING
    for ending, what, steps in _FIRST_STEPS
    if beta or ending  # else it is one of those above
)

KNOWN = {config.name: config for config in (*CONFIGURATIONS, *ON_GPU, *ON_BUDGET, *ON_REGROWN)}
