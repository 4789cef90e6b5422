"""A sparse run: a model's sparse weights, how far it is, and what moves it on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.shards import is_sharded
from mst_compile.errors import ArgumentError, MSTWarning, OptimizerError
from mst_compile.rules.schedule import Schedule, attention_of, phase_of, sparsity_of

from .attention import AttentionState
from .checkpoint_hooks import take_unclaimed
from .event import Change, Plan, apply, carry_out, change_mask, change_to, plan_event
from .first_masks import FirstMasks, Masks, check_masks, choose, plan_first_masks
from .listeners import Listeners, TopologyEvent, changes
from .lookout import Lookout
from .masters import Keeper, Masters
from .optimizers import callers, keeps_zeros, zero_state_
from .packing import TOPOLOGY, check_entry
from .regrown import follows
from .resume import Progress, Topology, from_entry, restore
from .settle import settle, was_written_here
from .strides import lay_out_state
from .together import want_dense_gradients
from .unseen import warn_unseen
from .weight import UNKNOWN, SparseWeight
from .weights import Weights

_PATIENCE = 10  # steps after which weights that no compiled graph has taken are named


def _was_written(weight: SparseWeight, parameter: Tensor) -> bool:
    """Whether somebody was seen to write to a weight."""
    return not weight.is_clean(parameter) or (is_sharded(parameter) and was_written_here(weight, parameter))


def _unknown() -> None:
    """The model of a copy."""


@dataclass
class Completion:
    """How far the completion of a training step has come.

    Attributes:
        number: of the step.
        due: whether a topology event belongs to it.
        seen: whether it is known which weights have moved.
        changes: of the event, by names of weights; None before they are planned.
        before: the masks that they had, likewise.
        skipped: why the event is none.
        begun: whether a change may have been made.
        event: what listeners will be told.
        failed: what of optimizers' state could not be written.
    """

    number: int
    due: bool
    seen: bool = False
    changes: dict[str, Change] | None = None
    before: dict[str, Tensor] = field(default_factory=dict)
    skipped: str = ""
    begun: bool = False
    event: TopologyEvent | None = None
    failed: OptimizerError | None = None


class Run:
    """What steps and checkpoints work on.

    Attributes:
        optimizers: those that have stepped since masks were last loaded, or have followed values that were: their state
            is 0 outside the active blocks.
        active: False once the model was made dense again.
        root: the model, if it is known: a copy's is not.
        overdue: a topology event has been missed and is made up for at the next step.
        first_masks: how the masks of step 0 were made.
        masters: who keeps copies of the weights, and has optimizers train these.
    """

    def __init__(self, schedule: Schedule, weights: Weights, attention: AttentionState, seed: int) -> None:
        self.schedule = schedule
        self.weights = weights
        self.attention = attention
        self.seed = seed
        self.step_count = 0
        self.active = True
        self.overdue = False
        self._completion: Completion | None = None  # of a step, while it is under way or after an interrupt
        self._steps_here = 0  # in this process, until weights that no graph takes were looked for
        self.first_masks = FirstMasks()
        self._lookout = Lookout()
        self._traceless = 0  # times that values were found which nobody was seen to write
        self._know_nobody()
        self._drive()

    def _know_nobody(self) -> None:
        """Neither the model, nor optimizers, nor who listens: of a run that is new, and of a copy."""
        self.root: Callable[[], nn.Module | None] = _unknown
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # All that have stepped, and how many Parameters each trains: what a topology change drops is 0 in all of them.
        self._sizes: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        # Those that have such weights too and were not seen to step, as what wraps another optimizer may not be.
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # Whose state came with the masks of the moment: by name of a weight, its number of changes then.
        self._loaded: weakref.WeakKeyDictionary[Optimizer, dict[str, int]] = weakref.WeakKeyDictionary()
        self.listeners = Listeners()
        self.masters = Masters()

    def _drive(self) -> None:
        for weight in self.weights:
            weight.driver = weakref.ref(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("optimizers", "_sizes", "_others", "_loaded", "root", "listeners", "masters")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_completion": None, "_traceless": 0, "_lookout": Lookout()} | state)
        self._know_nobody()
        self._drive()

    @property
    def progress(self) -> Progress:
        """What a checkpoint holds beside the topology."""
        self.finish()
        return Progress(self.step_count, self.seed)

    @property
    def keeps_scores(self) -> bool:
        """Whether growth scores may be waiting when a checkpoint is written."""
        return self.schedule.growth_rule.gradient_steps > 1 or any(w.scores is not None for w in self.weights)

    @property
    def keeps_young(self) -> bool:
        """Whether blocks may be young when a checkpoint is written."""
        return follows(self.schedule)

    def of(self, optimizer: Optimizer) -> list[tuple[SparseWeight, nn.Parameter]]:
        """The sparse weights that ``optimizer`` trains."""
        return self.weights.of(optimizer) if self.active else []

    def densities(self) -> list[float]:
        """Target density of each weight after the steps that were taken."""
        return self.weights.densities(self.schedule, sparsity_of(self.schedule, self.step_count))

    def draw_first_masks(self, rescale: bool, masks: Masks = None) -> None:
        """The masks of step 0; with ``rescale`` what stays of freshly initialised weights grows by
        ``density ** -0.5``."""
        choice, plan = FirstMasks(), Plan({})
        check_masks(masks, self.weights)
        if sparsity_of(self.schedule, 0) > 0:
            choice = choose(masks, self.weights)
            plan = plan_first_masks(choice, masks, self.weights, self.densities(), self.schedule.magnitude, self.seed)
        elif isinstance(masks, Mapping):
            raise ArgumentError(
                f"masks gives the first masks of {len(masks)} weights, but the schedule starts dense (sparsity_at(0) "
                "is 0) and draws none: leave masks out, or call sparsifier(model).apply_mask(name, mask)"
            )
        self.prepare_next_step()  # asks the schedule, which may fail, before weights have changed
        apply(plan, self.weights.parameters(), (), rescale=rescale and choice.fresh)
        self.first_masks = choice
        self.take_unclaimed()

    def complete_step(self) -> None:
        """Count a training step, change the topology if the schedule says so, and prepare the next.

        If anything is interrupted, however often, the rest is done at the next step or when a checkpoint is written,
        unless it could be done at once.
        """
        self.finish()
        number = self.step_count + 1
        try:
            due = bool(self.overdue or self.schedule.is_topology_event(number))
        except Exception:
            self._completion = Completion(number, False)
            self.finish()
            raise
        self._completion = Completion(number, due)
        self.finish()

    def finish(self) -> None:
        """Bring the completion of a step to its end, if it was interrupted."""
        if self._completion is None:
            return
        try:
            self._go_on_completing()
        except BaseException:
            try:
                self._go_on_completing()
            except Exception:  # what cannot be is left out; what was interrupted is made up for
                self._completion, self.overdue = None, False
                self._note_versions(self.weights.parameters())
                self.prepare_next_step()
            raise

    def _go_on_completing(self) -> None:
        """Do what is left to be done; each part can be done again."""
        now = self._completion
        if now is None:
            return
        self.step_count = now.number
        own = list(self.weights.parameters())
        if not now.seen:
            for weight, parameter in own:
                weight.moved |= parameter.grad is not None or weight.version not in (UNKNOWN, parameter._version)
                weight.trained |= weight.moved
            self._steps_here += 1
            now.seen = True
            self.overdue = now.due
        if self.overdue:
            self._change_topology(now, own)
        self._note_versions(own)
        self.prepare_next_step()
        event, self._completion = now.event, None
        if self._steps_here == _PATIENCE:
            # A keeper of copies has taken the gradients away.
            warn_unseen([weight for weight, parameter in own if parameter.grad is not None or self.masters])
        if event is not None:  # last: what a callback raises finds a step that is complete
            self.listeners.tell(event)
        if now.failed is not None:
            raise now.failed

    @staticmethod
    def _note_versions(own: Iterable[tuple[SparseWeight, nn.Parameter]]) -> None:
        for weight, parameter in own:
            weight.version = parameter._version

    def skip_step(self) -> None:
        """Count a training step that was over before it was known to be one: too late for its topology event."""
        self.finish()
        self.step_count += 1
        self.overdue |= self.schedule.is_topology_event(self.step_count)

    def meet(self, optimizer: Optimizer, own: list[tuple[SparseWeight, nn.Parameter]]) -> bool:
        """Before an optimizer steps: its weights and its state of them shall be 0 outside the active blocks.

        It may have a past, from before the model was made sparse or from a checkpoint; so may Parameters that have
        joined it since its last step.

        Returns:
            Whether any have joined it, or it has never stepped.
        """
        if self.masters:
            self.masters.forget()
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        joined = self._sizes.get(optimizer) != size
        first = joined or optimizer not in self.optimizers  # something of which nothing is known, nor its past
        if first:
            self.weights.check_replaced(self.root())
            self.weights.warn_untied()
            if optimizer not in self._sizes and optimizer not in self._others:
                self._others.update(other for other in callers() if self._may_keep(other, optimizer))
            self._others.discard(optimizer)
            self._sizes[optimizer] = size
            self.optimizers.discard(optimizer)  # until what it keeps is cleaned, which may raise
        seen = not first and self._lookout.sees(own)
        # What is seen here of a spread weight others may not see: each rank looks at its own part.
        self._settle(own, look=first or seen, alone=seen)
        if optimizer not in self.optimizers:
            self._clean(optimizer, own)
        for weight, parameter in own:
            weight.version = parameter._version
        return joined

    def meet_masters(self, own: Sequence[tuple[SparseWeight, nn.Parameter]], keeper: Keeper) -> None:
        """Before copies of weights are stepped: the weights, the copies and the optimizer's state of these shall be 0
        outside the active blocks, and where somebody has written to a weight its copy shall be that."""
        new = not self.masters.is_sure(keeper)
        if new:
            self.weights.check_replaced(self.root())
            self.weights.warn_untied()
        unsure = [(weight, parameter) for weight, parameter in own if new or not weight.is_clean(parameter)]
        if unsure:
            self._settle(own, look=new)
            self.masters.follow(unsure, all_of_it=True)  # a half of what was loaded would be no model
        self.masters.be_sure(keeper)
        for weight, parameter in own:
            weight.version = parameter._version

    def _may_keep(self, other: Optimizer, steps: Optimizer) -> bool:
        """Whether an optimizer that has not been seen to step, and calls one that ``steps``, may keep something of the
        run's weights."""
        state = getattr(other, "state", None)
        if other is steps or other in self._sizes or not isinstance(state, Mapping) or state is steps.state:
            return False
        return bool(self.of(other))

    def forget(self, optimizer: Optimizer) -> None:
        """Other state was given to an optimizer, of which nothing is known."""
        self.optimizers.discard(optimizer)
        self._loaded.pop(optimizer, None)

    def _clean(self, optimizer: Optimizer, own: Sequence[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Let an optimizer's state be 0 outside the active blocks, and where they have just grown; that of others,
        too, which may never step."""
        for one in (optimizer, *self._others):
            lay_out_state(one, own)
            loaded = {} if keeps_zeros(one) else self._loaded.pop(one, {})
            for weight, parameter in own:
                if loaded.get(weight.name) == weight.changes:
                    continue  # as the run that wrote it had it: what is not of elements is not 0, and would differ
                zero_state_(one, weight, parameter)
                if weight.grown is not None:  # by a mask that was given before the optimizer was known
                    zero_state_(one, weight, parameter, weight.grown)
        self.optimizers.add(optimizer)

    def take_unclaimed(self) -> None:
        """Go on from the topology that an optimizer was loaded with before the model was made sparse."""
        progress, topologies = self.progress, {}
        for weight, parameter in self.weights.parameters():
            entry = take_unclaimed(parameter)
            if TOPOLOGY in entry:
                check_entry(weight.name, weight, entry)
                found = from_entry(entry)
                if found is not None:
                    progress, topologies[weight.name] = found
        if topologies:
            self.go_on(progress, topologies)

    def _settle(
        self, own: Sequence[tuple[SparseWeight, nn.Parameter]], *, look: bool = False, alone: bool = False
    ) -> None:
        """Let weights be 0 outside their active blocks; where one was not, or a mask has changed, the state of
        optimizers too: a gradient that was written may have gone into it.

        Args:
            look, alone: as :func:`settle` has them.
        """
        told = alone and any(p.requires_grad and _was_written(weight, p) for weight, p in own)
        known = list(self.optimizers)
        if settle(own, self.optimizers.clear, look=look, alone=alone):
            if alone and not told:
                self._distrust()
            self.optimizers.clear()  # until they are cleaned: state may not be writable
            for optimizer in known:
                self._clean(optimizer, own)

    def _distrust(self) -> None:
        """Somebody has written without a trace: gradients are masked now whatever is known of them; and if it was not
        the first time, weights are looked at and gradients masked at every step from now on."""
        self._traceless += 1
        for weight in self.weights:
            weight.doubted = True
            weight.suspect |= self._traceless > 1
        warnings.warn(
            "values were written outside the active blocks without a trace, through .data of a weight or of its "
            "gradient, whose writes PyTorch does not count: compiled calls may have left them out. Write to the tensor "
            "itself under torch.no_grad(), which is seen at once"
            + (
                ". Weights are looked at and gradients masked at every step from now on" if self._traceless == 2 else ""
            ),
            MSTWarning,
            stacklevel=6,
        )

    def _change_topology(self, now: Completion, own: list[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Change masks, or go on with it, and note what happens, if anybody wants to know."""
        if now.changes is None:
            try:
                self._plan(now, own)
            except Exception:
                self.overdue = False
                raise
        again, now.begun = now.begun, True
        planned = [((now.changes or {}).get(weight.name), weight, parameter) for weight, parameter in own]
        changed = [(change, weight, parameter) for change, weight, parameter in planned if change is not None]
        try:
            carry_out(changed, [*self._sizes, *self._others], again=again)
        except OptimizerError as error:
            now.failed = error
            self.optimizers.clear()  # none steps before its state could be cleaned
        try:
            pairs = [(weight, parameter) for _, weight, parameter in changed]
            self.masters.changed(pairs, {weight.name: change.new for change, weight, _ in changed})
        except OptimizerError as error:
            now.failed = error
            self.masters.doubt()
        if self.listeners.wanted and now.event is None:
            phase, found = phase_of(self.schedule, self.step_count), changes(now.before, self.weights)
            now.event = TopologyEvent(self.step_count, phase, self.density, now.skipped, found)
        for weight in self.weights:
            weight.scores, weight.moved = None, False
        self.overdue = False

    def _plan(self, now: Completion, own: list[tuple[SparseWeight, nn.Parameter]]) -> None:
        """Find out what shall change, and change nothing but values that stand outside the active blocks."""
        self._settle(own, look=True)
        plan = self.plan_event()
        now.skipped, now.before = plan.skipped, {w.name: w.mask for w in self.weights if w.name in plan.masks}
        found = {w.name: change_to(w, p, plan.masks[w.name]) for w, p in own if w.name in plan.masks}
        now.changes = {name: change for name, change in found.items() if change is not None}
        if plan.skipped:
            warnings.warn(
                f"topology event at step {self.step_count} skipped: {plan.skipped}. Masks stay until the next one",
                MSTWarning,
                stacklevel=6,
            )

    @property
    def density(self) -> float:
        """Share of the elements of all sparse weights that lie in active blocks."""
        return sum(w.density * w.numel for w in self.weights) / sum(w.numel for w in self.weights)

    def plan_event(self) -> Plan:
        """What a topology event would do now, at the present step count and with the scores so far."""
        own, step, measure = self.weights.parameters(), self.step_count, self.masters.measure
        return plan_event(own, self.densities(), self.schedule, step, self.seed, measure)

    def prepare_next_step(self) -> None:
        """Choose the attention pattern of the next forward pass; and if the next step belongs to a topology event
        whose growth reads gradients, have them computed on all blocks."""
        self.attention.pattern = attention_of(self.schedule, self.step_count)
        wanted = self.schedule.wants_gradient_after(self.step_count)
        want_dense_gradients((weight for weight in self.weights if weight.density_target >= 1 or not wanted), False)
        want_dense_gradients((weight for weight in self.weights if weight.density_target < 1 and wanted), True)

    def change_mask(self, weight: SparseWeight, parameter: nn.Parameter, mask: Tensor) -> None:
        """Give one weight other active blocks, outside of the schedule."""
        self.finish()
        try:
            change_mask(weight, parameter, mask.detach().cpu().clone(), [*self._sizes, *self._others])
            self.masters.follow([(weight, parameter)])
        except OptimizerError:
            self.optimizers.clear()
            self.masters.doubt()
            raise

    def go_on(self, progress: Progress, topologies: dict[str, Topology], optimizer: Optimizer | None = None) -> None:
        """Continue from a checkpoint, of which ``optimizer`` has its state."""
        self.finish()
        self.step_count, self.seed = progress.step, progress.seed
        for weight in self.weights:
            if weight.name in topologies:
                restore(weight, topologies[weight.name], self.keeps_young)
        if optimizer is not None:
            self._loaded[optimizer] = {w.name: w.changes for w in self.weights if w.name in topologies}
        self.optimizers.clear()
        self.masters.doubt()
        self.prepare_next_step()
