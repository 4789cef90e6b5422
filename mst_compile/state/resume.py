"""Every way that a run's state is written and comes back: the sparsifier's own state dict, and what rides in an
optimizer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import packing
from .weight import SparseWeight
from .weights import Weights
from .young import Young


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what its masks are drawn from."""

    step: int
    seed: int


@dataclass(frozen=True)
class Topology:
    """What a checkpoint holds of one weight; see :class:`SparseWeight` for its parts."""

    mask: Tensor
    grown: Tensor | None
    scores: Tensor | None
    moved: bool = False
    young: Tensor | None = None  # numbers of steps, int32


def state_dict(weights: Weights, progress: Progress, keeps_scores: bool, keeps_young: bool) -> dict[str, Any]:
    """The sparsifier's state dict."""
    state = {
        "version": packing.STATE_VERSION,
        "step": progress.step,
        "seed": progress.seed,
        "masks": {w.name: w.mask.clone() for w in weights},
        "grown": {w.name: torch.zeros_like(w.mask) if w.grown is None else w.grown for w in weights},
        "moved": {w.name: w.moved for w in weights},
        "scores": {w.name: _scores_or_zeros(w) for w in weights if keeps_scores},
    }
    return state | ({"young": {w.name: _numbers(w) for w in weights}} if keeps_young else {})


def from_state_dict(state: Any, weights: Weights) -> tuple[Progress, dict[str, Topology]]:
    """What a sparsifier's state dict says; inverse of :func:`state_dict`.

    Raises:
        CheckpointError: it is of another format, or does not fit the model.
    """
    progress = Progress(*packing.check_state(state, weights.by_name))
    masks, grown, scores, moved = state["masks"], state["grown"], state["scores"], state.get("moved", {})
    young = state.get("young", {})
    found = {
        name: Topology(masks[name], grown.get(name), scores.get(name), bool(moved.get(name, False)), young.get(name))
        for name in weights.by_name
    }
    return progress, found


def entry_of(weight: SparseWeight, progress: Progress, keeps_scores: bool, keeps_young: bool) -> dict[str, Tensor]:
    """What an optimizer's state dict shall hold of a weight."""
    entry = {
        packing.TOPOLOGY: packing.pack_topology(weight.mask, weight.grown, weight.moved),
        packing.PROGRESS: packing.pack_progress(progress.step, progress.seed),
    }
    if keeps_scores:
        entry[packing.SCORES] = packing.pack_words(_scores_or_zeros(weight))
    if keeps_young:
        entry[packing.YOUNG] = packing.pack_words(_numbers(weight))
    return entry


def from_entry(entry: dict[str, Tensor] | None) -> tuple[Progress, Topology] | None:
    """What an optimizer's state dict says of a weight; inverse of :func:`entry_of`. None if it says nothing."""
    if entry is None or packing.TOPOLOGY not in entry or packing.PROGRESS not in entry:
        return None
    mask, grown, moved = packing.unpack_topology(entry[packing.TOPOLOGY])
    scores = packing.unpack_words(entry[packing.SCORES], torch.float32) if packing.SCORES in entry else None
    young = packing.unpack_words(entry[packing.YOUNG], torch.int32) if packing.YOUNG in entry else None
    return Progress(*packing.unpack_progress(entry[packing.PROGRESS])), Topology(mask, grown, scores, moved, young)


def restore(weight: SparseWeight, topology: Topology, keeps_young: bool) -> None:
    """Let a weight go on from a checkpoint's topology; with its young blocks, if the schedule has any.

    Values are left alone: those of the same checkpoint may have come before or be still to come, and what stands
    outside the active blocks is settled when an optimizer steps. A topology that is the present one, as when an
    optimizer loads its own state, is no news: it does not make masks newer than the values.
    """
    mask = topology.mask.detach().cpu().clone()
    if not torch.equal(mask, weight.mask):
        weight.set_mask(mask)
        weight.follows = False
    weight.grown = _copy_if_any(topology.grown)
    weight.scores = _copy_if_any(topology.scores)
    weight.moved = topology.moved
    young = Young.of_numbers(topology.young) if keeps_young and topology.young is not None else None
    weight.young = None if young is None else young.inside(mask)


def _copy_if_any(values: Tensor | None) -> Tensor | None:
    return values.detach().cpu().clone() if values is not None and bool(values.any()) else None


def _numbers(weight: SparseWeight) -> Tensor:
    """Of the next step of each young block, 0 of all others: int32 ``[R, C]``."""
    if weight.young is not None:
        return weight.young.numbers(weight.grid)
    return torch.zeros(weight.grid.shape, dtype=torch.int32, device="cpu")


def _scores_or_zeros(weight: SparseWeight) -> Tensor:
    if weight.scores is not None:
        return weight.scores
    return torch.zeros(weight.grid.shape, dtype=torch.float32, device="cpu")
