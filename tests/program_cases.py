"""Training programs to draw: a model, a schedule, an optimizer, and what happens in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from net_cases import TURNING, Net, nets
from simulated_rules import Course, Law
from torch import optim
from torch.optim import lr_scheduler

import mst_compile
from mst_compile.schedule import GradualPruning

Maker = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Maker] = {
    "sgd": lambda p: optim.SGD(p, 5e-2, weight_decay=0.1),
    "momentum": lambda p: optim.SGD(p, 2e-2, momentum=0.9, weight_decay=0.1, foreach=True),
    "nesterov": lambda p: optim.SGD(p, 2e-2, momentum=0.9, nesterov=True),
    "adamw": lambda p: optim.AdamW(p, 1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: optim.AdamW(p, 1e-2, betas=(0.8, 0.95), foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, 1e-2, fused=True),
    "adam amsgrad": lambda p: optim.Adam(p, 1e-2, amsgrad=True, weight_decay=0.1),
    "adam maximize": lambda p: optim.Adam(p, 1e-2, maximize=True, weight_decay=0.1, decoupled_weight_decay=True),
    "nadam": lambda p: optim.NAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: optim.RAdam(p, 1e-2, weight_decay=0.1),
    "adamax": lambda p: optim.Adamax(p, 1e-2, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1, weight_decay=0.1),
    "adadelta": lambda p: optim.Adadelta(p, 1.0, weight_decay=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-2, momentum=0.5, centered=True, weight_decay=0.1),
    "sgd, rate a tensor": lambda p: optim.SGD(p, torch.tensor(2e-2), momentum=0.9, weight_decay=0.1, foreach=False),
    "adamw, rate a tensor": lambda p: optim.AdamW(p, torch.tensor(1e-2), weight_decay=0.1, foreach=False),
    "asgd": lambda p: optim.ASGD(p, 1e-2, t0=3, weight_decay=0.1),
    "lbfgs": lambda p: optim.LBFGS(p, 0.1, max_iter=3, history_size=2),
    "sgd fused": lambda p: optim.SGD(p, 5e-2, weight_decay=0.1, fused=True),
    "adagrad fused": lambda p: optim.Adagrad(p, 1e-2, weight_decay=0.1, fused=True),
    "adafactor": lambda p: optim.Adafactor(p, 1e-2, weight_decay=0.1),
    "muon": lambda p: optim.Muon(p, 1e-2, weight_decay=0.1),  # of matrices; the others are AdamW's
}


def _more(density: float) -> float:
    return 1 + density


LAWS: dict[str, tuple[Law, Law]] = {
    "none": ("none", "none"),
    "default": (1.0, "independent"),
    "root": (0.5, "independent"),
    "graphcore": ("graphcore", "none"),
    "function": (_more, 0.25),
}
LATE = "joins late"  # half of the Parameters, frozen until then
LAYOUTS = ["one", "halves", "two optimizers", "param_groups", LATE, *(f"halves: {law}" for law in LAWS)]
ORDERS = [  # in which the parts of a checkpoint are loaded
    ("model", "optimizer"),
    ("optimizer", "model"),
    ("sparsifier", "optimizer", "model"),
    ("model", "sparsifier", "optimizer"),
    ("optimizer", "optimizer", "model", "sparsifier"),
]
CASTS = [torch.bfloat16, torch.float64]
PATTERNS = ["local", "strided", "sparse", "fixed"]
WIDE = 64  # of models with attention patterns: heads of 32 are the smallest that have them
Scheduler = lr_scheduler.LRScheduler
Batch = tuple[int, int, int]  # seed, batch, length
Op = tuple[Any, ...]


def _one_cycle(optimizer: optim.Optimizer) -> Scheduler:
    """It moves the first momentum, too, where there is one."""
    cycles = bool({"momentum", "betas"} & optimizer.defaults.keys())
    return lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=60, pct_start=0.1, cycle_momentum=cycles)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Scheduler]] = {
    "warm": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4) * 0.9**step),
    "one cycle": _one_cycle,
    "from zero": lambda o: lr_scheduler.LinearLR(o, 1e-3, 1.0, 4),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


@dataclass(frozen=True)
class Program:
    """What is trained, by which schedule and optimizer, in which mode, and what happens in turn.

    Attributes:
        mode: ``"plain"`` for eager mode, else what the compiled graph runs on: ``"eager"``, ``"aot_eager"``,
            ``"inductor"``.
        first: first masks, as ``sparsify`` has ``masks``.
        own: sparsity and block of the first piece, if they are its own.
        rates: of :data:`SCHEDULERS`, of the learning rate.
        ops: names of :class:`Run`'s methods and their arguments.
    """

    net: Net
    course: Course
    mode: str = "plain"
    block: int = 4
    guard: str = "coverage"
    first: str | None = "random"
    rescale: bool = True
    own: tuple[float | None, int | None] | None = None
    optimizer: str = "adamw"
    layout: str = "one"
    rates: str = "none"
    ops: tuple[Op, ...] = ()


def schedule_of(c: Course) -> mst_compile.Schedule:
    """The library's schedule of the same numbers."""
    common: dict[str, Any] = {
        "interval": c.interval, "growth": c.growth, "drop_fraction": c.drop, "distribution": c.distribution,
        "magnitude": c.magnitude, "regrown": c.regrown, "regrown_warmup": c.regrown_warmup,
        "gradient_steps": c.gradient_steps,
    }  # fmt: skip
    if c.pattern != "full":
        common |= {"attention": c.pattern, "attention_window": c.window, "stride": c.stride, "span": c.span}
    if c.kind == "constant":
        return mst_compile.Constant(c.sparsity, total_steps=c.total, **common)
    assert c.total is not None
    if c.kind == "pruning":
        return GradualPruning(c.total, c.sparsity, c.initial, c.first, c.last, **common)
    initial = c.initial if c.warmup else None
    lengths = {"warmup": c.warmup, "restoration": c.restoration, "settle": c.settle, "ramp_interval": c.ramp}
    return mst_compile.MixedSparsity(c.total, c.sparsity, initial_sparsity=initial, **lengths, **common)


