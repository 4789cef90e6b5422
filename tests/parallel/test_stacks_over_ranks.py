"""Stacks of matrices over ranks: FSDP2, DDP and DTensors of whole matrices train what one process does."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from helpers import compiled
from mask_cases import element_masks
from oracles import assert_same_course
from ranks import assert_same_on_all_ranks, mine, results_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.blocks.index import read_mask
from mst_compile.blocks.shards import local_part
from mst_compile.communication import reduce_active_blocks
from mst_compile.errors import ParallelismError
from mst_compile.parallel.ranks import check_ranks

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

EXPERTS, WIDTH, HIDDEN = 3, 16, 24  # not as many as ranks would divide
SCHEDULE = Constant(0.6, interval=3, growth="gradient", regrown_warmup=3)
mse = nn.functional.mse_loss


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.float64) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=torch.float64) / 4)
        self.router = nn.Linear(WIDTH, EXPERTS, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(EXPERTS, -1, -1), self.up.mT).relu()
        return x + (torch.bmm(hidden, self.down.mT) * self.router(x).softmax(-1).t()[:, :, None]).sum(0)


def fresh() -> nn.Module:
    return nn.Sequential(Experts(), nn.Linear(WIDTH, WIDTH, dtype=torch.float64))


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(12, WIDTH, generator=generator).double(), torch.randn(12, WIDTH, generator=generator).double())
        for _ in range(steps)
    ]


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    mse(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same_run(model: nn.Module, alone: nn.Module) -> None:
    for (name, mask), other in zip(sparsifier(model).masks.items(), sparsifier(alone).masks.values(), strict=True):
        assert torch.equal(mask, other), name
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_course(whole(p), q.detach(), 10**8)


def assert_zero_outside(model: nn.Module) -> None:
    masks = element_masks(model)
    for name, parameter in model.named_parameters():
        if name in masks:
            local, part = local_part(parameter.detach())
            assert not local[~part.of(masks[name].reshape(-1, masks[name].shape[-1]))].any(), name


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model[0])
    return fully_shard(model)


def on_shards() -> None:
    """Sparse before and after it was sharded, and compiled on top."""
    for before, fast in ((True, False), (False, False), (True, True)):
        torch._dynamo.reset()
        alone = sparsify(fresh(), SCHEDULE, block=4)
        model = shard(sparsify(fresh(), SCHEDULE, block=4)) if before else sparsify(shard(fresh()), SCHEDULE, block=4)
        run = compiled(model) if fast else model
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
        for x, y in batches(14):
            step(alone, optimizers[0], x, y)
            step(run, optimizers[1], mine(x), mine(y))
            assert_zero_outside(model)
        assert sparsifier(model).weights["0.up"].changes > 3
        assert_same_run(model, alone)
        check_ranks(model)
        assert_same_on_all_ranks(*map(whole, model.parameters()))


def through_checkpoints() -> None:
    """From shards to one process and back, by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder = [TemporaryDirectory().name]
    dist.broadcast_object_list(folder)
    data = batches(12)
    model = shard(sparsify(fresh(), SCHEDULE, block=4))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for x, y in data[:7]:
        step(model, optimizer, mine(x), mine(y))
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=Path(folder[0]))
    for x, y in data[7:]:
        step(model, optimizer, mine(x), mine(y))
    again = shard(sparsify(fresh(), SCHEDULE, block=4, seed=9))
    other = torch.optim.AdamW(again.parameters(), 0.01)
    states = get_state_dict(again, other)
    found = {"model": states[0], "optimizer": states[1]}
    dcp.load(found, checkpoint_id=Path(folder[0]))
    set_state_dict(again, other, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    for x, y in data[7:]:
        step(again, other, mine(x), mine(y))
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def with_active_gradients_alone() -> None:
    alone, model = (sparsify(fresh(), SCHEDULE, block=4) for _ in range(2))
    parallel = DistributedDataParallel(model)
    moved = reduce_active_blocks(parallel)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
    for x, y in batches(14):
        step(alone, optimizers[0], x, y)
        step(parallel, optimizers[1], mine(x), mine(y))
    assert_same_run(model, alone)
    assert moved.bytes_moved < 0.75 * moved.bytes_dense


class LocalExperts(Experts):
    """Each rank multiplies the experts that it holds, as in expert parallelism."""

    def forward(self, x: Tensor) -> Tensor:
        up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (self.up, self.down))
        return torch.bmm(torch.bmm(x.expand(len(up), -1, -1), up.mT).relu(), down.mT)


def as_experts_of_each_rank() -> None:
    """The index is of the matrices that a rank holds, and events are those of the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    models = [sparsify(LocalExperts(), SCHEDULE, block=4, include=["up", "down"]) for _ in range(2)]
    for name in ("up", "down"):
        cut = distribute_tensor(getattr(models[1], name).detach(), mesh, [Shard(0)])
        models[1].register_parameter(name, nn.Parameter(cut))
    optimizers = [torch.optim.SGD([m.up, m.down], 0.05, momentum=0.9) for m in models]
    for x, _ in batches(8):
        for model, optimizer in zip(models, optimizers, strict=True):
            (model(x).square().sum() / len(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_run(*models[::-1])
    for name, weight in sparsifier(models[1]).weights.items():
        local, part = local_part(getattr(models[1], name).detach())
        assert weight.signature[3] == len(local) // weight.grid.matrix.rows
        assert weight.index is not None
        own = weight.mask[part.row // 4 : (part.row + part.rows) // 4]
        assert torch.equal(read_mask(weight.index, weight._indexed), own)


def cut_matrices_are_refused() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dim in (1, 2):
        model = Experts()
        cut = distribute_tensor(model.up.detach(), mesh, [Shard(dim)])
        model.register_parameter("up", nn.Parameter(cut))
        with pytest.raises(ParallelismError, match=r"stacks of matrices Shard\(0\) or Replicate\(\) alone"):
            sparsify(model, SCHEDULE, block=4)
        assert set(sparsifier(sparsify(model, SCHEDULE, block=4, exclude="up")).weights) == {"down"}


SCENARIOS = [
    on_shards, through_checkpoints, with_active_gradients_alone, as_experts_of_each_rank, cut_matrices_are_refused,
]  # fmt: skip
found = results_of(SCENARIOS, 2)


@pytest.mark.parametrize("name", [s.__name__ for s in SCENARIOS])
def test_on_two_ranks(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]
