"""A sparse run: a model's sparse weights, how far it is, and what moves it on."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.errors import MSTWarning
from mst_compile.rules.schedule import Schedule, attention_of, sparsity_of

from .attention import AttentionState
from .event import Plan, apply, change_mask, plan_event, plan_first_masks
from .resume import Progress, Topology, restore
from .weight import SparseWeight
from .weights import Weights


class Run:
    """What steps and checkpoints work on.

    Attributes:
        optimizers: those that have stepped or loaded a checkpoint: their state of dropped blocks is zeroed.
        active: False once the model was made dense again.
    """

    def __init__(self, schedule: Schedule, weights: Weights, attention: AttentionState, seed: int) -> None:
        self.schedule = schedule
        self.weights = weights
        self.attention = attention
        self.seed = seed
        self.step_count = 0
        self.active = True
        self.optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "optimizers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, optimizers=weakref.WeakSet())  # a copy knows none yet

    @property
    def progress(self) -> Progress:
        """What a checkpoint holds beside the topology."""
        return Progress(self.step_count, self.seed)

    @property
    def keeps_scores(self) -> bool:
        """Whether growth scores may be waiting when a checkpoint is written."""
        return self.schedule.growth_rule.gradient_steps > 1 or any(w.scores is not None for w in self.weights)

    def of(self, optimizer: Optimizer) -> list[tuple[SparseWeight, nn.Parameter]]:
        """The sparse weights that ``optimizer`` trains."""
        return self.weights.of(optimizer) if self.active else []

    def densities(self) -> list[float]:
        """Target density of each weight after the steps that were taken."""
        return self.weights.densities(self.schedule, sparsity_of(self.schedule, self.step_count))

    def draw_first_masks(self, rescale: bool) -> None:
        """The masks of step 0, at random; with ``rescale`` the weights that stay grow by ``density ** -0.5``."""
        sparse = sparsity_of(self.schedule, 0) > 0
        plan = plan_first_masks(self.weights, self.densities(), self.seed) if sparse else Plan({})
        self.prepare_next_step()  # asks the schedule, which may fail, before weights have changed
        apply(plan, self.weights.parameters(), (), rescale=rescale and sparse)

    def complete_step(self) -> None:
        """Count a training step, change the topology if the schedule says so, and prepare the next."""
        self.step_count += 1
        for weight in self.weights:
            weight.loaded = None
        if self.schedule.is_topology_event(self.step_count):
            self._change_topology()
        self.prepare_next_step()

    def _change_topology(self) -> None:
        plan = self.plan_event()
        if plan.skipped:
            warnings.warn(
                f"topology event at step {self.step_count} skipped: {plan.skipped}. Masks stay until the next one",
                MSTWarning,
                stacklevel=4,
            )
        apply(plan, self.weights.parameters(), self.optimizers)
        for weight in self.weights:
            weight.scores = None

    def plan_event(self) -> Plan:
        """What a topology event would do now, at the present step count and with the scores so far."""
        return plan_event(self.weights.parameters(), self.densities(), self.schedule, self.step_count, self.seed)

    def prepare_next_step(self) -> None:
        """Choose the attention pattern of the next forward pass; and if the next step belongs to a topology event
        whose growth reads gradients, have them computed on all blocks."""
        self.attention.pattern = attention_of(self.schedule, self.step_count)
        wanted = self.schedule.wants_gradient_after(self.step_count)
        for weight in self.weights:
            weight.set_dense_grad(wanted and weight.density_target < 1)

    def change_mask(self, weight: SparseWeight, parameter: nn.Parameter, mask: Tensor) -> None:
        """Give one weight other active blocks, outside of the schedule."""
        change_mask(weight, parameter, mask.detach().cpu().clone(), self.optimizers)

    def go_on(self, progress: Progress, topologies: dict[str, Topology]) -> None:
        """Continue from a checkpoint."""
        self.step_count, self.seed = progress.step, progress.seed
        for weight, parameter in self.weights.parameters():
            if weight.name in topologies:
                restore(weight, parameter, topologies[weight.name], self.optimizers)
        self.prepare_next_step()
