"""Random models, schedules and training programs at once: a sparse run is its simulation, after every operation.

In eager mode every number of it is the simulation's bit for bit, but for blocks that have just regrown, which are known
by a bound. In compiled mode outputs and gradients, whose sums run in another order, are held against float64; from them
on, weights and optimizer state are again exact. ``HYPOTHESIS_PROFILE=explore`` draws ten times as many, and others each
time.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import Phase, example, given, settings
from net_cases import Net
from program_cases import LATE, WIDE, Program, programs
from program_runs import check_program
from simulated_rules import Course

_EXAMPLES = settings.default.max_examples if settings.default else 60

BATCH = (0, 3, 6)
STEP = ("step", (BATCH,), "", "none")
# In it all of the backend's variants run, and attention has a pattern for two steps.
VARIANTS = Program(
    Net(("gated", "attention"), width=WIDE, hidden=24, tokens=True, head="tied", autocast=True),
    Course("mixed", 0.7, interval=2, total=9, restoration=2, settle=2, pattern="sparse", span=1, window=(1, 3)),
    "inductor",
    optimizer="adamw fused",
    layout="param_groups",
    ops=(
        STEP,
        ("swap", BATCH, "write"),
        ("scaled", (BATCH, BATCH), True, False, "none"),
        ("evaluate", BATCH, "no_grad"),
        STEP,
        ("swap", BATCH, "exchange"),
        ("roll_back", BATCH, True, ("model", "optimizer")),
        *(STEP,) * 5,
    ),
)
IN_FLOAT32 = replace(VARIANTS, net=replace(VARIANTS.net, autocast=False))
# What is remembered from one event to the next: which weights have moved, of which one is idle when it comes,
# and growth scores; through each way that a run is copied or comes back.
WAYS = (
    ("copy", True),
    ("copy", False),
    ("resume", ("model", "optimizer"), False),
    ("resume", ("optimizer", "model", "sparsifier"), True),
)
REMEMBERS = [
    Program(
        Net(("experts", "mlp")),
        Course("constant", 0.7, interval=3, growth="gradient", gradient_steps=3, drop=0.4),
        "plain",
        block=1,  # so that there are many, and some of them change places
        guard="none",
        ops=(STEP, ("turn",), way, STEP, STEP) * 2,
    )
    for way in WAYS
]
# A fused optimizer is told of the scale of gradients, and of those that are not finite: between two gradients that
# growth adds up, so that they have other scales, and just after blocks have grown.
SCALED, BAD = ("scaled", (BATCH,), False, False, "none"), ("scaled", (BATCH,), False, True, "none")
OTHER = ("scaled", ((7, 2, 4),), False, False, "none")
IS_SCALED = replace(
    REMEMBERS[0],
    optimizer="adamw fused",
    course=Course("constant", 0.7, interval=2, growth="gradient", gradient_steps=2, drop=0.4),
    ops=(*(SCALED,) * 2, OTHER, BAD, SCALED, BAD, OTHER, OTHER, BAD, *(SCALED, OTHER) * 2),
)
# Values that come without their masks: more of them than blocks are active, and fewer; just after blocks have grown.
FOLLOWS = replace(
    REMEMBERS[0],
    guard="coverage",
    layout="two optimizers",
    course=Course("constant", 0.7, interval=2, growth="random", drop=0.4),
    ops=(STEP, STEP, ("bring", 1, 1.0, BATCH), STEP, ("bring", 2, 0.2, BATCH), STEP, ("bring", 3, 0.5, BATCH), STEP),
)
# Optimizers that are known by their form alone: what they remember of dropped blocks, and how young ones warm up.
BY_FORM = [
    replace(
        IS_SCALED,
        optimizer=name,
        layout=layout,
        course=Course("constant", 0.7, interval=2, growth="mixed", drop=0.4, regrown_warmup=3),
    )
    for name, layout in (("muon", "by shape"), ("adafactor", "one"))
]
# Half of the Parameters join the optimizer between two events.
JOINS = replace(REMEMBERS[0], layout=LATE, ops=(*(STEP,) * 4, ("join",), *(STEP,) * 5))
# Weights that are frozen with gradients that are left and values outside their masks, and trained again.
FREEZES = replace(
    REMEMBERS[0],
    optimizer="adam amsgrad",
    course=Course("constant", 0.7, interval=2, growth="gradient", drop=0.4),
    ops=(
        STEP,
        ("step", (BATCH,), "", "keep"),
        ("write",),
        *(("freeze", i, False) for i in range(8)),
        STEP,
        STEP,
        ("rest",),
        *(STEP,) * 3,
    ),
)


@settings(max_examples=2 * _EXAMPLES)
@example(REMEMBERS[0])
@example(REMEMBERS[1])
@example(REMEMBERS[2])
@example(REMEMBERS[3])
@example(IS_SCALED)
@example(FOLLOWS)
@example(replace(FOLLOWS, block=4, layout="one", guard="backbone"))
@example(BY_FORM[0])
@example(BY_FORM[1])
@example(JOINS)
@example(FREEZES)
@given(programs(("plain",), least=10))
def test_programs_in_eager_mode(program: Program) -> None:
    check_program(program)


@settings(max_examples=_EXAMPLES // 10)
@example(replace(IN_FLOAT32, mode="eager"))
@example(replace(FOLLOWS, mode="eager", block=4))
@given(programs(("eager",), least=4, most=12))
def test_programs_in_compiled_mode(program: Program) -> None:
    check_program(program)


# A graph takes Inductor seconds: what is drawn beside the examples is for who explores.
@settings(max_examples=_EXAMPLES // 60, phases=(Phase.explicit, *([Phase.generate] if _EXAMPLES > 60 else [])))
@example(VARIANTS)
@example(replace(IN_FLOAT32, ops=IN_FLOAT32.ops[:6]))
@given(programs(("inductor",), most=6))
def test_programs_through_inductor(program: Program) -> None:
    check_program(program)
