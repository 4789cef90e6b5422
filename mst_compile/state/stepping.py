"""What a run does when optimizers step.

Within one training step::

    forward, backward   gradients arrive; outside the active blocks they are set to 0 as soon as they have accumulated
                        (kept dense on the steps before a topology event, so that growth can read them)
    optimizer.step()    before: growth scores are harvested and the inactive part of the gradient is zeroed
                        after:  the step is counted and, on an event, the topology changes
"""

from __future__ import annotations

import warnings
import weakref
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import block_mean_square
from mst_compile.errors import MSTWarning

from . import optimizers
from .clock import StepClock
from .learning_rates import restore_rates, scale_rates
from .run import Run
from .steps import Step
from .weight import SparseWeight, first_gradients

_PATIENCE = 10  # foreign optimizer steps with gradients on sparse weights before the user is warned


class RunWatcher(Protocol):
    """Something that looks at every run of this process before it trains."""

    def first_gradient(self, run: Run, weight: SparseWeight, parameter: Tensor) -> None:
        """The run's first gradient has arrived: of ``weight``, within the backward pass."""

    def first_step(self, run: Run) -> None:
        """An optimizer is about to step the run's weights for the first time. Raises to refuse; then it is asked again
        at the next step."""


_run_watchers: list[RunWatcher] = []


def watch_runs(watcher: RunWatcher) -> None:
    """Let ``watcher`` look at every run of this process."""
    _run_watchers.append(watcher)


