"""The training loops people write: accumulation, clipping, scaling, several optimizers, checkpoints."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks
from oracles import assert_same_course
from torch import nn
from training import (
    MODES,
    OPTIMIZERS,
    SCHEDULE,
    STEPS,
    assert_density_is_the_schedules,
    assert_zero_outside,
    batches,
    fresh,
    loss_of,
    runner,
    train,
)

from mst_compile import Constant, sparsifier, sparsify


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resume_at", [5, 10, 19, 37])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_resume_is_bitwise(name: str, resume_at: int, mode: str) -> None:
    model = fresh()
    optimizer = OPTIMIZERS[name](model.parameters())
    data = list(batches())
    losses = train(model, optimizer, mode, iter(data[:resume_at]))
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "mst": sparsifier(model).state_dict()}
    torch.save(state, file)
    losses += train(model, optimizer, mode, iter(data[resume_at:]))

    torch._dynamo.reset()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(99)
    again = sparsify(Blocks(), SCHEDULE, seed=5)  # the checkpoint's seed counts
    other = OPTIMIZERS[name](again.parameters())
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    sparsifier(again).load_state_dict(state["mst"])
    assert train(again, other, mode, iter(data[resume_at:])) == losses[resume_at:]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key]))
    assert all(torch.equal(m, sparsifier(again).masks[n]) for n, m in sparsifier(model).masks.items())


@pytest.mark.parametrize("mode", MODES)
def test_gradient_accumulation(mode: str) -> None:
    """Two half batches are one step, and give what the whole batch gives."""
    whole, halves = fresh(), fresh()
    train(whole, torch.optim.SGD(whole.parameters(), 1e-2), mode, batches())
    optimizer, run = torch.optim.SGD(halves.parameters(), 1e-2), runner(halves, mode)
    for step, x in enumerate(batches(), 1):
        for half in x.chunk(2):
            (loss_of(run, half) / 2).backward()
        optimizer.step()
        assert sparsifier(halves).step_count == step
        assert_zero_outside_without_state(halves)
        optimizer.zero_grad()
    assert all(torch.equal(m, sparsifier(halves).masks[n]) for n, m in sparsifier(whole).masks.items())
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        assert_same_course(p, q, 16)


def assert_zero_outside_without_state(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in element_masks(model).items():
        assert not parameters[name].detach()[~mask].any()
        assert not parameters[name].grad[~mask].any()  # type: ignore[index]


@pytest.mark.parametrize("mode", MODES)
def test_clipping(mode: str) -> None:
    model = fresh()
    optimizer, run = torch.optim.AdamW(model.parameters(), 1e-2), runner(model, mode)
    for step, x in enumerate(batches(), 1):
        optimizer.zero_grad()
        (loss_of(run, x) * 1e3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert_zero_outside(model, optimizer)
        assert_density_is_the_schedules(model, step)


def test_steps_that_the_scaler_skips_are_not_counted() -> None:
    model = fresh(Constant(0.6, interval=2))
    own = sparsifier(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counted = 0
    for step, x in enumerate(batches(12)):
        optimizer.zero_grad()
        broken = step in (1, 4, 5)
        scaler.scale(loss_of(model, x) * (float("inf") if broken else 1.0)).backward()
        masks = own.masks
        scaler.step(optimizer)
        scaler.update()
        counted += not broken
        assert own.step_count == counted
        if broken:
            assert all(torch.equal(masks[n], m) for n, m in own.masks.items())
    assert_zero_outside(model, optimizer, gradients=False)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_stepping_by_hand(mode: str) -> None:
    by_hook, by_hand = fresh(), fresh(auto_step=False)
    expected = train(by_hook, torch.optim.AdamW(by_hook.parameters(), 1e-2), mode, batches())
    torch._dynamo.reset()
    optimizer, run, losses = torch.optim.AdamW(by_hand.parameters(), 1e-2), runner(by_hand, mode), []
    for step, x in enumerate(batches(), 1):
        loss = loss_of(run, x)
        loss.backward()
        optimizer.step()
        assert sparsifier(by_hand).step_count == step - 1
        sparsifier(by_hand).step()
        assert sparsifier(by_hand).step_count == step
        assert_zero_outside(by_hand, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == expected
    assert all(torch.equal(p, q) for p, q in zip(by_hook.parameters(), by_hand.parameters(), strict=True))


def test_the_optimizer_may_come_first() -> None:
    results = []
    for early in (False, True):
        torch.manual_seed(0)
        model = Blocks()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2) if early else None
        sparsify(model, SCHEDULE)
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
        results.append(train(model, optimizer, "none", batches()))
        assert sparsifier(model).step_count == STEPS
    assert results[0] == results[1]


def test_an_optimizer_with_history_forgets_what_is_dropped() -> None:
    """State from dense training before sparsify vanishes outside the masks at the first step."""
    torch.manual_seed(0)
    model = Blocks()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, "none", batches(3))
    sparsify(model, Constant(0.7, interval=1))
    train(model, optimizer, "none", batches(5))
    assert_zero_outside(model, optimizer)


def test_two_optimizers_count_one_step() -> None:
    model = fresh(Constant(0.6, interval=1, growth="random"))
    sparse = [p for p in model.parameters() if p.dim() == 2]
    first, second = torch.optim.SGD(sparse[:2], 1e-2), torch.optim.SGD(sparse[2:], 1e-2)
    rest = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], 1e-2)
    for step, x in enumerate(batches(6), 1):
        loss_of(model, x).backward()
        for optimizer in (rest, first, second):
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier(model).step_count == step


def test_two_models_do_not_disturb_each_other() -> None:
    alone = fresh()
    expected = train(alone, torch.optim.AdamW(alone.parameters(), 1e-2), "none", batches())
    model, other = fresh(), fresh(Constant(0.5, interval=1, growth="random"))
    optimizer, foreign = torch.optim.AdamW(model.parameters(), 1e-2), torch.optim.SGD(other.parameters(), 1e-2)
    losses = []
    for x in batches():
        loss = loss_of(model, x)
        loss.backward()
        loss_of(other, x).backward()
        foreign.step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == expected


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_blocks_and_dtypes(block: int, dtype: torch.dtype) -> None:
    model = sparsify(Blocks().to(dtype), SCHEDULE, block=block)
    optimizer, run = torch.optim.AdamW(model.parameters(), 1e-2), runner(model, "aot_eager")
    for step, x in enumerate(batches(), 1):
        optimizer.zero_grad()
        loss_of(run, x.to(dtype)).backward()
        optimizer.step()
        assert_zero_outside(model, optimizer)
        assert_density_is_the_schedules(model, step)
    assert sparsifier(model).density == 1.0


def test_a_tied_head_is_masked_whole() -> None:
    """The gradient that reaches a tied weight through the embedding is masked too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc = nn.Embedding(64, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.fc(self.emb(ids)))

    model = sparsify(Tied(), SCHEDULE)
    optimizer, run = torch.optim.AdamW(model.parameters(), 1e-2), runner(model, "aot_eager")
    for step in range(1, STEPS + 1):
        ids = torch.randint(0, 64, (4, 9))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        assert_zero_outside(model, optimizer)
        assert_density_is_the_schedules(model, step)
    assert model.head.weight is model.emb.weight


def test_a_copy_continues_bitwise() -> None:
    model = fresh()
    optimizer: Any = torch.optim.SGD(model.parameters(), 1e-2)
    data = list(batches())
    train(model, optimizer, "none", iter(data[:17]))
    twin = copy.deepcopy(model)
    losses = train(model, optimizer, "none", iter(data[17:]))
    assert train(twin, torch.optim.SGD(twin.parameters(), 1e-2), "none", iter(data[17:])) == losses
