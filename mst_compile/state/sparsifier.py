"""The one stateful class: it owns a model's masks, counts optimizer steps and changes the topology between them.

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

from mst_compile.blocks.bulk import block_mean_square, zero_blocks_
from mst_compile.blocks.shards import check_placement, parameter_of
from mst_compile.errors import MSTWarning, NotSparseError, SelectionError
from mst_compile.rules.density import active_count, layer_densities
from mst_compile.rules.guard import Guard
from mst_compile.rules.masks import generator, random_mask, update_mask
from mst_compile.rules.schedule import Schedule, attention_pattern, gradient_steps
from mst_compile.state import optimizers
from mst_compile.state import packing as checkpoint
from mst_compile.state import weight as weights
from mst_compile.state.attention import AttentionState
from mst_compile.state.clock import watch_steps
from mst_compile.state.ownership import forget_owner, remember_owner
from mst_compile.state.selection import Candidate
from mst_compile.state.weight import SparseWeight

_FEW = 0.05  # share of dropped blocks up to which visiting them alone beats a pass over the weight
_PATIENCE = 10  # foreign optimizer steps with gradients on sparse weights before the user is warned


_ATTRIBUTE = "_mst_sparsifier"


class Sparsifier:
    """The sparse state of one model; made by :func:`sparsify`, found by :func:`sparsifier`."""

    _optimizers: weakref.WeakSet[Optimizer]  # that have stepped or loaded: their state of dropped blocks is zeroed
    _warned: weakref.WeakSet[Optimizer]
    _stepped: set[str]  # weights whose optimizer has stepped since the last counted step
    _late: set[str]  # weights whose optimizer has not, though the step was counted
    _unowned: set[str]  # weights with gradients that no optimizer steps, as far as is known
    _rates: list[tuple[dict[str, Any], Any]]  # learning rates to restore after the step under way
    _deferred: bool  # a step within the backward pass waits for its end
    _not_a_step: bool  # the optimizer that steps now only makes its state
    _foreign_steps: int  # of optimizers without sparse weights; -1: warned
    _foreign_checkpoint: bool  # warned of one without topology

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
        self._weights = {c.name: SparseWeight.create(c, guard) for c in candidates}
        self._overrides = [c.override.sparsity for c in candidates]
        self.attention = AttentionState.create(schedule)
        for weight in self._weights.values():
            weight.attention = self.attention
        self._owners = {c.name: c.owners for c in candidates}
        self._scores: dict[str, Tensor] = {}  # growth scores since the last event
        self._grown: dict[str, Tensor] = {}  # blocks that grew at the last event and have not been stepped yet
        for name, owners in self._owners.items():
            for module, attribute in owners:
                remember_owner(module, attribute, self._weights[name])
        self._bind({c.name: c.parameter for c in candidates})

    # -- what users read -------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, SparseWeight]:
        """Parameter name -> :class:`~mst_compile.SparseWeight`."""
        return dict(self._weights)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> block mask, bool ``[ceil(rows / block), ceil(cols / block)]`` on the CPU (copies)."""
        return {name: w.mask.clone() for name, w in self._weights.items()}

    @property
    def density(self) -> float:
        """Share of the elements of all sparse weights that lie in active blocks."""
        return sum(w.density * w.numel for w in self._weights.values()) / sum(w.numel for w in self._weights.values())

    def parameters(self) -> Iterator[tuple[SparseWeight, nn.Parameter]]:
        """Each sparse weight with the Parameter that its module holds now."""
        for name, weight in self._weights.items():
            yield weight, parameter_of(name, *self._owners[name][0])

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count one optimizer step and change the topology if the schedule says so.

        Called by a hook after every step of the optimizer that owns the sparse weights; call it yourself, after
        ``optimizer.step()`` and before the next forward pass, only with ``sparsify(..., auto_step=False)``.
        """
        self._rebind()
        for weight, parameter in self.parameters():
            if weight.name not in self._stepped and parameter.grad is not None:
                self._late.add(weight.name)  # another optimizer's, whose turn is still to come
                self._harvest(weight, parameter, 1.0)
        self._stepped = set()
        self.step_count += 1
        for weight in self._weights.values():
            weight.loaded = None
        if self.schedule.is_topology_event(self.step_count):
            self._change_topology()
            self._scores = {}
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        """Choose the attention pattern of the next forward pass; and if the next step belongs to a topology event
        whose growth reads gradients, have them computed on all blocks."""
        self.attention.pattern = attention_pattern(self.schedule, self.step_count)
        wanted = self.wants_gradient_after(self.step_count)
        for weight in self._weights.values():
            weight.set_dense_grad(wanted and weight.density_target < 1)

    def wants_gradient_after(self, step: int) -> bool:
        """Whether the training step that follows ``step`` others computes gradients on all blocks."""
        return any(self._wants_gradient(step + 1 + i) for i in range(gradient_steps(self.schedule)))

    def _wants_gradient(self, step: int) -> bool:
        """Whether a topology event after ``step`` reads gradients."""
        schedule = self.schedule
        if schedule.growth not in ("mixed", "gradient") or not schedule.is_topology_event(step):
            return False
        return schedule.sparsity_at(step) > 0  # at sparsity 0 everything grows; there is nothing to choose

    def before_step(self, optimizer: Optimizer, *, nested: bool) -> None:
        """Optimizer pre-hook: harvest growth scores, and let the optimizer see zeros outside the active blocks."""
        own = self._own(optimizer)
        if not own or optimizers.skipped_by_scaler(optimizer):
            return
        if not optimizer.state and optimizers.only_makes_state(optimizer):
            self._not_a_step = True
            return
        self._optimizers.add(optimizer)
        self._rebind()
        if not nested:
            optimizers.restore_rates(self._rates)  # of a step that raised
            self._rates = optimizers.scale_rates(optimizer, own)
        names = {weight.name for weight, _ in own}
        if not nested and names & self._stepped:
            self._give_up_waiting()
        self._unowned -= names
        scale, in_backward = optimizers.gradient_scale(optimizer), _in_backward()
        for weight, parameter in own:
            late = weight.name in self._late
            if late:
                self._late.discard(weight.name)
            else:
                self._stepped.add(weight.name)
                self._harvest(weight, parameter, scale)
            # Within the backward pass the hook that masks gradients may come after the one that steps.
            if (late or in_backward) and parameter.grad is not None:
                weight.zero_inactive_(parameter.grad)
            if weight.name in self._grown and parameter.grad is not None:
                optimizers.start_second_moment(optimizer, parameter, weight.grid, self._grown[weight.name])

    def _give_up_waiting(self) -> None:
        """A weight is stepped a second time: whoever was waited for does not step in every iteration."""
        self._unowned |= self._waiting()
        self._stepped = set()
        self.step_count += 1  # too late for its topology event: the forward pass has been

    def _waiting(self) -> set[str]:
        """Weights with gradients whose optimizer is still to step in this iteration."""
        return {
            weight.name
            for weight, parameter in self.parameters()
            if parameter.grad is not None and weight.name not in self._stepped and weight.name not in self._unowned
        }

    def after_step(self, optimizer: Optimizer, *, nested: bool) -> None:
        """Optimizer post-hook: count the step if the optimizer owns sparse weights.

        Args:
            nested: the step was taken within another optimizer's step, which will be counted.
        """
        if not nested:
            optimizers.restore_rates(self._rates)
        if self._not_a_step:
            self._not_a_step = nested
            return
        if optimizers.skipped_by_scaler(optimizer):
            return
        own = self._own(optimizer)
        if own and not optimizers.keeps_zeros(optimizer):
            self._mask_after(optimizer, own)
        if nested:
            return
        for weight, parameter in own:
            if parameter.grad is not None:
                self._grown.pop(weight.name, None)  # they have had their first step
        if not self.auto_step:
            return
        if own:
            if _in_backward():
                self._step_after_backward()
            elif self._stepped and not self._waiting():
                self.step()  # of several optimizers the last one completes the step
        elif self.step_count == 0:
            self._warn_if_never_stepped(optimizer)

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
        if not self._active:
            return []
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [(weight, parameter) for weight, parameter in self.parameters() if id(parameter) in known]

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
        if self._foreign_steps < 0 or not any(p.grad is not None for _, p in self.parameters()):
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

    def _harvest(self, weight: SparseWeight, parameter: nn.Parameter, scale: float) -> None:
        """Add a dense gradient (times ``scale``) to the growth scores, and zero its inactive part."""
        if not weight.dense_grad or parameter.grad is None:
            return
        weight.set_dense_grad(False)
        score = block_mean_square(parameter.grad, weight.grid) / (scale * scale)
        before = self._scores.get(weight.name)
        self._scores[weight.name] = score if before is None else before + score
        weight.zero_inactive_(parameter.grad)

    # -- topology --------------------------------------------------------------------------------------------------

    def _change_topology(self) -> None:
        sparsity = self.schedule.sparsity_at(self.step_count)
        changes, densities = {}, self.densities(sparsity)
        for density, (weight, parameter) in zip(densities, self.parameters(), strict=True):
            count, score = self.count(weight, density), self._scores.get(weight.name)
            drop = self.schedule.drop_fraction_at(self.step_count) if density < 1 else 0.0
            active = int(weight.mask.sum())
            if drop == 0.0 and count == active:
                continue
            only_grows = drop == 0.0 and count > active
            magnitude = weight.mask.float() if only_grows else block_mean_square(parameter, weight.grid)
            for what, values in (("gradient", score), ("weight", magnitude)):
                if density < 1 and values is not None and not bool(values.isfinite().all()):
                    self._say_skipped(f"the {what} of {weight.name} is not finite")
                    return
            changes[weight.name] = update_mask(
                weight.mask,
                weight.safe_blocks(magnitude),
                magnitude,
                score,
                count,
                drop,
                1.0 if self.schedule.growth == "gradient" else self.schedule.gradient_share,
                generator(self.seed, self.step_count, weight.name),
            )
        for weight, parameter in self.parameters():
            if weight.name in changes:
                self._apply(weight, parameter, changes[weight.name])

    def _say_skipped(self, reason: str) -> None:
        warnings.warn(
            f"topology event at step {self.step_count} skipped: {reason}. Masks stay until the next one",
            MSTWarning,
            stacklevel=3,
        )

    def densities(self, sparsity: float) -> list[float]:
        """Target density of each of :attr:`weights` when the schedule is at ``sparsity``."""
        shapes = [(w.grid.rows, w.grid.cols) for w in self._weights.values()]
        schedule = self.schedule
        return layer_densities(shapes, sparsity, schedule.distribution, self._overrides, schedule.max_sparsity)

    def count(self, weight: SparseWeight, density: float) -> int:
        """Active blocks of ``weight`` at a target density."""
        return active_count(density, weight.grid.blocks, max(1, int(weight.backbone.sum())))

    def _apply(self, weight: SparseWeight, parameter: nn.Parameter, mask: Tensor) -> None:
        """Take over a mask: dropped weights, their gradient and all their optimizer state become exactly 0.

        Outside the active blocks weights and optimizer state are 0 already, so grown blocks start at 0.
        """
        if torch.equal(weight.mask, mask):
            return
        dropped, grown = weight.mask & ~mask, mask & ~weight.mask
        if weight.name in self._grown:
            grown |= self._grown[weight.name] & mask
        if bool(grown.any()):
            self._grown[weight.name] = grown
        weight.set_mask(mask)
        count = int(dropped.sum())
        if count == 0:
            return
        tensors: list[Tensor] = [parameter]
        if parameter.grad is not None:
            tensors.append(parameter.grad)
        for optimizer in self._optimizers:
            tensors += optimizers.state_like(optimizer, parameter)
        few = count < _FEW * dropped.numel()
        for tensor in tensors:
            if few:
                zero_blocks_(tensor, weight.grid, dropped)
            else:
                weight.zero_inactive_(tensor)

    def draw_first_masks(self, rescale: bool) -> None:
        """The masks of step 0, at random; with ``rescale`` the weights that stay grow by ``density ** -0.5``."""
        sparsity = self.schedule.sparsity_at(0)
        if sparsity > 0:
            for density, (weight, parameter) in zip(self.densities(sparsity), self.parameters(), strict=True):
                count = self.count(weight, density)
                mask = random_mask(weight.backbone, count, generator(self.seed, 0, weight.name))
                self._apply(weight, parameter, mask)
                if rescale:
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
        if name not in self._weights:
            raise SelectionError(f"no sparse weight is called {name!r}; there are {', '.join(self._weights)}")
        checkpoint.check_mask(name, mask, self._weights[name])
        parameter = next(p for w, p in self.parameters() if w.name == name)
        self._apply(self._weights[name], parameter, mask.detach().cpu().clone())

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step count, seed, masks and what else the next step depends on; loads with ``torch.load(weights_only=True)``
        and through ``torch.distributed.checkpoint`` (this object is Stateful in its sense)."""
        return {
            "version": checkpoint.STATE_VERSION,
            "step": self.step_count,
            "seed": self.seed,
            "masks": self.masks,
            "grown": {name: self._grown.get(name, torch.zeros_like(w.mask)) for name, w in self._weights.items()},
            "scores": {name: self._score_or_zeros(w) for name, w in self._weights.items() if self._keeps_scores},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Load the model's own state dict as well, before or after.

        Raises:
            CheckpointError: the state is of another format, or its masks do not fit this model. Nothing has changed.
        """
        checkpoint.check_state(state, self._weights)
        self.step_count, self.seed = state["step"], state["seed"]
        for weight, parameter in self.parameters():
            scores = state["scores"].get(weight.name)
            self._restore(weight, parameter, state["masks"][weight.name], state["grown"].get(weight.name), scores)
        self._prepare_next_step()

    @property
    def _keeps_scores(self) -> bool:
        """Whether scores may be waiting when a checkpoint is written."""
        return gradient_steps(self.schedule) > 1 or bool(self._scores)

    def _score_or_zeros(self, weight: SparseWeight) -> Tensor:
        found = self._scores.get(weight.name)
        return torch.zeros(weight.grid.shape) if found is None else found

    def _restore(
        self, weight: SparseWeight, parameter: nn.Parameter, mask: Tensor, grown: Tensor | None, scores: Tensor | None
    ) -> None:
        if weight.loaded is not None:
            with torch.no_grad():
                parameter.copy_(weight.loaded)
            weight.loaded = None
        self._apply(weight, parameter, mask.detach().cpu().clone())
        weight.zero_inactive_(parameter)
        for kept, value in ((self._grown, grown), (self._scores, scores)):
            kept.pop(weight.name, None)
            if value is not None and bool(value.any()):
                kept[weight.name] = value.detach().cpu().clone()

    def save_into(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Add the topology of the optimizer's sparse weights to what its state dict will hold of them."""
        for weight, parameter in self._own(optimizer):
            entry = {
                checkpoint.TOPOLOGY: checkpoint.pack_topology(weight.mask, self._grown.get(weight.name)),
                checkpoint.PROGRESS: checkpoint.pack_progress(self.step_count, self.seed),
            }
            if self._keeps_scores:
                entry[checkpoint.SCORES] = checkpoint.pack_scores(self._score_or_zeros(weight))
            entries[id(parameter)] = {key: value.to(parameter.device) for key, value in entry.items()}

    def check_loaded(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Raise :class:`CheckpointError` if the topology in an optimizer's state dict does not fit."""
        for weight, parameter in self._own(optimizer):
            if id(parameter) in entries:
                checkpoint.check_entry(weight.name, weight, entries[id(parameter)])

    def after_load(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Continue from the topology that came with an optimizer's state dict."""
        own = self._own(optimizer)
        if own:
            self._optimizers.add(optimizer)
        for weight, parameter in own:
            entry = entries.get(id(parameter))
            if entry is not None and checkpoint.TOPOLOGY in entry and checkpoint.PROGRESS in entry:
                self.step_count, self.seed = checkpoint.unpack_progress(entry[checkpoint.PROGRESS])
                mask, grown = checkpoint.unpack_topology(entry[checkpoint.TOPOLOGY])
                scores = entry.get(checkpoint.SCORES)
                scores = None if scores is None else checkpoint.unpack_scores(scores)
                self._restore(weight, parameter, mask, grown, scores)
            elif optimizer.state.get(parameter) and not self._foreign_checkpoint:
                self._foreign_checkpoint = True
                warnings.warn(
                    f"the optimizer state that was loaded has no topology of {weight.name}: the masks and the step "
                    "count are not those of the run that wrote it. Load sparsifier(model).state_dict() of that run as "
                    "well",
                    MSTWarning,
                    stacklevel=4,
                )
        if own:
            self._prepare_next_step()

    # -- binding to Parameters ---------------------------------------------------------------------------------------

    def _bind(self, parameters: dict[str, nn.Parameter]) -> None:
        """Hang the state on the Parameters, and start to watch optimizers."""
        self._optimizers, self._warned = weakref.WeakSet(), weakref.WeakSet()
        self._stepped, self._late, self._unowned = set(), set(), set()
        self._rates = []
        self._deferred = self._not_a_step = self._foreign_checkpoint = False
        self._foreign_steps = 0
        self._active = True
        for name, parameter in parameters.items():
            weights.bind(parameter, self._weights[name])
        watch_steps(self)

    def _rebind(self) -> None:
        """Follow weights that moved to another device, were unfrozen, or whose Parameter object was replaced."""
        for weight, parameter in self.parameters():
            check_placement(weight.name, parameter)
            if weights.bind(parameter, weight):
                weight.zero_inactive_(parameter)
                if parameter.grad is not None and not weight.dense_grad:
                    weight.zero_inactive_(parameter.grad)

    def release(self) -> None:
        """Detach from the model: it is an ordinary one again. Zeros stay zeros until an optimizer moves them."""
        for _, parameter in self.parameters():
            weights.unbind(parameter)
        for owners in self._owners.values():
            for module, _ in owners:
                forget_owner(module)
        self._active = False
        self._foreign_steps = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        public = ("schedule", "seed", "auto_step", "skipped", "step_count", "attention")
        private = ("_weights", "_overrides", "_owners", "_scores", "_grown")
        state = {name: getattr(self, name) for name in (*public, *private)}
        # The Parameters themselves too: while a copy is being made its modules do not have them yet.
        return state | {"parameters": {weight.name: parameter for weight, parameter in self.parameters()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        self.__dict__.update(state)
        self._bind(parameters)


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
