"""Measure how fast a model trains on this machine, at the densities that a schedule will bring."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import block_means
from mst_compile.blocks.index import write_indexes
from mst_compile.cost.baseline import Baseline
from mst_compile.cost.flops import attention_saving, elements_per_token
from mst_compile.errors import ForecastError, MSTError
from mst_compile.rules.checks import shown
from mst_compile.rules.schedule import events_of
from mst_compile.state.event import plan_event
from mst_compile.state.first_masks import at_random
from mst_compile.state.sparsifier import Sparsifier, sparsifier, sparsifier_of
from mst_compile.state.steps import refusing_steps

ROUNDS = 5
_T = TypeVar("_T")


@dataclass(frozen=True)
class Rates:
    """Seconds of one training step as a function of the active elements of all sparse weights, ``A`` of ``W``.

    Of a sparse run, below the mean density ``threshold``: ``fixed + per_element * A``, and ``per_gradient * (W - A)``
    more with dense weight gradients; from ``threshold`` on, where the backend takes dense products: ``dense``. Both
    with full attention, and ``attention`` less with the schedule's pattern. Of a run in which nothing is sparse:
    ``baseline``.

    Attributes:
        optimizer: seconds of an optimizer step, of either run. event: seconds of a topology event.
        attention_flops: FLOPs that the pattern saves of a pass, see :func:`mst_compile.forecast`.
        baseline_is: what was timed as ``baseline``, in words.
    """

    fixed: float
    per_element: float
    per_gradient: float
    dense: float
    baseline: float
    threshold: float
    optimizer: float
    event: float
    attention: float = 0.0
    attention_flops: float = 0.0
    baseline_is: str = ""


def measure(
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: Optimizer | None = None,
    rounds: int = ROUNDS,
    steps: int = 10_000,
) -> Rates:
    """Time forward and backward passes at the densities of the schedule, interleaved, and take medians.

    The model is as before afterwards: masks, weights, buffers, gradients, step count and random state. It compiles
    what the run will need, if ``loss`` runs a compiled model; and the graphs as Inductor would have them if nothing
    were sparse, with the user's mode and options, unless the backend's dense ones are the same. If Inductor cannot,
    the baseline is what ``loss`` takes in eager mode. An eager ``loss`` is its own baseline.

    Args:
        model: a sparsified model; let no step be under way.
        loss: runs the forward pass on one batch of a step's size and returns the loss.
        optimizer: the one that will train the model; a copy of it is timed.
        rounds: times that each point is measured.
        steps: length of the run; the middle one of its topology events is timed.

    Raises:
        NotSparseError: the model is not sparse.
        ForecastError: an optimizer steps within the backward pass. It is stopped before it changes anything.
    """
    own = sparsifier(model)
    active: dict[str, float] = {}
    attentions: list[tuple[int, ...]] = []  # the shape of the queries, and then the size of a value
    twin, taken = None if optimizer is None else _copy(optimizer), list[float]()
    with kept(model):
        _set_masks(model, own.schedule.max_sparsity, False)
        _pass(model, loss)  # compiles: only then do the weights know where the backend turns to dense products
        baseline, threshold = Baseline(own), _threshold(model)
        _set_masks(model, 0.0, False)
        baseline.try_out(lambda: _pass(model, loss))
        points = _points(own, threshold, baseline)
        times: dict[str, list[float]] = {name: [] for name in points}
        for turn in range(rounds + 1):  # the first compiles the other variants
            for name, (sparsity, dense_grad, pattern) in points.items():
                active[name] = _set_masks(model, sparsity, dense_grad)
                own.attention.pattern, own.attention.queries = pattern, []
                with baseline.running() if name == "baseline" else contextlib.nullcontext():
                    seconds = _pass(model, loss)
                attentions = own.attention.queries or attentions  # none with full attention
                if turn:
                    times[name].append(seconds)
                if twin is not None:
                    _clear_gradients(model)  # with them hooks would count the steps of the copy as another model's
                    taken.append(_step(twin))  # after a pass, as in training: caches hold other things
        event = _event(model, rounds, steps)
    median = {name: _median(found) for name, found in times.items()}
    total, span = elements_per_token(own), active["middle"] - active["top"]
    per_element = max(0.0, (median["middle"] - median["top"]) / span) if span > 0 else 0.0
    fixed = median["top"] - per_element * active["top"]
    dense = median.get("dense", fixed + per_element * total)
    return Rates(
        fixed,
        per_element,
        per_gradient=max(0.0, median["gradient"] - median["top"]) / max(1, total - active["top"]),
        dense=dense,
        baseline=median.get("baseline", dense),
        threshold=threshold,
        optimizer=_median(taken[len(points) :]) if taken else 0.0,
        event=event,
        attention=median["top"] - median.get("pattern", median["top"]),
        attention_flops=sum(attention_saving(query, own.attention.parts, size) for *query, size in attentions),
        baseline_is=str(baseline),
    )


def _points(own: Sparsifier, threshold: float, baseline: Baseline) -> dict[str, tuple[float, bool, str]]:
    """What to time: name -> sparsity, dense gradients, attention."""
    highest, lowest = own.schedule.max_sparsity, own.schedule.min_sparsity
    middle = 1 - 0.9 * min(1.0, threshold)
    middle = max((highest + max(lowest, middle)) / 2, middle)
    points = {
        "top": (highest, False, "full"),
        "middle": (min(middle, highest), False, "full"),
        "gradient": (highest, True, "full"),
    }
    if threshold <= 1:  # else no step of the run takes dense products
        points["dense"] = (0.0, False, "full")
    if baseline.differs or threshold > 1:
        points["baseline"] = (0.0, False, "full")
    if own.attention.sparse != "full":
        points["pattern"] = (highest, False, own.attention.sparse)
    return points


def _threshold(model: nn.Module) -> float:
    """Mean density from which dense products run, as the compiled graphs have it; 1 where none has taken a weight."""
    weights = sparsifier(model).weights.values()
    known = [(w.numel, w.uses.dense_threshold) for w in weights if w.uses.dense_threshold is not None]
    return sum(n * threshold for n, threshold in known) / sum(n for n, _ in known) if known else 1.0


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Put the masks, buffers and gradients of a model, sparse or not, and the random state back at the end.

    Weights are never touched: an optimizer that steps meanwhile on any of them raises :class:`ForecastError`.
    """
    own = sparsifier_of(model)
    masks = {} if own is None else {name: (w.mask, w.dense_grad) for name, w in own.weights.items()}
    pattern = None if own is None else own.attention.pattern
    grads = {p: p.grad for p in model.parameters()}
    buffers = [(m._buffers, n, b, b.clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    with torch.random.fork_rng(), _no_steps({id(p) for p in grads}):
        for name in masks:
            assert own is not None
            own.weights[name].timed = True
        try:
            yield
        finally:
            for name, (mask, dense_grad) in masks.items():
                assert own is not None
                if own.weights[name].mask is not mask:
                    own.weights[name].set_mask(mask)
                own.weights[name].set_dense_grad(dense_grad)
                own.weights[name].timed = False
            for parameter, grad in grads.items():
                parameter.grad = grad
            with torch.no_grad():
                for holder, name, buffer, value in buffers:
                    buffer.copy_(value)
                    holder[name] = buffer
            if own is not None and pattern is not None:
                own.attention.pattern, own.attention.queries = pattern, None


def _no_steps(parameters: set[int]) -> AbstractContextManager[None]:
    """Refuse optimizer steps on ``parameters`` (ids), as of optimizers that step within the backward pass."""

    def refuse(optimizer: Optimizer) -> None:
        if any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
            raise ForecastError(
                f"{type(optimizer).__name__} steps within the backward pass, so a pass cannot be timed without "
                "training the model. Forecast before you register the hook that steps, or without loss"
            )

    return refusing_steps(refuse)


def _set_masks(model: nn.Module, sparsity: float, dense_grad: bool) -> float:
    """Random masks of the schedule's densities at ``sparsity``; returns how many active elements a token meets."""
    own = sparsifier(model)
    for density, weight in zip(own.densities(sparsity), own.weights.values(), strict=True):
        weight.set_mask(at_random(weight, weight.blocks_at(density), seed=0))
        weight.set_dense_grad(dense_grad and weight.density_target < 1)
    return sum(w.active * w.per_token for w in own.weights.values())


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _clear_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def loss_of(loss: Callable[[], Tensor]) -> Tensor:
    """What ``loss`` returns: one number that depends on parameters.

    Raises:
        ForecastError: it returns something else.
    """
    found: object = loss()
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad or found.is_complex():
        raise ForecastError(
            f"loss must return the loss, a tensor of one element to differentiate, got {shown(found)}; pass "
            "lambda: model(x, y), of a model whose parameters require gradients"
        )
    return found


def differentiate(model: nn.Module, loss: Callable[[], Tensor], backward: Callable[[Tensor], _T]) -> _T:
    """``backward`` of what ``loss`` returns; the model has no gradients before.

    Raises:
        ForecastError: ``loss`` returns no loss, or has run the backward pass of it.
    """
    _clear_gradients(model)  # those of before are the user's: ``loss`` may add to gradients itself, of parts of a batch
    found = loss_of(loss)
    ran = any(p.grad is not None for p in model.parameters())
    try:
        return backward(found)
    except RuntimeError as error:
        if not ran or isinstance(error, MSTError):
            raise
        raise ForecastError(
            "loss runs a backward pass itself, of what it returns: let it return the loss, whose backward pass is timed"
        ) from error


def _pass(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    _synchronize()
    start = time.perf_counter()
    differentiate(model, loss, lambda found: found.backward())
    _synchronize()
    return time.perf_counter() - start


def _copy(optimizer: Optimizer) -> Optimizer:
    """A copy of ``optimizer`` with copies of its parameters, whose gradients are 0."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    return twin


def _step(optimizer: Optimizer) -> float:
    _synchronize()
    start = time.perf_counter()
    try:
        optimizer.step()
    except Exception as error:  # of a copy, with gradients of zeros: what does not go with that is anybody's
        raise ForecastError(
            f"a step of {type(optimizer).__name__} cannot be timed, as a copy of it with gradients of zeros raises "
            f"{shown(error)}: leave optimizer out"
        ) from error
    _synchronize()
    return time.perf_counter() - start


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _event(model: nn.Module, rounds: int, steps: int) -> float:
    """Median seconds of the plan of a topology event, the schedule's middle one, and of the indices that it writes."""
    own, found = sparsifier(model), []
    events = events_of(own.schedule, steps)
    if not events:
        return 0.0
    middle = (len(events) - 1) // 2  # stands for all of them
    before, step = events[middle - 1] if middle else 0, events[middle]
    _set_masks(model, own.schedule.sparsity_at(before), False)
    scores = {name: weight.scores for name, weight in own.weights.items()}
    try:
        for _ in range(rounds):
            _synchronize()
            start = time.perf_counter()
            pairs, reads = list(own.parameters()), own.schedule.reads_gradient_at(step)
            # Reading the weights takes as long as reading their gradients.
            means = block_means([(parameter, weight.grid) for weight, parameter in pairs if reads])
            for weight, _ in pairs:
                weight.scores = next(means, None)
            plan = plan_event(
                own.parameters(), own.densities(own.schedule.sparsity_at(step)), own.schedule, step, own.seed
            )
            held = [(own.weights[name], mask) for name, mask in plan.masks.items()]
            write_indexes(
                [content._replace(to=torch.zeros_like(content.to)) for w, m in held for content in w.contents(m)]
            )
            _synchronize()
            found.append(time.perf_counter() - start)
    finally:
        for name, score in scores.items():
            own.weights[name].scores = score
    return _median(found)
