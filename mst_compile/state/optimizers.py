"""What is known about optimizers: which state belongs to which weight.

Zero gradient and zero state give a zero update in the optimizers listed here, so a weight that is masked stays 0 in
them. After a step of any other optimizer the weight is masked once more.

What an optimizer remembers of single elements is found by its form, of whatever optimizer (:func:`survey`): a
floating-point tensor in a place of its own that has the parameter's shape in *every* parameter that it is kept of, or
codes of that shape with a code book beside them. Everything else belongs to several elements at once; and where there
are matrices among it that may be a basis, tensors of the parameter's shape may be coordinates in that basis. Such state
is left alone, and said.
"""

from __future__ import annotations

import collections
import functools
import gc
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, optim
from torch.nn import Parameter

from mst_compile.blocks.bulk import zero_blocks_
from mst_compile.blocks.memory import overlaps
from mst_compile.blocks.shards import any_nonzero, is_sharded
from mst_compile.errors import OptimizerError

from .weight import SparseWeight

_ELEMENTWISE = {
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
}
_CODES = 256  # in a code book of 8-bit state


def keeps_zeros(optimizer: optim.Optimizer) -> bool:
    """Whether a step is known to leave a weight at 0 whose gradient and state are 0.

    A subclass is not known: it may do anything (Muon's orthogonalised update, for one, fills every element).
    """
    return type(optimizer) in _ELEMENTWISE


def alive() -> Iterator[optim.Optimizer]:
    """The optimizers of this process, also those that have not stepped: looked for among all objects that the garbage
    collector knows, which takes a moment."""
    for found in gc.get_objects():
        if issubclass(type(found), optim.Optimizer) and "param_groups" in vars(found):
            yield found


def callers() -> Iterator[optim.Optimizer]:
    """The optimizers whose methods are running now: where one steps within another, that is among them, though no hook
    may have seen it, as its constructor called none or the method is no ``step``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if issubclass(type(first), optim.Optimizer):
            yield first  # type: ignore[misc]
        frame = frame.f_back


def divides_by_zero(optimizer: optim.Optimizer, parameters: Iterable[Tensor]) -> set[int]:
    """Ids of those of the parameters in which a step may divide 0 by 0 where gradient and state are 0: the ``eps`` of
    their group is 0, or rounds to it in their dtype, as Adam's 1e-8 does in float16."""
    own = {id(p): p.dtype for p in parameters}
    dtypes = set(own.values())
    groups = [g for g in optimizer.param_groups if any(_is_zero(g.get("eps"), dtype) for dtype in dtypes)]
    members = ((id(p), g["eps"]) for g in groups for p in g["params"])
    return {i for i, eps in members if i in own and _is_zero(eps, own[i])}


def _is_zero(eps: object, dtype: torch.dtype) -> bool:
    return isinstance(eps, int | float) and _rounds_to_zero(float(eps), dtype)


@functools.lru_cache(maxsize=64)
def _rounds_to_zero(number: float, dtype: torch.dtype) -> bool:
    return not bool(torch.tensor(number, dtype=dtype, device="cpu"))


@dataclass(frozen=True)
class Survey:
    """What an optimizer keeps of its parameters.

    Attributes:
        elements: keys of tensors with one number for each element of a parameter; of those in containers and objects
            the way to them, as in ``momentum_buffer.0.9``.
        codes: key of 8-bit codes, one for each element -> key of the code book that says what number a code is.
        foreign: key -> form of what belongs to no single element.
    """

    elements: frozenset[str]
    codes: Mapping[str, str]
    foreign: Mapping[str, str]


_surveys: weakref.WeakKeyDictionary[optim.Optimizer, tuple[int, Survey]] = weakref.WeakKeyDictionary()


def survey(optimizer: optim.Optimizer) -> Survey:
    """Look through the state of an optimizer, containers and objects in it included; again when there is more of it."""
    entries = sum(1 + sum(map(_count, state.values())) for state in optimizer.state.values() if isinstance(state, dict))
    known = _surveys.get(optimizer)
    if known is None or known[0] != entries:
        known = _surveys[optimizer] = entries, _survey(optimizer)
    return known[1]


