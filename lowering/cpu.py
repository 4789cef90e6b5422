"""The record of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor

from mst_compile.blocks.bulk import Average, Kind
from mst_compile.blocks.grid import BlockGrid

from . import cpu_attention, cpu_choice, cpu_facts, cpu_grouped, cpu_linear, cpu_packed, device
from .memory import keep_freed_memory


def why_no_attention(dtype: torch.dtype, size: int, value_size: int) -> str | None:
    """Why there is no CPU attention kernel for heads of these sizes in ``dtype``, or None if there is one."""
    reason = kernels.why_unavailable()
    if reason is not None:
        return f"no kernels: {reason}"
    if kernels.supports_head(dtype, size, value_size):
        return None
    return f"no CPU attention kernel for {device.heads_of(size, value_size)} in {dtype}"


def _why_not_compiled() -> str | None:
    # Kernels of a warm cache are there without a compiler; what Inductor generates is not.
    return kernels.why_unavailable() or kernels.why_inductor_has_no_compiler()


class _Bulk:
    """Passes over a whole weight, see :mod:`mst_compile.blocks.bulk`."""

    launches = False

    def takes(self, tensor: Tensor, grid: BlockGrid) -> bool:
        supported = kernels.supports(grid.block, tensor.dtype, tensor.dtype) and tensor.stride(-1) == 1
        return supported and kernels.available()

    def zero_inactive_(self, tensors: Sequence[Tensor], indexes: Sequence[Tensor], grids: Sequence[BlockGrid]) -> None:
        for tensor, index, grid in zip(tensors, indexes, grids, strict=True):
            kernels.zero_inactive_(tensor, index, grid.block)

    def measures(self, tensor: Tensor, kind: Kind) -> bool:
        return kind == "squares"

    def measure(self, tensors: Sequence[Tensor], grids: Sequence[BlockGrid], kind: Kind) -> Tensor:
        found = [kernels.block_sumsq(t, grid.block).flatten() for t, grid in zip(tensors, grids, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def begins(self, average: Average) -> bool:
        return False  # PyTorch's passes are a small part of the step that follows an event

    def begin(self, averages: Sequence[Average], scale: float) -> None:
        raise NotImplementedError


def _lowerings() -> Mapping[str, Callable[..., Any]]:
    from .cpu_inductor import LOWERINGS

    return LOWERINGS


device.register(
    device.Device(
        "cpu",
        why_unsupported=cpu_linear.why_unsupported,
        why_no_attention=why_no_attention,
        times=cpu_choice.times,
        attention_pays=cpu_choice.is_attention_faster,
        chooses=True,
        default_block=8,
        finest_block=kernels.FINEST_BLOCK,
        multiplies_stacks=True,
        implementations={
            "linear": cpu_linear.linear,
            "linear_grad_input": cpu_linear.grad_input,
            "linear_grad_weight": cpu_linear.grad_weight,
            "grouped_linear": cpu_grouped.linear,
            "grouped_linear_grad_input": cpu_grouped.grad_input,
            "grouped_linear_grad_weight": cpu_grouped.grad_weight,
            "packed_linear": cpu_packed.packed_linear,
            "attention": cpu_attention.attention,
            "attention_backward": cpu_attention.attention_backward,
        },
        bulk=_Bulk(),
        lowerings=_lowerings,
        why_not_compiled=_why_not_compiled,
        keep_memory=keep_freed_memory,
        facts=cpu_facts.facts,
    )
)
