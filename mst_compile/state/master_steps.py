"""What a run does when somebody steps an optimizer that trains copies of its weights: what :mod:`.stepping` does for an
optimizer of the weights themselves, in the same order.

The keeper of the copies begins a step; it may find infinite gradients and leave. Else it steps its optimizer, once or
for one part of the copies after another, with gradients that are summed over ranks, unscaled and clipped. Then it
writes the copies into the model, and only when it is done has the model been trained::

    keeper.step()
        optimizer.step()    before: growth scores are read from the gradients, which then are 0 outside the active
                            blocks; regrown blocks get their first second moment
                            after:  young blocks are written as the schedule wants them, and what cannot be trusted to
                            have stayed 0 is zeroed
    the step is counted, and on an event the topology changes, in the copies and in the model
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from . import optimizers, regrown
from .learning_rates import restore_rates, scale_rates
from .masters import Held, Keeper, Shadow, block_means_of, clear_state_, held_by, mask_, members
from .run import Run
from .second_moments import SECOND_MOMENTS, start_second_moments
from .steps import Step
from .together import want_dense_gradients


class Told(Protocol):
    """Who is told of these steps; not kept, as it leads here."""

    def begin(self) -> None:
        """The run is about to be trained."""

    def trained(self) -> None:
        """The weights of the model have been trained."""

    def warn_of_state(self, optimizer: Optimizer) -> None:
        """Say so if an optimizer keeps state that belongs to no single element."""


@dataclass
class _Turn:
    """A step of an optimizer that trains copies.

    Attributes:
        told: who is told of it.
        own: what it trains in this step.
        before: versions of the masters before it, by id.
        young: values of young blocks before it, by name of their weight.
        stepped: what they are to be after it.
        first: whether the optimizer had no state of the copies.
        done: whether what follows from it has happened.
    """

    told: Told
    own: list[Held]
    before: dict[int, int]
    young: dict[str, Tensor]
    first: bool
    stepped: dict[str, regrown.Stepped] = field(default_factory=dict)
    done: bool = False


class MasterSteps:
    """Follows the keepers of one run's weights."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._turns: dict[Step, _Turn] = {}
        self._ours: weakref.WeakSet[Step] = weakref.WeakSet()  # steps of optimizers that train copies
        self._trained: weakref.WeakSet[Step] = weakref.WeakSet()  # keepers' steps in which an optimizer has stepped
        self._looked: weakref.WeakSet[Step] = weakref.WeakSet()  # keepers' steps whose beginning has been seen

    # -- a step of the optimizer ---------------------------------------------------------------------------------------

    def before(self, step: Step, told: Told) -> bool:
        """An optimizer is about to step within a keeper's step; returns whether it trains copies of the weights.

        Raises:
            ParallelismError: its steps cannot be followed.
        """
        run, optimizer, around = self._run, step.optimizer, step.within
        if around is None or not run.active:
            return False
        keeper = around.keeper
        masters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = held_by(keeper, run.weights.held(), masters)
        if not own:
            return False
        run.masters.stepped(keeper, optimizer)
        self._ours.add(step)
        if step.outer is not around or optimizers.skipped_by_scaler(optimizer):
            return True  # part of a step that was seen, or none
        if around not in self._looked:
            self._begin(keeper, around, told)
        scaled: list[tuple[dict[str, Any], dict[str, Any]]] = []
        step.at_end(lambda _: restore_rates(scaled))
        pairs = [(held.weight, held.parameter) for held in own]
        scale_rates(optimizer, pairs, scaled, lambda p: members(keeper, p))
        own = [held for held in own if held.piece.master.grad is not None]
        turn = self._turns[step] = _Turn(
            told,
            own,
            {id(held.piece.master): held.piece.master._version for held in own},
            {},
            first=not any(optimizer.state.get(held.piece.master) for held in own),
        )
        step.at_end(lambda failed: self._end(step, turn, failed))
        self._take_gradients(optimizer, own)
        turn.young = self._values_before(optimizer, own)
        return True

    def _begin(self, keeper: Keeper, around: Step, told: Told) -> None:
        """The first step of an optimizer within one of a keeper: the model, and its copies of it, shall be 0 outside
        the active blocks."""
        run = self._run
        keeper.check()
        run.masters.meet(keeper)
        told.begin()
        run.weights.rebind()
        run.meet_masters([(held.weight, held.parameter) for held in held_by(keeper, run.weights.held())], keeper)
        self._looked.add(around)
        around.at_end(lambda failed: self._finish(around, told, failed))

    def _take_gradients(self, optimizer: Optimizer, own: Sequence[Held]) -> None:
        """Read growth scores from the gradients that the optimizer will use, zero their inactive part, and let the
        second moments of blocks that have grown begin."""
        scale = optimizers.gradient_scale(optimizer)
        read = [held for held in own if held.weight.dense_grad]
        for held in read:
            gradient = held.piece.master.grad
            assert gradient is not None
            weight = held.weight
            score = block_means_of(held, gradient) / (scale * scale)
            weight.scores = score if weight.scores is None else weight.scores + score
        want_dense_gradients((held.weight for held in read), False)
        for held in own:
            assert held.piece.master.grad is not None
            mask_(held, held.piece.master.grad)
        begins = not regrown.by_own_steps(self._run.schedule, optimizer)
        for held in own if begins else ():  # one after the other: no rank has room for all of them
            if held.weight.grown is not None:
                shadow = Shadow(optimizer, [held], SECOND_MOMENTS, values=False)
                start_second_moments(shadow.optimizer, shadow.own)
                shadow.write()

    def _values_before(self, optimizer: Optimizer, own: Sequence[Held]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for held in own if regrown.follows(self._run.schedule) else ():
            if held.weight.grown is not None or held.weight.young is not None:
                found |= regrown.values_before(self._run.schedule, Shadow(optimizer, [held], (), values=True).own)
        return found

    def after(self, step: Step) -> bool:
        """An optimizer has stepped; returns whether it trains copies of the weights."""
        turn = self._turns.get(step)
        if turn is not None:
            self._follow(step, turn)
        return step in self._ours

    def _follow(self, step: Step, turn: _Turn) -> None:
        """Do what follows from a step of an optimizer."""
        optimizer = step.optimizer
        for held in turn.own:
            if held.weight.name in turn.young:
                shadow = Shadow(optimizer, [held], None, values=True)
                regrown.after_step(self._run.schedule, shadow.optimizer, shadow.own, turn.young, turn.stepped)
                shadow.write()
        known = optimizers.keeps_zeros(optimizer)
        divided = optimizers.divides_by_zero(optimizer, (held.piece.master for held in turn.own)) if known else set()
        for held in turn.own:
            held.weight.set_dense_grad(False)
            held.weight.moved = True
            held.weight.grown = None
            kept = known and id(held.piece.master) not in divided
            if not kept:
                mask_(held, held.piece.master)
            if not kept and (known or turn.first):
                clear_state_(held, optimizer)
        if not known:
            turn.told.warn_of_state(optimizer)
        turn.done = True
        if step.within is not None:
            self._trained.add(step.within)

    def _end(self, step: Step, turn: _Turn, failed: bool) -> None:
        """A step is over. One that has raised was one if the copies have moved all the same."""
        moved = any(held.piece.master._version != turn.before[id(held.piece.master)] for held in turn.own)
        if failed and moved and not turn.done:
            self._follow(step, turn)
        self._turns.pop(step, None)

    # -- a step of the keeper ------------------------------------------------------------------------------------------

    def finished(self, step: Step, told: Told) -> None:
        """A keeper is done with a step: the model has been trained, if an optimizer has stepped."""
        if step not in self._trained:
            return
        self._trained.discard(step)
        for held in held_by(step.keeper, self._run.weights.held()):  # type: ignore[arg-type]
            held.weight.note_clean(held.parameter)
        told.trained()

    def _finish(self, step: Step, told: Told, failed: bool) -> None:
        """A keeper's step has ended, and perhaps it was not said that it is done."""
        self._looked.discard(step)
        if failed and step in self._trained:
            self.finished(step, told)