def _survey(optimizer: optim.Optimizer) -> Survey:
    elements: set[str] = set()
    spoiled: set[str] = set()
    codes: dict[str, str] = {}
    foreign: dict[str, str] = {}
    basis = False
    for parameter, state in optimizer.state.items():
        for key, value in _leaves(state) if isinstance(state, dict) else ():
            top = key.partition(".")[0]
            if not isinstance(parameter, Tensor) or (value.shape != parameter.shape and value.numel() > 1):
                spoiled.add(key)
                basis |= _may_be_basis(value)
                foreign.setdefault(top, f"{top} of shape {tuple(value.shape)}")
            elif value.layout is torch.strided and overlaps(value):
                spoiled.add(key)
                foreign.setdefault(top, f"{top}, one number for several elements")
            elif value.shape == parameter.shape and value.is_floating_point():
                elements.add(key)
            elif value.numel() > 1:
                book = _code_book(key, value, state)
                if book is None:
                    foreign.setdefault(top, f"{top} of {value.dtype}")
                else:
                    codes[key] = book
    # What describes codes: the book, and the scales of groups of them, which are never 0 divided by.
    for key, book in codes.items():
        foreign.pop(book, None)
        foreign.pop(scale_of(key), None)
    if basis:
        foreign |= {key: f"{key}, perhaps in the basis of these" for key in sorted(elements - spoiled)}
        elements = set()
    return Survey(frozenset(elements - spoiled), codes, foreign)


def _leaves(state: Mapping[Any, object]) -> Iterator[tuple[str, Tensor]]:
    """What is kept of one parameter: the tensors, also those in lists, dicts and plain objects, by the way to them."""
    for key, value in state.items():
        yield from _tensors(f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else str(key), value)


