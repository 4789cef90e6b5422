"""Models of DTensors that are converted to another dtype and back, which PyTorch does by swapping their content."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from helpers import compiled
from oracles import assert_same_course
from ranks import batches
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mst_compile
from mst_compile import MixedSparsity, sparsifier, sparsify

pytestmark = pytest.mark.xdist_group("ranks")
STEPS = 10


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensor_parallel(model: nn.Module) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)  # type: ignore[arg-type]


def sharded(model: nn.Module) -> None:
    fully_shard(model)


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 12))


def step(model: nn.Module, run: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    (run(x) - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("spread", [tensor_parallel, sharded])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("compile_it", [False, True])
def test_a_model_of_dtensors_is_converted_in_mid_course(
    spread: Callable[[nn.Module], None], before: bool, compile_it: bool
) -> None:
    schedule = MixedSparsity.published(STEPS, 0.7, warmup=3, restoration=3, settle=1, interval=2, ramp_interval=1)
    runs = {}
    for at in (None, 0, 4):
        torch._dynamo.reset()
        model = dense()
        if before:
            sparsify(model, schedule, block=4)
        spread(model)
        if not before:
            sparsify(model, schedule, block=4)
        run = compiled(model) if compile_it else model
        optimizer = torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), 1e-2)
        for number, (x, _) in enumerate(batches(STEPS)):
            if number == at:
                model.to(torch.float64).to(torch.float32)
            step(model, run, optimizer, x.float()[:, :12])
        assert sparsifier(model).step_count == STEPS
        runs[at] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    for at in (0, 4):
        for one, other in zip(runs[at], runs[None], strict=True):
            assert_same_course(one.detach(), other.detach(), parted=100)


def test_a_dense_model_is_converted_as_without_this_package() -> None:
    """The package follows whatever FSDP2 shards in the process."""
    model = dense()
    fully_shard(model)
    model(torch.ones(2, 12)).sum().backward()
    model.to(torch.float64)
    assert next(model.parameters()).dtype == torch.float64
