"""A sparse model in training, to put into situations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import Blocks, compiled
from oracles import assert_reordered
from torch import Tensor, nn
from training import loss_of

from mst_compile import Constant, sparsify

X = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
Run = Callable[[Tensor], Tensor]


def start(growth: str = "none", interval: int = 5) -> tuple[nn.Module, Run, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = sparsify(Blocks(), Constant(0.7, interval=interval, growth=growth))
    return model, compiled(model), torch.optim.AdamW(model.parameters(), 1e-2)


def train(run: Run, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        loss_of(run, X).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(model: nn.Module, run: Run) -> None:
    """Compiled equals eager, in evaluation and in training."""
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            assert_reordered(run(X).detach(), model(X).detach(), 512)
