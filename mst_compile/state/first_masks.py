"""The masks that a run begins with: at random, from the weights' own magnitude, or as the user gives them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mst_compile.blocks.bulk import block_mean_abs, block_mean_square, sample_of
from mst_compile.blocks.layout import as_matrix
from mst_compile.errors import ArgumentError, MaskError, SelectionError, WeightError
from mst_compile.rules.checks import shown
from mst_compile.rules.fresh import SIDE, looks_trained
from mst_compile.rules.guard import safe_among_all
from mst_compile.rules.masks import generator, magnitude_mask, random_mask

from .event import Plan
from .packing import form
from .weight import SparseWeight
from .weights import Weights

Masks = str | Mapping[str, Tensor] | None
WAYS = ("magnitude", "random")
_LOADED = "_is_hf_initialized"  # what transformers (from version 5) sets on a Parameter that from_pretrained has loaded

_logger = logging.getLogger("mst_compile")


@dataclass(frozen=True)
class FirstMasks:
    """How first masks were made.

    Attributes:
        way: ``"magnitude"`` or ``"random"``, of the weights without a given mask; empty of a run that starts dense.
        why: what that was chosen by; empty if the user chose.
        given: number of weights whose mask the user gave.
    """

    way: str = ""
    why: str = ""
    given: int = 0

    @property
    def fresh(self) -> bool:
        """Whether weights count as freshly initialised."""
        return self.way == "random"

    def __str__(self) -> str:
        if not self.way:
            return "none, the schedule starts dense"
        way = {"magnitude": "by magnitude", "random": "at random"}[self.way]
        given = f"given for {self.given} weights, of others " if self.given else ""
        return f"{given}{way}{f': {self.why}' if self.why else ''}"


def check_masks(masks: object, weights: Weights) -> None:
    """Check what the user has to say of first masks; changes nothing.

    Raises:
        ArgumentError: it is neither a way to make them nor a mapping.
        SelectionError: no sparse weight has a name that it maps.
        MaskError: a mask does not fit its weight.
    """
    if masks is None or (isinstance(masks, str) and masks in WAYS):
        return
    if not isinstance(masks, Mapping):
        raise ArgumentError(
            f"masks must be 'magnitude', 'random', a mapping of weights' names to masks, or None, got {shown(masks)}"
        )
    for name, mask in masks.items():
        weight = weights.by_name.get(name) if isinstance(name, str) else None
        if weight is None:
            names = ", ".join(map(repr, weights.by_name))[:200]
            raise SelectionError(f"masks: no sparse weight is called {shown(name)}; their names look like {names}")
        block_mask(weight, mask)


def block_mask(weight: SparseWeight, mask: object) -> Tensor:
    """The block mask, bool ``[R, C]`` on the CPU, of a mask of blocks or of elements.

    Raises:
        MaskError: it has another shape or dtype, cuts blocks, or leaves nothing of the weight.
    """
    grid = weight.grid
    whole = grid.dims
    if grid.matrices and isinstance(mask, Tensor) and tuple(mask.shape) == (grid.matrices, *grid.matrix.shape):
        mask = as_matrix(mask)
    fits = type(mask) is Tensor and mask.dtype == torch.bool and tuple(mask.shape) in (grid.shape, whole)
    if not fits or mask.is_meta or mask.layout != torch.strided:  # type: ignore[attr-defined]
        raise MaskError(
            f"the mask of {weight.name} must be a torch.bool tensor of its {grid.shape} blocks (block {grid.block}) or "
            f"{whole} elements, got {form(mask)}"
        )
    assert isinstance(mask, Tensor)
    found = mask.detach().cpu().clone()
    if tuple(found.shape) != grid.shape:
        elements = found
        found = block_mean_abs(elements, grid) > 0
        cut = int((grid.expand(found).view(whole) != elements).count_nonzero())
        if cut:
            raise MaskError(
                f"the mask of {weight.name}, shape {whole}, cuts its blocks of {grid.block} x {grid.block}: {cut} "
                "elements are inactive in blocks with active ones. Give whole blocks, or sparsify with block=1"
            )
    if not all(bool(one.any()) for one in grid.split(found)):
        of_all = " in one of its matrices" if grid.matrices else ""
        raise MaskError(
            f"the mask of {weight.name}, shape {tuple(mask.shape)}, has no active block{of_all}; one must be"
        )
    return found


def choose(masks: Masks, weights: Weights) -> FirstMasks:
    """How first masks are made, and why; says it to the log."""
    given = len(masks) if isinstance(masks, Mapping) else 0
    if isinstance(masks, str):
        choice = FirstMasks(masks)
    else:
        why = _why_trained(list(weights.parameters()))
        choice = FirstMasks("magnitude", why, given) if why else FirstMasks("random", "weights look fresh", given)
    _logger.info("first masks %s", choice)
    return choice


def _why_trained(own: Sequence[tuple[SparseWeight, nn.Parameter]]) -> str:
    """Why weights are not as an initialiser left them; empty if they seem to be."""
    loaded = next((weight.name for weight, parameter in own if getattr(parameter, _LOADED, False)), None)
    if loaded is not None:
        return f"{loaded} was loaded by from_pretrained"
    for weight, parameter in own:
        eps = torch.finfo(parameter.dtype).eps
        if looks_trained(sample_of(parameter, SIDE), eps, len(own)):
            return f"the values of {weight.name} are not those of a fresh initialisation"
    return ""


def plan_first_masks(
    choice: FirstMasks, masks: Masks, weights: Weights, densities: Sequence[float], magnitude: str, seed: int
) -> Plan:
    """The masks of step 0; changes nothing.

    Args:
        masks: as checked by :func:`check_masks`.
        densities: target density of each weight.
        magnitude: of the schedule, ``"l2"`` or ``"l1"``.

    Raises:
        WeightError: a weight whose magnitude counts is not finite.
    """
    given = masks if isinstance(masks, Mapping) else {}
    found = {}
    for density, (weight, parameter) in zip(densities, weights.parameters(), strict=True):
        if weight.name in given:
            found[weight.name] = block_mask(weight, given[weight.name])
        elif choice.way == "magnitude":
            found[weight.name] = _by_magnitude(weight, parameter, weight.blocks_at(density), magnitude)
        else:
            found[weight.name] = at_random(weight, weight.blocks_at(density), seed)
    return Plan(found)


def at_random(weight: SparseWeight, count: int, seed: int) -> Tensor:
    """A mask of random blocks, those of the backbone among them: ``count``, of a stack in each matrix."""
    own = zip(weight.grid.split(weight.backbone), weight.matrices, strict=True)
    return torch.cat([random_mask(backbone, count, generator(seed, 0, name)) for backbone, name in own])


def _by_magnitude(weight: SparseWeight, parameter: Tensor, count: int, magnitude: str) -> Tensor:
    """``count`` blocks, of a stack in each matrix: those of largest magnitude, and what the guard keeps."""
    if count >= weight.grid.matrix.blocks:
        return torch.ones_like(weight.mask)
    scores = (block_mean_abs if magnitude == "l1" else block_mean_square)(parameter, weight.grid)
    if not bool(scores.isfinite().all()):
        raise WeightError(
            f"{weight.name} holds values that are not finite, so that its first mask cannot follow their magnitude; "
            "load the model again, or pass masks='random'"
        )
    own = zip(weight.grid.split(scores), weight.grid.split(weight.backbone), strict=True)
    return torch.cat(
        [magnitude_mask(safe_among_all(weight.guard, m, count, backbone), count, m) for m, backbone in own]
    )
