"""``forecast(model, ...)``: training FLOPs and time of a run by phase, before it begins."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mst_compile.api import sparsify
from mst_compile.cost.flops import check_tokens, dense_linear_training
from mst_compile.cost.rates import Rates, kept, loss_of, measure
from mst_compile.errors import ForecastError, NotSparseError
from mst_compile.rules.checks import check_instance, check_model, check_number
from mst_compile.rules.density import active_count
from mst_compile.rules.schedule import Schedule
from mst_compile.state.sparsifier import Sparsifier, sparsifier

MOST_STEPS = 10**9  # of a run: it is gone through step by step

STEPS, TOKENS, ACTIVE, GRADIENT, REST = sympy.symbols("steps tokens active gradient rest", nonnegative=True)
SPARSE, DENSE, PATTERN, EVENTS = sympy.symbols("sparse_steps dense_steps pattern_steps events", nonnegative=True)
SPARSE_ACTIVE, SPARSE_MORE = sympy.symbols("sparse_active sparse_more", nonnegative=True)
ATTENTION_SAVED = sympy.Symbol("attention_saved", nonnegative=True)
FIXED, PER_ELEMENT, PER_GRADIENT, DENSE_STEP, OPTIMIZER, EVENT, ATTENTION = sympy.symbols(
    "t_fixed t_element t_gradient t_dense t_optimizer t_event t_attention", real=True
)
# ``active`` and ``gradient`` are means over the steps of a phase; ``sparse_*`` over those that run sparse products.
# A pattern saves ``attention_saved`` FLOPs and ``t_attention`` seconds of a step.
FLOPS = STEPS * (TOKENS * (4 * ACTIVE + 2 * GRADIENT) + REST) - PATTERN * ATTENTION_SAVED
SECONDS = (
    SPARSE * (FIXED + PER_ELEMENT * SPARSE_ACTIVE + PER_GRADIENT * SPARSE_MORE)
    + DENSE * DENSE_STEP
    + (SPARSE + DENSE) * OPTIMIZER
    + EVENTS * EVENT
    - PATTERN * ATTENTION
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
        rest: FLOPs of a step in everything but products with sparse weights, attention in full.
        rates: what was measured, or None.
        expressions: ``"flops"`` and ``"seconds"`` of a phase as sympy expressions.
    """

    phases: list[Phase]
    rest: float
    rates: Rates | None
    expressions: dict[str, sympy.Expr]

    def __post_init__(self) -> None:
        check_instance("phases", self.phases, list, "a list of phases", ForecastError)
        for phase in self.phases:
            check_instance("phases", phase, Phase, "a list of phases", ForecastError)
        check_number("rest", self.rest, least=0, error=ForecastError)
        check_instance("rates", self.rates, Rates | None, "what was measured, or None", ForecastError)
        check_instance("expressions", self.expressions, dict, "a dict of expressions", ForecastError)

    @property
    def flops(self) -> float:
        """Training FLOPs of the run."""
        return sum(p.flops for p in self.phases)

    @property
    def attention_saved(self) -> float:
        """FLOPs that a step saves while the schedule gives attention a pattern; 0 if unknown."""
        return 0.0 if self.rates is None else self.rates.attention_flops

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
    event, for sparse weights (only ragged edges are taken at their mean, and a guard may keep some blocks more on grids
    too coarse for the density), each used once a token; for the rest what
    ``torch.utils.flop_counter`` counts in one dense pass of ``loss``, or without ``loss`` the other linear layers
    alone. Attention counts as if no pair of query and key were masked; one that the schedule gives a pattern as the
    share of the causal pairs that it keeps, where ``loss`` runs the compiled model and so shows which ones the graph
    pass understood. Steps at densities so near 1 that the backend runs dense products count by their masks all the
    same.

    Args:
        model: sparsified, or a plain one with a ``schedule``.
        schedule: of a plain model; ``options`` then are :func:`sparsify`'s.
        tokens: of the whole run.
        tokens_per_step: tokens of one optimizer step, gradient accumulation included.
        loss: runs the forward pass on one step's batch and returns the loss, ``lambda: model(x, y)``; through the
            compiled model, if time shall be forecast for it. With a sparsified model it is also timed, at a few
            densities: see :func:`mst_compile.cost.rates.measure`. The rest of the training loop, such as clipping of
            gradients and loading of data, is not timed.
        optimizer: the one that will train the model, to be timed.

    Returns:
        Phases of :class:`MixedSparsity`: warm-up, plateau, restoration, settle, without those that have no steps; of
        any other schedule one, ``"training"``. Seconds are known if a sparsified model came with ``loss``.

    Raises:
        ForecastError: ``tokens`` or ``tokens_per_step`` is not positive or too large, model and schedule do not go
            together, ``loss`` returns no loss, or an optimizer steps within the backward pass of ``loss``.
        ModelError: ``model`` is no module.
    """
    check_model("forecast", model)
    tokens_per_step = check_tokens("tokens_per_step", tokens_per_step)
    steps = math.ceil(check_number("tokens", tokens, positive=True, error=ForecastError) / tokens_per_step)
    if steps > MOST_STEPS:
        raise ForecastError(
            f"tokens={tokens!r} at tokens_per_step={tokens_per_step!r} are {steps} optimizer steps, more than "
            f"{MOST_STEPS}; are these the numbers of the whole run and of one step?"
        )
    if loss is not None:
        check_instance("loss", loss, Callable, "a function without arguments that returns the loss", ForecastError)
    if optimizer is not None:
        check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer", ForecastError)
    sparse, own = _sparse(model, schedule, options)
    if loss is None:
        rest = float(dense_linear_training(sparse) * tokens_per_step)
    else:
        rest = _rest(model, own, tokens_per_step, loss)
    rates = measure(model, loss, optimizer, steps=steps) if loss is not None and schedule is None else None
    line = timeline(own, steps)
    phases = [_phase(own, line, *phase, tokens_per_step, rest, rates) for phase in own.schedule.phases(steps)]
    return Forecast(phases, rest, rates, {"flops": FLOPS, "seconds": SECONDS})


def _sparse(model: nn.Module, schedule: Schedule | None, options: dict[str, Any]) -> tuple[nn.Module, Sparsifier]:
    """The sparse model, a copy if ``model`` is a plain one, and its sparsifier."""
    try:
        own = sparsifier(model)
    except NotSparseError:
        if schedule is None:
            raise ForecastError("the model is not sparse: pass a schedule, or sparsify the model first") from None
        twin = sparsify(copy.deepcopy(model), schedule, **options)
        return twin, sparsifier(twin)
    if schedule is not None or options:
        raise ForecastError("the model is sparse already and has its schedule: pass no other, and no options")
    return model, own


def _rest(model: nn.Module, own: Sparsifier, tokens: int, loss: Callable[[], Tensor]) -> float:
    """FLOPs of a dense step less those of the products that are sparse.

    Runs in eager mode, where every product is dense, with attention written out: not all of its kernels are counted.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    counter = FlopCounterMode(display=False)
    with kept(model), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        torch.autograd.grad(loss_of(loss), trained, allow_unused=True)
    sparse = 6.0 * tokens * sum(w.numel for w in own.weights.values())
    return max(0.0, counter.get_total_flops() - sparse)


