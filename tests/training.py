"""A small training run, and what must hold after each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from helpers import Blocks, compiled
from mask_cases import element_masks
from torch import Tensor, nn

from mst_compile import MixedSparsity, sparsifier, sparsify
from mst_compile.rules.density import DISTRIBUTIONS
from mst_compile.rules.schedule import Schedule

STEPS = 40
SCHEDULE = MixedSparsity.published(STEPS, 0.8, warmup=8, restoration=8, settle=4, interval=3, ramp_interval=2)
MODES = ["none", "aot_eager"]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False, fused=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    "sgd nesterov": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, foreach=True),
}


def batches(steps: int = STEPS, rows: int = 16) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(rows, 32, generator=generator)


def fresh(schedule: Schedule | None = SCHEDULE, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Blocks()
    return model if schedule is None else sparsify(model, schedule, **options)


def runner(model: nn.Module, mode: str) -> Callable[..., Tensor]:
    return model if mode == "none" else compiled(model, mode)


def loss_of(run: Callable[..., Tensor], x: Tensor) -> Tensor:
    return (run(x) - x.roll(1, 1)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, mode: str, data: Iterator[Tensor]) -> list[float]:
    run, losses = runner(model, mode), []
    for x in data:
        loss = loss_of(run, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_zero_outside(model: nn.Module, optimizer: torch.optim.Optimizer, *, gradients: bool = True) -> None:
    """Weights, gradients and all optimizer state are exactly 0 outside the active blocks."""
    parameters = dict(model.named_parameters())
    for name, mask in element_masks(model).items():
        p = parameters[name]
        tensors = {"weight": p.detach(), **({"grad": p.grad} if gradients and p.grad is not None else {})}
        tensors |= {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape}
        assert len(tensors) >= 2
        for what, tensor in tensors.items():
            assert not tensor[~mask].any(), f"{what} of {name} is not zero outside the mask"


def assert_density_is_the_schedules(model: nn.Module, step: int) -> None:
    """The target is set by the last event; each weight meets it up to rounding, or keeps rows and columns
    alive, one block each."""
    own, schedule = sparsifier(model), sparsifier(model).schedule
    last = max([t for t in range(1, step + 1) if schedule.is_topology_event(t)], default=0)
    shapes = [(w.grid.rows, w.grid.cols) for w in own.weights.values()]
    targets = DISTRIBUTIONS[schedule.distribution](shapes, schedule.sparsity_at(last))
    for target, weight in zip(targets, own.weights.values(), strict=True):
        active = int(weight.mask.sum())
        rows, cols = weight.grid.shape
        assert bool(weight.mask.any(0).all())
        assert bool(weight.mask.any(1).all())
        wanted = target * rows * cols
        assert abs(active - wanted) <= 0.5 or max(rows, cols, wanted) <= active < rows + cols
        assert weight.density == active / weight.grid.blocks  # no ragged edges here


def restored(steps: int = 20) -> MixedSparsity:
    return MixedSparsity(steps, 0.8, warmup=6, restoration=6, settle=2, interval=2, ramp_interval=1, growth="random")
