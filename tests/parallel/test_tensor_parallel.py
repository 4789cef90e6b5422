"""Tensor parallelism, alone and under FSDP2: training is that of one process, compiled too; what is refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from mask_cases import element_masks
from oracles import assert_same_course
from ranks import SCHEDULES, assert_same_on_all_ranks, batches, net, run
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.distributed.tensor.placement_types import _StridedShard

from mst_compile import Constant, explain, sparsifier, sparsify
from mst_compile.blocks.shards import local_part
from mst_compile.errors import ParallelismError, RankMismatchError, WeightError
from mst_compile.parallel.ranks import check_ranks
from mst_compile.rules.schedule import Schedule

mse = nn.functional.mse_loss
FOLDER = "MST_TEST_TENSOR_PARALLEL"
ROUNDINGS = 10**8  # by which trainings in float64 may part, as those on FSDP2's shards do

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

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


class Tied(nn.Module):
    """An embedding that is also the head; a weight that is whole on all ranks, between norms on parts of the tokens;
    and two layers between which tensors stay DTensors, of a width that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(37, 24), nn.LayerNorm(24)
        self.mix, self.up, self.down = nn.Linear(24, 24), nn.Linear(24, 39), nn.Linear(39, 24)
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
    for name in ("weight", "bias"):
        value = getattr(model.mix, name)
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


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, mesh: DeviceMesh | None = None) -> None:
    """On this rank's part of the batches, if ``mesh`` has a dimension for data."""
    parts, part = (1, 0) if mesh is None else (mesh["dp"].size(), mesh["dp"].get_local_rank())
    for step, (x, y) in enumerate(batches(steps.stop)):
        if step in steps:
            mse(model(x.chunk(parts)[part]), y.chunk(parts)[part]).backward()
            optimizer.step()
            optimizer.zero_grad()


def resumes() -> None:
    """State dicts of model and optimizer continue a run bit for bit, into Parameters or in place of them."""
    model = sparsify(tensor_parallel(net()), SCHEDULES[0])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, range(7))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(7, 14))
    for assign in (False, True):
        again = tensor_parallel(sparsify(net(), SCHEDULES[0], seed=9))
        again.load_state_dict(copy.deepcopy(saved[0]), assign=assign)
        other = torch.optim.AdamW(again.parameters(), 0.01)
        other.load_state_dict(copy.deepcopy(saved[1]))
        train(again, other, range(7, 14))
        assert_same_run(again, model, 0)


def saves() -> None:
    """A distributed checkpoint of tensor-parallel parts, and what the run comes to."""
    model = sparsify(tensor_parallel(net()), SCHEDULES[0])
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, range(7))
    parts = dict(zip(("model", "optimizer"), dsd.get_state_dict(model, optimizer), strict=True))
    dcp.save(parts, checkpoint_id=Path(os.environ[FOLDER], "dcp"))
    now = sparsifier(model).masks
    train(model, optimizer, range(7, 12))
    expected = {"now": now, "then": sparsifier(model).masks, "weights": [whole(p) for p in model.parameters()]}
    if dist.get_rank() == 0:
        torch.save(expected, Path(os.environ[FOLDER], "expected.pt"))


def resumes_elsewhere() -> None:
    """One process, parts for other ranks, and shards of parts go on from there with the same masks."""
    expected = torch.load(Path(os.environ[FOLDER], "expected.pt"), weights_only=True)
    meshes = [None]
    if dist.get_world_size() == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    for mesh in meshes:
        model = net()
        if dist.get_world_size() > 1:
            tensor_parallel(model, mesh["tp"] if mesh else None)
        if mesh is not None:
            fully_shard(model, mesh=mesh["dp"])
        sparsify(model, SCHEDULES[0], seed=9)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        parts = dict(zip(("model", "optimizer"), dsd.get_state_dict(model, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=Path(os.environ[FOLDER], "dcp"))
        dsd.set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
        own = sparsifier(model)
        assert (own.step_count, own.seed) == (7, 0)
        assert all(torch.equal(mask, expected["now"][n]) for n, mask in own.masks.items())
        train(model, optimizer, range(7, 12), mesh)
        check_ranks(model)
        assert all(torch.equal(mask, expected["then"][n]) for n, mask in own.masks.items())
        for p, q in zip(model.parameters(), expected["weights"], strict=True):
            assert_same_course(whole(p), q, ROUNDINGS)


def written_weights() -> None:
    """What stands outside the masks is multiplied as in eager mode, and cut at the next topology event."""
    model = sparsify(tensor_parallel(net(torch.float32)), Constant(0.7, interval=2))
    fast = always_sparse(model, "aot_eager")
    x, _ = next(batches(1, torch.float32))
    with torch.no_grad():
        fast(x)
        for write in (lambda p: p.fill_(0.1), lambda p: p.to_local().fill_(0.2)):
            write(model.first.up.weight)
            torch.testing.assert_close(fast(x), model(x))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        mse(fast(x), x[:, :5]).backward()
        with pytest.warns(UserWarning, match="values stood outside") if _ else torch.enable_grad():
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
    with pytest.raises(ParallelismError, match="fully_shard, of a tensor-parallel model on the other dimension"):
        optimizer.step()
    # Ranks that were given other options.
    model = sparsify(tensor_parallel(net()), SCHEDULES[0], seed=dist.get_rank() // (dist.get_world_size() - 1))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    x, y = next(batches(1))
    mse(model(x), y).backward()
    with pytest.raises(RankMismatchError, match="seed 0 and 1"):
        optimizer.step()


TWO: list[Callable[[], None]] = [is_one_process, compiles, other_layers, written_weights, resumes, refused, saves]
FOUR: list[Callable[[], None]] = [is_one_process, under_fsdp, compiles, resumes_elsewhere]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where the ranks keep the checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("checkpoint")))
        yield


@pytest.fixture(scope="module")
def two(folder: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(two: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


@pytest.mark.parametrize("scenario", [s.__name__ for s in FOUR])
def test_four_ranks(four: dict[str, str], scenario: str) -> None:
    assert not four[scenario], four[scenario]


def test_one_process_resumes(two: dict[str, str], tmp_path: Path) -> None:
    assert run([resumes_elsewhere], 1, tmp_path)["resumes_elsewhere"] == ""
