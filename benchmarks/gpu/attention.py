"""Attention with a pattern, forward and forward with backward: ours against causal SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mst_compile.lowering import inductor  # noqa: F401  (registers the lowerings)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mst_compile.doctor.trial import error
from mst_compile.rules.patterns import PATTERNS, Parts, allowed, sees

from .plan import AttentionCell, verdict
from .report import Run
from .timing import Call, median_times

BENCHMARK = "gpu_attention"
# Times the error of PyTorch's own attention on the same operands, and roundings of the result where that is nothing.
_AS_GOOD, _ROUNDINGS = 4.0, 8.0
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _parts(cell: AttentionCell) -> Parts:
    return PATTERNS[cell.pattern].parts(cell.window, cell.stride)


def operands(cell: AttentionCell, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, values and the gradient of the result, ``[batch, heads, length, size]``.

    As a model's projections leave them, positions side by side in memory, as all sides' results and gradients lie.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = cell.batch, cell.length, cell.heads, cell.size
    return [torch.randn(*shape, generator=generator, device=device, dtype=dtype).transpose(1, 2) for _ in range(4)]


def ours(cell: AttentionCell) -> Attend:
    """Our operator as Inductor compiles it, at its first call."""
    settings = _parts(cell).numbers, cell.size**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.mst.attention(q, k, v, None, *settings)[0]

    return torch.compile(attend, fullgraph=True, backend="inductor", dynamic=False)


def _flex(cell: AttentionCell, device: torch.device) -> Attend:
    """The same mask as a ``mask_mod``; FlexAttention skips blocks of 128 x 128 that it empties."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    parts = _parts(cell)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(parts, query, key)

    blocks = create_block_mask(mask, None, None, cell.length, cell.length, device=device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def _sides(cell: AttentionCell, run: Run) -> dict[str, Attend]:
    sides: dict[str, Attend] = {
        "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
        "mst": ours(cell),
    }
    if run.device.type == "cuda" and "flex" not in run.without:
        try:
            sides["flex"] = _flex(cell, run.device)
        except Exception as failure:
            run.failed(BENCHMARK, cell.case, "flex", f"{type(failure).__name__}: {failure}")
    return sides


def _complaint(cell: AttentionCell, attend: Attend, operands: tuple[Tensor, ...], grad: Tensor) -> str | None:
    """What is wrong with the result or a gradient of one head, or None: further from float64 than PyTorch's own."""
    mask = allowed(_parts(cell), cell.length, grad.device)

    def usual(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    few, few_grad = [t[:1, :1] for t in operands], grad[:1, :1]
    exact = _with_gradients(usual, [t.double() for t in few], few_grad.double())
    common = _with_gradients(usual, few, few_grad)
    found = [t[:1, :1] for t in _with_gradients(attend, list(operands), grad)]
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), found, common, exact, strict=True):
        own, limit = error(ours, right), _AS_GOOD * error(theirs, right) + _ROUNDINGS
        if not own <= limit:
            return f"wrong {name}, {own:.3g} eps off, {limit:.3g} allowed"
    return None


def _with_gradients(attend: Attend, operands: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of the operands."""
    leaves = [t.detach().requires_grad_() for t in operands]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def measure(cell: AttentionCell, run: Run) -> None:
    """Check ours, then time all sides in turn."""
    q, k, v, grad = operands(cell, run.device, run.dtype)
    sides = _sides(cell, run)
    complaint = _complaint(cell, sides["mst"], (q, k, v), grad)
    if complaint is not None:
        run.failed(BENCHMARK, cell.case, "mst", complaint)
        return
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def both(attend: Attend) -> Call:
        def call() -> None:
            for leaf in leaves:
                leaf.grad = None
            attend(*leaves).backward(grad)

        return call

    for operation in ("forward", "forward and backward"):
        backward = operation != "forward"
        calls: dict[str, Call] = {
            name: both(attend) if backward else _forward(attend, leaves) for name, attend in sides.items()
        }
        median = median_times(calls, run.device, run.runs)
        for name, seconds in median.items():
            ratio = median["sdpa"] / seconds
            judged = verdict(cell.goal if backward else None, ratio) if name == "mst" else ""
            note = "; ".join(filter(None, ("ratio against causal SDPA", judged)))
            run.record(BENCHMARK, f"{cell.case} {operation}", name, seconds, ratio, note)
            figures = f"{median['sdpa'] * 1e3:.3f}", f"{seconds * 1e3:.3f}", f"{ratio:.2f}x"
            print(f"{cell.case} {operation}: {name} {figures[1]} ms, {figures[2]} SDPA {judged}".rstrip(), flush=True)
            run.rows.append((cell.case, "", operation, name, *figures, judged))


def _forward(attend: Attend, leaves: list[Tensor]) -> Call:
    def call() -> None:
        with torch.no_grad():
            attend(*leaves)

    return call
