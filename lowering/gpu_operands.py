"""Operands of the Triton templates of products: matrices whose rows can be loaded 16 bytes at a time.

Triton loads 16 bytes a thread, copies to shared memory asynchronously and so pipelines, only where it can prove that
rows begin at multiples of 16 bytes and that masks change at such places alone. Of logits 50257 wide, or features 199
wide, it would load every element by itself and wait for it. Such an operand is therefore written into wider rows, whose
gap is filled with zeros as far as masks reach, which are those of the padded width: zeros change no result, where what
memory held before might be NaN.

What that costs, by arithmetic; it has not been measured. What Inductor computes is written into the wide rows at once:
the gradient of logits, for instance, by the kernel that ends the softmax's backward pass. Besides that only the gaps
are filled, about a sector of 32 bytes a row, half a megabyte at 16384 tokens, by a kernel of its own. Any other operand
(a graph's input, also what a template leaves, since Inductor fuses no epilogue into rows of somebody else) is copied:
4 bytes an element in bfloat16, 3.3 GB or 1.1 ms at 3 TB/s for 16384 x 50257, once for both products that take it. At
density .3 and the rates of docs/gpu.md these take 0.75 ms each with 768 outputs, so that the copy pays if element-wise
loads would slow them down by more than 1.7x. At density .1 they are bound by reading the operand, 0.55 ms each, and it
pays from 2x. Loads that wait for memory in every step (some 1 us, for some .3 us of arithmetic) are expected to cost
more. With fewer than 77 active outputs (number of outputs x density) the copy is the larger part and may be a loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import full, lowerings, to_dtype
from torch._inductor.virtualized import V

_LOAD = 16  # bytes that a thread loads at once
_SECTOR = 32  # bytes that caches move at least: widths are padded to a multiple
_LINE = 128  # bytes of a cache line: rows of more than _LINES of them begin with a new one
_LINES = 4


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


def as_they_are(x: Any) -> tuple[Any, list[Any]]:
    """``x`` as a realized ``[M, features]`` for a library's product, which takes any strides; and its leading sizes."""
    *lead, features = x.get_size()
    flat = x if len(lead) == 1 else lowerings[torch.ops.aten.view.default](x, [-1, features])
    return ir.ExternKernel.realize_input(flat), list(lead)


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
    x = ir.ExternKernel.realize_input(x)
    if isinstance(x.get_layout(), ir.FlexibleLayout):
        # A copy that the view has made: templates are given its strides now, and Inductor would choose them later.
        x = ir.ExternKernel.require_contiguous(x)
    x = ir.ExternKernel.require_stride1(x)
    return x if _wide(x) else ir.ExternKernel.require_contiguous(ir.ExternKernel.copy_input(x))


def _pad(x: Any) -> Any:
    """``x`` in wider rows, as ``[M, width]``, with zeros beyond its features."""
    *lead, last = x.get_size()
    device, dtype, features = x.get_device(), x.get_dtype(), static(last)
    width = _up(features, _SECTOR // dtype.itemsize)
    stride = _up(features, _LINE // dtype.itemsize) if features * dtype.itemsize > _LINES * _LINE else width
    leading = [stride * s for s in ir.FlexibleLayout.contiguous_strides(lead)]
    # As Inductor lowers torch.cat: a buffer, and kernels that write their results into slices of it.
    layout = ir.FixedLayout(device, dtype, [*lead, width], [*leading, 1])
    kernel = ir.ConcatKernel(name=None, layout=layout, inputs=[])
    box = ir.StorageBox(kernel)
    gap = full([*lead, width - features], 0, dtype=dtype, device=device)
    parts = []
    for part, start, end in ((x, 0, features), (gap, features, width)):
        place = ir.SliceView.create(box, len(lead), start, end, clamp=False)
        parts.append(ir.ConcatKernel.realize_into(part, place))
    kernel.name = V.graph.register_buffer(kernel)
    kernel.inputs = ir.ConcatKernel.unwrap_storage(parts)
    V.graph.register_operation(kernel)
    layout = ir.FixedLayout(device, dtype, [math.prod(lead), width], [stride, 1])
    return ir.TensorBox(ir.ReinterpretView(data=box, layout=layout))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