def _tensors(way: str, value: object, depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield way, value
        return
    for name, item in _inside(value) if depth else ():
        yield from _tensors(f"{way}.{name}", item, depth - 1)


def _inside(value: object) -> Iterable[tuple[object, object]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, list | tuple | set | collections.deque):
        return enumerate(value)
    if not isinstance(value, type) and not callable(value) and hasattr(value, "__dict__"):
        return vars(value).items()
    return ()


def _count(value: object) -> int:
    return 1 if isinstance(value, Tensor | int | float) else sum(1 for _ in _tensors("", value)) + 1


def _may_be_basis(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] > 1


def _code_book(key: str, codes: Tensor, state: Mapping[str, Any]) -> str | None:
    """Key of the code book of 8-bit codes, as bitsandbytes keeps it: ``state1`` has ``qmap1``, which holds a 0."""
    name = book_of(key)
    book = state.get(name)
    fits = codes.dtype == torch.uint8 and name != key and isinstance(book, Tensor) and book.shape == (_CODES,)
    return name if fits and bool((book == 0).any()) else None  # type: ignore[union-attr]


def book_of(key: str) -> str:
    return key.replace("state", "qmap")


def scale_of(key: str) -> str:
    return key.replace("state", "absmax")


def state_like(optimizer: optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state of ``parameter`` that has one number for each of its elements, by its key."""
    state = optimizer.state.get(parameter, {})
    if not state or not isinstance(state, dict):
        return
    known = keeps_zeros(optimizer)
    keys = state.keys() if known else survey(optimizer).elements
    for key, value in state.items() if known else _leaves(state):
        if key in keys and isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            yield key, value


@torch.no_grad()
def zero_state_(
    optimizer: optim.Optimizer,
    weight: SparseWeight,
    parameter: Tensor,
    blocks: Tensor | None = None,
    *,
    first: bool = False,
    later: list[Tensor] | None = None,
) -> None:
    """Set what ``optimizer`` remembers of a weight to 0 outside its active blocks.

    Args:
        blocks: bool ``[R, C]``, to be 0 whether they are active or not, and the only ones that can be anything else;
            None: all that are not active.
        first: the state has just been made: try whether it can hold a 0, also where it does.
        later: takes up plain tensors of the weight's shape, which the caller will set to 0 outside the active blocks.

    Raises:
        OptimizerError: state in a tensor subclass cannot be read or written.
    """
    for key, value in state_like(optimizer, parameter):
        if type(value) not in (Tensor, Parameter) and not is_sharded(value):
            outside = _outside(weight, blocks, value.device)
            _zero_wrapped_(f"{type(optimizer).__name__} keeps {key} of {weight.name}", value, outside, first)
        elif blocks is not None:
            zero_blocks_(value, weight.grid, blocks)
        elif later is not None:
            later.append(value)
        else:
            weight.zero_inactive_(value)
    if not keeps_zeros(optimizer) and not is_sharded(parameter):
        state = optimizer.state.get(parameter, {})
        for key, book in survey(optimizer).codes.items():
            if key in state:
                outside = _outside(weight, blocks, state[key].device)
                state[key].masked_fill_(outside, int((state[book] == 0).nonzero()[0]))


def _outside(weight: SparseWeight, blocks: Tensor | None, device: torch.device) -> Tensor:
    """The elements that lie outside the active blocks, and those of ``blocks``: bool, of the weight's shape."""
    wanted = ~weight.mask if blocks is None else ~weight.mask | blocks
    return weight.grid.expand(wanted).view(weight.shape).to(device)


def not_of_elements(optimizer: optim.Optimizer, weight: SparseWeight, parameter: Tensor) -> list[str]:
    """Keys of what was taken for state of single elements and is none: it has not stayed 0 where weight and gradient
    were 0 for a step. Of sharded state nothing is known."""
    outside = weight.outside(torch.device("cpu"))
    found = []
    for key, value in state_like(optimizer, parameter):
        if type(value) in (Tensor, Parameter) and bool((value.detach()[outside.to(value.device)] != 0).any()):
            found.append(f"{key}, not 0 where weight and gradient are")
    return found


def _zero_wrapped_(what: str, value: Tensor, outside: Tensor, first: bool) -> None:
    """Through the subclass's own copies, as of 8-bit state: what an address would show is not its numbers. Where all is
    0 already nothing is written, unless it is the ``first`` time: what is coded anew may be rounded anew."""
    try:
        plain = torch.empty(value.shape, dtype=torch.float32, device=value.device)
        plain.copy_(value)
        if not first and not bool((plain[outside] != 0).any()):
            return
        plain.masked_fill_(outside, 0)
        value.copy_(plain)
        plain.copy_(value)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise OptimizerError(
            f"{what} in a {type(value).__name__}, which cannot be copied to a plain tensor and back ({error}), so that "
            "dropped blocks would keep their old state. Use an optimizer with state in plain tensors for the sparse "
            "weights (mst_compile.param_groups lists them)"
        ) from error
    if bool((plain[outside] != 0).any()):
        raise OptimizerError(
            f"{what} in a {type(value).__name__}, which does not hold a 0 exactly, so that dropped blocks would keep "
            "state. Use an optimizer with state in plain tensors for the sparse weights (mst_compile.param_groups "
            "lists them)"
        )


def foreign_state(optimizer: optim.Optimizer) -> list[str]:
    """What ``optimizer`` keeps that cannot be attributed to single elements of parameters: keys, shapes, dtypes."""
    return list(survey(optimizer).foreign.values())


def skipped_by_scaler(optimizer: optim.Optimizer) -> bool:
    """Whether ``GradScaler`` had a fused optimizer find infinite gradients: ``step`` is called but does nothing."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)


def only_makes_state(optimizer: optim.Optimizer) -> bool:
    """Whether this is no training step but ``torch.distributed.checkpoint.state_dict`` making an optimizer's state.

    It steps once with all gradients and all learning rates 0.
    """
    groups = optimizer.param_groups
    rates = [group.get("lr") for group in groups]
    if any(rate is None or float(rate) != 0.0 for rate in rates):  # None: the optimizer finds its own
        return False
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    # The same answer on all ranks: each may hold another part of a gradient.
    return bool(gradients) and not any(any_nonzero(g) for g in gradients)


def gradient_scale(optimizer: optim.Optimizer) -> float:
    """Factor that the optimizer will take out of the gradients itself (fused optimizers under ``GradScaler``)."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
