"""What DeepSpeed's engine trains in tests, and what it should become: the same training written by hand, in which the
sparse model is that of the masters."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import mst_compile
from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.rules.schedule import Schedule

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # asked for when it is imported

STEPS, PARTS, BATCH, FEATURES = 16, 2, 8, 33
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SCHEDULES: dict[str, Schedule] = {
    "by gradient": Constant(0.7, interval=4, growth="gradient"),
    "own steps": Constant(0.7, interval=4, growth="gradient", regrown="own steps"),
    "warm-up": Constant(0.7, interval=4, regrown_warmup=3, magnitude="l1"),
    "restored": MixedSparsity(total_steps=STEPS),
}


class Net(nn.Module):
    """Weights with ragged edges; one in a stack of its own parameter group would be of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 72), nn.Linear(72, FEATURES)
        self.c, self.d = nn.Linear(FEATURES, 40, bias=False), nn.Linear(40, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(nn.functional.gelu(self.a(x)))
        return self.d(nn.functional.gelu(self.c(x)))  # type: ignore[no-any-return]


def loss_of(model: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    return (model(x.to(dtype)) - x.flip(-1).to(dtype)).float().square().mean()


def batches() -> Tensor:
    return torch.randn(STEPS, PARTS, BATCH, FEATURES, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """How DeepSpeed is configured.

    Attributes:
        added: the dtype in which gradients are added up, if it is not the model's.
        scale: by which the loss is multiplied.
        clip: the gradients' largest norm; where a scale is taken out in the same pass, one that is not reached.
        begun: the optimizer has taken a step of zero gradients when training begins, as without ZeRO; then without
            weight decay.
    """

    name: str
    config: dict[str, Any]
    dtype: torch.dtype = F32
    added: torch.dtype | None = None
    scale: float = 1.0
    clip: float = 0.2
    begun: bool = False

    @property
    def decay(self) -> float:
        return 0.0 if self.begun else 0.1


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


_BF16: dict[str, Any] = {"bf16": {"enabled": True}}
_WIDE: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
_CPU: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
WIDE = [
    Case("stage 1", zero(1)),
    Case("stage 2", zero(2, round_robin_gradients=True)),
    Case("stage 1, offloaded", zero(1, **_CPU)),
    Case("stage 2, offloaded", zero(2, **_CPU)),
]
NARROW = [
    Case("bfloat16", zero(0) | _BF16, BF16, begun=True),
    Case("bfloat16, stage 1", zero(1) | _BF16, BF16),
    Case("bfloat16, stage 1, added in float32", zero(1) | _BF16 | _WIDE, BF16, F32),
    Case("bfloat16, stage 2, added in float32", zero(2) | _BF16 | _WIDE, BF16, F32),
    Case("float16", zero(0) | {"fp16": {"enabled": True, "loss_scale": 1}}, F16, begun=True),
    Case("float16, stage 2", zero(2) | {"fp16": {"enabled": True, "loss_scale": 256}}, F16, scale=256.0, clip=9.0),
]


def fresh(schedule: Schedule, decay: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    sparsify(model, schedule, block=8)
    return model, torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=decay), lr=1e-3)


def dense(decay: float = 0.1) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As :func:`fresh` by gradient, with the same values and parameter groups, but not sparse."""
    sparse, optimizer = fresh(SCHEDULES["by gradient"], decay)
    model = Net()
    model.load_state_dict(sparse.state_dict())
    own = dict(zip(map(id, sparse.parameters()), model.parameters(), strict=True))
    groups = [{**group, "params": [own[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    return model, torch.optim.AdamW(groups, lr=1e-3)


def engine_of(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: int = 1) -> Any:
    import deepspeed

    logging.disable(logging.INFO)
    type(deepspeed.accelerator.get_accelerator()).is_fp16_supported = lambda self: True  # slow on CPUs, and there
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # which takes seconds
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // ranks,
        "gradient_accumulation_steps": PARTS,
        "gradient_clipping": case.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | case.config)[0]


def train(
    case: Case, engine: Any, of: slice = slice(None), rank: int = 0, ranks: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Masks after each step."""
    for parts in batches()[of]:
        for x in parts:
            engine.backward(loss_of(engine, x.chunk(ranks)[rank], case.dtype))
            engine.step()
        yield sparsifier(engine.module).masks


def by_hand(case: Case, schedule: Schedule) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The masters, and masks after each step."""
    masters, optimizer = fresh(schedule, case.decay)
    with torch.no_grad():
        for p in masters.parameters():
            p.copy_(p.to(case.dtype))
    for p in masters.parameters() if case.begun else ():
        optimizer.state[p] = {"step": torch.tensor(1.0), **{k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}}
    model = mst_compile.densify(copy.deepcopy(masters)).to(case.dtype)
    course = []
    for parts in batches():
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters.parameters(), strict=True):
                p.copy_(master)
        for x in parts:
            (loss_of(model, x, case.dtype) / PARTS * case.scale).backward()
            if case.added is not None:
                move(model, masters)
        move(model, masters)
        for master in masters.parameters():
            master.grad.div_(case.scale)  # type: ignore[union-attr]
        for weight, master in sparsifier(masters).parameters():
            if not weight.dense_grad:
                weight.zero_inactive_(master.grad)  # type: ignore[arg-type]
        nn.utils.clip_grad_norm_(masters.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
        course.append(sparsifier(masters).masks)
    return masters, course


def move(model: nn.Module, masters: nn.Module) -> None:
    """Gradients of the model to those of the masters."""
    for p, master in zip(model.parameters(), masters.parameters(), strict=True):
        if p.grad is not None:
            master.grad = p.grad.float() if master.grad is None else master.grad + p.grad.float()
            p.grad = None


def master_of(engine: Any, parameter: nn.Parameter, key: str | None = None) -> Tensor:
    """The whole copy of a Parameter, or what the optimizer keeps of it; all ranks must ask.

    DeepSpeed's own ``safe_get_full_optimizer_state`` knows no state but that of the first parameter group, and none of
    its like knows the order that ``round_robin_gradients`` makes (0.19.8).
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(parameter, "ds_id"):
        found = safe_get_full_fp32_param(parameter)
        return found if key is None else safe_get_full_optimizer_state(parameter, key)  # type: ignore[no-any-return]
    if hasattr(parameter, "_hp_mapping"):
        outer = engine.optimizer
        flats = getattr(outer, "bit16_groups_flat", None) or outer.bf16_groups_flat
        group = next(i for i, f in enumerate(flats) if f.untyped_storage()._cdata == parameter.untyped_storage()._cdata)
        (master,) = outer.optimizer.param_groups[group]["params"]
        source = master if key is None else outer.optimizer.state[master][key]
        parts = [torch.empty_like(source) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, source.detach())
        at = parameter.storage_offset() - flats[group].storage_offset()
        return torch.cat(parts)[at : at + parameter.numel()].view(parameter.shape)
    own: Sequence[Any] = [p for group in engine.optimizer.fp16_groups for p in group]
    copies = [p for group in engine.optimizer.fp32_groups for p in group]
    copy_ = next(c for p, c in zip(own, copies, strict=True) if p is parameter)
    return copy_.detach() if key is None else engine.optimizer.optimizer.state[copy_][key]  # type: ignore[no-any-return]


def assert_zero_outside(engine: Any, *, state: bool = True) -> None:
    """The model, the masters and the optimizer's state of them."""
    for weight, parameter in sparsifier(engine.module).parameters():
        outside = weight.outside(torch.device("cpu"))
        for key in (None, "exp_avg", "exp_avg_sq") if state else (None,):
            assert not master_of(engine, parameter, key)[outside].any(), (weight.name, key)
        if parameter.dim() == 2:
            assert not parameter[outside].any(), weight.name
