"""What is written to the indexes of many weights in one go: on a GPU a launch and a transfer cost the host the same for
all of them as for one."""

from __future__ import annotations

from collections.abc import Iterable

from mst_compile.blocks.index import write_dense_grad, write_indexes

from .indexes import epoch
from .weight import SparseWeight


def write_taken(weights: Iterable[SparseWeight]) -> None:
    """Write the indexes of those weights that have taken over a mask since theirs was written."""
    late = [weight for weight in weights if weight.unwritten]
    if late:
        epoch.value += 1
    write_indexes([content for weight in late for content in weight.contents(weight.mask)])
    for weight in late:
        weight.unwritten = False


def want_dense_gradients(weights: Iterable[SparseWeight], wanted: bool) -> None:
    """Ask kernels for gradients on all blocks, which growth reads, or on the active ones alone."""
    changing = [weight for weight in weights if weight.dense_grad != wanted]
    write_dense_grad([index for weight in changing for index in weight.indexes], wanted)
    for weight in changing:
        weight.dense_grad = wanted
