"""Measure how fast a model trains on this machine, at the densities that a schedule will bring."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import topology
from .api import sparsifier
from .blockindex import new_index, write_index
from .blockops import block_mean_square
from .lowering import crossover

ROUNDS = 5


@dataclass(frozen=True)
class Rates:
    """Seconds of one training step as a function of the active elements of all sparse weights, ``A`` of ``W``.

    Sparse: ``fixed + per_element * A``, and ``per_gradient * (W - A)`` more with dense weight gradients. Dense, from
    the mean density ``threshold`` on: ``dense``.

    Attributes:
        optimizer: seconds of an optimizer step. event: seconds of a topology event.
    """

    fixed: float
    per_element: float
    per_gradient: float
    dense: float
    threshold: float
    optimizer: float
    event: float


def measure(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None, rounds: int = ROUNDS
) -> Rates:
    """Time forward and backward passes at the densities of the schedule, interleaved, and take medians.

    The model is as before afterwards: masks, weights, gradients, step count and random state. It compiles what the
    run will need, if ``loss`` runs a compiled model.

    Args:
        model: a sparsified model; let no step be under way.
        loss: runs the forward pass on one batch of a step's size and returns the loss.
        optimizer: the one that will train the model; a copy of it is timed.
        rounds: times that each point is measured.

    Raises:
        NotSparseError: the model is not sparse.
    """
    own = sparsifier(model)
    total = sum(w.numel for w in own.weights.values())
    highest, lowest = own.schedule.max_sparsity, own.schedule.min_sparsity
    threshold = crossover.of_weights([w.grid for w in own.weights.values()], next(own.parameters())[1].device.type)
    middle = max((highest + max(lowest, 1 - 0.9 * threshold)) / 2, 1 - 0.9 * threshold)
    points = {"dense": (0.0, False), "top": (highest, False), "middle": (min(middle, highest), False)}
    points["gradient"] = (highest, True)
    times: dict[str, list[float]] = {name: [] for name in points}
    active: dict[str, int] = {}
    with _kept(model), torch.random.fork_rng():
        for turn in range(rounds + 1):  # the first compiles
            for name, (sparsity, dense_grad) in points.items():
                active[name] = _set_masks(model, sparsity, dense_grad)
                seconds = _pass(model, loss)
                if turn:
                    times[name].append(seconds)
    median = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
    span = active["middle"] - active["top"]
    per_element = max(0.0, (median["middle"] - median["top"]) / span) if span > 0 else 0.0
    more = max(0.0, median["gradient"] - median["top"]) / max(1, total - active["top"])
    return Rates(
        median["top"] - per_element * active["top"],
        per_element,
        more,
        median["dense"],
        threshold,
        0.0 if optimizer is None else _optimizer_step(optimizer, rounds),
        _event(model, rounds),
    )


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put masks and gradients back at the end; weights are never touched."""
    own = sparsifier(model)
    masks = {name: (w.mask, w.dense_grad) for name, w in own.weights.items()}
    grads = {p: p.grad for p in model.parameters()}
    pattern = own.attention.pattern
    try:
        yield
    finally:
        for name, (mask, dense_grad) in masks.items():
            own.weights[name].set_mask(mask)
            own.weights[name].set_dense_grad(dense_grad)
        for parameter, grad in grads.items():
            parameter.grad = grad
        own.attention.pattern = pattern


def _set_masks(model: nn.Module, sparsity: float, dense_grad: bool) -> int:
    """Random masks of the schedule's densities at ``sparsity``; returns the number of active elements."""
    own = sparsifier(model)
    for density, weight in zip(own.densities(sparsity), own.weights.values(), strict=True):
        mask = topology.random_mask(weight.spine, own.count(weight, density), topology.generator(0, 0, weight.name))
        weight.set_mask(mask)
        weight.set_dense_grad(dense_grad and weight.density_target < 1)
    return sum(w.active for w in own.weights.values())


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _pass(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    for parameter in model.parameters():
        parameter.grad = None
    _synchronize()
    start = time.perf_counter()
    loss().backward()
    _synchronize()
    return time.perf_counter() - start


def _optimizer_step(optimizer: torch.optim.Optimizer, rounds: int) -> float:
    """Median seconds of a step of a copy of ``optimizer``, on copies of its parameters."""
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    found = []
    for _ in range(rounds + 1):
        _synchronize()
        start = time.perf_counter()
        twin.step()
        _synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[rounds // 2]


def _event(model: nn.Module, rounds: int) -> float:
    """Median seconds of what a topology event computes, without its effect."""
    own, found = sparsifier(model), []
    for turn in range(rounds):
        _synchronize()
        start = time.perf_counter()
        for weight, parameter in own.parameters():
            score = block_mean_square(parameter, weight.grid)
            gradient = block_mean_square(parameter, weight.grid)
            count, generator = int(weight.mask.sum()), topology.generator(0, turn, weight.name)
            mask = topology.update_mask(weight.mask, weight.spine, score, gradient, count, 0.3, 0.75, generator)
            if weight.index is not None:
                write_index(new_index(weight.grid, weight.index.device), weight.grid, mask)
        _synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found)[rounds // 2]
