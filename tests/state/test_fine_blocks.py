"""Training with unstructured masks and blocks of 2: compiled, interrupted, and over a whole schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Blocks, check_model, statuses
from oracles import assert_same_course
from training import (
    SCHEDULE,
    STEPS,
    assert_density_is_the_schedules,
    assert_zero_outside,
    batches,
    fresh,
    loss_of,
    runner,
)

from mst_compile import Override, sparsifier, sparsify

pytestmark = pytest.mark.parametrize("block", [1, 2])


def test_a_compiled_run_takes_the_course_of_the_masked_model(block: int) -> None:
    eager, model = (fresh(block=block) for _ in range(2))
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (eager, model)]
    run = runner(model, "aot_eager")
    for step, x in enumerate(batches(), 1):
        losses = [loss_of(call, x) for call in (eager, run)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        assert_zero_outside(model, optimizers[1])
        assert_density_is_the_schedules(model, step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step <= 12:  # later roundings decide which of two blocks grows
            assert_same_course(losses[1].detach(), losses[0].detach(), 1000)
            masks = sparsifier(eager).masks
            assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier(model).masks.items())
    assert sparsifier(model).step_count == STEPS
    assert all(w.changes > 5 and w.uses.served for w in sparsifier(model).weights.values())


def test_a_resumed_run_is_the_uninterrupted_one(block: int) -> None:
    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
        run = runner(model, "aot_eager")
        for x in data:
            optimizer.zero_grad()
            loss_of(run, x).backward()
            optimizer.step()

    data = list(batches())
    model = fresh(block=block)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, data[:17])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[17:])

    again = sparsify(Blocks(), SCHEDULE, block=block)
    resumed = torch.optim.AdamW(again.parameters(), 1e-2)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, data[17:])
    masks = sparsifier(model).masks
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier(again).masks.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_generated_code_runs_the_kernels(block: int, precision: torch.dtype) -> None:
    """Beside coarser blocks, in one graph; fp32 weights under autocast."""

    def context() -> torch.autocast:
        return torch.autocast("cpu", precision, enabled=precision != torch.float32)

    model = check_model(
        lambda: Blocks(depth=1),
        torch.randn(40, 32),
        inner="inductor",
        context=context,
        precision=precision,
        overrides={"layers.0.3.*": Override(block=block), "*": Override(block=4)},
    )
    assert set(statuses(model).values()) == {"matched (1 use)"}
    assert {w.grid.block for w in sparsifier(model).weights.values()} == {block, 4}
