"""Optimizer steps as they happen: who is told when one begins, succeeds, or fails.

PyTorch has global hooks for optimizer steps. They fire for every optimizer class, also for a subclass that a user
wrote, once under gradient accumulation, and not for a step that ``GradScaler`` skips. They do not fire when a step
raises, so ``step`` of every optimizer class is also wrapped in a function that knows when it is left, and how; that is
also what tells a step within another one. Steps of different threads know nothing of each other.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch._dynamo.decorators import skip
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from .indexes import activity

_GUARDED = "_mst_guarded"
_MOST_INTERRUPTS = 20  # of what ends a step: beyond them it raises them itself


class Step:
    """A step of an optimizer that is under way.

    Attributes:
        optimizer: who steps.
        outer: the step that it was taken within, which will be counted instead, or None.
        has_closure: whether the optimizer was given a function that computes its gradients.
        guard: the frame of the function that will end it, None where there is none.
        keeper: who steps, where that is no optimizer of PyTorch's, but steps one that trains copies of weights.
    """

    def __init__(self, optimizer: Any, outer: Step | None, guard: FrameType | None) -> None:
        self.optimizer = optimizer
        self.outer = outer
        self.guard = guard
        self.keeper: Any = None
        self.begun = self.ending = False
        self.has_closure = False
        self._ends: list[Callable[[bool], None]] = []

    @property
    def guarded(self) -> bool:
        """Whether a function around it will see it end."""
        return self.guard is not None

    @property
    def nested(self) -> bool:
        """Whether it was taken within another step."""
        return self.outer is not None

    @property
    def outermost(self) -> Step:
        """The step that all others were taken within; itself, if it is that."""
        return self if self.outer is None else self.outer.outermost

    @property
    def within(self) -> Step | None:
        """The step of a keeper of copies that it was taken within, if there is one."""
        around = self.outer
        while around is not None and around.keeper is None:
            around = around.outer
        return around

    def at_end(self, callback: Callable[[bool], None]) -> None:
        """Call ``callback(failed)`` when the step ends, however it does; last in, first out. One that is interrupted is
        called again, to go on from where it was."""
        self._ends.append(callback)

    @property
    def over(self) -> bool:
        """Whether nothing is left to be called."""
        return not self._ends

    def end(self, failed: bool) -> None:
        """Call what is left to be called; what has raised first is raised when all have had their turn."""
        raised: BaseException | None = None
        self.ending, interrupts = True, 0
        while self._ends:
            try:
                self._ends[-1](failed)
                self._ends.pop()
            except BaseException as error:
                raised, failed = raised or error, True
                interrupts += 1
                if isinstance(error, Exception) or interrupts > _MOST_INTERRUPTS:
                    self._ends.pop()
        if raised is not None:
            raise raised


class StepWatcher(Protocol):
    """Something that wants to know of optimizer steps."""

    def before_step(self, step: Step) -> None:
        """A step begins; gradients are those that the optimizer was called with, if it has no closure."""

    def after_closure(self, step: Step) -> None:
        """The step's closure has run, perhaps not for the last time: gradients are those that it has computed."""

    def after_step(self, step: Step) -> None:
        """A step has succeeded."""

    def after_keeper(self, step: Step) -> None:
        """A step has succeeded whose :attr:`Step.keeper` is not None; of its beginning those within it tell."""


class _Running(threading.local):
    def __init__(self) -> None:
        self.steps: list[Step] = []  # of this thread, outermost first


_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_running = _Running()
_registered = False


def watch_steps(watcher: StepWatcher) -> None:
    """Call ``watcher`` around every optimizer step of this process for as long as it lives."""
    global _registered
    if not _registered:
        _registered = True
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)
        _guard_classes()
    _watchers.add(watcher)


@contextlib.contextmanager
def refusing_steps(refuse: Callable[[Optimizer], None]) -> Iterator[None]:
    """Call ``refuse`` before anything else when a step begins; it raises to stop the step."""
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: refuse(optimizer))
    # Before the hook that tells the watchers: a step that is refused has not begun.
    _global_optimizer_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()


def watched(original: Callable[..., Any], keeper: Callable[[Any], object | None]) -> Callable[..., Any]:
    """A method ``step``, of what is no optimizer of PyTorch's and steps one, that can be followed.

    Args:
        keeper: says of its object who keeps copies of weights; None: nobody does.
    """

    @skip
    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        keeps = keeper(self)
        if keeps is None:
            return original(self, *args, **kwargs)
        end_left()
        depth, failed = len(_running.steps), True
        try:
            around = _enter(self, sys._getframe())
            around.keeper = keeps
            result = original(self, *args, **kwargs)
            for watcher in list(_watchers):
                watcher.after_keeper(around)
            failed = False
            return result
        finally:
            _leave_down_to(depth, failed)

    return step


