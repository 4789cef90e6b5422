"""What is known about optimizers: which state belongs to which weight, and how regrown weights start.

Zero gradient and zero state give a zero update in the optimizers listed here, so a weight that is masked stays 0 in
them. After a step of any other optimizer the weight is masked once more.

What an optimizer remembers of single elements is found by its form, of whatever optimizer (:func:`survey`): a
floating-point tensor under a key of its own that has the parameter's shape in *every* parameter that it is kept of, or
codes of that shape with a code book beside them. Everything else belongs to several elements at once; and where there
are matrices among it that may be a basis, tensors of the parameter's shape may be coordinates in that basis. Such state
is left alone, and said.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mst_compile.blocks.bulk import block_mean_square, zero_blocks_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.memory import overlaps
from mst_compile.blocks.shards import any_nonzero, is_sharded, local_part
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
_ENOUGH = 4  # edge of a block whose mean square is an estimate
# Key of the state -> how its average decays; "state2" is bitsandbytes' second moment.
_SECOND_MOMENTS = {"exp_avg_sq": "beta2", "square_avg": "alpha", "state2": "beta2"}
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
        elements: keys of tensors with one number for each element of a parameter.
        codes: key of 8-bit codes, one for each element -> key of the code book that says what number a code is.
        foreign: key -> form of what belongs to no single element.
    """

    elements: frozenset[str]
    codes: Mapping[str, str]
    foreign: Mapping[str, str]


_surveys: weakref.WeakKeyDictionary[optim.Optimizer, tuple[int, Survey]] = weakref.WeakKeyDictionary()


def survey(optimizer: optim.Optimizer) -> Survey:
    """Look through the state of an optimizer, containers and objects in it included; again when there is more of it."""
    entries = sum(1 + len(state) for state in optimizer.state.values() if isinstance(state, dict))
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
        for key, value in state.items() if isinstance(state, dict) else ():
            if not isinstance(value, Tensor):
                inside = [tensor for tensor in _tensors(value) if tensor.numel() > 1]
                basis |= any(map(_may_be_basis, inside))
                if inside:
                    foreign.setdefault(key, f"{key} of shape {tuple(inside[0].shape)}")
            elif not isinstance(parameter, Tensor) or (value.shape != parameter.shape and value.numel() > 1):
                spoiled.add(key)
                basis |= _may_be_basis(value)
                foreign.setdefault(key, f"{key} of shape {tuple(value.shape)}")
            elif value.layout is torch.strided and overlaps(value):
                spoiled.add(key)
                foreign.setdefault(key, f"{key}, one number for several elements")
            elif value.shape == parameter.shape and value.is_floating_point():
                elements.add(key)
            elif value.numel() > 1:
                book = _code_book(key, value, state)
                if book is None:
                    foreign.setdefault(key, f"{key} of {value.dtype}")
                else:
                    codes[key] = book
    # What describes codes: the book, and the scales of groups of them, which are never 0 divided by.
    for key, book in codes.items():
        foreign.pop(book, None)
        foreign.pop(_scale_of(key), None)
    if basis:
        foreign |= {key: f"{key}, perhaps in the basis of these" for key in sorted(elements - spoiled)}
        elements = set()
    return Survey(frozenset(elements - spoiled), codes, foreign)


