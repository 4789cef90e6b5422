"""How long causal attention takes on this machine, ours and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import NamedTuple

import torch
from torch import Tensor

from mst_compile.rules.patterns import FULL

from .cpu_times import interleaved, undisturbed

_LONGEST = 2048
_QUERIES = 4096  # a thread: of all heads, beyond which times grow about in proportion
_CLEAR = 2.0  # how many times faster one side is, that two rounds will do


class AttentionTimes(NamedTuple):
    """Seconds of PyTorch's attention, and of ours."""

    usual: float
    ours: float


class CausalAttention(NamedTuple):
    """What decides how they compare.

    Attributes:
        heads: of all sequences of a batch. length: see :func:`bucket` for both.
        size: of a query, or key, in a head. value_size: of a value.
        trained: whether the backward pass counts.
    """

    heads: int
    length: int
    size: int
    value_size: int
    dtype: torch.dtype
    trained: bool


def bucket(heads: int, length: int) -> tuple[int, int]:
    """How many heads of what length to measure with: powers of two, and not the longest.

    What a call costs whatever its size must weigh as it does in the model, where short heads are many.
    """
    near = _near(length, 16, _LONGEST)
    threads = torch.get_num_threads()
    return _near(heads, 1, max(2, threads, threads * _QUERIES // near)), near


def _near(number: int, least: int, most: int) -> int:
    """The power of two that is nearest in ratio, about; at least ``least``, which is one, and hardly above the most."""
    near = least
    while near < most and 3 * near <= 2 * number:
        near *= 2
    return near


def measure(attention: CausalAttention) -> AttentionTimes:
    """Time forward and, if trained, backward."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = 1, attention.heads, attention.length
    with undisturbed():
        q, k, v, grad = (
            torch.randn(*shape, size, generator=generator, device="cpu", dtype=torch.float32).to(attention.dtype)
            for size in (attention.size, attention.size, attention.value_size, attention.value_size)
        )
        upstream = grad if attention.trained else None
        usual_side = _side_of_pytorch(q, k, v, attention.size**-0.5, upstream)
        sides = [usual_side, lambda: _ours(q, k, v, attention.size**-0.5, upstream)]
        usual, ours = interleaved(sides, lambda a, b: max(a, b) > _CLEAR * min(a, b))
    return AttentionTimes(min(usual), min(ours))


def _side_of_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor | None) -> Callable[[], None]:
    if q.shape[-1] == v.shape[-1]:
        return lambda: _usual(q, k, v, scale, grad)
    wide = [None if t is None else t.float().squeeze(0) for t in (q, k, v, grad)]
    return lambda: _written_out(*wide)  # type: ignore[arg-type]


def _written_out(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> None:
    """What PyTorch runs where queries and values differ in size, for which it has no kernel, at its best: float32
    products, whatever the operands' dtype, and a softmax. Inductor puts casts, scale and mask into what runs anyway."""
    p = torch._softmax(q @ k.mT, -1, False)
    p @ v
    if grad is not None:
        p.mT @ grad
        ds = torch.ops.aten._softmax_backward_data(grad @ v.mT, p, -1, torch.float32)
        ds @ k
        ds.mT @ q


def _usual(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor | None) -> None:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    if grad is not None:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, True, scale=scale
        )


def _ours(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor | None) -> None:
    parts = astuple(FULL)
    out, lse = torch.ops.mst.attention(q, k, v, None, parts, scale)
    if grad is not None:
        torch.ops.mst.attention_backward(grad, q, k, v, out, lse, None, parts, scale)
