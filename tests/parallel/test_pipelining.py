"""Pipeline parallelism: each rank trains some layers, with the masks and values of one process that trains them all."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from helpers import compiled
from oracles import assert_same_course
from ranks import results_of
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, SplitPoint, pipeline
from torch.nn.functional import mse_loss

from mst_compile import MixedSparsity, param_groups, sparsifier, sparsify

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

STEPS, PARTS, ROWS, WIDTH = 16, 4, 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Layers by name, so that those of other ranks can be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(4)}).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def schedule() -> MixedSparsity:
    return MixedSparsity(STEPS, 0.7, interval=4)


def cut(model: nn.Module) -> nn.Module:
    """The half of this rank."""
    for name in list(model.layers):  # type: ignore[arg-type]
        if (int(name) < 2) != (dist.get_rank() == 0):
            del model.layers[name]  # type: ignore[operator,union-attr]
    return model


def batches() -> Tensor:
    return torch.randn(STEPS, ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def assert_trains_as_one_process(part: nn.Module, stage: PipelineStage, whole: nn.Module) -> None:
    """
    Args:
        part: this rank's layers.
        whole: what was made sparse here.
    """
    runner = Schedule1F1B(stage, n_microbatches=PARTS, loss_fn=mse_loss)
    optimizer = torch.optim.AdamW(param_groups(part, weight_decay=0.1), lr=1e-3)
    alone = sparsify(Net(), schedule(), block=4)
    expected = torch.optim.AdamW(param_groups(alone, weight_decay=0.1), lr=1e-3)
    for x in batches():
        optimizer.zero_grad()
        expected.zero_grad()
        if dist.get_rank() == 0:
            runner.step(x)
        else:
            runner.step(target=x.flip(-1))
        optimizer.step()
        for one in x.chunk(PARTS):
            (mse_loss(alone(one), one.flip(-1)) / PARTS).backward()
        expected.step()
        own, masks = sparsifier(whole).masks, sparsifier(alone).masks
        mine = {name: p for name, p in part.named_parameters() if name in masks}
        assert len(mine) == 4
        assert all(torch.equal(own[name], masks[name]) for name in mine)
        for name, parameter in part.named_parameters():
            assert_same_course(parameter.detach(), alone.get_parameter(name).detach(), parted=10_000)
    assert sparsifier(whole).step_count == STEPS
    assert sparsifier(whole).weights["layers.0.up.weight" if dist.get_rank() == 0 else "layers.2.up.weight"].is_dense


def by_hand(make: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    part, whole = make()
    stage = PipelineStage(compiled(part), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    assert_trains_as_one_process(part, stage, whole)


def made_sparse_and_then_cut() -> None:
    """Each rank has a copy of the whole, and takes the others' layers out."""

    def make() -> tuple[nn.Module, nn.Module]:
        part = cut(copy.deepcopy(sparsify(Net(), schedule(), block=4)))
        return part, part

    by_hand(make)


def cut_and_then_made_sparse() -> None:
    """Masks are drawn by the names of weights, which are those of the whole."""

    def make() -> tuple[nn.Module, nn.Module]:
        part = sparsify(cut(Net()), schedule(), block=4)
        return part, part

    by_hand(make)


def cut_by_the_tracer() -> None:
    whole = sparsify(Net(), schedule(), block=4)
    example = torch.zeros(ROWS // PARTS, WIDTH, dtype=torch.float64)
    pipe = pipeline(whole, mb_args=(example,), split_spec={"layers.2": SplitPoint.BEGINNING})
    part = pipe.get_stage_module(dist.get_rank())
    part.compile(backend="mst", options={"mst.inner": "aot_eager"})
    assert_trains_as_one_process(part, pipe.build_stage(dist.get_rank(), torch.device("cpu")), whole)


SCENARIOS = [made_sparse_and_then_cut, cut_and_then_made_sparse, cut_by_the_tracer]
found = results_of(SCENARIOS, 2)


@pytest.mark.parametrize("scenario", [s.__name__ for s in SCENARIOS])
def test_two_stages(found: dict[str, str], scenario: str) -> None:
    assert not found[scenario], found[scenario]
