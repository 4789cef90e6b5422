"""Weights that are trained by noise while blocks come and go, and optimizers that know steps of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mask_cases import element_masks
from torch import Tensor, nn
from training import OPTIMIZERS

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.rules.schedule import Schedule

ROWS, COLS, BLOCK, STEPS = 44, 36, 8, 36  # ragged edges
Maker = Callable[[Any], torch.optim.Optimizer]
OWN: dict[str, Maker] = {
    **{n: OPTIMIZERS[n] for n in ("adamw", "adamw foreach", "adamw fused", "adamw amsgrad")},
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1, maximize=True),
    "adam 1e-2": lambda p: torch.optim.Adam(p, 1e-2, betas=(0.0, 0.95), eps=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=0.1, maximize=True),
    "nadam decoupled": lambda p: torch.optim.NAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2, weight_decay=0.1),
}


def often(**changes: Any) -> Constant:
    return Constant(0.5, **{"interval": 5, "growth": "random", "drop_fraction": 0.4, "regrown": "own steps"} | changes)


BOTH = often(growth="mixed", interval=3, regrown_warmup=4)


def single(schedule: Schedule, block: int = BLOCK, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(nn.Linear(COLS, ROWS, bias=False, dtype=dtype), schedule, block=block)


def gradient_of(model: nn.Linear, step: int) -> Tensor:
    """Noise, masked unless growth reads it."""
    noise = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(step), dtype=model.weight.dtype)
    return noise if sparsifier(model).weights["weight"].dense_grad else noise * element_masks(model)["weight"]
