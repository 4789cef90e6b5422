"""Check that the ranks of a run agree."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from mst_compile.errors import RankMismatchError
from mst_compile.parallel.description import digest
from mst_compile.rules.checks import check_instance, check_model
from mst_compile.state.sparsifier import some_parts_of


def check_ranks(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Check that all ranks of ``group`` hold the same masks and have taken the same number of steps.

    They do as long as they sparsify with the same schedule, seed and options, and step together, which is checked at
    the first training step without being asked (:mod:`mst_compile.parallel.first_step`). All ranks of the group must
    call it (``torch.distributed.all_gather_object``); it costs one small message. Does nothing where
    ``torch.distributed`` is not initialised. Modules that were sparsified
    separately are all checked.

    Args:
        group: default the world.

    Raises:
        RankMismatchError: on all ranks, naming the first weight that differs.
        NotSparseError: the model is not sparse.
    """
    check_model("check_ranks", model)
    parts = some_parts_of(model)
    if group is not None:
        check_instance("group", group, dist.ProcessGroup, "a torch.distributed.ProcessGroup or None")
    if not dist.is_initialized():
        return
    counts = [part.sparsifier.step_count for part in parts]
    digests = {part.full(name): digest(w) for part in parts for name, w in part.sparsifier.weights.items()}
    mine = counts[0] if len(counts) == 1 else tuple(counts), digests
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    steps = [step for step, _ in found]
    first = found[0][1]
    for rank, (_, digests) in enumerate(found):
        names = [n for n in [*first, *digests] if first.get(n) != digests.get(n)]
        if names:
            raise RankMismatchError(
                f"the mask of {names[0]} differs between ranks 0 and {rank} of the group (steps taken: {steps[0]} and "
                f"{steps[rank]}); {len(names)} of {len(first)} weights differ. Call sparsify with the same schedule, "
                "seed and options on all ranks, and load the same checkpoint"
            )
    if len(set(steps)) > 1:
        raise RankMismatchError(
            f"the ranks have taken different numbers of steps: {steps}; every rank must call optimizer.step() equally "
            "often, and load the same checkpoint"
        )
