"""The sparse state of one model: what users read, and who is told when optimizers step, save and load.

Within one training step::

    forward, backward   gradients arrive; outside the active blocks they are set to 0 as soon as they have accumulated
                        (kept dense on the steps before a topology event, so that growth can read them)
    optimizer.step()    before: growth scores are harvested and the inactive part of the gradient is zeroed
                        after:  the step is counted and, on an event, the topology changes
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import block_mean_square
from mst_compile.errors import MSTWarning, NotSparseError, SelectionError
from mst_compile.rules.guard import Guard
from mst_compile.rules.schedule import Schedule

from . import optimizers, packing, resume
from .attention import AttentionState
from .checkpoint_hooks import watch_checkpoints
from .clock import StepClock
from .event import Plan, apply, change_mask, plan_event, plan_first_masks
from .learning_rates import restore_rates, scale_rates
from .resume import Progress, Topology
from .selection import Candidate
from .steps import Step, watch_steps
from .weight import SparseWeight
from .weights import Weights

_ATTRIBUTE = "_mst_sparsifier"
_PATIENCE = 10  # foreign optimizer steps with gradients on sparse weights before the user is warned


class Sparsifier:
    """The sparse state of one model; made by :func:`sparsify`, found by :func:`sparsifier`."""

    _clock: StepClock
    _optimizers: weakref.WeakSet[Optimizer]  # that have stepped or loaded: their state of dropped blocks is zeroed
    _warned: weakref.WeakSet[Optimizer]
    _deferred: bool  # a step within the backward pass waits for its end
    _making_state: bool  # the optimizer that steps now only makes its state
    _foreign_steps: int  # of optimizers without sparse weights; -1: warned
    _foreign_checkpoint: bool  # warned of one without topology
    _active: bool

    def __init__(
        self,
        schedule: Schedule,
        candidates: list[Candidate],
        seed: int,
        auto_step: bool,
        skipped: dict[str, str],
        guard: Guard = "coverage",
    ) -> None:
        self.schedule = schedule
        self.seed = seed
        self.auto_step = auto_step
        self.skipped = skipped
        self.step_count = 0
        self.attention = AttentionState.create(schedule)
        self._weights = Weights(candidates, guard, self.attention)
        self._watch()

    # -- what users read -------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, SparseWeight]:
        """Parameter name -> :class:`~mst_compile.SparseWeight`."""
        return dict(self._weights.by_name)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> block mask, bool ``[ceil(rows / block), ceil(cols / block)]`` on the CPU (copies)."""
        return {w.name: w.mask.clone() for w in self._weights}

    @property
    def density(self) -> float:
        """Share of the elements of all sparse weights that lie in active blocks."""
        return sum(w.density * w.numel for w in self._weights) / sum(w.numel for w in self._weights)

    def parameters(self) -> Iterator[tuple[SparseWeight, nn.Parameter]]:
        """Each sparse weight with the Parameter that its module holds now."""
        return self._weights.parameters()

    def densities(self, sparsity: float) -> list[float]:
        """Target density of each of :attr:`weights` when the schedule is at ``sparsity``."""
        return self._weights.densities(self.schedule, sparsity)

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count one optimizer step and change the topology if the schedule says so.

        Called by a hook after every step of the optimizer that owns the sparse weights; call it yourself, after
        ``optimizer.step()`` and before the next forward pass, only with ``sparsify(..., auto_step=False)``.
        """
        self._weights.rebind()
        late = self._clock.complete(self._weights.with_gradients())
        for weight, parameter in self.parameters():
            if weight.name in late:  # another optimizer's, whose turn is still to come
                _harvest(weight, parameter, 1.0)
        self.step_count += 1
        for weight in self._weights:
            weight.loaded = None
        if self.schedule.is_topology_event(self.step_count):
            self._change_topology()
        self._prepare_next_step()

    def _change_topology(self) -> None:
        plan = self.plan_event()
        if plan.skipped:
            warnings.warn(
                f"topology event at step {self.step_count} skipped: {plan.skipped}. Masks stay until the next one",
                MSTWarning,
                stacklevel=3,
            )
        apply(plan, self.parameters(), self._optimizers)
        for weight in self._weights:
            weight.scores = None

    def plan_event(self) -> Plan:
        """What a topology event would do now, at the present step count and with the scores so far."""
        densities = self.densities(self.schedule.sparsity_at(self.step_count))
        return plan_event(self.parameters(), densities, self.schedule, self.step_count, self.seed)

    def _prepare_next_step(self) -> None:
        """Choose the attention pattern of the next forward pass; and if the next step belongs to a topology event
        whose growth reads gradients, have them computed on all blocks."""
        self.attention.pattern = self.schedule.attention_at(self.step_count)
        wanted = self.schedule.wants_gradient_after(self.step_count)
        for weight in self._weights:
            weight.set_dense_grad(wanted and weight.density_target < 1)

    def before_step(self, step: Step) -> None:
        """An optimizer steps: harvest growth scores, and let it see zeros outside the active blocks."""
        optimizer = step.optimizer
        own = self._own(optimizer)
        if not own or self._making_state or optimizers.skipped_by_scaler(optimizer):
            return
        if not optimizer.state and optimizers.only_makes_state(optimizer):
            self._making_state = True
            step.outermost.at_end(lambda _: setattr(self, "_making_state", False))
            return
        self._optimizers.add(optimizer)
        self._weights.rebind()
        if not step.nested:
            scaled = scale_rates(optimizer, own)
            step.at_end(lambda _: restore_rates(scaled))
        names = {weight.name for weight, _ in own}
        late = self._clock.turn(names, self._weights.with_gradients(), nested=step.nested)
        if self._clock.missed:
            self.step_count += 1  # too late for its topology event: the forward pass has been
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
        optimizer = step.optimizer
        if self._making_state or optimizers.skipped_by_scaler(optimizer):
            return
        own = self._own(optimizer)
        if own and not optimizers.keeps_zeros(optimizer):
            self._mask_after(optimizer, own)
        if step.nested:
            return
        for weight, parameter in own:
            if parameter.grad is not None:
                weight.grown = None  # they have had their first step
        if not self.auto_step:
            return
        if own:
            if _in_backward():
                self._step_after_backward()
            elif self._clock.is_complete(self._weights.with_gradients()):
                self.step()  # of several optimizers the last one completes the step
        elif self.step_count == 0:
            self._warn_if_never_stepped(optimizer)

    def _after_failure(self, step: Step, names: set[str], late: set[str], versions: list[int]) -> None:
        """A step has raised: it was one if weights have moved all the same, as where a hook after it raised."""
        if versions == [parameter._version for _, parameter in self._own(step.optimizer)]:
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

    def _own(self, optimizer: Optimizer) -> list[tuple[SparseWeight, nn.Parameter]]:
        """The sparse weights that ``optimizer`` trains."""
        return self._weights.of(optimizer) if self._active else []

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
        if self._foreign_steps < 0 or not self._weights.with_gradients():
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

    # -- masks from outside the schedule ----------------------------------------------------------------------------

    def draw_first_masks(self, rescale: bool) -> None:
        """The masks of step 0, at random; with ``rescale`` the weights that stay grow by ``density ** -0.5``."""
        sparsity = self.schedule.sparsity_at(0)
        if sparsity > 0:
            apply(plan_first_masks(self._weights, self.densities(sparsity), self.seed), self.parameters(), ())
        for weight, parameter in self.parameters() if sparsity > 0 and rescale else ():
            with torch.no_grad():
                parameter.mul_(weight.density**-0.5)
        self._prepare_next_step()

    def apply_mask(self, name: str, mask: Tensor) -> None:
        """Give one weight other active blocks, outside of the schedule; call it between a step and the next forward.

        Dropped weights, their gradient and their optimizer state become exactly 0, grown ones start at 0. The next
        topology event goes on from this mask.

        Args:
            name: a key of :attr:`masks`.
            mask: bool ``[ceil(rows / block), ceil(cols / block)]``.

        Raises:
            SelectionError: no sparse weight has this name.
            MaskError: the mask has another shape or dtype. Nothing has changed.
        """
        found = next(((w, p) for w, p in self.parameters() if w.name == name), None)
        if found is None:
            raise SelectionError(f"no sparse weight is called {name!r}; there are {', '.join(self.weights)}")
        packing.check_mask(name, mask, found[0])
        change_mask(*found, mask.detach().cpu().clone(), self._optimizers)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def _progress(self) -> Progress:
        return Progress(self.step_count, self.seed)

    @property
    def _keeps_scores(self) -> bool:
        """Whether scores may be waiting when a checkpoint is written."""
        return self.schedule.growth_rule.gradient_steps > 1 or any(w.scores is not None for w in self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Step count, seed, masks and what else the next step depends on; loads with ``torch.load(weights_only=True)``
        and through ``torch.distributed.checkpoint`` (this object is Stateful in its sense)."""
        return resume.state_dict(self._weights, self._progress, self._keeps_scores)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Load the model's own state dict as well, before or after.

        Raises:
            CheckpointError: the state is of another format, or its masks do not fit this model. Nothing has changed.
        """
        self._continue(*resume.from_state_dict(state, self._weights))

    def save_into(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Add the topology of the optimizer's sparse weights to what its state dict will hold of them."""
        for weight, parameter in self._own(optimizer):
            entry = resume.entry_of(weight, self._progress, self._keeps_scores)
            entries[id(parameter)] = {key: value.to(parameter.device) for key, value in entry.items()}

    def check_loaded(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Raise :class:`CheckpointError` if the topology in an optimizer's state dict does not fit."""
        for weight, parameter in self._own(optimizer):
            if id(parameter) in entries:
                packing.check_entry(weight.name, weight, entries[id(parameter)])

    def after_load(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Continue from the topology that came with an optimizer's state dict."""
        own = self._own(optimizer)
        if not own:
            return
        self._optimizers.add(optimizer)
        progress, topologies = self._progress, {}
        for weight, parameter in own:
            found = resume.from_entry(entries.get(id(parameter)))
            if found is not None:
                progress, topologies[weight.name] = found
            elif optimizer.state.get(parameter):
                self._warn_of_foreign_checkpoint(weight)
        self._continue(progress, topologies)

    def _continue(self, progress: Progress, topologies: dict[str, Topology]) -> None:
        self.step_count, self.seed = progress.step, progress.seed
        for weight, parameter in self.parameters():
            if weight.name in topologies:
                resume.restore(weight, parameter, topologies[weight.name], self._optimizers)
        self._prepare_next_step()

    def _warn_of_foreign_checkpoint(self, weight: SparseWeight) -> None:
        if not self._foreign_checkpoint:
            self._foreign_checkpoint = True
            warnings.warn(
                f"the optimizer state that was loaded has no topology of {weight.name}: the masks and the step count "
                "are not those of the run that wrote it. Load sparsifier(model).state_dict() of that run as well",
                MSTWarning,
                stacklevel=5,
            )

    # -- beginning, copying and ending -------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Begin to watch optimizers; nothing is known of any."""
        self._clock = StepClock()
        self._optimizers, self._warned = weakref.WeakSet(), weakref.WeakSet()
        self._deferred = self._making_state = self._foreign_checkpoint = False
        self._foreign_steps = 0
        self._active = True
        watch_steps(self)
        watch_checkpoints(self)

    def release(self) -> None:
        """Detach from the model: it is an ordinary one again. Zeros stay zeros until an optimizer moves them."""
        self._weights.release()
        self._active = False
        self._foreign_steps = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        public = ("schedule", "seed", "auto_step", "skipped", "step_count", "attention", "_weights")
        # The Parameters themselves too: while a copy is being made its modules do not have them yet.
        parameters = {weight.name: parameter for weight, parameter in self.parameters()}
        return {name: getattr(self, name) for name in public} | {"parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        self.__dict__.update(state)
        self._weights.bind(parameters)
        self._watch()


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


def attach(model: nn.Module, sparsifier: Sparsifier) -> None:
    """Let :func:`sparsifier_of` find the sparsifier of ``model``."""
    model.__dict__[_ATTRIBUTE] = sparsifier


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)


def sparsifier_of(model: nn.Module) -> Sparsifier | None:
    """The :class:`Sparsifier` of a model, also through ``torch.compile``'s or DDP's wrapper; None of a plain one."""
    return next((found for m in model.modules() if (found := m.__dict__.get(_ATTRIBUTE)) is not None), None)


def sparsifier(model: nn.Module) -> Sparsifier:
    """The :class:`Sparsifier` of a model that was sparsified, also through ``torch.compile``'s or DDP's wrapper.

    Raises:
        NotSparseError: the model is not sparse.
    """
    found = sparsifier_of(model)
    if found is None:
        raise NotSparseError("the model is not sparse; call mst_compile.sparsify(model, schedule) first")
    return found
