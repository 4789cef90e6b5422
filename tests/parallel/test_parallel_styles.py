"""Beside columns and rows: sequence parallelism with a parallel loss, products that a program writes with its rank's
part of a weight, and data parallelism over tensor parallelism, where DistributedDataParallel is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_cases import always_sparse, assert_same_run, assert_zero_outside, mse, tensor_parallel, train
from ranks import SCHEDULES, batches, net, results_of
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.errors import MSTWarning, ParallelismError

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

SCHEDULE = Constant(0.6, interval=3)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 52), nn.Linear(52, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Language(nn.Module):
    """Embedding, norm, a block on whole sequences, norm, head of 37 columns, which no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.inner = nn.Embedding(37, 24), nn.LayerNorm(24), Inner()
        self.last, self.head = nn.LayerNorm(24), nn.Linear(24, 37, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.last(x + self.inner(self.norm(x))))


def language(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return Language().to(dtype)


def over_sequences(model: nn.Module) -> nn.Module:
    """As PyTorch's tutorial has it: parts of the tokens between the products, parts of the logits at the end."""
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "inner": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "inner.up": ColwiseParallel(),
        "inner.down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def sequences() -> None:
    """With the loss computed on parts of the logits, in eager mode and within the compiled graph."""
    for inner, steps in ((None, 7), ("aot_eager", 2)):
        dtype = torch.float64 if inner is None else torch.float32
        alone = sparsify(language(dtype), SCHEDULE)
        model = sparsify(over_sequences(language(dtype)), SCHEDULE)
        whole = _WithLoss(model)
        fast = whole if inner is None else always_sparse(whole, inner)
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01, foreach=False) for m in (alone, model)]
        for step in range(steps):
            tokens = torch.randint(37, (3, 8), generator=torch.Generator().manual_seed(step))
            expected = _WithLoss(alone)(tokens)
            expected.backward()
            with loss_parallel():
                loss = fast(tokens)
                loss.backward()
            assert isinstance(loss, DTensor)
            relative = 1e-9 if inner is None else 1e-5
            assert float(loss.full_tensor()) == pytest.approx(float(expected), rel=relative)
            for optimizer in optimizers:
                optimizer.step()
            assert_zero_outside(model, optimizers[1])
            for optimizer in optimizers:
                optimizer.zero_grad()
        if inner is None:
            assert_same_run(model, alone)
        assert all(weight.uses.served == (inner is not None) for weight in sparsifier(model).weights.values())


class _WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())


class Local(nn.Module):
    """Columns, then rows, written with what this rank holds, as libraries do where no gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(30, 52), nn.Linear(52, 30)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.up.weight, DTensor):
            return self.down(self.up(x))
        x = nn.functional.linear(x, self.up.weight.to_local(), self.up.bias.to_local())  # type: ignore[operator]
        x = nn.functional.linear(x, self.down.weight.to_local())  # type: ignore[operator]
        return DTensor.from_local(x, self.up.weight.device_mesh, run_check=False).full_tensor()


def local_products() -> None:
    """They run sparse, forward and backward. Of shards that nobody has gathered they stay dense, and it is said."""
    torch.manual_seed(0)
    model = parallelize_module(
        sparsify(Local(), SCHEDULE),
        init_device_mesh("cpu", (dist.get_world_size(),)),
        {"up": ColwiseParallel(), "down": RowwiseParallel()},
    )
    fast, x = always_sparse(model, "aot_eager"), torch.randn(8, 30)
    found: list[list[Any]] = []
    for call in (model, fast):
        call(x).square().sum().backward()
        found.append([p.grad.to_local() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    for name, weight in sparsifier(model).weights.items():
        assert (weight.uses.served, weight.uses.unmatched) == (True, []), (name, weight.uses)


def shards_of_nobody() -> None:
    model = fully_shard(sparsify(nn.Linear(30, 52, bias=False), SCHEDULE))

    @torch.compile(backend="mst", options={"mst.inner": "aot_eager", "mst.dense_threshold": 1.0})
    def product(x: Tensor, weight: DTensor) -> Tensor:
        return nn.functional.linear(x, weight.to_local())

    x = torch.randn(8, 30)
    with pytest.warns(MSTWarning, match=r"a shard of \(26, 30\) that nobody gathered"):
        y = product(x, model.weight)  # type: ignore[arg-type]
    torch.testing.assert_close(y, x @ model.weight.to_local().T)  # type: ignore[operator]


def data_over_parts() -> None:
    """DistributedDataParallel is refused before it has taken weights out, in favour of what gives the same run."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "one", "tp"))

    def shard(module: nn.Module) -> None:
        fully_shard(module, mesh=mesh["dp", "one"])

    def keep(module: nn.Module) -> None:
        replicate(module, mesh=mesh["dp"])

    for spread in (shard, keep):
        alone = sparsify(net(), SCHEDULES[0])
        model = tensor_parallel(sparsify(net(), SCHEDULES[0]), mesh["tp"])
        held = list(model.parameters())
        for more in ({"device_mesh": mesh["dp"]}, {}):
            with pytest.raises(ParallelismError, match=r"first\.up\.weight.*fully_shard.*the second has size 1"):
                DistributedDataParallel(model, **more)
        assert all(p is q for p, q in zip(model.parameters(), held, strict=True))
        for module in (model.first, model.second, model):
            spread(module)  # type: ignore[arg-type]
        rows = model.first.up.weight.to_local().shape[0]  # type: ignore[operator, union-attr]
        assert rows == 26  # every rank keeps its whole part
        _train_both(alone, model, mesh)


def _train_both(alone: nn.Module, model: nn.Module, mesh: DeviceMesh) -> None:
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
    train(alone, optimizers[0], range(12))
    train(model, optimizers[1], range(11), mesh)
    x, y = list(batches(12))[-1]
    part = mesh["dp"].get_local_rank()
    mse(model(x.chunk(2)[part]), y.chunk(2)[part]).backward()
    optimizers[1].step()
    assert_zero_outside(model, optimizers[1])
    assert_same_run(model, alone)


def test_local_tensors_that_transformers_has_cut_are_refused() -> None:
    """As its version 4 leaves them: parts on plain Parameters, and the plan's word on the module."""
    model = nn.ModuleDict({"up": nn.Linear(32, 32), "norm": nn.Linear(32, 32)})
    model["norm"]._hf_tp_plan = "replicated_with_grad_allreduce"
    sparsify(copy.deepcopy(model), SCHEDULE)
    for plan in ("colwise", "local_rowwise", "packed_colwise"):
        model["up"]._hf_tp_plan = plan
        with pytest.raises(ParallelismError, match=rf"up\.weight is a local tensor of \(32, 32\).*'{plan}'.*tp_size"):
            sparsify(model, SCHEDULE)
    sparsify(model, SCHEDULE, exclude="up.*")


TWO: list[Callable[[], None]] = [sequences, local_products, shards_of_nobody]
FOUR: list[Callable[[], None]] = [data_over_parts]


two = results_of(TWO, 2)
four = results_of(FOUR, 4)


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_styles_on_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


@pytest.mark.parametrize("scenario", [s.__name__ for s in FOUR])
def test_styles_on_four_ranks(four: dict[str, str], scenario: str) -> None:
    assert not four[scenario], four[scenario]
