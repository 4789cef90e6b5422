"""Modules know their sparse weights, so that they learn of a checkpoint that is loaded into a module."""

from __future__ import annotations

from typing import Any

from torch import nn

from mst_compile.blocks.shards import is_sharded

from .binding import bind
from .weight import UNKNOWN, SparseWeight

_OWNED = "_mst_owned_weights"


def remember_owner(module: nn.Module, attribute: str, weight: SparseWeight) -> None:
    """Let ``module`` know that its parameter ``attribute`` is sparse."""
    if _OWNED not in module.__dict__:
        module.__dict__[_OWNED] = {}
        module.register_load_state_dict_post_hook(_after_load)
    module.__dict__[_OWNED][attribute] = weight


def owned(module: nn.Module, attribute: str) -> SparseWeight | None:
    """What :func:`remember_owner` noted of a module's parameter."""
    weight: SparseWeight | None = module.__dict__.get(_OWNED, {}).get(attribute)
    return weight


def forget_owner(module: nn.Module) -> None:
    """Undo :func:`remember_owner` for all of the module's parameters."""
    if module.__dict__.pop(_OWNED, None) is not None:
        hooks = module._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _after_load]:
            del hooks[key]


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """``load_state_dict`` may bring other Parameter objects (``assign=True``) and values outside the active blocks.

    Nothing is cut here: their masks may come later, with the optimizer's state or the sparsifier's. Until then the
    model computes with what was loaded; the next optimizer step settles what stays.
    """
    for attribute, weight in module.__dict__.get(_OWNED, {}).items():
        parameter = module._parameters[attribute]
        if parameter is not None and weight.adopted:
            bind(parameter, weight)
            weight.forget()
            weight.version, weight.follows = UNKNOWN, True
            if not is_sharded(parameter) and not parameter.is_meta:
                weight.look(parameter)  # values that fit the masks have none to bring: what is written later is no news
