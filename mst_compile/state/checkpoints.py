"""What a run does when optimizers are saved and loaded."""

from __future__ import annotations

import warnings
from typing import Any

from torch.optim import Optimizer

from mst_compile.errors import MSTWarning

from . import packing, resume
from .run import Run
from .weight import SparseWeight


class OptimizerCheckpoints:
    """Lets the topology ride in optimizers' state dicts: a
    :class:`~mst_compile.state.checkpoint_hooks.CheckpointWatcher`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._warned = False  # of a checkpoint without topology

    def save_into(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Add the topology of the optimizer's sparse weights to what its state dict will hold of them."""
        for weight, parameter in self._run.of(optimizer):
            entry = resume.entry_of(weight, self._run.progress, self._run.keeps_scores, self._run.keeps_young)
            entries[id(parameter)] = {key: value.to(parameter.device) for key, value in entry.items()}

    def owned(self, optimizer: Optimizer) -> set[int]:
        """Ids of the Parameters whose topology this run takes."""
        return {id(parameter) for _, parameter in self._run.of(optimizer)}

    def check_loaded(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Raise :class:`CheckpointError` if the topology in an optimizer's state dict does not fit."""
        for weight, parameter in self._run.of(optimizer):
            if id(parameter) in entries:
                packing.check_entry(weight.name, weight, entries[id(parameter)])

    def after_load(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
        """Continue from the topology that came with an optimizer's state dict."""
        own = self._run.of(optimizer)
        if not own:
            return
        self._run.forget(optimizer)  # of its new state nothing is known
        progress, topologies = self._run.progress, {}
        for weight, parameter in own:
            found = resume.from_entry(entries.get(id(parameter)))
            if found is not None:
                progress, topologies[weight.name] = found
            elif optimizer.state.get(parameter):
                self._warn_without_topology(weight)
        if topologies:
            self._run.go_on(progress, topologies, optimizer)

    def _warn_without_topology(self, weight: SparseWeight) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the optimizer state that was loaded has no topology of {weight.name}: the masks and the step count "
                "are not those of the run that wrote it. Load sparsifier(model).state_dict() of that run as well",
                MSTWarning,
                stacklevel=5,
            )
