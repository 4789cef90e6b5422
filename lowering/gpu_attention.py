"""``mst::attention`` and its gradient on NVIDIA GPUs: lowerings to the templates of kernels/triton/attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mst_compile.kernels.triton import attention as kernels
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, lowerings, to_dtype
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from mst_compile.rules.patterns import Parts

from . import compat, gpu_operands, gpu_tiles

_aten = torch.ops.aten


def _operand(x: Any) -> Any:
    """``[batch, heads, length, size]`` realized, with contiguous heads' features and a constant stride of positions."""
    x = ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(x))
    *_, position, last = x.get_stride()
    constant = not getattr(position, "free_symbols", None) and V.graph.sizevars.statically_known_equals(last, 1)
    return x if constant else ir.ExternKernel.require_contiguous(ir.ExternKernel.copy_input(x))


def _bytes(mask: Any) -> Any:
    """A bool tensor as contiguous bytes: Triton loads them, and Inductor may fuse what made it."""
    mask = to_dtype(mask, torch.int8)
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(mask))


class _Call:
    """Operands and constants that the three kernels of one attention share."""

    def __init__(self, q: Any, k: Any, v: Any, key_mask: Any, parts: Sequence[int], scale: float) -> None:
        self.q, self.k, self.v = _operand(q), _operand(k), _operand(v)
        self.names, self.inputs = ["Q", "K", "V"], [self.q, self.k, self.v]
        if key_mask is not None:
            self.names.append("VISIBLE")
            self.inputs.append(_bytes(key_mask))
        heads, size = gpu_operands.static(self.q.get_size()[1]), gpu_operands.static(self.q.get_size()[3])
        self.parts = Parts(*parts)
        self.kind, self.size = gpu_tiles.kind(self.q.get_dtype()), size
        self.constants = {
            "SCALE": scale,
            "HEADS": heads,
            "GROUP": heads // gpu_operands.static(self.k.get_size()[1]),
            "SIZE": size,
            "BLOCK_D": max(16, 1 << (size - 1).bit_length()),
            "KEY_MASK": key_mask is not None,
            "PRECISION": gpu_tiles.precision(self.q.get_dtype()),
        }

    def run(self, which: str, size: Sequence[Any], more: dict[str, Any], parts: Parts, mutated: str | None) -> Any:
        """One kernel on some parts, tuned; its result has ``size`` and positions side by side in memory. ``mutated`` of
        ``more`` is written too."""
        _, heads, length, features = size
        layout = ir.FixedLayout(
            self.q.get_device(),
            self.q.get_dtype(),
            list(size),
            [length * heads * features, features, heads * features, 1],
        )
        names, inputs = [*self.names, *more], [*self.inputs, *more.values()]
        strides = {
            f"{n}_STRIDE": gpu_operands.static(x.get_stride()[2])
            for n, x in zip(names, inputs, strict=True)
            if n in ("Q", "K", "V", "DO")
        }
        constants = self.constants | strides | kernels.constants(parts)
        template = getattr(kernels, which)
        choices: list[Any] = []
        for tile in kernels.tiles(self.size, self.kind, which, parts)[: None if gpu_tiles.tunes() else 1]:
            error = template.maybe_append_choice(
                choices,
                input_nodes=tuple(inputs),
                layout=layout,
                mutated_inputs=[more[mutated]] if mutated else None,
                num_warps=tile.warps,
                num_stages=tile.stages,
                BLOCK_M=tile.queries,
                BLOCK_N=tile.keys,
                NAMES=repr(",".join(names)),
                **constants,
            )
            if error is not None:
                raise error
        # Random values serve as operands, but masks must not be empty.
        masks = {i: _all_seen for i, n in enumerate(names) if n == "VISIBLE"}
        return compat.select(template.name, choices, inputs, layout, input_gen_fns=masks, return_multi_template=False)


def _all_seen(mask: Any) -> torch.Tensor:
    return torch.ones([compat.hint(s) for s in mask.get_size()], dtype=torch.int8, device=mask.get_device())


