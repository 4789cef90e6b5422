"""What a run does when optimizers step.

Within one training step::

    forward, backward   gradients arrive; outside the active blocks they are set to 0 as soon as they have accumulated
                        (kept dense on the steps before a topology event, so that growth can read them)
    optimizer.step()    before: values that stand outside the active blocks are settled, a new optimizer's state is
                        cleaned; growth scores are harvested and the inactive part of the gradient is zeroed, with a
                        closure each time it has run
                        after:  blocks that have just grown are written as the schedule wants their first steps,
                        what cannot be trusted to have stayed 0 is zeroed, the step is counted and, on an event,
                        the topology changes
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import block_means
from mst_compile.blocks.memory import is_plain
from mst_compile.blocks.shards import is_sharded, lay_out_gradient
from mst_compile.errors import MSTWarning

from . import optimizers, regrown
from .binding import gradients
from .clock import StepClock
from .learning_rates import restore_rates, scale_rates
from .master_steps import MasterSteps
from .run import Run
from .second_moments import begin_elsewhere, start_fresh, start_second_moments
from .standstill import Standstill
from .steps import Step
from .strides import fused_on_cpu, lay_out
from .together import want_dense_gradients
from .weight import SparseWeight, mask_gradients

_NOWHERE = -1  # id of no backward pass


@dataclass
class _Turn:
    """What was found when a step began.

    Attributes:
        own: the weights that the optimizer trains.
        late: weights whose training step was counted before.
        scores: growth scores before it, by name.
        versions: of the Parameters, by name.
        fresh: names of the weights that the optimizer had no state of.
        young: values of young blocks before it, by name.
        written: frozen weights with values outside the active blocks, which stay, by name.
        done: how much of what follows a step has happened: an interrupt may come anywhere, and then the rest is done.
        stepped: what young blocks are to be after it, by name of their weight.
    """

    own: list[tuple[SparseWeight, nn.Parameter]]
    late: set[str]
    scores: dict[str, Tensor | None]
    versions: dict[str, int]
    fresh: set[str]
    young: dict[str, Tensor]
    written: set[str]
    done: int = 0
    stepped: dict[str, regrown.Stepped] = field(default_factory=dict)


_YOUNG, _ZEROS, _GROWN, _ALL = range(1, 5)  # values of _Turn.done


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
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # unknown ones, their first state cleaned
        self._later: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()  # their steps since then
        self._turns: dict[Step, _Turn] = {}  # steps under way
        self._deferred = _NOWHERE  # the backward pass for whose end a step within it waits
        self._making_state = False  # the optimizer that steps now only makes its state
        self._standstill = Standstill(run, auto_step)
        self._masters = MasterSteps(run)
        self._has_stepped = self._had_gradient = False
        for weight in run.weights:
            gradients[weight] = weakref.WeakMethod(self._gradient_arrived)

    def step(self) -> None:
        """A training step is complete."""
        self._finish()
        self._run.weights.rebind()
        self._complete(self._run.weights.with_gradients())

    def _complete(self, pending: set[str]) -> None:
        """Count a training step of weights that are bound; ``pending`` have gradients."""
        self._clock.complete(pending, self._run.step_count + 1)
        self._finish()
        if not self._standstill.is_over:
            self._standstill.counted()
            self._stop_listening()

    def _finish(self) -> None:
        """Do what follows from a training step that was counted: what an interrupt has left of it, or all."""
        self._run.finish()
        if self._clock.completed is None:
            return
        late, number = self._clock.completed
        try:
            if self._run.step_count == number - 1:  # else it has been completed, or a checkpoint was loaded meanwhile
                # Another optimizer's, whose turn is still to come.
                if late:
                    _harvest([(w, p, w.scores) for w, p in self._run.weights.parameters() if w.name in late], 1.0)
                self._run.complete_step()
        except Exception:
            self._clock.done()
            raise
        self._clock.done()

    def before_step(self, step: Step) -> None:
        """An optimizer steps: harvest growth scores, and let it see zeros outside the active blocks."""
        run, optimizer = self._run, step.optimizer
        own = run.of(optimizer)
        if not own and run.active:
            run.weights.check_not_flattened(optimizer)
            if self._masters.before(step, self):
                return
            self._standstill.check(optimizer)
        if not own or self._making_state or optimizers.skipped_by_scaler(optimizer):
            return
        self._finish()
        if not optimizer.state and optimizers.only_makes_state(optimizer):
            self._making_state = True
            step.outermost.at_end(lambda _: setattr(self, "_making_state", False))
            return
        self.begin(own)
        run.weights.rebind()
        if run.meet(optimizer, own):
            self._checked.discard(optimizer)  # state of Parameters that have joined it begins at this step
        if not step.nested:
            scaled: list[tuple[dict[str, Any], dict[str, Any]]] = []
            step.at_end(lambda _: restore_rates(scaled))
            scale_rates(optimizer, own, scaled)
        scores, versions = {w.name: w.scores for w, _ in own}, {w.name: p._version for w, p in own}
        fresh = {w.name for w, p in own if not optimizer.state.get(p)}
        young = regrown.values_before(run.schedule, own)
        written = {w.name for w, p in own if not p.requires_grad and not (w.is_clean(p) or w.look(p))}
        turn = self._turns[step] = _Turn(own, set(), scores, versions, fresh, young, written)
        step.at_end(lambda failed: self._end(step, turn, failed))
        turn.late = self._clock.turn(set(versions), run.weights.with_gradients(), nested=step.nested)
        if self._clock.missed:
            run.skip_step()
        self._take_gradients(step, own)

    def begin(self, own: Sequence[tuple[SparseWeight, nn.Parameter]] = ()) -> None:
        """The run is about to be trained, perhaps for the first time."""
        self._finish()
        if not self._has_stepped:
            for watcher in _run_watchers:
                watcher.first_step(self._run)
            _warn_if_shared(own)
            self._has_stepped = True

    def after_closure(self, step: Step) -> None:
        """The closure of a step has computed gradients: they are what the optimizer will use."""
        if step in self._turns:
            self._take_gradients(step, self._run.of(step.optimizer))

    def _take_gradients(self, step: Step, own: list[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Harvest growth scores from the gradients that the optimizer will use, and zero their inactive part.

        A closure that runs again begins its scores again, so that they are of its last gradients.
        """
        optimizer, turn = step.optimizer, self._turns[step]
        scale = optimizers.gradient_scale(optimizer)
        found = [(weight, parameter) for weight, parameter in own if parameter.grad is not None]
        fused = fused_on_cpu(optimizer)
        for _, parameter in found:
            lay_out_gradient(parameter)
            lay_out(parameter, fused)
        read = [(w, p, turn.scores.get(w.name)) for w, p in found if w.name not in turn.late]
        _harvest(read, scale, again=step.has_closure)
        mask_gradients((weight, parameter.grad) for weight, parameter in found)  # type: ignore[misc]
        grown = [(weight, parameter) for weight, parameter in found if weight.grown is not None]
        start_fresh(optimizer, grown)
        if grown and not regrown.by_own_steps(self._run.schedule, optimizer):
            start_second_moments(optimizer, grown)

    def after_step(self, step: Step) -> None:
        """An optimizer has stepped: count the step if it owns sparse weights, and completes a training step."""
        run, optimizer, turn = self._run, step.optimizer, self._turns.get(step)
        if self._masters.after(step):
            return
        if self._making_state or optimizers.skipped_by_scaler(optimizer):
            return
        self._follow(step, turn, run.of(optimizer) if turn is None else turn.own)

    def after_keeper(self, step: Step) -> None:
        """Copies of weights have been trained, and the model with them."""
        self._masters.finished(step, self)

    def trained(self) -> None:
        """The weights of the model have been trained, by copies of them."""
        self._standstill.own_step()
        if self._auto_step:
            self._complete(set())

    def _follow(self, step: Step, turn: _Turn | None, own: list[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Do what follows from a step of an optimizer, or what is left of that."""
        optimizer = step.optimizer
        if turn is not None:
            if turn.done < _YOUNG:
                self._write_young(step, own, turn)
                turn.done = _YOUNG
            if turn.done < _ZEROS:
                self._keep_zeros(optimizer, own, turn)
                turn.done = _ZEROS
        if not step.nested:
            if turn is None or turn.done < _GROWN:
                for weight, parameter in own:
                    if parameter.grad is not None:
                        weight.grown = None  # they have had their first step
                if turn is not None:
                    turn.done = _GROWN
            self._count(optimizer, own)
        if turn is not None:
            turn.done = _ALL

    def _count(self, optimizer: Optimizer, own: list[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Count the step of an optimizer, if it completes a training step."""
        run = self._run
        if not self._auto_step:
            return
        if own:
            self._standstill.own_step()
            if _in_backward():
                self._step_after_backward()
            elif self._clock.completed is not None:
                self._finish()  # it was counted, and then interrupted
            elif self._clock.is_complete(pending := run.weights.with_gradients()):
                self._complete(pending)  # of several optimizers the last one completes the step
        elif run.active:
            self._standstill.foreign_step(optimizer)

    def _write_young(self, step: Step, own: list[tuple[SparseWeight, nn.Parameter]], turn: _Turn) -> None:
        """Let young blocks step as the schedule says: once, whoever steps around the one that has moved them."""
        if not turn.young:
            return
        done = regrown.after_step(self._run.schedule, step.optimizer, own, turn.young, turn.stepped)
        outer = step.outer
        while outer is not None:
            if outer in self._turns:
                self._turns[outer].young = {n: v for n, v in self._turns[outer].young.items() if n not in done}
            outer = outer.outer

    def _end(self, step: Step, turn: _Turn, failed: bool) -> None:
        """A step is over. One that has raised was one if weights have moved all the same, as where a hook after it
        raised."""
        if failed and turn.done < _ALL:
            own = self._run.of(step.optimizer)
            moved = turn.done or any(parameter._version != turn.versions.get(weight.name) for weight, parameter in own)
            if not moved:
                self._clock.failed(set(turn.versions), turn.late)
            elif turn.done or not step.nested:
                self._follow(step, turn, own)
        self._turns.pop(step, None)

    def _gradient_arrived(self, weight: SparseWeight, parameter: Tensor) -> None:
        """A gradient has arrived before a step was counted in this process."""
        if not self._had_gradient:
            self._had_gradient = True
            for watcher in _run_watchers:
                watcher.first_gradient(self._run, weight, parameter)
        if not self._turns and not weight.timed:
            self._standstill.arrived(weight, parameter)
        if self._standstill.is_over:
            self._stop_listening()

    def _stop_listening(self) -> None:
        for weight in self._run.weights:
            gradients.pop(weight, None)

    def _step_after_backward(self) -> None:
        """Optimizers that step within the backward pass, one a parameter: count once, when all gradients are there."""
        backward = torch._C._current_graph_task_id()
        if self._deferred != backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)  # type: ignore[attr-defined]
            self._deferred = backward

    def _finish_backward(self) -> None:
        if self._deferred != _NOWHERE:
            self.step()
        self._deferred = _NOWHERE

    def _keep_zeros(self, optimizer: Optimizer, own: list[tuple[SparseWeight, nn.Parameter]], turn: _Turn) -> None:
        """Zero what a step may have made non-zero, and warn once if its optimizer keeps foreign state.

        A weight has stayed 0 if three things hold: the optimizer's arithmetic is known to keep zeros, dividing none by
        another, so did its state begin, and the gradient that it read is the one that was masked, unchanged.
        """
        known, spread = optimizers.keeps_zeros(optimizer), []
        divided = optimizers.divides_by_zero(optimizer, (parameter for _, parameter in own)) if known else set()
        look = not known and self._is_time_to_look(optimizer, own)
        for weight, parameter in own:
            weight.set_dense_grad(False)
            gradient = parameter.grad
            # Kernels of other optimizers write through addresses, and leave the version as it was.
            told = known or gradient is None
            if told and parameter._version == turn.versions.get(weight.name) and not is_sharded(parameter):
                continue  # it was not stepped
            weight.moved = weight.trained = True
            if weight.name in turn.written:
                # By a gradient from before it was frozen; with L2, decay has entered the optimizer's state.
                weight.forget()
                self._run.optimizers.discard(optimizer)
                continue
            kept = weight.is_dense or gradient is None or weight.is_masked(gradient)
            kept = kept and id(parameter) not in divided
            if not (known and kept):
                weight.zero_inactive_(parameter)
            fresh = weight.name in turn.fresh
            if not kept or (not known and fresh and optimizer not in self._checked):
                optimizers.zero_state_(optimizer, weight, parameter, first=fresh)
            elif look and not weight.is_dense:
                known_keys = begin_elsewhere(optimizer)  # Rprop's step sizes are never 0, and begin anew
                found = optimizers.not_of_elements(optimizer, weight, parameter)
                spread += [what for what in found if what.split(",")[0] not in known_keys]
            weight.note_clean(parameter)
        if not known:
            self._checked.add(optimizer)
            self._warn_of_foreign_state(optimizer, spread)

    def _is_time_to_look(self, optimizer: Optimizer, own: list[tuple[SparseWeight, nn.Parameter]]) -> bool:
        """Whether to look at what an unknown optimizer keeps outside the active blocks: at the first, second, fourth,
        eighth, ... step after it has begun at 0. What it does every tenth step is seen late, but seen."""
        if optimizer not in self._checked or optimizer in self._warned or all(weight.is_dense for weight, _ in own):
            return False
        count = self._later[optimizer] = self._later.get(optimizer, 0) + 1
        return count.bit_count() == 1

    def warn_of_state(self, optimizer: Optimizer) -> None:
        """Say so if an optimizer keeps state that belongs to no single element."""
        self._warn_of_foreign_state(optimizer, [])

    def _warn_of_foreign_state(self, optimizer: Optimizer, spread: list[str]) -> None:
        if optimizer in self._warned:
            return
        found = [*optimizers.foreign_state(optimizer), *dict.fromkeys(spread)]
        if found:
            self._warned.add(optimizer)
            warnings.warn(
                f"{type(optimizer).__name__} keeps state that does not belong to single elements of weights "
                f"({', '.join(found)}): what it remembers of dropped blocks cannot be removed. Weights and gradients "
                "are masked all the same",
                MSTWarning,
                stacklevel=6,
            )


def _warn_if_shared(own: Sequence[tuple[SparseWeight, nn.Parameter]]) -> None:
    """Say what goes wrong where several processes train weights that they have in common: each has masks of its own,
    and none sees the others' writes."""
    shared = [
        weight.name for weight, parameter in own if is_plain(parameter) and parameter.is_cpu and parameter.is_shared()
    ]
    if shared:
        warnings.warn(
            f"{', '.join(shared[:3])} lie in memory that processes share, as torch.multiprocessing hands a model over: "
            "masks are each process's own, so one process alone may train these weights. To train here apart from the "
            "others, train copy.deepcopy(model)",
            MSTWarning,
            stacklevel=6,
        )


def _harvest(own: list[tuple[SparseWeight, nn.Parameter, Tensor | None]], scale: float, *, again: bool = False) -> None:
    """Add dense gradients (times ``scale``) to growth scores, and zero their inactive part.

    Args:
        own: weights, and their scores before.
        again: other dense gradients may take the place of these in the same step.
    """
    found: list[tuple[SparseWeight, Tensor, Tensor | None]] = []
    for weight, parameter, base in own:
        if weight.dense_grad and parameter.grad is not None and not weight.was_masked(parameter.grad):
            lay_out_gradient(parameter)
            found.append((weight, parameter.grad, base))
    means = block_means([(gradient, weight.grid) for weight, gradient, _ in found])
    for (weight, _, base), mean in zip(found, means, strict=True):
        score = mean / (scale * scale)
        weight.scores = score if base is None else base + score
    want_dense_gradients((weight for weight, _, _ in found), again)
    mask_gradients((weight, gradient) for weight, gradient, _ in found)
    for weight, gradient, _ in found:
        weight.note_masked(gradient)  # a dense one's, too, that it is not read twice


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != _NOWHERE