@st.composite
def courses(draw: st.DrawFn) -> Course:
    kind = draw(st.sampled_from(["constant", "constant", "mixed", "pruning"]))
    interval = draw(st.integers(1, 3))
    common: dict[str, Any] = {
        "sparsity": draw(st.sampled_from([0.5, 0.7, 0.85])),
        "interval": interval,
        "growth": draw(st.sampled_from(["mixed", "gradient", "random", "none"])),
        "gradient_steps": draw(st.integers(1, interval)),
        "drop": draw(st.sampled_from([0.2, 0.4])),
        "distribution": draw(st.sampled_from(["erdos-renyi", "uniform"])),
        "magnitude": draw(st.sampled_from(["l2", "l2", "l1"])),
        "regrown": draw(st.sampled_from(["first estimate", "own steps"])),
        "regrown_warmup": draw(st.sampled_from([0, 0, 3])),
    }
    total = draw(st.integers(8, 14))
    if kind == "constant":
        return Course(kind, total=draw(st.sampled_from([None, total])), **common)
    if kind == "pruning":
        first = draw(st.integers(0, 2))
        common |= {
            "first": first,
            "last": first + draw(st.integers(1, 4)),
            "initial": draw(st.sampled_from([0.0, 0.4])),
        }
        return Course(kind, total=total, **common)
    common |= {"warmup": draw(st.integers(0, 2)), "restoration": draw(st.integers(0, 3))}
    common |= {"settle": draw(st.integers(0, 2)), "ramp": draw(st.integers(1, 2))}
    return Course(kind, total=total, **common)


def batches(lengths: list[int]) -> st.SearchStrategy[Batch]:
    # Sizes of 1 are graphs of their own, of which Dynamo makes eight at most.
    return st.tuples(st.integers(0, 99), st.sampled_from([2, 3, 3, 1]), st.sampled_from(lengths))