class Stepping:
    """Moves a run on as optimizers step: a :class:`~mst_compile.state.steps.StepWatcher`.

    Args:
        auto_step: whether optimizer steps are counted; otherwise :meth:`step` is called by hand.
    """

    def __init__(self, run: Run, auto_step: bool) -> None:
        self._run = run
        self._auto_step = auto_step
        self._clock = StepClock()
        self._warned: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._deferred = False  # a step within the backward pass waits for its end
        self._making_state = False  # the optimizer that steps now only makes its state
        self._foreign_steps = 0  # of optimizers without sparse weights; -1: warned
        self._has_stepped = False
        for weight in run.weights:
            first_gradients[weight] = weakref.WeakMethod(self._tell_of_gradient)

    def step(self) -> None:
        """A training step is complete."""
        weights = self._run.weights
        weights.rebind()
        late = self._clock.complete(weights.with_gradients())
        for weight, parameter in weights.parameters():
            if weight.name in late:  # another optimizer's, whose turn is still to come
                _harvest(weight, parameter, 1.0)
        self._run.complete_step()

    def before_step(self, step: Step) -> None:
        """An optimizer steps: harvest growth scores, and let it see zeros outside the active blocks."""
        run, optimizer = self._run, step.optimizer
        own = run.of(optimizer)
        if not own or self._making_state or optimizers.skipped_by_scaler(optimizer):
            return
        if not optimizer.state and optimizers.only_makes_state(optimizer):
            self._making_state = True
            step.outermost.at_end(lambda _: setattr(self, "_making_state", False))
            return
        if not self._has_stepped:
            for watcher in _run_watchers:
                watcher.first_step(run)
            self._has_stepped = True
        run.optimizers.add(optimizer)
        run.weights.rebind()
        if not step.nested:
            scaled = scale_rates(optimizer, own)
            step.at_end(lambda _: restore_rates(scaled))
        names = {weight.name for weight, _ in own}
        late = self._clock.turn(names, run.weights.with_gradients(), nested=step.nested)
        if self._clock.missed:
            run.step_count += 1  # too late for its topology event: the forward pass has been
        versions = [parameter._version for _, parameter in own]
        step.at_end(lambda failed: self._after_failure(step, names, late, versions) if failed else None)
        scale, in_backward = optimizers.gradient_scale(optimizer), _in_backward()
        for weight, parameter in own:
            if weight.name not in late:
                _harvest(weight, parameter, scale)
            # Within the backward pass the hook that masks gradients may come after the one that steps.
            if (weight.name in late or in_backward) and parameter.grad is not None:
                weight.zero_inactive_(parameter.grad)
            if weight.grown is not None and parameter.grad is not None:
                optimizers.start_second_moment(optimizer, parameter, weight.grid, weight.grown)

    def after_step(self, step: Step) -> None:
        """An optimizer has stepped: count the step if it owns sparse weights, and completes a training step."""
        run, optimizer = self._run, step.optimizer
        if self._making_state or optimizers.skipped_by_scaler(optimizer):
            return
        own = run.of(optimizer)
        if own and not optimizers.keeps_zeros(optimizer):
            self._mask_after(optimizer, own)
        if step.nested:
            return
        for weight, parameter in own:
            if parameter.grad is not None:
                weight.grown = None  # they have had their first step
        if not self._auto_step:
            return
        if own:
            if _in_backward():
                self._step_after_backward()
            elif self._clock.is_complete(run.weights.with_gradients()):
                self.step()  # of several optimizers the last one completes the step
        elif run.active and run.step_count == 0:
            self._warn_if_never_stepped(optimizer)

    def _tell_of_gradient(self, weight: SparseWeight, parameter: Tensor) -> None:
        for other in self._run.weights:  # one is told of, the first
            first_gradients.pop(other, None)
        for watcher in _run_watchers:
            watcher.first_gradient(self._run, weight, parameter)

    def _after_failure(self, step: Step, names: set[str], late: set[str], versions: list[int]) -> None:
        """A step has raised: it was one if weights have moved all the same, as where a hook after it raised."""
        if versions == [parameter._version for _, parameter in self._run.of(step.optimizer)]:
            self._clock.failed(names, late)
        elif not step.nested:
            self.after_step(step)

    def _step_after_backward(self) -> None:
        """Optimizers that step within the backward pass, one a parameter: count once, when all gradients are there."""
        if not self._deferred:
            self._deferred = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)  # type: ignore[attr-defined]

    def _finish_backward(self) -> None:
        self._deferred = False
        self.step()

    def _mask_after(self, optimizer: Optimizer, own: list[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Zero what an optimizer of unknown arithmetic made non-zero, and warn once if it keeps foreign state."""
        for weight, parameter in own:
            weight.zero_inactive_(parameter)
        found = [] if optimizer in self._warned else optimizers.foreign_state(optimizer)
        if found:
            self._warned.add(optimizer)
            warnings.warn(
                f"{type(optimizer).__name__} keeps state that does not belong to single elements of weights "
                f"({', '.join(found)}): what it remembers of dropped blocks cannot be removed. Weights and gradients "
                "are masked all the same",
                MSTWarning,
                stacklevel=5,
            )

    def _warn_if_never_stepped(self, optimizer: Optimizer) -> None:
        if self._foreign_steps < 0 or not self._run.weights.with_gradients():
            return
        self._foreign_steps += 1
        if self._foreign_steps >= _PATIENCE:
            self._foreign_steps = -1
            warnings.warn(
                f"{type(optimizer).__name__} has stepped {_PATIENCE} times but owns none of the sparse weights, so the "
                "sparsity schedule does not advance. Build the optimizer from model.parameters() of the sparsified "
                "model, or pass auto_step=False to sparsify and call sparsifier(model).step() yourself",
                MSTWarning,
                stacklevel=4,
            )


def _harvest(weight: SparseWeight, parameter: nn.Parameter, scale: float) -> None:
    """Add a dense gradient (times ``scale``) to the growth scores, and zero its inactive part."""
    if not weight.dense_grad or parameter.grad is None:
        return
    weight.set_dense_grad(False)
    score = block_mean_square(parameter.grad, weight.grid) / (scale * scale)
    weight.scores = score if weight.scores is None else weight.scores + score
    weight.zero_inactive_(parameter.grad)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
