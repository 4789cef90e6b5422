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

from mst_compile.api import sparsify
from mst_compile.cost.decision import Decision, amdahl, disagreement, eaten, step_limit
from mst_compile.cost.flops import check_tokens, dense_linear_training, elements_per_token, not_in_pytorch
from mst_compile.cost.hardware import bandwidth_of, default_options, estimate, table_of
from mst_compile.cost.inputs import check_loss, check_optimizer, check_options, steps_of
from mst_compile.cost.rates import Rates, differentiate, kept, measure
from mst_compile.cost.timeline import Timeline, timeline
from mst_compile.errors import ForecastError, NotSparseError
from mst_compile.rules.checks import check_instance, check_model, check_number, check_whole
from mst_compile.rules.schedule import Schedule
from mst_compile.state.sparsifier import Sparsifier, sparsifier

STEPS, TOKENS, ACTIVE, GRADIENT, REST = sympy.symbols("steps tokens active gradient rest", nonnegative=True)
SPARSE, DENSE, PATTERN, EVENTS = sympy.symbols("sparse_steps dense_steps pattern_steps events", nonnegative=True)
SPARSE_ACTIVE, SPARSE_MORE = sympy.symbols("sparse_active sparse_more", nonnegative=True)
ATTENTION_SAVED = sympy.Symbol("attention_saved", nonnegative=True)
FIXED, PER_ELEMENT, PER_GRADIENT, DENSE_STEP, OPTIMIZER, EVENT, ATTENTION = sympy.symbols(
    "t_fixed t_element t_gradient t_dense t_optimizer t_event t_attention", real=True
)
BASELINE, ELEMENTS = sympy.symbols("t_baseline elements", nonnegative=True)
MOVE, MOVE_REST = sympy.symbols("t_move t_move_rest", nonnegative=True)
# ``active`` and ``gradient`` are means over the steps of a phase; ``sparse_*`` over those that run sparse products.
# A pattern saves ``attention_saved`` FLOPs and ``t_attention`` seconds of a step. Ranks move the gradient elements that
# are computed, ``t_move`` seconds each, and those of all other parameters, ``t_move_rest`` seconds a step.
FLOPS = STEPS * (TOKENS * (4 * ACTIVE + 2 * GRADIENT) + REST) - PATTERN * ATTENTION_SAVED
SECONDS = (
    SPARSE * (FIXED + PER_ELEMENT * SPARSE_ACTIVE + PER_GRADIENT * SPARSE_MORE)
    + DENSE * DENSE_STEP
    + (SPARSE + DENSE) * OPTIMIZER
    + EVENTS * EVENT
    - PATTERN * ATTENTION
    + STEPS * (MOVE * GRADIENT + MOVE_REST)
)
# Of the model in which nothing is sparse, whose weights have so many ``elements`` where the other's may be sparse.
DENSE_SECONDS = STEPS * (BASELINE + OPTIMIZER + MOVE * ELEMENTS + MOVE_REST)


@dataclass(frozen=True)
class Phase:
    """Steps ``start`` to ``stop`` of a run; ``values`` gives the symbols of :data:`FLOPS`, :data:`SECONDS` and
    :data:`DENSE_SECONDS`."""

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

    @property
    def dense_seconds(self) -> float | None:
        """Expected seconds of a run of as many steps in which nothing is sparse; None if no rates were measured."""
        return float(DENSE_SECONDS.subs(self.values)) if FIXED in self.values else None


