"""What a run does when optimizers are saved and loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mst_compile.errors import CheckpointError, MSTWarning

from . import packing, resume
from .masters import held_by, keeper_of
from .run import Run
from .weight import SparseWeight

Entries = dict[int, dict[str, Any]]


class OptimizerCheckpoints:
    """Lets the topology ride in optimizers' state dicts: a
    :class:`~mst_compile.state.checkpoint_hooks.CheckpointWatcher`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._warned = False  # of a checkpoint without topology

    def save_into(self, optimizer: Optimizer, entries: Entries) -> None:
        """Add the topology of the optimizer's sparse weights to what its state dict will hold of them."""
        for weight, parameter in self._run.of(optimizer):
            entry = self._entry_of(weight)
            entries[id(parameter)] = {key: value.to(parameter.device) for key, value in entry.items()}
        for weight, master, number in self._copies(optimizer):
            inside = entries.setdefault(id(master), {}).setdefault(packing.MASTERS, {})
            inside[number] = self._entry_of(weight)

    def _entry_of(self, weight: SparseWeight) -> dict[str, Tensor]:
        return resume.entry_of(weight, self._run.progress, self._run.keeps_scores, self._run.keeps_young)

    def _copies(self, optimizer: Optimizer) -> Iterator[tuple[SparseWeight, Tensor, str]]:
        """The weights that it trains copies of: each with the copy, and its number in the parameter group."""
        keeper = keeper_of(optimizer) if self._run.active else None
        for held in [] if keeper is None else held_by(keeper, self._run.weights.held()):
            beside = keeper.beside(held.piece.master)  # type: ignore[union-attr]
            number = next(i for i, parameter in enumerate(beside) if parameter is held.parameter)
            yield held.weight, held.piece.master, str(number)

    def owned(self, optimizer: Optimizer) -> set[int]:
        """Ids of the Parameters whose topology this run takes."""
        copies = {id(master) for _, master, _ in self._copies(optimizer)}
        return copies | {id(parameter) for _, parameter in self._run.of(optimizer)}

    def check_loaded(self, optimizer: Optimizer, entries: Entries) -> None:
        """Raise :class:`CheckpointError` if the topology in an optimizer's state dict does not fit."""
        for weight, entry, _ in self._entries(optimizer, entries):
            if entry is not None:
                packing.check_entry(weight.name, weight, entry)

    def _entries(
        self, optimizer: Optimizer, entries: Entries
    ) -> Iterator[tuple[SparseWeight, dict[str, Any] | None, bool]]:
        """Each weight that it trains, or trains a copy of, with what the state dict has of it, and whether the
        optimizer has state of it.

        Raises:
            CheckpointError: what there is of copies is not of the form in which it was written.
        """
        for weight, parameter in self._run.of(optimizer):
            yield weight, entries.get(id(parameter)), bool(optimizer.state.get(parameter))
        for weight, master, number in self._copies(optimizer):
            inside = entries.get(id(master), {}).get(packing.MASTERS, {})
            entry = inside.get(number) if isinstance(inside, dict) else inside
            if entry is not None and not (isinstance(entry, dict) and entry.keys() <= set(packing.TOPOLOGY_KEYS)):
                raise CheckpointError(
                    f"{packing.MASTERS} of {weight.name} in the optimizer state must be a dict of "
                    f"{', '.join(packing.TOPOLOGY_KEYS)}, got {packing.form(entry)}; it was not written by this library"
                )
            yield weight, entry, bool(optimizer.state.get(master))

    def after_load(self, optimizer: Optimizer, entries: Entries) -> None:
        """Continue from the topology that came with an optimizer's state dict."""
        self._run.forget(optimizer)  # of its new state nothing is known
        progress, topologies, found_any = self._run.progress, {}, False
        for weight, entry, has_state in self._entries(optimizer, entries):
            found_any = True
            found = resume.from_entry(entry)
            if found is not None:
                progress, topologies[weight.name] = found
            elif has_state:
                self._warn_without_topology(weight)
        if found_any:
            self._run.masters.doubt()
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
