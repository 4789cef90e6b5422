"""Who watches products while they run: PyTorch's profiler, and counters of FLOPs.

A product knows no layer: a compiled graph may serve many, and a name in it would be that of the first. Its packed index
is each weight's own, though, so whoever holds the weights says whose it is, and only when somebody watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry

# Who calls an operator asks this first, in the open, as a call would cost more than the question:
#     profiler._is_profiler_enabled or counters
Counter = Callable[[Any, int], None]  # of an operator and the FLOPs of a call
_INDEX = {  # operator -> which argument the index is
    "linear": 3, "linear_grad_input": 2, "linear_grad_weight": 2,
    "grouped_linear": 3, "grouped_linear_grad_input": 3, "grouped_linear_grad_weight": 3,
}  # fmt: skip

counters: list[Counter] = []  # that are told of calls that no dispatcher sees
finders: list[Callable[[Tensor], str | None]] = []  # name of the weight whose index it is
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class _Last:
    """The weight whose product ran last: an attention, which has none, is named after it."""

    name = ""


@contextlib.contextmanager
def marked(name: str, args: Sequence[Any], *, unseen: bool = False) -> Iterator[None]:
    """A range of the profiler's around a call of ``mst::<name>``, with the layer's name and the call's FLOPs.

    Args:
        args: of the operator.
        unseen: no dispatcher sees the call, so that counters have to be told; what it calls itself does not count.
    """
    operator = getattr(torch.ops.mst, name)
    formula = flop_registry.get(operator)
    with _disable_current_modes():
        count = 0 if formula is None else int(formula(*args, out_val=None))
    for tell in counters if unseen else ():
        tell(operator, count)
    with contextlib.ExitStack() as stack:
        if unseen and counters:
            stack.enter_context(_disable_current_modes())
        if profiler._is_profiler_enabled:
            stack.enter_context(profiler.record_function(f"mst::{name} {_layer(name, args)} [{_shown(count)}]"))
        yield


def _layer(name: str, args: Sequence[Any]) -> str:
    if name not in _INDEX:
        return f"after {_Last.name}" if _Last.name else "of dense layers"
    found = (find(args[_INDEX[name]]) for find in finders)
    _Last.name = next((layer for layer in found if layer is not None), "of no model")
    return _Last.name


def _shown(flops: int) -> str:
    size, unit = next(((size, unit) for size, unit in _UNITS if flops >= size), (1.0, ""))
    return f"{flops / size:.4g} {unit}FLOP"