def _tensors(value: object, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dicts and plain objects."""
    if isinstance(value, Tensor):
        yield value
        return
    inside: Iterable[object] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    elif not isinstance(value, type) and not callable(value) and hasattr(value, "__dict__"):
        inside = vars(value).values()
    for item in inside if depth else ():
        yield from _tensors(item, depth - 1)


def _may_be_basis(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] > 1


def _code_book(key: str, codes: Tensor, state: Mapping[str, Any]) -> str | None:
    """Key of the code book of 8-bit codes, as bitsandbytes keeps it: ``state1`` has ``qmap1``, which holds a 0."""
    name = _book_of(key)
    book = state.get(name)
    fits = codes.dtype == torch.uint8 and name != key and isinstance(book, Tensor) and book.shape == (_CODES,)
    return name if fits and bool((book == 0).any()) else None  # type: ignore[union-attr]


def _book_of(key: str) -> str:
    return key.replace("state", "qmap")


def _scale_of(key: str) -> str:
    return key.replace("state", "absmax")


def state_like(optimizer: optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state of ``parameter`` that has one number for each of its elements, by its key."""
    state = optimizer.state.get(parameter, {})
    if not state or not isinstance(state, dict):
        return
    keys = state.keys() if keeps_zeros(optimizer) else survey(optimizer).elements
    for key, value in state.items():
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


@torch.no_grad()
def start_second_moment(optimizer: optim.Optimizer, parameter: Tensor, grid: BlockGrid, grown: Tensor) -> None:
    """Before the first step of regrown blocks: let their second moment begin at its first estimate, not at 0.

    Adam divides the average of squared gradients, begun at 0, by ``1 - beta2**step`` because it knows how few it has
    seen; but the step count is the whole weight's. After thousands of steps nothing is corrected, the average of a
    regrown weight is ``1 - beta2`` of one square, and its first updates are ``(1 - beta1) / sqrt(1 - beta2)`` (3.2 for
    the default betas) and later up to 7 times the learning rate. Begun at the square of its first gradient, or at the
    block's mean square where that is larger, no first update exceeds ``1 - beta1`` of the learning rate and the rate
    then rises as the first moment fills, as for a weight that has been there for long. One element says too little of
    its block if there are few: below blocks of 4 the mean is that of all blocks that grew. (The trouble is described
    in SMET, arXiv 2606.00888.)

    Args:
        grown: bool ``[R, C]`` on the CPU, the blocks that grew at the last topology event.
    """
    if parameter.grad is None:
        return
    state = optimizer.state.get(parameter, {})
    averages = {k: v for k, v in state_like(optimizer, parameter) if k in _SECOND_MOMENTS}
    codes = [] if keeps_zeros(optimizer) or is_sharded(parameter) else _coded_averages(optimizer, state)
    if not averages and not codes:
        return
    scale = gradient_scale(optimizer)
    gradient, part = local_part(parameter.grad)
    means = block_mean_square(parameter.grad, grid)
    if grid.block < _ENOUGH:
        means = torch.full_like(means, means[grown].mean().item())
    mask = part.of(grid.expand(grown)).to(gradient.device)
    least = part.of(grid.expand(means)).to(gradient.device)
    square = torch.maximum(gradient.float().square(), least) / (scale * scale)
    for key, average in averages.items():
        begun = square * _correction(optimizer, parameter, state, key)
        local = local_part(average)[0]
        if is_traceable_wrapper_subclass(local):  # 8-bit state: through its own copies
            plain = torch.empty(local.shape, dtype=torch.float32, device=local.device).copy_(local)
            local.copy_(torch.where(mask, begun, plain))
        else:
            local.copy_(torch.where(mask, begun.to(local.dtype), local))
    for key in codes:
        _write_codes(state, key, mask, square * _correction(optimizer, parameter, state, key))


def _coded_averages(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> list[str]:
    """Keys of second moments in 8-bit codes, with a scale for each group of them."""
    codes = survey(optimizer).codes
    return [k for k in codes if k in _SECOND_MOMENTS and k in state and isinstance(state.get(_scale_of(k)), Tensor)]


def _write_codes(state: dict[str, Any], key: str, mask: Tensor, values: Tensor) -> None:
    """Let 8-bit codes say ``values`` under ``mask``.

    The scale of a group, by which its codes are multiplied, grows where a value is larger, and its other codes are then
    written anew; all other groups stay as they are, bit for bit. How codes are grouped must follow from how many scales
    there are, or nothing is written.
    """
    codes, book, scales = state[key], state[_book_of(key)], state[_scale_of(key)]
    size = _group_size(codes.numel(), scales.numel())
    if size is None:
        return
    group = torch.arange(codes.numel(), device=codes.device) // size
    mask, values = mask.reshape(-1), values.reshape(-1)
    flat = codes.reshape(-1)
    said = book[flat.long()] * scales.reshape(-1)[group]
    wanted = torch.where(mask, values, said)
    largest = scales.reshape(-1).scatter_reduce(0, group, wanted.where(mask, 0.0).to(scales.dtype), "amax")
    changed = mask | (largest > scales.reshape(-1))[group]
    order = book.argsort()
    middles = (book[order][1:] + book[order][:-1]) / 2
    nearest = order[torch.bucketize(wanted / largest[group].clamp_min(torch.finfo(scales.dtype).tiny), middles)]
    codes.copy_(torch.where(changed, nearest.to(codes.dtype), flat).view_as(codes))
    scales.copy_(largest.view_as(scales))


def _group_size(elements: int, groups: int) -> int | None:
    """How many codes share a scale, a power of 2, if that many groups follow from it."""
    return next((size for size in (1 << i for i in range(4, 16)) if -(-elements // size) == groups), None)


def _correction(optimizer: optim.Optimizer, parameter: Tensor, state: dict[str, Any], key: str) -> float:
    """``1 - beta2**step`` of the coming step where the optimizer will divide by it, else 1."""
    if _SECOND_MOMENTS[key] != "beta2" or "step" not in state:
        return 1.0
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return 1.0 - float(group["betas"][1]) ** (float(state["step"]) + 1.0) if "betas" in group else 1.0
