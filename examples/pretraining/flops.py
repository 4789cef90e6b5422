"""Training FLOPs of a GPT-2, counted the same way for every run.

Matrix products only, 2 FLOPs per multiply-add, forward + backward:

* a linear layer (LM head included) costs ``6 * nnz`` per token: forward, grad-input and grad-weight, 2 each;
  on the step before a topology event grad-weight is dense, so that growth can read it: ``4 * nnz + 2 * size``;
* attention costs ``3 * (QK + AV) = 3 * 4 * T * d`` per token and layer, with all T keys counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Shape:
    """What decides the FLOPs of a GPT-2."""

    d_model: int
    layers: int
    heads: int
    context: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.vocabulary * self.d_model

    @property
    def linear_size(self) -> int:
        return 12 * self.layers * self.d_model**2 + self.head_size

    def step_flops(self, tokens: int, active: float, in_gradient: float) -> float:
        """FLOPs of one training step on ``tokens`` tokens, with so many weights active and in the weight gradient."""
        attention = 12 * self.context * self.d_model * self.layers
        return float(tokens) * (4 * active + 2 * in_gradient + attention)


def active_weights(model: nn.Module, sparse: Mapping[str, Any]) -> tuple[float, float]:
    """Weights of the linear layers that take part in (forward and grad-input, grad-weight) of the coming step.

    ``sparse`` is ``mst_compile.sparsifier(model).weights``; layers that are not in it count as a whole.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    linear = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    active = in_gradient = 0.0
    for key, weight in linear.items():
        mask = sparse.get(names[key])
        density = 1.0 if mask is None else mask.density
        active += weight.numel() * density
        in_gradient += weight.numel() * (1.0 if mask is not None and mask.dense_grad else density)
    return active, in_gradient


def gradient_is_dense(schedule: Any, step: int) -> bool:
    """Whether step ``step`` (from 0) computes dense weight gradients: a topology event follows it and reads them."""
    grows_by_gradient = getattr(schedule, "growth", "none") in ("mixed", "gradient")
    return grows_by_gradient and schedule.is_topology_event(step + 1) and schedule.sparsity_at(step + 1) > 0


def planned_flops(
    shape: Shape, tokens_per_step: int, steps: int, schedule: Any = None, sparse_head: bool = False
) -> float:
    """Training FLOPs of a whole run under ``schedule``, before running it; dense without one."""
    dense_size = 0 if sparse_head else shape.head_size
    sparse_size = shape.linear_size - dense_size
    total, density = 0.0, 1.0 if schedule is None else 1.0 - schedule.sparsity_at(0)
    for step in range(steps):
        if schedule is not None and schedule.is_topology_event(step):
            density = 1.0 - schedule.sparsity_at(step)
        dense = schedule is not None and gradient_is_dense(schedule, step)
        in_gradient = 1.0 if dense else density
        active, in_gradient = (dense_size + share * sparse_size for share in (density, in_gradient))
        total += shape.step_flops(tokens_per_step, active, in_gradient)
    return total


def matching_width(shape: Shape, tokens_per_step: int, steps: int, budget: float) -> Shape:
    """The dense shape of the same depth whose training FLOPs come closest to ``budget``.

    Widths are multiples of 8; of the head counts that divide the width the one nearest to the original head size wins.
    """
    head_size = shape.d_model / shape.heads

    def heads(width: int) -> int:
        fitting: Iterable[int] = (h for h in range(1, width + 1) if width % h == 0 and (width // h) % 4 == 0)
        return min(fitting, key=lambda h: (abs(width / h - head_size), h))

    shapes = [
        Shape(width, shape.layers, heads(width), shape.context, shape.vocabulary)
        for width in range(8, shape.d_model + 1, 8)
    ]
    return min(shapes, key=lambda s: abs(planned_flops(s, tokens_per_step, steps) - budget))
