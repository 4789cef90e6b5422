"""Follow FSDP2 (``torch.distributed.fsdp.fully_shard``): a weight's sparse state goes where its Parameter goes.

Importing this module wraps three methods of PyTorch's internal ``FSDPParam``, see :func:`_follow`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mst_compile.blocks import shards
from mst_compile.state.binding import carry
from mst_compile.state.swaps import watch_swaps

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    _AVAILABLE = True
else:  # a build of PyTorch without torch.distributed
    _AVAILABLE = False


class _Holder:
    """An ``FSDPParam`` as a :class:`mst_compile.blocks.shards.Holder`; lives as long as it does, as its attribute."""

    def __init__(self, manager: FSDPParam) -> None:
        self._manager = weakref.ref(manager)

    @property
    def sharded(self) -> Tensor:
        return self._manager().sharded_param  # type: ignore[union-attr]

    @property
    def whole(self) -> Tensor | None:
        manager = self._manager()
        assert manager is not None
        # Changes of the sharded Parameter must be made in the copy too: it is gathered anew only after it was freed.
        return manager._unsharded_param if manager.sharded_state.name == "UNSHARDED" else None


def _remember(manager: FSDPParam) -> None:
    holder: _Holder | None = manager.__dict__.get("_mst_holder")
    if holder is None:
        holder = manager.__dict__["_mst_holder"] = _Holder(manager)
    for parameter in (manager.sharded_param, getattr(manager, "_unsharded_param", None)):
        if parameter is not None:
            shards.remember(parameter, holder)


def adopt(model: nn.Module) -> None:
    """Get to know what FSDP2 has sharded of ``model``, in case it did so before this package was imported."""
    if not _AVAILABLE:
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            # Up to torch 2.12 a module has one group of parameters.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                for manager in group.fsdp_params if group is not None else ():
                    _remember(manager)


def _follow() -> None:
    """Carry sparse state along whenever FSDP2 puts one Parameter in the place of another.

    That is when ``fully_shard`` shards a Parameter, when a checkpoint brings another one (``load_state_dict(...,
    assign=True)``), and at every all-gather, before forward and backward, from the sharded Parameter to the unsharded
    one. FSDP2 has no hook at these points that leaves compiled graphs alone (a module's forward hook would break
    them), so three methods of its internal ``FSDPParam`` are wrapped, once.
    """

    def after(method: str, then: Callable[[FSDPParam, Tensor], None]) -> None:
        original = getattr(FSDPParam, method)

        @functools.wraps(original)
        def wrapper(self: FSDPParam, *args: Any, **kwargs: Any) -> Any:
            before = args[0] if method == "__init__" else self.sharded_param
            result = original(self, *args, **kwargs)
            then(self, before)
            return result

        setattr(FSDPParam, method, wrapper)

    def sharded_anew(manager: FSDPParam, before: Tensor) -> None:
        _remember(manager)
        if manager.sharded_param is not before:
            carry(before, manager.sharded_param)

    def gathered(manager: FSDPParam, before: Tensor) -> None:
        _remember(manager)
        carry(before, manager._unsharded_param)

    after("__init__", sharded_anew)
    after("reset_sharded_param", sharded_anew)
    after("init_unsharded_param", gathered)


if _AVAILABLE:
    _follow()
    watch_swaps()  # what is remembered of a Parameter, of a dense model's too, must not keep it from being moved
