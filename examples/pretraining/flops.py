"""Training FLOPs of a GPT-2, counted the same way for every run.

Matrix products only, 2 FLOPs per multiply-add, forward + backward. Linear layers, LM head included, are counted by
mst_compile (``forecast`` before a run, ``flops.Meter`` during it): ``6 * nnz`` per token, and where growth reads the
gradient ``4 * nnz + 2 * size``. Attention costs ``3 * (QK + AV) = 3 * 4 * T * d`` per token and layer, with all T keys
counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mst_compile

from .model import HEAD, Shape, build_model


def planned_flops(
    shape: Shape,
    tokens_per_step: int,
    steps: int,
    schedule: Any = None,
    sparse_head: bool = False,
    block: int | None = None,
) -> float:
    """Training FLOPs of a whole run under ``schedule``, before running it; dense without one."""
    if schedule is None:
        return float(steps * tokens_per_step * (6 * shape.linear_size + shape.attention_flops))
    expected = mst_compile.forecast(
        build_model(shape),
        schedule,
        tokens=steps * tokens_per_step,
        tokens_per_step=tokens_per_step,
        exclude=None if sparse_head else HEAD,
        block=block,
    )
    return expected.flops + steps * tokens_per_step * shape.attention_flops


def matching_width(shape: Shape, tokens_per_step: int, steps: int, budget: float) -> Shape:
    """The dense shape of the same depth whose training FLOPs come closest to ``budget``.

    Widths are multiples of 8 that divide into heads of about the original size (between two thirds and four thirds of
    it), since many small heads take much longer than their FLOPs say; of small models, any.
    """
    head_size = shape.d_model / shape.heads

    def heads(width: int) -> int:
        fitting: Iterable[int] = (h for h in range(1, width + 1) if width % h == 0 and (width // h) % 4 == 0)
        return min(fitting, key=lambda h: (abs(width / h - head_size), h))

    shapes = [
        Shape(width, shape.layers, heads(width), shape.context, shape.vocabulary)
        for width in range(8, shape.d_model + 1, 8)
    ]
    alike = [s for s in shapes if 2 / 3 <= s.d_model / s.heads / head_size <= 4 / 3]
    return min(alike or shapes, key=lambda s: abs(planned_flops(s, tokens_per_step, steps) - budget))
