"""Tell sparsifiers about optimizer steps, and about optimizer state that is saved and loaded.

For steps PyTorch has global hooks. They fire for every optimizer class, also for a subclass that a user wrote, once
under gradient accumulation, and not for a step that ``GradScaler`` skips. For ``state_dict`` and ``load_state_dict``
it has hooks on single optimizers alone, and an optimizer that is resumed has not stepped, so nobody knows it yet:
those two methods of ``torch.optim.Optimizer`` are wrapped, once, when the first model is made sparse.
"""

from __future__ import annotations

import functools
import sys
import weakref
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mst_compile.state.packing import PROGRESS, SCORES, TOPOLOGY

TOPOLOGY_KEYS = (TOPOLOGY, PROGRESS, SCORES)


class StepWatcher(Protocol):
    """Something that wants to know of optimizer steps and of optimizer checkpoints."""

    def before_step(self, optimizer: Optimizer, *, nested: bool) -> None: ...
    def after_step(self, optimizer: Optimizer, *, nested: bool) -> None: ...
    def save_into(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...
    def check_loaded(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...
    def after_load(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...


_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_stepping: list[Optimizer] = []  # optimizers whose step is running, outermost first
_registered = False


@torch._dynamo.disable
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _stepping and not _is_running(_stepping[-1]):
        _stepping.clear()  # a step that raised left it here
    _stepping.append(optimizer)
    for watcher in list(_watchers):
        watcher.before_step(optimizer, nested=len(_stepping) > 1)


@torch._dynamo.disable
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _stepping and _stepping[-1] is optimizer:
        _stepping.pop()
    for watcher in list(_watchers):
        watcher.after_step(optimizer, nested=bool(_stepping))


def _is_running(optimizer: Optimizer) -> bool:
    """Whether a step of ``optimizer`` is on the call stack."""
    frame = sys._getframe(2).f_back  # past the hook and the wrapper that PyTorch put around the step that begins
    while frame is not None:
        if frame.f_code.co_name in ("step", "wrapper") and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def watch_steps(watcher: StepWatcher) -> None:
    """Call ``watcher`` around every optimizer step and checkpoint of this process for as long as it lives."""
    global _registered
    if not _registered:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _wrap_state_dict()
        _wrap_load_state_dict()
        _registered = True
    _watchers.add(watcher)


def _positions(groups: list[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


def _wrap_state_dict() -> None:
    original = Optimizer.state_dict

    @functools.wraps(original)
    def state_dict(self: Optimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original(self, *args, **kwargs)
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
        if entries:
            for watcher in list(_watchers):
                watcher.check_loaded(self, entries)
            state = {
                key: {k: v for k, v in entry.items() if k not in TOPOLOGY_KEYS} if isinstance(entry, dict) else entry
                for key, entry in state_dict["state"].items()
            }
            state_dict = {**state_dict, "state": {key: entry for key, entry in state.items() if entry != {}}}
        original(self, state_dict, *args, **kwargs)
        for watcher in list(_watchers):
            watcher.after_load(self, entries)

    Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _take_entries(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Our part of an optimizer's state dict, by the id of the Parameter that it belongs to."""
    state, saved = state_dict.get("state", {}), _positions(state_dict.get("param_groups", []))
    found = {}
    for parameter, key in zip(_positions(optimizer.param_groups), saved, strict=False):
        entry = state.get(key)
        if isinstance(entry, dict) and any(name in entry for name in TOPOLOGY_KEYS):
            found[id(parameter)] = {name: entry[name] for name in TOPOLOGY_KEYS if name in entry}
    return found
