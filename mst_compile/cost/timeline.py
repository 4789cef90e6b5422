"""What a run will do step by step, before it happens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_compile.rules.density import active_count
from mst_compile.state.sparsifier import Sparsifier


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
