"""A tensor-parallel model for tests, what its training is compared with, and how it is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mask_cases import element_masks
from oracles import assert_same_course
from ranks import assert_same_on_all_ranks, batches
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from mst_compile import sparsifier
from mst_compile.blocks.shards import local_part
from mst_compile.parallel.ranks import check_ranks

mse = nn.functional.mse_loss
ROUNDINGS = 10**8  # by which trainings in float64 may part, as those on FSDP2's shards do

# Weights of 52 x 30 in blocks of 4: two ranks cut at 26, four at 13, through blocks; the head has 5 rows, of which a
# fourth rank holds none.
PLAN: dict[str, ParallelStyle] = {
    "first.up": ColwiseParallel(),
    "first.down": RowwiseParallel(),
    "second.up": ColwiseParallel(),
    "second.down": RowwiseParallel(),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh | None = None, plan: Any = None) -> nn.Module:
    return parallelize_module(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan or PLAN)


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_zero_outside(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every rank looks at its own part of weights, moments and gradients."""
    masks = element_masks(model)
    for name, parameter in model.named_parameters():
        if name in masks:
            state = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
            assert len(state) == 2
            assert parameter.grad is not None
            for tensor in [parameter.detach(), *state, parameter.grad]:
                local, part = local_part(tensor)
                assert not local[~part.of(masks[name])].any(), name


def assert_same_run(model: nn.Module, alone: nn.Module, parted: int = ROUNDINGS) -> None:
    """Same masks, on all ranks; weights up to rounding."""
    check_ranks(model)
    for (name, mask), other in zip(sparsifier(model).masks.items(), sparsifier(alone).masks.values(), strict=True):
        assert torch.equal(mask, other), name
    found = [whole(p) for p in model.parameters()]
    assert_same_on_all_ranks(*found)
    for p, q in zip(found, alone.parameters(), strict=True):
        assert_same_course(p, whole(q), parted)


def always_sparse(model: nn.Module, inner: str) -> Any:
    return torch.compile(model, backend="mst", options={"mst.inner": inner, "mst.dense_threshold": 1.0})


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mesh: DeviceMesh | None = None
) -> list[Tensor]:
    """On this rank's part of the batches, if ``mesh`` has a dimension for data; returns the losses of the parts."""
    parts, part = (1, 0) if mesh is None else (mesh["dp"].size(), mesh["dp"].get_local_rank())
    losses = []
    for step, (x, y) in enumerate(batches(steps.stop)):
        if step in steps:
            loss = mse(model(x.chunk(parts)[part]), y.chunk(parts)[part])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return losses
