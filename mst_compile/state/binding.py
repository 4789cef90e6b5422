"""From a Parameter to its sparse state, and back: who holds which, and the hooks on its gradients.

The state hangs on the Parameter object itself, because that is what a compiled graph receives at every call: one
compiled graph then serves all layers that Dynamo shares it among.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import TensorWeakRef

from mst_compile.blocks.by_tensor import ByTensor
from mst_compile.blocks.memory import is_plain
from mst_compile.blocks.shards import check_placement, forget_local, gathered, holder_of, note_local, stored

from .indexes import activity, epoch
from .uses import warn_orphaned
from .weight import SparseWeight

_ATTRIBUTE = "_mst_weight"
_hooks = ByTensor()  # parameter -> handle of its gradient hook
# Who is told of a weight's gradients as they arrive, as long as it wants to be. Weak methods, as they lead back to it.
gradients: weakref.WeakKeyDictionary[SparseWeight, weakref.WeakMethod[Callable[[SparseWeight, Tensor], None]]] = (
    weakref.WeakKeyDictionary()
)


def of(parameter: object) -> SparseWeight | None:
    """The sparse state of ``parameter``, or ``None``."""
    weight: SparseWeight | None = getattr(parameter, _ATTRIBUTE, None)
    return weight if weight is not None and weight.adopted else None


def bind(parameter: Tensor, weight: SparseWeight) -> bool:
    """Make ``weight`` the sparse state of ``parameter`` and have its gradients masked; returns whether that is new.

    Safe to call again, and on frozen parameters.
    """
    changed = of(parameter) is not weight
    if changed:
        _remove_hook(parameter)
        setattr(parameter, _ATTRIBUTE, weight)
        epoch.value += 1
    # FSDP2 may keep shards on the host, and gathers what it has cut: the index is of what products are computed with.
    if holder_of(parameter) is None or gathered(parameter):
        weight.follow(parameter)
    if parameter not in _hooks:
        # The hook holds no more than the weight's state: one that led back to the parameter would never be freed.
        hook = torch._dynamo.disable(functools.partial(_mask_gradient, weight))
        frozen = not parameter.requires_grad  # it may be unfrozen later, and a hook is only taken by one that is not
        _hooks[parameter] = parameter.requires_grad_(True).register_post_accumulate_grad_hook(hook)
        parameter.requires_grad_(not frozen)
        changed = True
    note_local(parameter)
    weight.home = TensorWeakRef(parameter)
    return changed


def come_first(parameter: Tensor) -> None:
    """Have the gradients of a sparse Parameter masked before any other hook sees them that has been there before."""
    handle = _hooks.get(parameter)
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    if handle is not None and hooks is not None and handle.id in hooks:
        hooks.move_to_end(handle.id, last=False)


def is_at_home(weight: SparseWeight, parameter: Tensor) -> bool:
    """Whether :func:`bind` has nothing to do for an ordinary Parameter, as at nearly every step; False where somebody
    must look."""
    home, index = weight.home, weight.index
    known = home is not None and index is not None and home() is parameter and of(parameter) is weight
    if not known or type(parameter) is not Parameter or holder_of(parameter) is not None:
        return False
    return weight.part is None and index.device == parameter.device and parameter.dim() == len(weight.shape)  # type: ignore[union-attr]


def unbind(parameter: Tensor) -> None:
    """Remove the sparse state of ``parameter`` and its hook; also where FSDP2 would carry it here from again."""
    for holder in (parameter, stored(parameter)):
        _remove_hook(holder)
        forget_local(holder)
        if hasattr(holder, _ATTRIBUTE):
            delattr(holder, _ATTRIBUTE)
    epoch.value += 1


def _remove_hook(parameter: Tensor) -> None:
    weight = of(parameter)
    if weight is not None:
        weight.home = None
    handle = _hooks.pop(parameter, None)
    if handle is not None:
        handle.remove()


def _mask_gradient(weight: SparseWeight, parameter: Tensor) -> None:
    """Post-accumulate hook: gradients are zero outside the active blocks, whoever computed them."""
    activity.value += 1
    gradient = parameter.grad
    if gradient is not None and not weight.dense_grad and not _holds_zeros(weight, parameter, gradient):
        weight.mask_gradient(gradient)
    if weight.is_orphan and not weight.orphaned:
        weight.orphaned = True
        warn_orphaned(weight.name)
    told = gradients.get(weight) if gradients else None
    tell = None if told is None else told()
    if tell is not None:
        tell(weight, parameter)


def _holds_zeros(weight: SparseWeight, parameter: Tensor, gradient: Tensor) -> bool:
    """Whether a gradient that has arrived is known to be 0 outside the active blocks."""
    take = weight.take_computed if weight.computed is not None else weight.take_sum if weight.adding else None
    # A hook on the way may have written without a trace.
    return take is not None and not parameter._backward_hooks and is_plain(gradient) and take(gradient)


class Arrival:
    """A hook on the node that adds a weight's gradients up, for one gradient that is to be added to another: it is the
    last to see it before that, and tells the weight what it has seen.

    Args:
        node: of ``parameter``, which has a gradient.
    """

    def __init__(self, weight: SparseWeight, parameter: Tensor, node: Any) -> None:
        self._weight, self._parameter = weight, parameter
        self._handle = node.register_prehook(self)

    def remove(self) -> None:
        """Look no more: of a gradient that has not arrived, as ``autograd.grad`` computes them."""
        self._handle.remove()

    @torch._dynamo.disable
    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        hooks = self._handle.hooks_dict_ref()
        alone = hooks is not None and len(hooks) == 1  # another one, before or after this, may write without a trace
        self._handle.remove()
        gradient, held = gradients[0], self._parameter.grad
        if not alone or self._parameter._backward_hooks or gradient is None or not is_plain(gradient):
            self._weight.computed = None
        elif held is not None and is_plain(held):
            self._weight.note_adding(gradient, held)


def weights() -> Iterator[SparseWeight]:
    """Sparse weights of this process whose Parameters are alive."""
    return (weight for p in _hooks if (weight := of(p)) is not None)


def bound() -> list[tuple[str, Tensor]]:
    """Names and Parameters of all sparse weights of this process that are alive."""
    return [(weight.name, p) for p in _hooks if (weight := of(p)) is not None]


def carry(old: Tensor, new: Tensor) -> None:
    """Let a Parameter that takes another's place, as FSDP2's do, have the other's sparse state, also if it has none.

    Raises:
        ParallelismError: it is spread over ranks in a way that is not served.
    """
    weight = of(old)
    if weight is of(new):
        return
    if weight is None:
        unbind(new)
        return
    check_placement(weight.name, new)
    bind(new, weight)