@dataclass(frozen=True)
class Forecast:
    """What :func:`forecast` returns; prints as a table.

    Attributes:
        phases: in the order of the run.
        rest: FLOPs of a step in everything but products with sparse weights, attention in full.
        rates: what was measured or estimated, or None.
        expressions: ``"flops"``, ``"seconds"`` and ``"dense_seconds"`` of a phase as sympy expressions.
        source: where seconds come from: what was measured here, what is an estimate, and from what.
        total_steps: the schedule's, None if it has no end.
        price_per_hour: of one rank, or None. ranks: of the run.
    """

    phases: list[Phase]
    rest: float
    rates: Rates | None
    expressions: dict[str, sympy.Expr]
    source: tuple[str, ...] = ()
    total_steps: int | None = None
    price_per_hour: float | None = None
    ranks: int = 1

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

    @property
    def dense_seconds(self) -> float | None:
        """Expected seconds of a run of as many steps in which nothing is sparse; None if no rates are known.

        Of the model as Inductor compiles it by itself, if ``loss`` runs a compiled model; else as ``loss`` runs it.
        ``rates.dense`` is another figure: a step of the sparse run once its weights have returned.
        """
        found = [p.dense_seconds for p in self.phases]
        return None if any(s is None for s in found) else sum(s for s in found if s is not None)

    @property
    def decision(self) -> Decision:
        """Dense against sparse, and what speaks against the run as it is planned."""
        return _decide(self)

    def __str__(self) -> str:
        lines = [f"{'phase':12} {'steps':>8} {'TFLOP':>12} {'of dense':>9} {'seconds':>10} {'dense':>10}"]
        rows = [(p.name, p.stop - p.start, p.flops, p.dense_flops, p.seconds, p.dense_seconds) for p in self.phases]
        steps = sum(p.stop - p.start for p in self.phases)
        rows.append(("all", steps, self.flops, self.dense_flops, self.seconds, self.dense_seconds))
        for name, count, flops, dense, seconds, dense_seconds in rows:
            times = " ".join(f"{'-' if s is None else f'{s:.1f}':>10}" for s in (seconds, dense_seconds))
            lines.append(f"{name:12} {count:8} {flops / 1e12:12.4g} {flops / max(dense, 1.0):9.1%} {times}")
        return "\n".join([*lines, str(self.decision)])

    __repr__ = __str__