def operations(
    draw: st.DrawFn, batches: st.SearchStrategy[Batch], few: bool, inductor: bool = False
) -> st.SearchStrategy[Op]:
    """What may happen: mostly steps, of scaled losses too; with ``few`` of all else a choice, and that more often."""
    several = st.lists(batches, min_size=1, max_size=3).map(tuple)
    clips, zeros = st.sampled_from(["", "", "norm", "value"]), st.sampled_from(["none", "none", "zero", "keep"])
    steps = st.tuples(st.just("step"), several, clips, zeros)
    scaled = st.tuples(st.just("scaled"), several, st.booleans(), st.sampled_from([False, False, True]), zeros)
    others = [
        st.tuples(st.just("gather"), batches),
        st.tuples(st.just("burst"), batches, st.integers(0, 9)),
        st.tuples(st.just("closure"), batches),
        st.tuples(st.just("skip"), batches),
        st.tuples(st.just("lay"), batches, st.sampled_from(["none", "keep"])),
        st.tuples(st.just("mask"), batches, st.integers(0, 9)),
        st.tuples(st.just("bring"), st.integers(0, 99), st.sampled_from([0.2, 0.5, 1.0]), batches),
        st.tuples(st.just("evaluate"), batches, st.sampled_from(["grad", "no_grad", "inference"])),
        st.tuples(st.just("freeze"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("resume"), st.sampled_from(ORDERS), st.booleans()),
        st.tuples(st.just("start_optimizer_anew"), st.booleans()),
        st.tuples(st.just("roll_back"), batches, st.booleans(), st.sampled_from(ORDERS)),
        st.tuples(st.just("copy"), st.booleans()),
        st.tuples(st.just("averaged"), batches),
        st.tuples(st.just("swap"), batches, st.sampled_from(["write", "exchange", "stay"])),
        st.tuples(st.just("cast"), batches, st.sampled_from(CASTS)),
        *(st.tuples(st.just(name)) for name in ("turn", "rest", "write", "round_trip", "densify", "join")),
    ]
    if inductor:
        others.append(st.tuples(st.just("package"), batches, st.booleans()))
    kinds = draw(st.lists(st.sampled_from(others), min_size=1, max_size=4)) if few else others
    # By flatmap, as one_of would draw from all of these at once.
    other = st.sampled_from(kinds).flatmap(lambda kind: kind)
    if not few:
        return st.one_of(steps, steps, scaled, other)
    return st.one_of(steps, draw(st.sampled_from([steps, scaled])), other)


def _patterned(draw: st.DrawFn, net: Net, course: Course) -> tuple[Net, Course]:
    """Attention with a pattern for a while."""
    begin = draw(st.integers(0, 3))
    window = draw(st.sampled_from([None, (begin, begin + 3)]))
    pattern, stride, span = (
        draw(st.sampled_from(PATTERNS)),
        draw(st.integers(2, 3)),
        draw(st.sampled_from([None, 1, 3])),
    )
    pieces = (*net.pieces[:2], draw(st.sampled_from(["attention", "softmax"])))
    dtype = torch.float32 if net.dtype == torch.float64 else net.dtype
    net = replace(net, pieces=pieces, width=WIDE, dtype=dtype)
    return net, replace(course, pattern=pattern, stride=stride, span=span, window=window)


@st.composite
def programs(draw: st.DrawFn, modes: tuple[str, ...], least: int = 3, most: int = 18) -> Program:
    mode = draw(st.sampled_from(modes))
    dtypes = (torch.float32, torch.float32, torch.float64, torch.bfloat16)
    net, course = draw(nets(random=mode == "plain", dtypes=dtypes)), draw(courses())
    lengths = [3, 4, 4, 1]
    if mode != "plain" and course.kind != "pruning" and draw(st.booleans()):
        (net, course), lengths = _patterned(draw, net, course), [5, 6, 6, 1]
    # Its closure is not known to compute the same bits compiled, and it takes contiguous gradients alone.
    closures = mode == "plain" and "transposed" not in net.pieces
    optimizer = draw(st.sampled_from([name for name in sorted(OPTIMIZERS) if closures or name != "lbfgs"]))
    rates = draw(st.sampled_from(["none", "none", *SCHEDULERS]))
    if "stacks, padded" in net.pieces and optimizer.endswith("fused"):
        optimizer = "adamw"  # PyTorch's fused kernels take the gaps in memory for elements
    if optimizer == "nadam" and course.regrown == "own steps" and rates == "one cycle":
        rates = "warm"  # young blocks know the first momentum of the moment, and not those before
    few = draw(st.booleans())
    possible = operations(draw, batches(lengths), few, mode == "inductor")
    ops = tuple(draw(st.lists(possible, min_size=least, max_size=most)))
    named = {op[0] for op in ops} if few else set()
    if "turn" in named and not {*net.pieces} & TURNING:
        net = replace(net, pieces=("experts", *net.pieces[1:]))
    if "scaled" in named and "stacks, padded" not in net.pieces and optimizer != "lbfgs" and draw(st.booleans()):
        optimizer = "adamw fused"  # which is told of scales
    if {"turn", "freeze", "rest"} & named and {"copy", "resume", "roll_back"} & named:
        # What is remembered from one event to the next matters where there are steps between them.
        course = replace(course, interval=3, growth=draw(st.sampled_from(["mixed", "gradient", "random"])))
    if "copy" in named:
        course = replace(course, gradient_steps=course.interval)
    layout = draw(st.sampled_from([LATE] if "join" in named else LAYOUTS))
    if optimizer == "lbfgs":
        layout = "one"
    elif optimizer == "muon":
        layout = "by shape"
    elif layout == LATE:
        optimizer = "adamw" if optimizer.startswith("adagrad") else optimizer  # it makes state when it is made alone
        rates = "none"  # schedulers know the groups that there were
    return Program(
        net,
        course,
        mode,
        draw(st.sampled_from([1, 2, 4, 8, 16, 32])),
        draw(st.sampled_from(["coverage", "coverage", "backbone", "none"])),
        draw(st.sampled_from(["random", "magnitude"])),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, (0.3, None), (0.8, 2), (None, 4)]))
        if net.every and net.pieces[0] != "shared"
        else None,
        optimizer,
        layout,
        rates,
        ops,
    )