def _new(size: Sequence[Any], dtype: torch.dtype, device: Any) -> Any:
    buffer = empty_strided(list(size), None, dtype=dtype, device=device)
    buffer.realize()
    return buffer


def attention(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    """Lowering of ``mst::attention``: the result and the log-denominators."""
    call = _Call(q, k, v, *rest)
    lse = _new(call.q.get_size()[:3], torch.float32, call.q.get_device())
    out = call.run("forward", call.q.get_size(), {"LSE": lse}, call.parts, "LSE")
    return out, lse


def attention_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """Lowering of ``mst::attention_backward``: gradients of queries, keys and values."""
    call = _Call(q, k, v, *rest)
    grad = _operand(to_dtype(grad, call.q.get_dtype()))
    product = lowerings[_aten.mul.Tensor](to_dtype(grad, torch.float32), to_dtype(out, torch.float32))
    delta = _contiguous(lowerings[_aten.sum.dim_IntList](product, [-1]))
    saved = {"DO": grad, "LSE": _contiguous(lse), "DELTA": delta}
    dq = dk = dv = None
    # Row-wise dots want other tiles than products.
    for parts in call.parts.alone() if call.parts.step else [call.parts]:
        dq = _sum(dq, call.run("grad_query", call.q.get_size(), saved, parts, None))
    for parts in call.parts.alone():
        count = FloorDiv(call.k.get_size()[2], parts.summary) if parts.summary else call.k.get_size()[2]
        if V.graph.sizevars.statically_known_equals(count, 0):
            continue
        dk_part, dv_part = _key_value(call, saved, count, parts)
        dk, dv = _sum(dk, dk_part), _sum(dv, dv_part)
    return dq, _or_zeros(dk, call.k), _or_zeros(dv, call.v)


def _contiguous(x: Any) -> Any:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else lowerings[_aten.add.Tensor](a, b)


def _or_zeros(gradient: Any, like: Any) -> Any:
    """A gradient, or zeros where no query sees any key."""
    if gradient is not None:
        return gradient
    dtype = like.get_dtype()
    return ir.Pointwise.create(
        device=like.get_device(),
        dtype=dtype,
        inner_fn=lambda _: ops.constant(0.0, dtype),
        ranges=list(like.get_size()),
    )


def _key_value(call: _Call, saved: dict[str, Any], count: Any, parts: Parts) -> tuple[Any, Any]:
    """The share of one launch, over ``count`` keys, in the gradients of keys and values."""
    batch, kv_heads, length, size = call.k.get_size()
    by_position = _new([batch, count, kv_heads, size], call.q.get_dtype(), call.q.get_device())
    dk = call.run("grad_key_value", [batch, kv_heads, count, size], saved | {"DV": by_position}, parts, "DV")
    dv = lowerings[_aten.permute.default](by_position, [0, 2, 1, 3])
    if not parts.summary:
        return dk, dv
    return _spread(dk, parts.summary, count, length), _spread(dv, parts.summary, count, length)


def _spread(of_summaries: Any, summary: int, count: Any, length: Any) -> Any:
    """The gradients of ``count`` summaries at their positions, the last one of each chunk, and 0 between them."""
    load = of_summaries.make_loader()
    batch, heads, _, size = of_summaries.get_size()

    def inner(position: Any) -> Any:
        batch, head, t, d = position
        chunk = FloorDiv(t, summary)
        where = ops.index_expr(ModularIndexing(t, 1, summary), torch.int32)
        last = ops.eq(where, ops.constant(summary - 1, torch.int32))
        inside = ops.lt(ops.index_expr(chunk, torch.int32), ops.index_expr(count, torch.int32))
        return ops.masked(ops.logical_and(last, inside), lambda: load([batch, head, chunk, d]), 0.0)

    return ir.Pointwise.create(
        device=of_summaries.get_device(),
        dtype=of_summaries.get_dtype(),
        inner_fn=inner,
        ranges=[batch, heads, length, size],
    )
