"""Operands of the Triton templates of products: matrices whose rows can be loaded 16 bytes at a time.

Triton loads 16 bytes a thread, and copies to shared memory asynchronously, only where it can prove that rows begin at
multiples of 16 bytes and that masks change at such places alone. Of logits 50257 wide, or features 199 wide, it would
load every element by itself, wait for it, and not pipeline. Such an operand therefore goes into a buffer with wider
rows, whose gap is filled with zeros so far that masks can be those of the padded width: products of zeros change no
result, where what memory held before might be NaN.

What it costs. A tensor that is not in memory yet is written into the wide rows at once: the gradient of logits by what
ends the softmax's backward pass, an activation by the store of the product before it. Only the gaps are filled besides,
a sector of 32 bytes a row: half a megabyte at 16384 tokens. An operand that has its memory already, an input of the
graph above all, is copied: read and written once, 3.3 GB or 1.1 ms at the 3 TB/s of an H100 for 16384 x 50257 in
bfloat16, and once for both products that take the gradient. Reading it once takes half that in any product; the two
products at density .3 take 1.5 to 2 ms together at the rates of docs/gpu.md for aligned widths. Without pipelining each
of their steps (of 64 features, some .2 us of arithmetic) would wait for memory, at about 1 us, with two programs to hide
it; so they would take some 2 to 3 times as long, and even a copy pays. It is the larger part for narrow weights: it
moves 4 bytes an element, for which the product does 2 N d operations (N outputs, density d), and takes longer than these
where N d is below 300.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import full, lowerings, to_dtype
from torch._inductor.virtualized import V

_LOAD = 16  # bytes that a thread loads at once
_SECTOR = 32  # bytes that the caches move at least
_LINE = 128  # bytes that they keep together; rows of a few of them begin with a new one


def static(size: Any) -> int:
    """A size as a constant. Features and strides must be: symbolic ones would cost the asynchronous copies."""
    return int(V.graph.sizevars.guard_int(size))


def rows(x: Any, argument: int) -> tuple[Any, list[Any]]:
    """``x`` as a realized ``[M, width]`` that can be loaded by 16 bytes, row stride constant; and its leading sizes.

    ``width`` is the number of features, or more: then the columns beyond them are 0. Made once a graph: both products
    of a backward pass share the gradient, and layers side by side their input.

    Args:
        argument: which argument ``x`` is of the operator that is being lowered. Inductor has laid ``x`` out anew for
            each of its uses; what they have in common is the node.
    """
    made = vars(V.graph).setdefault("mst_operands", {})
    key = V.graph.current_node.args[argument], x.get_dtype()
    if key not in made:
        made[key] = _rows(x)
    return made[key], list(x.get_size()[:-1])


def weight(x: Any, argument: int, dtype: torch.dtype) -> Any:
    """A weight in ``dtype``, as `rows`."""
    return rows(to_dtype(x, dtype), argument)[0]


def unflatten(out: Any, lead: list[Any]) -> Any:
    """``[M, features]`` with its leading sizes back."""
    return out if len(lead) == 1 else lowerings[torch.ops.aten.view.default](out, [*lead, out.get_size()[-1]])


def _wide(x: Any) -> bool:
    """Whether Triton can see that rows of ``x``, ``[M, features]``, begin at multiples of 16 bytes."""
    row, last = x.get_stride()
    known = V.graph.sizevars
    return (
        not getattr(row, "free_symbols", None)
        and known.statically_known_equals(last, 1)
        and static(row) * x.get_dtype().itemsize % _LOAD == 0
        and not ir.is_unaligned(x)
    )


def _rows(x: Any) -> Any:
    *lead, features = x.get_size()
    if static(features) * x.get_dtype().itemsize % _LOAD:
        return _pad(x)
    if len(lead) != 1:
        x = lowerings[torch.ops.aten.view.default](x, [-1, features])
    x = ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(x))
    return x if _wide(x) else ir.ExternKernel.require_contiguous(ir.ExternKernel.copy_input(x))


def _pad(x: Any) -> Any:
    *lead, features = x.get_size()
    device, dtype = x.get_device(), x.get_dtype()
    features = static(features)
    width = _up(features, _SECTOR // dtype.itemsize)
    stride = _up(features, _LINE // dtype.itemsize) if features * dtype.itemsize > 4 * _LINE else width
    strides = [stride * s for s in ir.FlexibleLayout.contiguous_strides([*lead, 1])[:-1]]
    # As in Inductor's lowering of torch.cat: what is not in memory yet, or may still be moved, is written in place.
    kernel = ir.ConcatKernel(name=None, layout=ir.FixedLayout(device, dtype, [*lead, width], [*strides, 1]), inputs=[])
    box = ir.StorageBox(kernel)
    gap = full([*lead, width - features], 0, dtype=dtype, device=device)
    parts = []
    for part, start, end in ((x, 0, features), (gap, features, width)):
        place = ir.SliceView.create(box, len(lead), start, end, clamp=False)
        parts.append(ir.ConcatKernel.realize_into(part, place))
    kernel.name = V.graph.register_buffer(kernel)
    kernel.inputs = ir.ConcatKernel.unwrap_storage(parts)
    V.graph.register_operation(kernel)
    m = 1
    for size in lead:
        m = m * size
    return ir.TensorBox(ir.ReinterpretView(data=box, layout=ir.FixedLayout(device, dtype, [m, width], [stride, 1])))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