def forecast(
    model: nn.Module,
    schedule: Schedule | None = None,
    *,
    tokens: float,
    tokens_per_step: int,
    loss: Callable[[], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    hardware: str | None = None,
    ranks: int = 1,
    bandwidth: float | None = None,
    price_per_hour: float | None = None,
    **options: Any,
) -> Forecast:
    """Training FLOPs, and if it can run the model the time, of a whole run by phase. Nothing is changed.

    Counted are matrix products, forward and backward, 2 FLOPs a multiply-add: exactly, block by block and event by
    event, for sparse weights (of more than 2**15 events some, equally far apart, stand for all; only ragged edges are
    taken at their mean, and a guard may keep some blocks more on grids too coarse for the density), each used once a
    token; for the rest what
    ``torch.utils.flop_counter`` counts in one dense pass of ``loss``, or without ``loss`` the other linear layers
    alone. Attention counts as if no pair of query and key were masked; one that the schedule gives a pattern as the
    share of the causal pairs that it keeps, where ``loss`` runs the compiled model and so shows which ones the graph
    pass understood. Steps at densities so near 1 that the backend runs dense products count by their masks all the
    same.

    Args:
        model: sparsified, or a plain one with a ``schedule``.
        schedule: of a plain model; ``options`` then are :func:`sparsify`'s.
        tokens: of the whole run.
        tokens_per_step: tokens of one optimizer step, gradient accumulation and all ranks included.
        loss: runs the forward pass on one step's batch, of one rank, and returns the loss, ``lambda: model(x, y)``;
            through the compiled model, if time shall be forecast for it. With a sparsified model it is also timed, at
            a few densities, and as Inductor alone runs it: see :func:`mst_compile.cost.rates.measure`. The rest of the
            training loop, such as clipping of gradients and loading of data, is not timed.
        optimizer: the one that will train the model, to be timed.
        hardware: estimate seconds on a machine that is not here, ``"H100"``, from rates measured there on other models
            (:mod:`mst_compile.cost.hardware_table`), instead of measuring this one. Blocks are those of that machine:
            64 by default for a plain model.
        ranks: of data parallelism; each takes an equal part of a step's tokens, and they exchange the gradients of
            active blocks (:func:`mst_compile.communication.reduce_active_blocks`), in a ring. An estimate, without
            overlap with the backward pass: no less time than that is needed if all goes well.
        bandwidth: bytes a second that each rank sends; default the data sheet's of ``hardware``.
        price_per_hour: of one rank's machine, in whatever currency.

    Returns:
        Phases of :class:`MixedSparsity`: warm-up, plateau, restoration, settle, without those that have no steps; of
        any other schedule one, ``"training"``. Seconds are known if a sparsified model came with ``loss``, or with
        ``hardware``. ``decision`` has dense against sparse, and notes on what does not fit.

    Raises:
        ForecastError: ``tokens`` or ``tokens_per_step`` is not positive or too large, model and schedule do not go
            together, ``loss`` returns no loss of the model, an optimizer steps within the backward pass of ``loss``, a
            step of ``optimizer`` cannot be timed, ``hardware`` is unknown or has no rates for the model's blocks,
            ``ranks`` do not divide a step's tokens or have no ``bandwidth``, there is a price of seconds that are not
            known, or an option is none of :func:`sparsify`'s.
        ModelError: ``model`` is no module.
    """
    check_model("forecast", model)
    tokens_per_step = check_tokens("tokens_per_step", tokens_per_step)
    steps = steps_of(tokens, tokens_per_step)
    check_loss(loss)
    check_optimizer(optimizer)
    check_options("forecast", options)
    timed = hardware is not None or (loss is not None and schedule is None)
    ranks, speed, says = _machines(hardware, ranks, bandwidth, tokens_per_step)
    price_per_hour = _price(price_per_hour, timed)
    if hardware is not None:
        options = default_options(options) if schedule is not None else options
    sparse, own = _sparse(model, schedule, options)
    rest = rest_of(model, sparse, own, tokens_per_step, loss, ranks)
    rates = None
    if hardware is not None:
        rates = estimate(sparse, own, hardware, tokens_per_step // ranks)
    elif loss is not None and schedule is None:
        rates = measure(model, loss, optimizer, steps=steps)
    move = _communication(sparse, own, ranks, speed)
    told = () if rates is None else (_source(rates, hardware, optimizer is not None), *says)
    return of_run(
        own, steps, tokens_per_step, rest, rates, move, source=told, price_per_hour=price_per_hour, ranks=ranks
    )


def of_run(
    own: Sparsifier,
    steps: int,
    tokens_per_step: int,
    rest: float,
    rates: Rates | None = None,
    move: tuple[float, float] = (0.0, 0.0),
    **more: Any,
) -> Forecast:
    """The forecast of a run of ``steps`` under the schedule of ``own``; ``more`` is the Forecast's own."""
    line = timeline(own, steps)
    phases = [_phase(own, line, *phase, tokens_per_step, rest, rates, move) for phase in own.schedule.phases(steps)]
    total: object = getattr(own.schedule, "total_steps", None)
    more["total_steps"] = total if isinstance(total, int) else None
    expressions = {"flops": FLOPS, "seconds": SECONDS, "dense_seconds": DENSE_SECONDS}
    return Forecast(phases, rest, rates, expressions, **more)


def rest_of(
    model: nn.Module,
    sparse: nn.Module,
    own: Sparsifier,
    tokens_per_step: int,
    loss: Callable[[], Tensor] | None,
    ranks: int = 1,
) -> float:
    """FLOPs of a step of all ranks in everything but products with sparse weights.

    Args:
        model: what ``loss`` runs. sparse: the same model, or a copy that was made sparse, with its sparsifier ``own``.
    """
    if loss is None:
        return float(dense_linear_training(sparse) * tokens_per_step)
    return ranks * _rest(model, own, tokens_per_step // ranks, loss)


def _machines(
    hardware: str | None, ranks: int, bandwidth: float | None, tokens: int
) -> tuple[int, float, tuple[str, ...]]:
    """Ranks, bytes a second between them, and what to say of that."""
    if hardware is not None:
        table_of(hardware)
    ranks = check_whole("ranks", ranks, of="processes that train together", error=ForecastError)
    if tokens % ranks:
        raise ForecastError(f"ranks={ranks} must divide tokens_per_step={tokens}, which counts the tokens of all ranks")
    if bandwidth is not None:
        speed = check_number("bandwidth", bandwidth, positive=True, error=ForecastError)
        by = "as given"
    elif ranks > 1:
        known = bandwidth_of(hardware)
        if known is None:
            raise ForecastError(
                f"ranks={ranks} need bandwidth=, the bytes a second that each rank sends, 12.5e9 for 100 Gbit/s"
            )
        speed, by = known
    else:
        return ranks, math.inf, ()
    text = f"estimate: {ranks} ranks, a ring that moves active blocks at {speed / 1e9:g} GB/s ({by}), no overlap"
    return ranks, speed, (text,) if ranks > 1 else ()


def _source(rates: Rates, hardware: str | None, optimizer: bool) -> str:
    """Where seconds come from, and what the dense ones are of."""
    if hardware is not None:
        source = f"estimate, not measured here: rates of other models on {hardware} ({table_of(hardware)['source']})"
    else:
        source = "measured here: passes at a few densities" + (", optimizer" if optimizer else "")
    return f"{source}; dense: the model {rates.baseline_is}"


def _price(price: float | None, timed: bool) -> float | None:
    if price is None:
        return None
    price = check_number("price_per_hour", price, least=0, error=ForecastError)
    if not timed:
        raise ForecastError(
            f"price_per_hour={price:g} needs seconds: pass loss with a sparsified model, to have this machine "
            "measured, or hardware"
        )
    return price


def _communication(model: nn.Module, own: Sparsifier, ranks: int, speed: float) -> tuple[float, float]:
    """Seconds that ranks take for the gradient of each element of the sparse weights that a token meets, and a step for
    all other gradients: a ring moves each byte ``2 (ranks - 1) / ranks`` times."""
    sparse = {id(p): p for _, p in own.parameters()}
    sizes = [p.numel() * p.element_size() for p in sparse.values()]
    other = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad and id(p) not in sparse)
    factor = 2 * (ranks - 1) / ranks / speed
    return factor * sum(sizes) / elements_per_token(own), factor * other


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
    counter = FlopCounterMode(display=False, custom_mapping=not_in_pytorch())
    with kept(model), torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        gradients = differentiate(model, loss, lambda found: torch.autograd.grad(found, trained, allow_unused=True))
    if all(gradient is None for gradient in gradients):
        raise ForecastError(
            "what loss returns depends on no parameter of the model: it must run the model that is forecast, "
            "lambda: model(x, y)"
        )
    sparse = 6.0 * tokens * elements_per_token(own)
    return max(0.0, counter.get_total_flops() - sparse)


def _phase(
    own: Sparsifier,
    line: Timeline,
    name: str,
    start: int,
    stop: int,
    tokens: int,
    rest: float,
    rates: Rates | None,
    move: tuple[float, float] = (0.0, 0.0),
) -> Phase:
    """Sums and means over the steps of a phase."""
    steps, share = stop - start, line.share(start, stop)
    total = elements_per_token(own)
    active, gradient = line.active, line.gradient
    sparse = active < (1.0 if rates is None else rates.threshold) * total
    values = {
        STEPS: float(steps),
        TOKENS: float(tokens),
        REST: rest,
        ATTENTION_SAVED: 0.0 if rates is None else rates.attention_flops,
        ELEMENTS: total,
        ACTIVE: _mean(active, share),
        GRADIENT: _mean(gradient, share),
        SPARSE: float(share[sparse].sum()),
        DENSE: float(share[~sparse].sum()),
        SPARSE_ACTIVE: _mean(active, share * sparse),
        SPARSE_MORE: _mean(gradient - active, share * sparse),
        EVENTS: float(line.events_in(start, stop)),
        PATTERN: float(line.patterned(start, stop)) if own.attention.sparse != "full" else 0.0,
    }
    if rates is not None:
        values |= {
            FIXED: rates.fixed,
            PER_ELEMENT: rates.per_element,
            PER_GRADIENT: rates.per_gradient,
            DENSE_STEP: rates.dense,
            BASELINE: rates.baseline,
            OPTIMIZER: rates.optimizer,
            EVENT: rates.event,
            ATTENTION: rates.attention,
            MOVE: move[0],
            MOVE_REST: move[1],
        }
    return Phase(name, start, stop, values, steps * (6.0 * tokens * total + rest))


def _mean(values: Tensor, share: Tensor) -> float:
    """Mean of values that stand for so many steps each."""
    steps = float(share.sum())
    return float((values * share).sum()) / steps if steps else 0.0


def _decide(found: Forecast) -> Decision:
    first, rates, steps = found.phases[0], found.rates, found.phases[-1].stop
    values, hours = first.values, found.ranks / 3600
    timed = rates is not None and rates.per_element > 0  # else what a step takes at no density is not known
    if rates is None or not timed:
        limit = amdahl(first.dense_flops, values[STEPS] * found.rest)
    else:
        limit = step_limit(rates, values[MOVE] * values[ELEMENTS], values[MOVE_REST])
    costs = [
        None if s is None or found.price_per_hour is None else s * hours * found.price_per_hour
        for s in (found.seconds, found.dense_seconds)
    ]
    seconds, dense = found.seconds, found.dense_seconds
    speedup = dense / seconds if seconds and dense is not None else None
    notes = disagreement(steps, found.total_steps, values[TOKENS])
    notes += eaten(found.dense_flops / max(1.0, found.flops), speedup, limit)
    return Decision(
        found.flops, found.dense_flops, seconds, dense, costs[0], costs[1], limit, timed, found.source, tuple(notes)
    )
