"""How the topology is written into checkpoints, and read back: pure functions.

In an optimizer's state dict everything is a tensor that belongs to a parameter, and comes back in that parameter's
dtype. So all is written in whole numbers from 0 to 255, which every floating dtype of 16 bits or more holds exactly::

    mst_topology  [R, C]       0 inactive, 1 active, 2 active since the last topology event, not stepped since; and 3
                               more everywhere if the weight was trained since that event
    mst_progress  [16]         step count and seed, eight bytes each, little end first
    mst_scores    [4, R, C]    float32 growth scores so far, four bytes each; where scores are added up over steps
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mst_compile.errors import CheckpointError, MaskError

from .weight import SparseWeight

STATE_VERSION = 2
TOPOLOGY, PROGRESS, SCORES = TOPOLOGY_KEYS = ("mst_topology", "mst_progress", "mst_scores")


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
    return torch.tensor([*step.to_bytes(8, "little"), *seed.to_bytes(8, "little", signed=True)], dtype=torch.uint8)


def unpack_progress(packed: Tensor) -> tuple[int, int]:
    """Step count and seed: inverse of :func:`pack_progress`, from any dtype and device."""
    data = bytes(packed.detach().cpu().to(torch.uint8).tolist())
    return int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little", signed=True)


def pack_scores(scores: Tensor) -> Tensor:
    """The bytes of float32 ``[R, C]``: uint8 ``[4, R, C]``."""
    return scores.contiguous().view(torch.uint8).view(*scores.shape, 4).movedim(-1, 0).contiguous()


def unpack_scores(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_scores`, from any dtype and device."""
    data = packed.detach().cpu().to(torch.uint8).movedim(0, -1).contiguous()
    return data.view(torch.float32).squeeze(-1)


def check_entry(name: str, weight: SparseWeight, entry: dict[str, Any]) -> None:
    """Raise :class:`CheckpointError` unless our part of an optimizer's state of one weight fits the weight."""
    rows, cols = weight.grid.shape
    shapes = {TOPOLOGY: (rows, cols), PROGRESS: (16,), SCORES: (4, rows, cols)}
    for key, value in entry.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != shapes[key]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(
                f"the optimizer state holds {key} of {got} for {name}, which has {shapes[key]} here (block "
                f"{weight.grid.block}); sparsify the model with the block that the checkpoint was written with"
            )


def check_state(state: Any, own: dict[str, SparseWeight]) -> None:
    """Raise :class:`CheckpointError` unless ``state`` is a sparsifier's state dict that fits the model."""
    if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
        version = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"not a sparsifier state of version {STATE_VERSION}: got {version!r}")
    for key, kind in (("step", int), ("seed", int), ("masks", dict), ("grown", dict), ("scores", dict)):
        if not isinstance(state.get(key), kind):
            raise CheckpointError(
                f"the sparsifier state has no {key!r} of type {kind.__name__}: got {state.get(key)!r}"
            )
    masks = state["masks"]
    if masks.keys() != own.keys():
        raise CheckpointError(
            f"the checkpoint's masks do not fit the model: missing {sorted(own.keys() - masks.keys())}, "
            f"unexpected {sorted(masks.keys() - own.keys())}; sparsify the model as it was when it was saved"
        )
    for name, weight in own.items():
        check_mask(name, masks[name], weight)


def check_mask(name: str, mask: Any, weight: SparseWeight) -> None:
    """Raise :class:`MaskError` unless ``mask`` is a block mask of ``weight``."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != weight.grid.shape or mask.dtype != torch.bool:
        got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(
            f"the mask of {name} must have {weight.grid.shape} blocks of torch.bool (block {weight.grid.block}), got "
            f"{got}; a checkpoint needs the block that it was written with"
        )
