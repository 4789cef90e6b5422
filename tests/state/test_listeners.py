"""What a run tells of its topology events, to callbacks and to the log."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from training import OPTIMIZERS, SCHEDULE, STEPS, assert_zero_outside, batches, fresh, loss_of, train

from mst_compile import Constant, MSTWarning, TopologyEvent, sparsifier
from mst_compile.errors import ArgumentError
from mst_compile.state import run as run_module


def events_of(model: nn.Module, steps: int = STEPS) -> list[TopologyEvent]:
    told: list[TopologyEvent] = []
    sparsifier(model).on_event(told.append)
    train(model, OPTIMIZERS["adamw"](model.parameters()), "none", batches(steps))
    return told


def test_every_event_is_told_as_it_was() -> None:
    """Against the masks before and after each step."""
    model = fresh()
    own, optimizer = sparsifier(model), OPTIMIZERS["adamw"](model.parameters())
    told: list[TopologyEvent] = []
    own.on_event(told.append)
    steps = 0
    for x in batches():
        before = own.masks
        told.clear()
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        changed = {name: (mask, own.masks[name]) for name, mask in before.items() if not mask.equal(own.masks[name])}
        assert len(told) == SCHEDULE.is_topology_event(steps)
        if not told:
            assert not changed
            continue
        (event,) = told
        assert (event.step, event.phase, event.skipped) == (steps, own.phase, "")
        assert event.density == own.density
        assert set(event.weights) == set(changed)
        for name, (old, new) in changed.items():
            change, weight = event.weights[name], own.weights[name]
            assert change.dropped == int((old & ~new).sum())
            assert change.grown == int((new & ~old).sum())
            assert (change.density, change.block) == (weight.density, weight.grid.block)
        assert event.dropped == sum(c.dropped * c.block**2 for c in event.weights.values())
        assert event.grown == sum(c.grown * c.block**2 for c in event.weights.values())


def test_phases_and_what_a_sparsifier_prints() -> None:
    model = fresh()
    own = sparsifier(model)
    assert repr(own).startswith(f"<Sparsifier: step 0 of {STEPS}, warm-up, density ")
    phases = [event.phase for event in events_of(model)]
    assert list(dict.fromkeys(phases))[:3] == ["warm-up", "plateau", "restoration"]
    assert own.phase == ""
    assert repr(own) == f"<Sparsifier: step {STEPS} of {STEPS}, density 1.00, {len(own.weights)} weights>"
    assert repr(sparsifier(fresh(Constant(0.5, growth="none")))).startswith("<Sparsifier: step 0, ")


def test_callbacks_in_order_until_they_are_removed() -> None:
    model, calls = fresh(), list[str]()
    own = sparsifier(model)
    first = own.on_event(lambda event: calls.append("a"))
    own.on_event(lambda event: (first.remove(), calls.append("b")))  # while events are told
    events = events_of(model)
    assert calls == ["a", *["b"] * len(events)]


def test_the_same_training_with_callbacks_and_without() -> None:
    heard, alone = fresh(), fresh()
    events_of(heard)
    train(alone, OPTIMIZERS["adamw"](alone.parameters()), "none", batches())
    for a, b in zip(heard.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_counted_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "changes", None)
    model = fresh()
    train(model, OPTIMIZERS["adamw"](model.parameters()), "none", batches())


def test_a_callback_that_raises_finds_a_complete_step() -> None:
    """The step has taken place, and training goes on as if nothing had been raised."""
    model, usual = fresh(), fresh()
    train(usual, OPTIMIZERS["adamw"](usual.parameters()), "none", batches())
    own, optimizer = sparsifier(model), OPTIMIZERS["adamw"](model.parameters())

    def fail(event: TopologyEvent) -> None:
        raise ZeroDivisionError(f"at {event.step}")

    own.on_event(fail)
    raised = []
    for step, x in enumerate(batches(), 1):
        loss_of(model, x).backward()
        try:
            optimizer.step()
        except ZeroDivisionError as error:
            raised.append(str(error))
        assert own.step_count == step
        optimizer.zero_grad()
    assert raised == [f"at {t}" for t in range(1, STEPS + 1) if SCHEDULE.is_topology_event(t)]
    assert_zero_outside(model, optimizer)
    for a, b in zip(model.parameters(), usual.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = fresh()
    with caplog.at_level(logging.INFO, logger="mst_compile"):
        told = events_of(model)
    assert [record.getMessage() for record in caplog.records] == [str(event) for event in told]
    dropped = sum(change.dropped for change in told[3].weights.values())
    assert f"step {told[3].step}, {told[3].phase}: density {told[3].density:.3f}, {dropped} blocks" in str(told[3])


def test_an_event_that_is_skipped_says_why() -> None:
    model, told = fresh(), list[TopologyEvent]()
    own, optimizer = sparsifier(model), torch.optim.SGD(model.parameters(), lr=1e-2)
    own.on_event(told.append)
    step = next(t for t in range(1, STEPS) if SCHEDULE.is_topology_event(t))
    for t, x in enumerate(batches(step), 1):
        loss_of(model, x).backward()
        if t == step:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(torch.inf)
            with pytest.warns(MSTWarning, match="not finite"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    (event,) = told
    assert "not finite" in event.skipped
    assert not event.weights
    assert event.dropped == event.grown == 0
    assert "skipped" in str(event)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_no_callbacks(how: str) -> None:
    model, calls = fresh(), list[int]()
    sparsifier(model).on_event(lambda event: calls.append(event.step))
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    told = events_of(other)
    assert told
    assert not calls
    train(model, OPTIMIZERS["adamw"](model.parameters()), "none", batches())
    assert calls == [event.step for event in told]


@pytest.mark.parametrize("callback", [None, 3, "print"])
def test_what_cannot_be_called(callback: object) -> None:
    with pytest.raises(ArgumentError, match="on_event wants a function"):
        sparsifier(fresh()).on_event(callback)  # type: ignore[arg-type]
