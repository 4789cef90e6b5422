"""``mst::attention`` and its gradient on NVIDIA GPUs: lowerings to the templates of kernels/triton/attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mst_compile.kernels.triton import attention as kernels
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, full, lowerings, to_dtype
from torch._inductor.virtualized import V

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
        value_size = gpu_operands.static(self.v.get_size()[3])
        self.parts = Parts(*parts)
        self.kind, self.size = gpu_tiles.kind(self.q.get_dtype()), max(size, value_size)
        self.constants = {
            "SCALE": scale,
            "HEADS": heads,
            "GROUP": heads // gpu_operands.static(self.k.get_size()[1]),
            "SIZE": size,
            "BLOCK_D": _block(size),
            "VALUE_SIZE": value_size,
            "BLOCK_E": _block(value_size),
            "KEY_MASK": key_mask is not None,
            "PRECISION": gpu_tiles.precision(self.q.get_dtype()),
        }

    def run(self, which: str, more: dict[str, Any], mutated: Sequence[str], parts: Parts, backwards: bool) -> Any:
        """One kernel on some parts, tuned. Its result is that of the queries, or their gradient, with positions side by
        side in memory.

        Args:
            more: further operands by name, of which those in ``mutated`` are written too.
            backwards: whether the heads are taken from the last one on.
        """
        size = [*self.q.get_size()[:3], (self.v if which == "forward" else self.q).get_size()[3]]
        layout = ir.FixedLayout(self.q.get_device(), self.q.get_dtype(), size, _by_position(size))
        names, inputs = [*self.names, *more], [*self.inputs, *more.values()]
        constants = self.constants | kernels.constants(parts) | self._strides(names, inputs)
        constants |= {"BEFORE": "SEEN" in names, "BACKWARDS": backwards}
        template = getattr(kernels, which)
        choices: list[Any] = []
        for tile in kernels.tiles(self.size, self.kind, which, parts)[: None if gpu_tiles.tunes() else 1]:
            error = template.maybe_append_choice(
                choices,
                input_nodes=tuple(inputs),
                layout=layout,
                mutated_inputs=[more[name] for name in mutated],
                num_warps=tile.warps,
                num_stages=tile.stages,
                BLOCK_M=tile.own,
                BLOCK_N=tile.walked,
                PACK=kernels.pack(tile, parts, compat.hint(size[2])),
                NAMES=repr(",".join(names)),
                **constants,
            )
            if error is not None:
                raise error
        # Random values serve as operands, but masks must not be empty.
        masks = {i: _all_seen for i, n in enumerate(names) if n == "VISIBLE"}
        return compat.select(template.name, choices, inputs, layout, input_gen_fns=masks, return_multi_template=False)

    @staticmethod
    def _strides(names: Sequence[str], inputs: Sequence[Any]) -> dict[str, int]:
        """Elements between the positions of those operands that have positions and features."""
        by_name = zip(names, inputs, strict=True)
        return {
            f"{name}_STRIDE": gpu_operands.static(x.get_stride()[2])
            for name, x in by_name
            if name in ("Q", "K", "V", "DO", "DK", "DV", "SEEN")
        }


def _block(size: int) -> int:
    """Numbers of a tile along the features of a head: a power of two that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def _all_seen(mask: Any) -> torch.Tensor:
    return torch.ones([compat.hint(s) for s in mask.get_size()], dtype=torch.int8, device=mask.get_device())


def _new(size: Sequence[Any], dtype: torch.dtype, device: Any, strides: Sequence[Any] | None = None) -> Any:
    buffer = empty_strided(list(size), strides, dtype=dtype, device=device)
    buffer.realize()
    return buffer


def attention(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any]:
    """Lowering of ``mst::attention``: the result and the log-denominators."""
    call = _Call(q, k, v, *rest)
    lse = _new(call.q.get_size()[:3], torch.float32, call.q.get_device())
    *runs, last = call.parts.alone()
    if last.step:  # tiles of their own, before a run: that one always sees something
        launches = [last, *runs]
    else:  # summaries are keys of the tiles that a run has
        launches = [call.parts]
    out = None
    for number, parts in enumerate(launches):
        out = call.run("forward", {"LSE": lse} | _seen(out), ["LSE"], parts, backwards=number % 2 == 1)
    return out, lse


def attention_backward(grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """Lowering of ``mst::attention_backward``: gradients of queries, keys and values."""
    call = _Call(q, k, v, *rest)
    grad = _operand(to_dtype(grad, call.q.get_dtype()))
    product = lowerings[_aten.mul.Tensor](to_dtype(grad, torch.float32), to_dtype(out, torch.float32))
    delta = _contiguous(lowerings[_aten.sum.dim_IntList](product, [-1]))
    saved = {"DO": grad, "LSE": _contiguous(lse), "DELTA": delta}
    launches = call.parts.alone()
    dq = None
    dk, dv = (_gradient(x, zeros=bool(launches[0].summary)) for x in (call.k, call.v))
    for number, parts in enumerate(launches):
        operands = saved | {"DK": dk, "DV": dv} | _seen(dq)
        # What computes delta goes from the first head to the last, the end of which is in the cache.
        dq = call.run("backward", operands, ["DK", "DV"], parts, backwards=number % 2 == 0)
    return dq, dk, dv


def _seen(before: Any) -> dict[str, Any]:
    """The result of the launch before, which the next one adds its share to, as an operand."""
    return {} if before is None else {"SEEN": ir.ExternKernel.realize_input(before)}


def _contiguous(x: Any) -> Any:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def _by_position(size: Sequence[Any]) -> list[Any]:
    """Strides of ``[batch, heads, length, size]`` with positions side by side in memory."""
    _, heads, length, features = size
    return [length * heads * features, features, heads * features, 1]


def _gradient(x: Any, zeros: bool) -> Any:
    """A buffer for the gradient of keys or values: launches write every position, or add to those of summaries."""
    size, dtype, device = x.get_size(), x.get_dtype(), x.get_device()
    if not zeros:
        return _new(size, dtype, device, _by_position(size))
    buffer = full(size, 0, dtype=dtype, device=device)
    buffer.realize()
    buffer.freeze_layout_with_exact_strides(_by_position(size))
    return buffer
