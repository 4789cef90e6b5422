"""How the topology is written into checkpoints, and read back: pure functions.

In an optimizer's state dict everything is a tensor that belongs to a parameter, and comes back in that parameter's
dtype. So all is written in whole numbers from 0 to 255, which every floating dtype of 16 bits or more holds exactly::

    mst_topology  [R, C]       0 inactive, 1 active, 2 active since the last topology event, not stepped since; and 3
                               more everywhere if the weight was trained since that event
    mst_progress  [16]         step count and seed, eight bytes each, little end first
    mst_scores    [4, R, C]    float32 growth scores so far, four bytes each; where scores are added up over steps
    mst_young     [4, R, C]    int32, the number of a young block's next step, 0 for all others, four bytes each; where
                               the schedule has young blocks
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_compile.errors import CheckpointError, MaskError
from mst_compile.rules.checks import as_whole, check_flag, check_seed, check_whole, shown

from .weight import SparseWeight

STATE_VERSION = 2
TOPOLOGY, PROGRESS, SCORES, YOUNG = TOPOLOGY_KEYS = ("mst_topology", "mst_progress", "mst_scores", "mst_young")
# Of a Parameter that is a copy of many weights: the number of each in its parameter group -> what belongs to it.
MASTERS = "mst_masters"
KEYS = (*TOPOLOGY_KEYS, MASTERS)


def pack_topology(mask: Tensor, grown: Tensor | None, moved: bool = False) -> Tensor:
    """uint8 ``[R, C]`` of two bool ``[R, C]``: the active blocks, and those of them that have just grown."""
    packed = mask.to(torch.uint8) + 3 * moved
    return packed if grown is None else packed + (grown & mask).to(torch.uint8)


def unpack_topology(packed: Tensor) -> tuple[Tensor, Tensor | None, bool]:
    """Inverse of :func:`pack_topology`, from any dtype and device."""
    packed = packed.detach().cpu()
    moved = bool((packed > 2.5).any())
    packed = packed - 3 * moved
    grown = packed > 1.5
    return packed > 0.5, grown if bool(grown.any()) else None, moved


def pack_progress(step: int, seed: int) -> Tensor:
    """uint8 ``[16]``."""
    return torch.tensor(
        [*step.to_bytes(8, "little"), *seed.to_bytes(8, "little", signed=True)], dtype=torch.uint8, device="cpu"
    )


def unpack_progress(packed: Tensor) -> tuple[int, int]:
    """Step count and seed: inverse of :func:`pack_progress`, from any dtype and device."""
    data = bytes(packed.detach().cpu().to(torch.uint8).tolist())
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little", signed=True)


def pack_words(words: Tensor) -> Tensor:
    """The bytes of float32 or int32 ``[R, C]``: uint8 ``[4, R, C]``, in memory of their own, also of one block:
    ``torch.save`` refuses to write what two dtypes share."""
    packed = words.contiguous().view(torch.uint8).view(*words.shape, 4).movedim(-1, 0)
    return packed.clone(memory_format=torch.contiguous_format)


def unpack_words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`pack_words`, from any dtype and device."""
    # A copy, as what has one row and column counts as contiguous whatever its strides are.
    data = packed.detach().cpu().to(torch.uint8).movedim(0, -1).clone(memory_format=torch.contiguous_format)
    return data.view(dtype).squeeze(-1)


