"""``forecast(model, ...)``: training FLOPs and time of a run by phase, before it begins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .api import sparsifier, sparsify
from .errors import ForecastError, NotSparseError
from .rates import Rates, measure
from .schedule import MixedSparsity, Schedule
from .sparsifier import Sparsifier

STEPS, TOKENS, ACTIVE, GRADIENT, REST = sympy.symbols("steps tokens active gradient rest", nonnegative=True)
SPARSE, DENSE, EVENTS = sympy.symbols("sparse_steps dense_steps events", nonnegative=True)
SPARSE_ACTIVE, SPARSE_MORE = sympy.symbols("sparse_active sparse_more", nonnegative=True)
FIXED, PER_ELEMENT, PER_GRADIENT, DENSE_STEP, OPTIMIZER, EVENT = sympy.symbols(
    "t_fixed t_element t_gradient t_dense t_optimizer t_event", nonnegative=True
)
# ``active`` and ``gradient`` are means over the steps of a phase; ``sparse_*`` over those that run sparse products.
FLOPS = STEPS * (TOKENS * (4 * ACTIVE + 2 * GRADIENT) + REST)
SECONDS = (
    SPARSE * (FIXED + PER_ELEMENT * SPARSE_ACTIVE + PER_GRADIENT * SPARSE_MORE)
    + DENSE * DENSE_STEP
    + (SPARSE + DENSE) * OPTIMIZER
    + EVENTS * EVENT
)


@dataclass(frozen=True)
class Phase:
    """Steps ``start`` to ``stop`` of a run; ``values`` gives the symbols of :data:`FLOPS` and :data:`SECONDS`."""

    name: str
    start: int
    stop: int
    values: dict[sympy.Symbol, float] = field(repr=False)
    dense_flops: float

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return float(FLOPS.subs(self.values))

    @property
    def seconds(self) -> float | None:
        """Expected seconds; None if no rates were measured."""
        return float(SECONDS.subs(self.values)) if FIXED in self.values else None


@dataclass(frozen=True)
class Forecast:
    """What :func:`forecast` returns; prints as a table.

    Attributes:
        phases: in the order of the run.
        rest: FLOPs of a step in everything but products with sparse weights.
        rates: what was measured, or None.
        expressions: ``"flops"`` and ``"seconds"`` of a phase as sympy expressions.
    """

    phases: list[Phase]
    rest: float
    rates: Rates | None
    expressions: dict[str, sympy.Expr]

    @property
    def flops(self) -> float:
        """Training FLOPs of the run."""
        return sum(p.flops for p in self.phases)

    @property
    def dense_flops(self) -> float:
        """Training FLOPs of the dense model over as many steps."""
        return sum(p.dense_flops for p in self.phases)

    @property
    def seconds(self) -> float | None:
        """Expected seconds of the run, compilation apart; None if no rates were measured."""
        found = [p.seconds for p in self.phases]
        return None if any(s is None for s in found) else sum(s for s in found if s is not None)

    def __str__(self) -> str:
        lines = [f"{'phase':12} {'steps':>8} {'TFLOP':>12} {'of dense':>9} {'seconds':>9}"]
        rows: list[tuple[str, int, float, float, float | None]] = [
            (p.name, p.stop - p.start, p.flops, p.dense_flops, p.seconds) for p in self.phases
        ]
        steps = sum(p.stop - p.start for p in self.phases)
        for name, count, flops, dense, seconds in [*rows, ("all", steps, self.flops, self.dense_flops, self.seconds)]:
            time = "-" if seconds is None else f"{seconds:.1f}"
            lines.append(f"{name:12} {count:8} {flops / 1e12:12.4g} {flops / max(dense, 1.0):9.1%} {time:>9}")
        return "\n".join(lines)

    __repr__ = __str__


def forecast(
    model: nn.Module,
    schedule: Schedule | None = None,
    *,
    tokens: float,
    tokens_per_step: int,
    loss: Callable[[], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Forecast:
    """Training FLOPs, and if it can run the model the time, of a whole run by phase. Nothing is changed.

    Counted are matrix products, forward and backward, 2 FLOPs a multiply-add: exactly, block by block and event by
    event, for sparse weights (only ragged edges are taken at their mean); for the rest what
    ``torch.utils.flop_counter`` counts in one dense pass of ``loss``, full attention included, or without ``loss`` the
    other linear layers alone.

    Args:
        model: sparsified, or a plain one with a ``schedule``.
        schedule: of a plain model; ``options`` then are :func:`sparsify`'s.
        tokens: of the whole run.
        tokens_per_step: tokens of one optimizer step, gradient accumulation included.
        loss: runs the forward pass on one step's batch and returns the loss, ``lambda: model(x, y)``; through the
            compiled model, if time shall be forecast for it. With a sparsified model it is also timed, at a few
            densities: see :func:`mst_compile.rates.measure`.
        optimizer: the one that will train the model, to be timed.

    Raises:
        ForecastError: ``tokens`` or ``tokens_per_step`` is not positive, or model and schedule do not go together.
    """
    for name, value in (("tokens", tokens), ("tokens_per_step", tokens_per_step)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0 or math.isinf(value):
            raise ForecastError(f"{name} must be a positive number, got {value!r}")
    own = _sparsifier(model, schedule, options)
    rest = _other_linears(model, own) * tokens_per_step if loss is None else _rest(model, own, tokens_per_step, loss)
    rates = measure(model, loss, optimizer) if loss is not None and schedule is None else None
    steps = math.ceil(tokens / tokens_per_step)
    phases = [_phase(own, name, a, b, tokens_per_step, rest, rates) for name, a, b in _phases(own.schedule, steps)]
    return Forecast(phases, rest, rates, {"flops": FLOPS, "seconds": SECONDS})


def _sparsifier(model: nn.Module, schedule: Schedule | None, options: dict[str, Any]) -> Sparsifier:
    try:
        own = sparsifier(model)
    except NotSparseError:
        if schedule is None:
            raise ForecastError("the model is not sparse: pass a schedule, or sparsify the model first") from None
        return sparsifier(sparsify(copy.deepcopy(model), schedule, **options))
    if schedule is not None or options:
        raise ForecastError("the model is sparse already and has its schedule: pass no other, and no options")
    return own


def _other_linears(model: nn.Module, own: Sparsifier) -> float:
    """Training FLOPs per token of the linear layers that are not sparse."""
    names = set(own.weights)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return 6.0 * sum(p.numel() for n, p in model.named_parameters() if n not in names and id(p) in linear)


def _rest(model: nn.Module, own: Sparsifier, tokens: int, loss: Callable[[], Tensor]) -> float:
    """FLOPs of a dense step less those of the products that are sparse.

    Runs in eager mode, where every product is dense, with attention written out: not all of its kernels are counted.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    counter = FlopCounterMode(display=False)
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        torch.autograd.grad(loss(), trained, allow_unused=True)
    sparse = 6.0 * tokens * sum(w.numel for w in own.weights.values())
    return max(0.0, counter.get_total_flops() - sparse)