@torch._dynamo.disable
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    top = _running.steps[-1] if _running.steps else None
    if top is None or top.optimizer is not optimizer or top.begun:
        top = _enter(optimizer, None)
        _guard_instance(optimizer)
    top.begun = True
    activity.value += 1
    given = len(args) > 1  # the optimizer itself is the first of them
    closure = args[1] if given else kwargs.get("closure")
    top.has_closure = callable(closure)
    for watcher in list(_watchers):
        watcher.before_step(top)
    if not top.has_closure:
        return None
    told = _telling(closure, top)
    return ((args[0], told, *args[2:]), kwargs) if given else (args, {**kwargs, "closure": told})


def _telling(closure: Callable[..., Any], step: Step) -> Callable[..., Any]:
    """A closure that tells the watchers when it has run."""

    @functools.wraps(closure, updated=())
    def told(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        for watcher in list(_watchers):
            watcher.after_closure(step)
        return result

    return told


@torch._dynamo.disable
def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    step = next((s for s in reversed(_running.steps) if s.optimizer is optimizer), None)
    if step is None:
        return
    for watcher in list(_watchers):
        watcher.after_step(step)
    if not step.guarded:
        _leave(step, failed=False)


def _enter(optimizer: Any, guard: FrameType | None) -> Step:
    around = (s for s in reversed(_running.steps) if not s.ending)
    outer = next((s for s in around if s.guarded or s.optimizer is optimizer), None)
    step = Step(optimizer, outer, guard)
    _running.steps.append(step)
    return step


def _leave(step: Step, failed: bool) -> None:
    """End ``step`` and what was left behind within it."""
    if step in _running.steps:
        _leave_down_to(_running.steps.index(step), failed)


def _leave_down_to(depth: int, failed: bool) -> None:
    """End the steps that are beyond the first ``depth``, of which all but the outermost were left behind.

    Each is there until it has ended: of one that an interrupt leaves there the next step knows, see :func:`end_left`.
    """
    raised: BaseException | None = None
    while len(_running.steps) > depth:
        last = _running.steps[-1]
        try:
            last.end(failed or len(_running.steps) > depth + 1)
        except BaseException as error:
            raised = raised or error
        if last.over:
            _running.steps.remove(last)
    if raised is not None:
        raise raised


def end_left() -> None:
    """End the steps of this thread whose end was interrupted so often that it was left out: the functions that should
    have seen to it are no longer running."""
    if not _running.steps:
        return
    running, frame = set(), sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back  # type: ignore[assignment]
    left = next((i for i, step in enumerate(_running.steps) if step.guarded and step.guard not in running), None)
    if left is not None:
        _leave_down_to(left, failed=True)


def _leave_unguarded(optimizer: Optimizer) -> None:
    """An unguarded step that raised was never left: it is over once its optimizer steps again, and hides no other."""
    for step in [s for s in _running.steps if s.optimizer is optimizer and not s.guarded]:
        _leave(step, failed=True)


def _guard(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Optimizer.step`` that knows when it is left."""

    @skip  # Dynamo leaves this frame alone, as the hooks' are, and compiles what it calls
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        end_left()
        _leave_unguarded(self)
        depth, failed = len(_running.steps), True
        try:  # what has been entered is left, even if an interrupt comes before anything else
            _enter(self, sys._getframe())
            result = original(self, *args, **kwargs)
            failed = False
            return result
        finally:
            _leave_down_to(depth, failed)

    functools.update_wrapper(step, original)
    setattr(step, _GUARDED, True)
    return step


def _guard_classes() -> None:
    """Guard ``step`` of the optimizer classes that PyTorch has put its hooks on, and of those that it will."""
    classes = list(Optimizer.__subclasses__())
    for cls in classes:
        classes += cls.__subclasses__()
        _guard_class(cls)
    original = Optimizer._patch_step_function

    @functools.wraps(original)
    def patch(self: Optimizer) -> None:
        original(self)
        for cls in type(self).__mro__:
            _guard_class(cls)

    Optimizer._patch_step_function = patch  # type: ignore[method-assign]


def _guard_class(cls: type) -> None:
    step = vars(cls).get("step")
    if getattr(step, "hooked", False) and not getattr(step, _GUARDED, False):
        cls.step = _guard(step)  # type: ignore[attr-defined, arg-type]


def _guard_instance(optimizer: Optimizer) -> None:
    """Guard a ``step`` that somebody, like a learning rate scheduler, has put on the optimizer itself."""
    step = optimizer.__dict__.get("step")
    if step is not None and not getattr(step, _GUARDED, False):
        bound = step
        guarded = _guard(lambda _, *args, **kwargs: bound(*args, **kwargs))
        functools.update_wrapper(guarded, getattr(step, "__func__", step))
        optimizer.__dict__["step"] = guarded.__get__(optimizer)
