"""Tensor parallelism, alone and under FSDP2: training is that of one process, compiled too; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mask_cases import element_masks
from parallel_cases import always_sparse, assert_same_run, assert_zero_outside, mse, tensor_parallel, whole
from ranks import SCHEDULES, batches, net, results_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.distributed.tensor.placement_types import _StridedShard

from mst_compile import Constant, explain, sparsifier, sparsify
from mst_compile.errors import ParallelismError, RankMismatchError, WeightError
from mst_compile.parallel.ranks import check_ranks
from mst_compile.rules.schedule import Schedule

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time


def products(run: Callable[[], None]) -> dict[str, set[str]]:
    """Operator -> names of the weights that sparse products multiply while ``run`` runs."""
    with torch.profiler.profile() as profile:
        run()
    found: dict[str, set[str]] = {}
    for event in profile.events() or ():
        operator, *layer = event.name.split(" ")
        if operator.startswith("mst::") and layer:
            found.setdefault(operator, set()).add(layer[0])
    return found


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def is_one_process() -> None:
    """Made sparse before or after, recomputing, with masks drawn or by magnitude, growing by gradients."""
    cases: list[tuple[bool, bool, Schedule, Any]] = [
        (True, False, Constant(0.6, interval=5, regrown="own steps", regrown_warmup=4), None),
        (False, True, SCHEDULES[1], "magnitude"),
    ]
    for before, recompute, schedule, masks in cases:
        alone = sparsify(net(), schedule, masks=masks)
        model = net(recompute=recompute)
        model = (
            tensor_parallel(sparsify(model, schedule, masks=masks))
            if before
            else sparsify(tensor_parallel(model), schedule, masks=masks)
        )
        assert_same_run(model, alone, 1)
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
        for step, (x, y) in enumerate(batches(17), 1):
            losses = [mse(m(x), y) for m in (alone, model)]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
            if step % 5 < 2:  # after topology events, and a step later
                assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
                assert_zero_outside(model, optimizers[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert_same_run(model, alone)


def compiles() -> None:
    """Every rank multiplies its own part by sparse products, forward and backward."""
    schedule = SCHEDULES[0]
    cases = [("aot_eager", True), ("inductor", False)]
    for inner, before in cases if dist.get_world_size() == 2 else cases[:1]:
        torch._dynamo.reset()
        alone = sparsify(net(torch.float32), schedule)
        model = net(torch.float32)
        model = tensor_parallel(sparsify(model, schedule)) if before else sparsify(tensor_parallel(model), schedule)
        if inner == "inductor":  # half of the model, as it takes long
            fast, seen = model, "first"
            model.first.compile(backend="mst", options={"mst.dense_threshold": 1.0})
        else:
            fast, seen = always_sparse(model, inner), ""
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
        for step, (x, y) in enumerate(batches(6, torch.float32)):
            losses = [mse(alone(x), y), mse(fast(x), y)]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                loss.backward()
                optimizer.step()
            assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4), (inner, step)
            assert_zero_outside(model, optimizers[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
        own = list(sparsifier(model).parameters())
        here = {weight.name for weight, p in own if p.to_local().numel() and weight.name.startswith(seen)}
        assert {weight.name for weight, _ in own if weight.uses.served} == here, inner
        x, y = next(batches(1, torch.float32))
        multiplied = products(lambda x=x, y=y, fast=fast: mse(fast(x), y).backward())
        for operator in ("mst::linear", "mst::linear_grad_weight", "mst::linear_grad_input"):
            assert multiplied[operator] == here, (inner, operator)


def under_fsdp() -> None:
    """On a mesh of two dimensions: shards of the parts, gathered to parts while a block runs, compiled or not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def spread(model: nn.Module) -> nn.Module:
        tensor_parallel(model, mesh["tp"])
        for module in (model.first, model.second, model):
            fully_shard(module, mesh=mesh["dp"])
        return model

    for before, inner in ((False, None), (True, "aot_eager")):
        dtype = torch.float64 if inner is None else torch.float32
        alone = sparsify(net(dtype), SCHEDULES[0])
        model = spread(sparsify(net(dtype), SCHEDULES[0])) if before else sparsify(spread(net(dtype)), SCHEDULES[0])
        if inner is not None:
            for block in (model.first, model.second):
                block.compile(backend="mst", options={"mst.inner": inner, "mst.dense_threshold": 1.0})
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
        for x, y in batches(12 if inner is None else 2, dtype):
            part = mesh["dp"].get_local_rank()
            mse(alone(x), y).backward()
            mse(model(x.chunk(2)[part]), y.chunk(2)[part]).backward()
            for optimizer in optimizers:
                optimizer.step()
            assert_zero_outside(model, optimizers[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
        check_ranks(model)
        if inner is None:
            assert_same_run(model, alone)
        else:
            for name, weight in sparsifier(model).weights.items():
                assert weight.uses.served or name == "head.weight", (name, weight.uses)
                assert weight.part is not None


# PyTorch 2.11 multiplies no tokens that are spread over ranks by a whole weight, with or without a mask.
WHOLE_WEIGHTS = torch.__version__ >= "2.12"


class Tied(nn.Module):
    """An embedding that is also the head; a weight that is whole on all ranks, between norms on parts of the tokens;
    and two layers between which tensors stay DTensors, of a width that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(37, 24), nn.LayerNorm(24)
        self.mix = nn.Linear(24, 24) if WHOLE_WEIGHTS else nn.Identity()
        self.up, self.down = nn.Linear(24, 39), nn.Linear(39, 24)
        self.head = nn.Linear(24, 37, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(self.embedding(x)))
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


def tied(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Tied().to(dtype)


def tied_in_parallel(model: nn.Module, *, tie: bool = True) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for name, value in list(model.mix.named_parameters()):
        setattr(model.mix, name, nn.Parameter(distribute_tensor(value.detach(), mesh, [Replicate()])))
    parallelize_module(model, mesh, plan)
    if tie:
        model.head.weight = model.embedding.weight
    return model


def other_layers() -> None:
    """Tied embeddings, sequence parallelism, whole weights whose gradients are partial sums; eager and compiled."""
    schedule = Constant(0.6, interval=3)
    length = 4 * dist.get_world_size()
    for before, inner in ((True, None), (False, "aot_eager")):
        dtype = torch.float64 if inner is None else torch.float32
        alone, model = sparsify(tied(dtype), schedule), tied(dtype)
        if before:
            model = tied_in_parallel(sparsify(model, schedule))
        else:
            model = sparsify(tied_in_parallel(model), schedule)
        assert "embedding.weight" in sparsifier(model).weights
        fast = model if inner is None else always_sparse(model, inner)
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01, foreach=False) for m in (alone, model)]
        for step in range(7):
            tokens = torch.randint(37, (3, length), generator=torch.Generator().manual_seed(step))
            for m, optimizer in zip((alone, fast), optimizers, strict=True):
                nn.functional.cross_entropy(m(tokens).flatten(0, 1), tokens.flatten()).backward()
                optimizer.step()
            assert_zero_outside(model, optimizers[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
        if inner is None:
            assert_same_run(model, alone)
        else:
            check_ranks(model)
            for name, weight in sparsifier(model).weights.items():
                assert weight.uses.served, (name, weight.uses)
    loose = tied_in_parallel(sparsify(tied(), schedule), tie=False)
    optimizer = torch.optim.AdamW(loose.parameters(), 0.01, foreach=False)
    loose(torch.zeros(2, length, dtype=torch.long)).sum().backward()
    with pytest.raises(WeightError, match="Tie them again"):
        optimizer.step()


def written_weights() -> None:
    """What stands outside the masks is multiplied as in eager mode, and cut at the next step."""
    model = sparsify(tensor_parallel(net(torch.float32)), Constant(0.7, interval=3))
    fast = always_sparse(model, "aot_eager")
    x, _ = next(batches(1, torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    mse(fast(x), x[:, :5]).backward()
    optimizer.step()  # an optimizer's first step would look at once
    optimizer.zero_grad()
    with torch.no_grad():
        fast(x)
        for write in (lambda p: p.fill_(0.1), lambda p: p.to_local().fill_(0.2)):
            write(model.first.up.weight)
            torch.testing.assert_close(fast(x), model(x))
    for first in (True, False):
        mse(fast(x), x[:, :5]).backward()
        with pytest.warns(UserWarning, match="values stood outside") if first else torch.enable_grad():
            optimizer.step()
        optimizer.zero_grad()
    mask = element_masks(model)["first.up.weight"]
    assert not whole(model.first.up.weight)[~mask].any()
    assert "block-sparse" in str(explain(model))


def refused() -> None:
    """With the layouts that are served, before anything has changed."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    served = r"ColwiseParallel and RowwiseParallel of parallelize_module.*fully_shard"

    def parameter(local: Tensor, placement: Any, rows: int) -> nn.Parameter:
        shape = {"shape": torch.Size((rows, 32)), "stride": (32, 1)}
        return nn.Parameter(DTensor.from_local(local, mesh, [placement], run_check=False, **shape))

    height = 8 if dist.get_rank() else 40 - 8 * (dist.get_world_size() - 1)  # as no torch.chunk cuts
    wrong: list[tuple[nn.Parameter, str]] = [
        (parameter(torch.ones(32, 32), Partial(), 32), r"Partial"),
        (parameter(torch.ones(height, 32), Shard(0), 40), r"Shard\(dim=0\).*\(\d+, 32\) of it here"),
        (parameter(torch.ones(40 // dist.get_world_size(), 32), _StridedShard(0, split_factor=2), 40), "StridedShard"),
    ]
    for value, layout in wrong:
        model = nn.Sequential(nn.Linear(32, value.shape[0]))
        model[0].weight = value
        with pytest.raises(ParallelismError, match=rf"0\.weight is a DTensor .*{layout}.*{served}.*exclude"):
            sparsify(model, SCHEDULES[0])
        later = sparsify(nn.Sequential(nn.Linear(32, value.shape[0])), SCHEDULES[0])
        with pytest.raises(ParallelismError, match=served):
            later[0].weight = value
        assert not isinstance(later[0].weight, DTensor)
    # DistributedDataParallel with a mesh trains local tensors, and puts DTensors in their place for the forward pass.
    model = sparsify(tensor_parallel(nn.Sequential(nn.Linear(32, 32)), plan={"0": ColwiseParallel()}), SCHEDULES[0])
    _pre_dp_module_transform(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(4, 32)).sum().backward()
    with pytest.raises(ParallelismError, match=r"over tensor parallelism call fully_shard .* on the other dimension"):
        optimizer.step()
    # Ranks that were given other options.
    model = sparsify(tensor_parallel(net()), SCHEDULES[0], seed=dist.get_rank() // (dist.get_world_size() - 1))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    x, y = next(batches(1))
    mse(model(x), y).backward()
    with pytest.raises(RankMismatchError, match="seed 0 and 1"):
        optimizer.step()


TWO: list[Callable[[], None]] = [is_one_process, compiles, other_layers, written_weights, refused]
FOUR: list[Callable[[], None]] = [is_one_process, under_fsdp, compiles]


two = results_of(TWO, 2)
four = results_of(FOUR, 4)


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


@pytest.mark.parametrize("scenario", [s.__name__ for s in FOUR])
def test_four_ranks(four: dict[str, str], scenario: str) -> None:
    assert not four[scenario], four[scenario]