def check_entry(name: str, weight: SparseWeight, entry: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless our part of an optimizer's state of one weight fits the weight."""
    rows, cols = weight.grid.shape
    shapes = {TOPOLOGY: (rows, cols), PROGRESS: (16,), SCORES: (4, rows, cols), YOUNG: (4, rows, cols)}
    for key, value in entry.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shapes[key]:
            got = tuple(value.shape) if isinstance(value, Tensor) else form(value)
            raise CheckpointError(
                f"the optimizer state holds {key} of {got} for {name}, which has {shapes[key]} here (block "
                f"{weight.grid.block}); sparsify the model with the block that the checkpoint was written with"
            )
        _check_bytes(f"{key} of {name} in the optimizer state", value, 5 if key == TOPOLOGY else 255)
    if TOPOLOGY in entry:
        low, high = (int(n) for n in entry[TOPOLOGY].detach().cpu().aminmax())
        if low < 3 <= high:
            raise CheckpointError(
                f"{TOPOLOGY} of {name} in the optimizer state holds {low} and {high}: of a weight that was trained "
                "since the last topology event all are 3 or more, of another none; it was not written by this library"
            )
    if PROGRESS in entry:
        step, _ = unpack_progress(entry[PROGRESS])
        check_whole(f"the step count of {name} in the optimizer state", step, least=0, error=CheckpointError)
    if SCORES in entry:
        _check_scores(f"{SCORES} of {name} in the optimizer state", unpack_words(entry[SCORES], torch.float32))
    if YOUNG in entry:
        _check_young(f"{YOUNG} of {name} in the optimizer state", unpack_words(entry[YOUNG], torch.int32))


def _check_bytes(what: str, packed: Tensor, most: int) -> None:
    """Raise :class:`CheckpointError` unless all is whole numbers from 0 to ``most``, of whatever dtype."""
    if packed.is_meta or packed.dtype == torch.bool or packed.dtype.is_complex:
        raise CheckpointError(f"{what} must be whole numbers, got a tensor of {packed.dtype} on {packed.device}")
    values = packed.detach().cpu().double()
    bad = values[~((values >= 0) & (values <= most) & (values == values.round()))]
    if bad.numel():
        raise CheckpointError(
            f"{what} must be whole numbers from 0 to {most}, got {bad[0].item()!r}; it was not written by this "
            "library, or was changed since, as by a cast to a dtype that cannot hold it"
        )


def check_state(state: Any, own: dict[str, SparseWeight]) -> tuple[int, int]:
    """Step count and seed of a sparsifier's state dict.

    Raises:
        CheckpointError: ``state`` is none, or does not fit the model.
    """
    version = state.get("version", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or as_whole(version) != STATE_VERSION:
        raise CheckpointError(
            f"not a sparsifier state of version {STATE_VERSION}: got {shown(version)}; pass what "
            "sparsifier(model).state_dict() returned"
        )
    step = check_whole("'step' of the sparsifier state", state.get("step"), least=0, error=CheckpointError)
    seed = check_seed("'seed' of the sparsifier state", state.get("seed"), CheckpointError)
    for key in ("masks", "grown", "scores"):
        if not isinstance(state.get(key), dict):
            raise CheckpointError(f"the sparsifier state has no {key!r} of type dict: got {shown(state.get(key))}")
    masks = state["masks"]
    if masks.keys() != own.keys():
        missing, more = (sorted(names, key=str) for names in (own.keys() - masks.keys(), masks.keys() - own.keys()))
        raise CheckpointError(
            f"the checkpoint's masks do not fit the model: missing {missing}, unexpected {more}; sparsify the model as "
            "it was when it was saved"
        )
    for name, weight in own.items():
        check_mask(name, masks[name], weight)
        if name in state["grown"]:
            check_mask(name, state["grown"][name], weight, "record of grown blocks")
        if name in state["scores"]:
            _check_scores_of(name, state["scores"][name], weight)
    moved = state.get("moved", {})
    if not isinstance(moved, dict):
        raise CheckpointError(f"'moved' of the sparsifier state must be a dict, got {shown(moved)}")
    for name, value in moved.items():
        check_flag(f"'moved' of {name} in the sparsifier state", value, CheckpointError)
    _check_young_of(state.get("young", {}), own)
    for key in ("grown", "scores"):
        more = sorted(state[key].keys() - own.keys(), key=str)
        if more:
            raise CheckpointError(f"the checkpoint has {key!r} of weights that are not sparse here: {more}")
    return step, seed


def _check_scores_of(name: str, scores: Any, weight: SparseWeight) -> None:
    """Raise :class:`CheckpointError` unless ``scores`` are growth scores of the blocks of ``weight``."""
    fits = isinstance(scores, Tensor) and scores.dtype == torch.float32 and tuple(scores.shape) == weight.grid.shape
    if not fits or scores.is_meta:
        raise CheckpointError(
            f"the growth scores of {name} must be torch.float32 of {weight.grid.shape} blocks, got {form(scores)}"
        )
    _check_scores(f"the growth scores of {name}", scores)


def _check_scores(what: str, scores: Tensor) -> None:
    """Raise :class:`CheckpointError` unless all are mean squares."""
    bad = scores[~(scores >= 0)]
    if bad.numel():
        raise CheckpointError(
            f"{what} must be mean squares, at least 0, got {bad[0].item()!r}; go on from a checkpoint whose gradients "
            "were numbers"
        )


def _check_young_of(young: Any, own: dict[str, SparseWeight]) -> None:
    """Raise :class:`CheckpointError` unless ``young`` are the numbers of steps of young blocks, by weight."""
    if not isinstance(young, dict):
        raise CheckpointError(f"'young' of the sparsifier state must be a dict, got {shown(young)}")
    for name, numbers in young.items():
        if name not in own:
            raise CheckpointError(f"the checkpoint has 'young' of weights that are not sparse here: {[name]}")
        shape = own[name].grid.shape
        fits = isinstance(numbers, Tensor) and numbers.dtype == torch.int32 and tuple(numbers.shape) == shape
        if not fits or numbers.is_meta:
            raise CheckpointError(f"'young' of {name} must be torch.int32 of {shape} blocks, got {form(numbers)}")
        _check_young(f"'young' of {name}", numbers)


def _check_young(what: str, numbers: Tensor) -> None:
    """Raise :class:`CheckpointError` unless all are numbers of steps."""
    if bool((numbers < 0).any()):
        raise CheckpointError(
            f"{what} must be numbers of steps, at least 0, got {int(numbers.min())}; it was not written by this library"
        )


def check_mask(name: str, mask: Any, weight: SparseWeight, what: str = "mask") -> None:
    """Raise :class:`MaskError` unless ``mask`` is a block mask of ``weight``."""
    fits = isinstance(mask, Tensor) and tuple(mask.shape) == weight.grid.shape and mask.dtype == torch.bool
    if not fits or mask.is_meta or mask.layout != torch.strided:
        raise MaskError(
            f"the {what} of {name} must have {weight.grid.shape} blocks of torch.bool (block {weight.grid.block}), got "
            f"{form(mask)}; a checkpoint needs the block that it was written with"
        )


def form(value: Any) -> str:
    """Shape, dtype, layout and device of a tensor; of anything else what it is. For messages."""
    if not isinstance(value, Tensor):
        return f"{shown(value)} of type {type(value).__name__}"
    return f"{tuple(value.shape)} of {value.dtype} ({value.layout}, on {value.device})"
