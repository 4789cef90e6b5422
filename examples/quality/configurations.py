"""What the study trains: the configurations in order of importance, on the models of ``sizes.py``."""

from __future__ import annotations

from typing import Any

from .config import START_80, Config, config, static
from .on_budget import ON_BUDGET

AT_ONCE: dict[str, Any] = {
    "sparsity": 0.8,
    "initial_sparsity": 0.8,
    "warmup": 0,
    "growth": "none",
    "restoration": 1,
    "settle": 0.2,
}
STATIC: dict[str, Any] = {"kind": "constant"}
FIRST_DENSER = (("blocks.0.*", 0.8, None),)

CONFIGURATIONS: tuple[Config, ...] = (
    # The method and its rivals.
    config("dense", "dense", kind="dense", main=True),
    config("mst-b8", "MST 90 %, B = 8: the base of the variants below", main=True),
    config("dense-small", "dense, narrower: the base's FLOPs", kind="dense", width="match", main=True),
    static("static-b8", "static 80 %, B = 8", main=True),
    config("dense-hidden-double", "dense, twice the rate of hidden weights", kind="dense", hidden_rate=2.0),
    config("mst-b1", "MST 90 %, unstructured", block=1, main=True),
    static("static-b4", "static 80 %, B = 4", block=4, main=True),
    config("mst-b4", "MST 90 %, B = 4", block=4, main=True),
    config("mst-b8-free", "MST 90 %, B = 8, no backbone", backbone=False, main=True),
    config("mst-b32-free", "MST 90 %, B = 32, no backbone", block=32, backbone=False, main=True),
    config("mst-b8-stays", "MST 90 %, B = 8, never restored", settle=None, main=True),
    static("rigl-b8", "RigL 80 %, B = 8", growth="gradient", main=True),
    config("no-regrow", "no drop-and-grow", growth="none", main=True),
    config("at-once-80", "static 80 %, dense at once for the last 20 %", **AT_ONCE, main=True),
    config("restore-30", "restoration over 30 %", restoration=0.3, main=True),
    static("static-b1", "static 80 %, unstructured", block=1, main=True),
    config("dense-128", "dense, width 128", kind="dense", width=128, main=True),
    config("mst-b16-free", "MST 90 %, B = 16, no backbone", block=16, backbone=False, main=True),
    config("mst-b64-free", "MST 90 %, B = 64, no backbone", block=64, backbone=False, main=True),
    # Guards against dead units; B = 8 with a backbone is mst-b8.
    *(
        config(
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
    static("rigl-b8-coverage", "RigL 80 %, B = 8, coverage", growth="gradient", guard="coverage", main=True),
    config("dense-short", "dense, fewer steps: the base's FLOPs", kind="dense", length="match", main=True),
    config("early", "restoration ramp early", restoration_ramp="early", main=True),
    config("start-sparse", "starts sparse, no warm-up", initial_sparsity=0.9, warmup=0),
    config("plateau-80", "plateau at 80 %", sparsity=0.8),
    config("restore-50", "restoration over 50 %", restoration=0.5),
    config("dense-rate-double", "dense, twice the learning rate", kind="dense", learning_rate=2.0),
    config("restore-20", "restoration over 20 %", restoration=0.2),
    config("plateau-85", "plateau at 85 %, warm-up and restoration 5 %", sparsity=0.85, warmup=0.05, restoration=0.05),
    config("gentle", "drop 10 %, every 96 steps", drop_fraction=0.1, interval=96),
    config("gradient-8", "growth reads 8 gradients", gradient_steps=8),
    config("fine-ramp", "an event every 4 steps of the ramps", ramp_interval=4),
    config("attention-60", "attention at 60 %", overrides=(("*.attention.*", 0.6, None),)),
    config("first-80", "first layer at 80 %", overrides=FIRST_DENSER),
    config("attention-b4", "attention in blocks of 4", overrides=(("*.attention.*", None, 4),)),
    static("static-b16", "static 80 %, B = 16", block=16),
    static("static-b8-free", "static 80 %, B = 8, no backbone", backbone=False),
    static("static-90", "static 90 %, B = 8", sparsity=0.9),
    static("static-b32-free", "static 80 %, B = 32, no backbone", block=32, backbone=False),
    config("dense-112", "dense, width 112", kind="dense", width=112, main=True),
    config("dense-192", "dense, width 192", kind="dense", width=192, main=True),
    config("dense-cosine", "dense, cosine", kind="dense", decay="cosine"),
    config("mst-cosine", "cosine", decay="cosine"),
    static("static-b8-unscaled", "static 80 %, B = 8, first weights not rescaled", rescale=False),
    static("static-b4-unscaled", "static 80 %, B = 4, first weights not rescaled", block=4, rescale=False),
    static("rigl-b8-unscaled", "RigL 80 %, B = 8, first weights not rescaled", growth="gradient", rescale=False),
    static(
        "static-b8-unscaled-rate0",
        "static 80 %, B = 8, the dense model's learning rate, first weights not rescaled",
        input_rate=0.0,
        rescale=False,
    ),
    config("at-once-80-b4", "static 80 %, B = 4, dense at once for the last 20 %", block=4, **AT_ONCE),
    # The library's default, and changes of one thing each.
    config("start-80", "80 % from the start, no drop-and-grow", **START_80, main=True),
    config("start-80-b1", "start-80, unstructured", block=1, **START_80),
    config("start-80-b4", "start-80, B = 4", block=4, **START_80, main=True),
    config("start-80-b16", "start-80, B = 16", block=16, **START_80, main=True),
    config("start-80-free", "start-80, no backbone", backbone=False, **START_80),
    config("start-80-restore-5", "start-80, restoration over 5 %", restoration=0.05, **START_80),
    config("start-80-restore-20", "start-80, restoration over 20 %", restoration=0.2, **START_80),
    config("start-80-restore-30", "start-80, restoration over 30 %", restoration=0.3, **START_80),
    config("start-80-early", "start-80, restoration ramp early", restoration_ramp="early", **START_80),
    config(
        "start-80-regrow",
        "start-80, drop 10 %, every 96 steps",
        drop_fraction=0.1,
        interval=96,
        **START_80 | {"growth": "mixed"},
    ),
    config(
        "start-80-regrow-coverage",
        "start-80, drop 10 %, every 96 steps, coverage",
        drop_fraction=0.1,
        interval=96,
        guard="coverage",
        **START_80 | {"growth": "mixed"},
    ),
    config("start-80-uniform", "start-80, the same density in every layer", distribution="uniform", **START_80),
    config("start-70", "start-80 at 70 %", **START_80 | {"sparsity": 0.7, "initial_sparsity": 0.7}, main=True),
    config("start-90", "start-80 at 90 %", **START_80 | {"sparsity": 0.9, "initial_sparsity": 0.9}, main=True),
    # Three times as long.
    config("dense-long", "dense, three times as long", kind="dense", length=3, main=True),
    config("dense-152-long", "dense, width 152, three times as long", kind="dense", width=152, length=3, main=True),
    config("dense-128-long", "dense, width 128, three times as long", kind="dense", width=128, length=3, main=True),
    config(
        "start-80-long", "80 % from the start, no drop-and-grow, three times as long", length=3, **START_80, main=True
    ),
    static("static-b8-long", "static 80 %, B = 8, three times as long", length=3, main=True),
    config("mst-b8-long", "MST 90 %, B = 8, three times as long", length=3, main=True),
    config(
        "start-80-b4-long",
        "start-80, B = 4, three times as long",
        block=4,
        length=3,
        **START_80,
        main=True,
    ),
    *(
        config(
            f"start-{percent}-long",
            f"start-80 at {percent} %, three times as long",
            length=3,
            **START_80 | {"sparsity": percent / 100, "initial_sparsity": percent / 100},
            main=True,
        )
        for percent in (70, 60)
    ),
    config(
        "start-80-restore-30-long",
        "start-80, restoration over 30 %, three times as long",
        restoration=0.3,
        length=3,
        **START_80,
        main=True,
    ),
    # Whether the rate that suits the short runs suits the long ones.
    *(
        config(
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
    static("static-b8-hidden-double", "static 80 %, B = 8, twice the rate of hidden weights", hidden_rate=2.0),
    config("mst-b8-hidden-double", "twice the rate of hidden weights", hidden_rate=2.0),
    static("set-b8", "SET 80 %, B = 8", growth="random"),
    config("dense-rate-half", "dense, half the learning rate", kind="dense", learning_rate=0.5),
    # The learning rate of the dense model for all weights, however few inputs they have.
    config("mst-b8-rate0", "MST 90 %, B = 8, the dense model's learning rate", input_rate=0.0),
    static("static-b8-rate0", "static 80 %, B = 8, the dense model's learning rate", input_rate=0.0),
    config(
        "dense-small-rate0",
        "dense, narrower, the full model's learning rate",
        kind="dense",
        width="match",
        input_rate=0.0,
    ),
    config("mst-b8-rate-half", "learning rate by the root of the inputs", input_rate=0.5),
    # Weight decay apart from the learning rate, for sparse models and their narrower rivals alike.
    *(
        config(
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
    static(
        "static-b8-graphcore-apart",
        "static 80 %, B = 8, Graphcore's rate, decay apart from it",
        rate_law="graphcore",
        decay_law="independent",
    ),
    static(
        "static-b8-rate-half-apart",
        "static 80 %, B = 8, rate by the root of the inputs, decay apart from it",
        input_rate=0.5,
        decay_law="independent",
    ),
)

# On a GPU, whose kernels begin with blocks of 32. Decay apart from the rate, as the library does it.
ON_GPU: tuple[Config, ...] = (
    static("static-b64", "static 80 %, B = 64", block=64, decay_law="independent"),
    static(
        "set-b64",
        "SET 80 %, B = 64, drop 30 % every 100 steps",
        block=64,
        growth="random",
        drop_fraction=0.3,
        interval=100,
        decay_law="independent",
    ),
    config("start-80-b64", "start-80, B = 64", block=64, decay_law="independent", **START_80),
    config("dense-512", "dense, width 512", kind="dense", width=512, decay_law="independent"),
    *(
        config(
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
    config(f"{name}{beta}{ending}", f"{note}{law}{what}", **settings, **steps, **changes)
    for beta, law, changes in (("", "", {}), ("-999", ", beta2 = 0.999", {"beta2": 0.999}))
    for name, note, settings in _MOVING
    for ending, what, steps in _FIRST_STEPS
    if beta or ending  # else it is one of those above
)

KNOWN = {config.name: config for config in (*CONFIGURATIONS, *ON_GPU, *ON_BUDGET, *ON_REGROWN)}
