"""Tell sparsifiers about optimizer steps, through PyTorch's global optimizer hooks.

The hooks fire once a step for every optimizer class, also for a subclass that a user wrote, under gradient
accumulation, and not for a step that ``GradScaler`` skips.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class StepWatcher(Protocol):
    """Something that wants to know of optimizer steps."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...


_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_registered = False


@torch._dynamo.disable
def _before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watcher in list(_watchers):
        watcher.before_step(optimizer)


@torch._dynamo.disable
def _after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for watcher in list(_watchers):
        watcher.after_step(optimizer)


def watch_steps(watcher: StepWatcher) -> None:
    """Call ``watcher`` around every optimizer step of this process for as long as it lives."""
    global _registered
    if not _registered:
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _registered = True
    _watchers.add(watcher)
