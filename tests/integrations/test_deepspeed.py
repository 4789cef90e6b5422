"""DeepSpeed's engine: stage 0 trains as PyTorch does, and what trains copies of the weights is refused or told of."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mst_compile
from mst_compile import MixedSparsity, MSTWarning, explain, sparsifier, sparsify
from mst_compile.errors import ParallelismError
from tests.oracles import assert_same_course

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")
STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    deepspeed.init_distributed(dist_backend="gloo")
    yield
    dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    sparsify(model, MixedSparsity(total_steps=STEPS), block=8)
    return model, torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=1e-3)


def engine_of(model: nn.Module, optimizer: torch.optim.Optimizer, **config: Any) -> Any:
    common = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0}
    more = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=common | more | config)[0]


def batches() -> torch.Tensor:
    return torch.randn(STEPS, 2, 8, 32, generator=torch.Generator().manual_seed(0))


def train(engine: Any, dtype: torch.dtype = torch.float32) -> list[str]:
    """Returns the kernels of the weights half way."""
    kernels: list[str] = []
    for step, parts in enumerate(batches()):
        for x in parts.to(dtype):
            engine.backward((engine(x) - x.flip(-1)).square().mean())
            engine.step()
        if step == STEPS // 2:
            kernels = [row.kernel for row in explain(engine.module)]
    return kernels


@pytest.mark.parametrize("compiled", [False, True])
def test_stage_0_trains_as_pytorch_does(compiled: bool) -> None:
    """Events, restoration, accumulated and clipped gradients, rates that follow the density."""
    model, optimizer = fresh()
    engine = engine_of(model, optimizer, zero_optimization={"stage": 0})
    if compiled:
        engine.compile(backend="mst")
    kernels = train(engine)
    if compiled:
        assert kernels == ["block-sparse"] * 2
    expected, optimizer = fresh()
    for parts in batches():
        for x in parts:
            ((expected(x) - x.flip(-1)).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier(model).step_count == STEPS
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_course(one.detach(), other.detach(), parted=1000)


@pytest.mark.parametrize("config", [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 1, "bf16": True}])
def test_copies_are_refused_at_the_first_step(config: dict[str, Any]) -> None:
    model, optimizer = fresh()
    wide = not config.pop("bf16", False)
    more = {} if wide else {"bf16": {"enabled": True}}
    engine = engine_of(model, optimizer, zero_optimization=config, **more)
    with pytest.raises(ParallelismError, match=r"DeepSpeed trains a copy of 0.weight.*stage 0 .*fully_shard"):
        train(engine, torch.float32 if wide else torch.bfloat16)


def test_master_weights_are_told_of() -> None:
    """Stage 0 in bfloat16 says nothing of its copies."""
    model, optimizer = fresh()
    engine = engine_of(model, optimizer, zero_optimization={"stage": 0}, bf16={"enabled": True})
    with pytest.warns(MSTWarning, match="does not advance: AdamW has stepped 10 times.*trains copies"):
        train(engine, torch.bfloat16)


def test_another_models_optimizer_is_none_of_the_copies() -> None:
    model, optimizer = fresh()
    engine_of(model, optimizer, zero_optimization={"stage": 1})
    other = nn.Linear(4, 4)
    dense = torch.optim.SGD(other.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        other(torch.ones(2, 4)).sum().backward()
        dense.step()
