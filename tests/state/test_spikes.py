"""Topology events of the default schedule cause no jump of the training loss."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import Blocks

from mst_compile import Constant, MixedSparsity, param_groups, sparsify
from mst_compile.rules.schedule import Schedule

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from quality.spikes import difference, largest_rise

STEPS = 600
BOUND = 0.1  # of the loss at the end of the dense run


def losses(schedule: Schedule | None) -> list[float]:
    """Training loss of each step of a small regression; the same batches in the same order for all."""
    torch.manual_seed(0)
    model = Blocks()
    groups = param_groups(sparsify(model, schedule, block=4)) if schedule is not None else model.parameters()
    optimizer, found = torch.optim.AdamW(groups, 2e-3, betas=(0.9, 0.95)), []
    data = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, 64, generator=data) / 5, torch.randn(64, 32, generator=data) / 8
    for _ in range(STEPS):
        x = torch.randn(64, 32, generator=data)
        optimizer.zero_grad()
        loss = (model(x) - torch.tanh(x @ teacher[0]) @ teacher[1]).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_bringing_weights_back_raises_no_loss() -> None:
    """And drop-and-grow of a third of all blocks does, so the yardstick can tell."""
    dense, control = losses(None), losses(Constant(0.8, growth="none"))
    rises = {}
    for name, schedule in {
        "default": MixedSparsity(STEPS, restoration=0.3, ramp_interval=30),
        "regrown": Constant(0.8, interval=60, drop_fraction=0.3),
    }.items():
        events = [step for step in range(1, STEPS) if schedule.is_topology_event(step)]
        found = [
            largest_rise(difference(losses(schedule), dense), events, after, difference(control, dense))
            for after in (20, 5)
        ]
        assert all(spike is not None for spike in found)
        rises[name] = [spike for spike in found if spike is not None]
    for spike in rises["default"]:
        assert not spike.found, spike
        assert spike.rise < BOUND * dense[-1], spike
    assert all(spike.found for spike in rises["regrown"])
