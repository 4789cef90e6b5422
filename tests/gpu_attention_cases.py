"""Attention with patterns as the GPU would run it, held against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mst_compile.lowering.inductor  # noqa: F401  (registers the lowerings)
import torch
from oracles import assert_within, of_rounding, of_sum, smallest
from torch import Tensor

from mst_compile.ops.attention import attention_backward_reference, attention_reference
from mst_compile.rules.patterns import Parts, allowed

F32 = torch.float32


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    parts: Parts

    @property
    def settings(self) -> tuple[list[int], float]:
        return self.parts.numbers, self.q.shape[-1] ** -0.5

    def to(self, device: torch.device) -> Case:
        q, k, v = (t.to(device) for t in (self.q, self.k, self.v))
        key_mask = None if self.key_mask is None else self.key_mask.to(device)
        return dataclasses.replace(self, q=q, k=k, v=v, key_mask=key_mask)

    def function(self) -> Callable[..., Tensor]:
        settings = self.settings

        def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
            return torch.ops.mst.attention(q, k, v, key_mask, *settings)[0]

        return attend

    def arguments(self) -> list[Tensor | None]:
        return [*(t.detach().requires_grad_() for t in (self.q, self.k, self.v)), self.key_mask]


def case(
    parts: Parts,
    batch: int = 1,
    heads: int = 2,
    group: int = 1,
    length: int = 97,
    size: int = 32,
    dtype: torch.dtype = F32,
    padded: bool = False,
    seed: int = 0,
    by_position: bool = False,
    value_size: int | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, size: int) -> Tensor:
        if by_position:  # as a model's projections leave it
            return torch.randn(batch, length, count, size, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, count, length, size, generator=generator).to(dtype)

    q, k, v = normal(heads * group, size), normal(heads, size), normal(heads, value_size or size)
    key_mask = torch.rand(batch, length, generator=generator) < 0.8 if padded else None
    return Case(q, k, v, key_mask, parts)


def check_numbers(c: Case, results: Sequence[Tensor | None], upstream: Tensor, precision: float = 0.0) -> None:
    """The result and its gradients, ``out, dq, dk, dv``, against the reference in float64.

    Errors are bounded by what is rounded to the operands' dtype (probabilities, their gradients, the result), relative
    to the sum of the absolute values of what is added up, and by float32's own error in sums and exponents.
    """
    q, k, v = (t.double() for t in (c.q, c.k, c.v))
    out, lse = attention_reference(q, k, v, c.key_mask, *c.settings)
    grad = upstream.double()
    exact = attention_backward_reference(grad, q, k, v, out, lse, c.key_mask, *c.settings)

    group, scale = c.q.shape[1] // c.k.shape[1], c.settings[-1]
    wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
    mask = allowed(c.parts, q.shape[2], q.device)
    mask = mask if c.key_mask is None else mask & c.key_mask[:, None, None, :]
    scores = (q @ wide_k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    p = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    size_of_scores = (q.abs() @ wide_k.abs().transpose(-1, -2)).max() * scale
    f32 = of_sum(q.shape[2] + max(q.shape[3], v.shape[3]), beside=0) * (2 + size_of_scores)
    error = float(of_rounding(c.q.dtype, times=4) + f32 + precision * (2 + size_of_scores))
    ds = (
        p
        * (grad.abs() @ wide_v.abs().transpose(-1, -2) + (grad.abs() * (p @ wide_v.abs())).sum(-1, keepdim=True))
        * scale
    )

    def per_key_head(t: Tensor) -> Tensor:
        return t.unflatten(1, (-1, group)).sum(2)

    sizes = [
        p @ wide_v.abs(),
        ds @ wide_k.abs(),
        per_key_head(ds.transpose(-1, -2) @ q.abs()),
        per_key_head(p.transpose(-1, -2) @ grad.abs()),
    ]
    for name, actual, expected, bound in zip(("out", "dq", "dk", "dv"), results, (out, *exact), sizes, strict=True):
        assert actual is not None
        assert actual.dtype == c.q.dtype
        # Parts of a gradient are rounded before they are added, and a saved result is rounded before delta is formed.
        # Close to 0, float16 rounds each of them by its smallest number, whatever their size.
        assert_within(actual, expected, 2 * error * bound + 2 * smallest(c.q.dtype), name)