@dataclass(frozen=True)
class Timeline:
    """A run step by step, before it happens; one entry a training step in each tensor, on the CPU.

    Attributes:
        active: elements of all sparse weights in active blocks, float64 ``[steps]``.
        gradient: elements of their gradients that are computed, float64 ``[steps]``.
        event: whether a topology event follows, bool ``[steps]``.
        pattern: whether attention has a pattern, bool ``[steps]``.
    """

    active: Tensor
    gradient: Tensor
    event: Tensor
    pattern: Tensor


def timeline(own: Sparsifier, steps: int) -> Timeline:
    """The first ``steps`` training steps under the schedule of ``own``; its own step count does not matter.

    The schedule is asked once for each step, what costs more only where something changes.
    """
    schedule, total = own.schedule, float(sum(w.numel for w in own.weights.values()))
    reach = max(1, schedule.growth_rule.gradient_steps)
    events = [t for t in range(1, steps + reach) if schedule.is_topology_event(t)]
    changes = [0, *(t for t in events if t < steps)]
    targets = [schedule.sparsity_at(t) for t in changes]
    found = _active_at(own, set(targets))
    cpu = functools.partial(torch.tensor, device="cpu")
    lengths = cpu([*changes[1:], steps]) - cpu(changes)
    active = cpu([found[s] for s in targets], dtype=torch.float64).repeat_interleave(lengths)
    before = {s for t in events for s in range(max(0, t - reach), min(t, steps))}
    dense = [s for s in before if schedule.wants_gradient_after(s)]
    gradient = active.clone()
    gradient[dense] = total
    event, pattern = (torch.zeros(steps, dtype=torch.bool, device="cpu") for _ in range(2))
    event[[t - 1 for t in events if t <= steps]] = True
    if own.attention.sparse != "full":
        pattern = cpu([schedule.attention_at(s) != "full" for s in range(steps)])
    return Timeline(active, gradient, event, pattern)


def _active_at(own: Sparsifier, sparsities: set[float]) -> dict[float, float]:
    """Active elements of all sparse weights at each target sparsity; ragged blocks count as the mean block."""
    weights = list(own.weights.values())
    # How few blocks a weight can have is asked once: it means counting its backbone.
    sizes = [(w.grid.blocks, w.blocks_at(0.0), w.numel / w.grid.blocks) for w in weights]
    return {
        sparsity: sum(
            active_count(density, blocks, least) * size
            for density, (blocks, least, size) in zip(own.densities(sparsity), sizes, strict=True)
        )
        for sparsity in sparsities
    }


def _phase(
    own: Sparsifier, line: Timeline, name: str, start: int, stop: int, tokens: int, rest: float, rates: Rates | None
) -> Phase:
    """Sums and means over the steps of a phase."""
    steps, part = stop - start, slice(start, stop)
    total = sum(w.numel for w in own.weights.values())
    active, gradient = line.active[part], line.gradient[part]
    sparse = active < (1.0 if rates is None else rates.threshold) * total
    values = {
        STEPS: float(steps),
        TOKENS: float(tokens),
        REST: rest,
        ATTENTION_SAVED: 0.0 if rates is None else rates.attention_flops,
        ACTIVE: _mean(active),
        GRADIENT: _mean(gradient),
        SPARSE: float(sparse.sum()),
        DENSE: float((~sparse).sum()),
        SPARSE_ACTIVE: _mean(active[sparse]),
        SPARSE_MORE: _mean((gradient - active)[sparse]),
        EVENTS: float(line.event[part].sum()),
        PATTERN: float(line.pattern[part].sum()),
    }
    if rates is not None:
        values |= {
            FIXED: rates.fixed,
            PER_ELEMENT: rates.per_element,
            PER_GRADIENT: rates.per_gradient,
            DENSE_STEP: rates.dense,
            OPTIMIZER: rates.optimizer,
            EVENT: rates.event,
            ATTENTION: rates.attention,
        }
    return Phase(name, start, stop, values, steps * (6.0 * tokens * total + rest))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
