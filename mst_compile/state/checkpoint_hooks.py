"""Optimizer checkpoints as they happen: let the topology ride in what people save and load anyway.

PyTorch has hooks for ``state_dict`` and ``load_state_dict`` on single optimizers alone, and an optimizer that is about
to be resumed has not stepped, so nobody knows it yet: those two methods of ``torch.optim.Optimizer`` are wrapped, once;
``load_state_dict`` on import, as it may be called first.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from .learning_rates import pack_laws, unpack_laws
from .packing import PROGRESS, TOPOLOGY_KEYS


class CheckpointWatcher(Protocol):
    """Something that wants to know of optimizer checkpoints. ``entries`` maps the id of a Parameter to what belongs to
    it."""

    def save_into(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...
    def owned(self, optimizer: Optimizer) -> set[int]: ...
    def check_loaded(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...
    def after_load(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...


_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_unclaimed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # Parameter that was not sparse -> its topology
_registered = False


def watch_checkpoints(watcher: CheckpointWatcher) -> None:
    """Call ``watcher`` whenever an optimizer's state is saved or loaded, for as long as it lives."""
    global _registered
    if not _registered:
        _registered = True
        _wrap_state_dict()
    _watchers.add(watcher)


def _positions(groups: list[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


def _wrap_state_dict() -> None:
    original = Optimizer.state_dict

    @functools.wraps(original)
    def state_dict(self: Optimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original(self, *args, **kwargs)
        pack_laws(found.get("param_groups", []))
        entries: dict[int, dict[str, Any]] = {}
        for watcher in list(_watchers):
            watcher.save_into(self, entries)
        if entries:
            keys = dict(zip(map(id, _positions(self.param_groups)), _positions(found["param_groups"]), strict=True))
            extra = {keys[i]: entry for i, entry in entries.items()}
            if not found["state"]:
                # torch.distributed.checkpoint takes state for no parameter, or for all of them.
                progress = {PROGRESS: next(iter(extra.values()))[PROGRESS]}
                extra = {key: extra.get(key, progress) for key in keys.values()}
            # Copies: the entries of the state dict are the optimizer's own, and it would step over ours.
            found["state"] = {
                key: {**found["state"].get(key, {}), **extra.get(key, {})}
                for key in [*found["state"], *(k for k in extra if k not in found["state"])]
            }
        return found

    Optimizer.state_dict = state_dict  # type: ignore[method-assign]


def _wrap_load_state_dict() -> None:
    original = Optimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        entries = _take_entries(self, state_dict)
        if "param_groups" in state_dict:
            groups = unpack_laws(self.param_groups, state_dict["param_groups"], set(entries))
            state_dict = {**state_dict, "param_groups": groups}
        if entries:
            for watcher in list(_watchers):
                watcher.check_loaded(self, entries)
            state = {
                key: {k: v for k, v in entry.items() if k not in TOPOLOGY_KEYS} if isinstance(entry, dict) else entry
                for key, entry in state_dict["state"].items()
            }
            state_dict = {**state_dict, "state": {key: entry for key, entry in state.items() if entry != {}}}
        original(self, state_dict, *args, **kwargs)
        owned: set[int] = set().union(*(watcher.owned(self) for watcher in list(_watchers)))
        for parameter in _positions(self.param_groups):
            if id(parameter) in entries and id(parameter) not in owned:
                _unclaimed[parameter] = entries[id(parameter)]
        for watcher in list(_watchers):
            watcher.after_load(self, entries)

    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def take_unclaimed(parameter: Tensor) -> dict[str, Any]:
    """The topology of a Parameter that an optimizer was loaded with before the Parameter was sparse, if any; no longer
    kept then."""
    return _unclaimed.pop(parameter, {})


def _take_entries(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Our part of an optimizer's state dict, by the id of the Parameter that it belongs to."""
    state, saved = state_dict.get("state", {}), _positions(state_dict.get("param_groups", []))
    found = {}
    for parameter, key in zip(_positions(optimizer.param_groups), saved, strict=False):
        entry = state.get(key)
        if isinstance(entry, dict) and any(name in entry for name in TOPOLOGY_KEYS):
            found[id(parameter)] = {name: entry[name] for name in TOPOLOGY_KEYS if name in entry}
    return found


# From the start: an optimizer may be loaded before anything is sparse.
_wrap_load_state_dict()