def _phases(schedule: Schedule, steps: int) -> list[tuple[str, int, int]]:
    """Name, first step and end of each phase, cut at ``steps``."""
    edges, names = [0, steps], ["training"]
    if isinstance(schedule, MixedSparsity):
        edges = [0, schedule.warmup_steps, schedule.restoration_start, schedule.restoration_end, steps]
        names = ["warm-up", "plateau", "restoration", "settle"]
    found = [(n, min(a, steps), min(b, steps)) for n, a, b in zip(names, edges[:-1], edges[1:], strict=True)]
    return [(name, a, b) for name, a, b in found if b > a]


def _phase(own: Sparsifier, name: str, start: int, stop: int, tokens: int, rest: float, rates: Rates | None) -> Phase:
    """Walk the steps of a phase; densities change at events alone."""
    total = sum(w.numel for w in own.weights.values())
    threshold = 1.0 if rates is None else rates.threshold
    sums = dict.fromkeys((ACTIVE, GRADIENT, SPARSE, DENSE, EVENTS, SPARSE_ACTIVE, SPARSE_MORE), 0.0)
    active: float | None = None
    for step in range(start, stop):
        if active is None or own.schedule.is_topology_event(step):
            active = _active_after(own, step)
        gradient = _gradient_elements(own, step, active)
        sums[ACTIVE] += active
        sums[GRADIENT] += gradient
        sums[EVENTS] += own.schedule.is_topology_event(step + 1)
        if active < threshold * total:
            sums[SPARSE] += 1
            sums[SPARSE_ACTIVE] += active
            sums[SPARSE_MORE] += gradient - active
        else:
            sums[DENSE] += 1
    steps = stop - start
    for symbol, count in (
        (ACTIVE, steps),
        (GRADIENT, steps),
        (SPARSE_ACTIVE, sums[SPARSE]),
        (SPARSE_MORE, sums[SPARSE]),
    ):
        sums[symbol] /= max(1, count)
    values = sums | {STEPS: float(steps), TOKENS: float(tokens), REST: rest}
    if rates is not None:
        times = (rates.fixed, rates.per_element, rates.per_gradient, rates.dense, rates.optimizer, rates.event)
        values |= dict(zip((FIXED, PER_ELEMENT, PER_GRADIENT, DENSE_STEP, OPTIMIZER, EVENT), times, strict=True))
    return Phase(name, start, stop, values, steps * (6.0 * tokens * total + rest))


def _active_after(own: Sparsifier, step: int) -> float:
    """Active elements of all sparse weights in the training step that follows ``step`` others."""
    schedule = own.schedule
    last = step
    while last > 0 and not schedule.is_topology_event(last):
        last -= 1
    found = 0.0
    for density, weight in zip(own.densities(schedule.sparsity_at(last)), own.weights.values(), strict=True):
        found += own.count(weight, density) / weight.grid.blocks * weight.numel
    return found


def _gradient_elements(own: Sparsifier, step: int, active: float) -> float:
    """Elements of the weight gradients that the training step after ``step`` others computes."""
    return float(sum(w.numel for w in own.weights.values())) if own.wants_gradient_after(step) else active
