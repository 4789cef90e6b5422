"""Optimizer steps that fail, nest, run in threads, or are reached by detours."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Blocks
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import assert_zero_outside, loss_of

from mst_compile import Constant, param_groups, sparsifier, sparsify
from mst_compile.blocks.bulk import zero_all_inactive_
from mst_compile.state import steps
from mst_compile.state import weight as weight_module
from mst_compile.state.steps import Step

SCHEDULE = Constant(0.7, interval=2)
LR = 0.01


class TroubleError(Exception):
    pass


def rates_of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


class Broken(torch.optim.SGD):
    """Steps, or raises before its weights have moved, or after."""

    trouble: BaseException | None = None
    late = False

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.trouble is not None and not self.late:
            raise self.trouble
        super().step(closure)
        if self.trouble is not None:
            raise self.trouble


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    loss = loss_of(model, torch.randn(8, 32, generator=gen))
    loss.backward()
    return loss


def by_body(optimizer: Any, error: BaseException) -> Callable[[], None]:
    optimizer.trouble, optimizer.late = error, False
    return lambda: setattr(optimizer, "trouble", None)


def by_late_body(optimizer: Any, error: BaseException) -> Callable[[], None]:
    optimizer.trouble, optimizer.late = error, True
    return lambda: setattr(optimizer, "trouble", None)


def raising(error: BaseException) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        raise error

    return hook


def by_pre_hook(optimizer: torch.optim.Optimizer, error: BaseException) -> Callable[[], None]:
    return optimizer.register_step_pre_hook(raising(error)).remove


def by_post_hook(optimizer: torch.optim.Optimizer, error: BaseException) -> Callable[[], None]:
    return optimizer.register_step_post_hook(raising(error)).remove


def by_global_hook(optimizer: torch.optim.Optimizer, error: BaseException) -> Callable[[], None]:
    """Somebody else's, that runs after ours."""
    return register_optimizer_step_post_hook(raising(error)).remove


WAYS = [(by_global_hook, True), (by_body, False), (by_late_body, True), (by_pre_hook, False), (by_post_hook, True)]


@pytest.mark.parametrize(("way", "moves"), WAYS)
@pytest.mark.parametrize("error", [TroubleError("x"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_raises_leaves_all_right(way: Any, moves: bool, error: BaseException, at: int) -> None:
    """Learning rates are back at once, the step counts if weights have moved, and the run goes on, masks and all."""
    model = sparsify(Blocks(), SCHEDULE)
    optimizer = Broken(param_groups(model), LR, momentum=0.9)
    own = sparsifier(model)
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        if step == at:
            mend = way(optimizer, error)
            with pytest.raises(type(error)):
                optimizer.step()
            mend()
            assert rates_of(optimizer) == [LR] * len(optimizer.param_groups)
            assert own.step_count == step + moves
            if step or moves:  # it has state to look at
                assert_zero_outside(model, optimizer, gradients=False)
            assert not steps._running.steps
            optimizer.zero_grad()
            backward(model, step)
        optimizer.step()
        assert own.step_count == step + 1 + (moves and step >= at)
        assert rates_of(optimizer) == [LR] * len(optimizer.param_groups)
        assert_zero_outside(model, optimizer)


def test_the_rate_really_was_another_during_the_step() -> None:
    model = sparsify(Blocks(), SCHEDULE)
    optimizer = torch.optim.SGD(param_groups(model), LR)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(rates_of(o)))
    backward(model)
    optimizer.step()
    assert max(seen[0]) > 2 * LR


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_scheduler_may_stand_before_the_step(scheduler_first: bool) -> None:
    """Learning rate schedulers put a function of their own on the optimizer, perhaps before any model was sparse."""
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    plain = torch.optim.SGD.step.__wrapped__  # type: ignore[attr-defined]
    before = torch.optim.SGD.step
    if scheduler_first:
        torch.optim.SGD.step = torch.optim.Optimizer.profile_hook_step(  # type: ignore[method-assign]
            plain.__wrapped__ if hasattr(plain, "__wrapped__") else plain
        )
        torch.optim.SGD.step.hooked = True  # type: ignore[attr-defined]
    try:
        if scheduler_first:
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        sparsify(model, SCHEDULE)
        if not scheduler_first:
            torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        optimizer.param_groups[0]["density_rate"] = 1.0
        for failing in (False, True, False):
            optimizer.zero_grad()
            backward(model)
            if failing:
                handle = optimizer.register_step_post_hook(raising(TroubleError()))
                with pytest.raises(TroubleError):
                    optimizer.step()
                handle.remove()
            else:
                optimizer.step()
            assert rates_of(optimizer) == [LR]
        assert sparsifier(model).step_count == 3
        assert not steps._running.steps
    finally:
        torch.optim.SGD.step = before  # type: ignore[method-assign]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bool]] = []

    def before_step(self, step: Step) -> None:
        self.seen.append(("before", type(step.optimizer).__name__, step.nested))

    def after_step(self, step: Step) -> None:
        self.seen.append(("after", type(step.optimizer).__name__, step.nested))


class Outer(torch.optim.Optimizer):
    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner[0].param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.inner:
            optimizer.step()


def make(kind: Any = torch.optim.SGD) -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return kind([parameter], LR)


def test_nesting_is_told_and_a_failure_within_ends_with_it() -> None:
    recorder = Recorder()
    steps.watch_steps(recorder)
    good, bad = make(torch.optim.AdamW), make(Broken)
    Outer(good, good).step()
    one = [("before", "AdamW", True), ("after", "AdamW", True)]
    assert recorder.seen == [("before", "Outer", False), *one, *one, ("after", "Outer", False)]
    recorder.seen.clear()
    bad.trouble = TroubleError()  # type: ignore[attr-defined]
    with pytest.raises(TroubleError):
        Outer(good, bad).step()
    assert recorder.seen == [("before", "Outer", False), *one, ("before", "Broken", True)]
    recorder.seen.clear()
    good.step()
    assert recorder.seen == [("before", "AdamW", False), ("after", "AdamW", False)]


def test_threads_do_not_nest_in_each_other() -> None:
    """Two optimizers that are both within their steps at one moment, in two threads."""
    recorder = Recorder()
    steps.watch_steps(recorder)
    barrier = threading.Barrier(2, timeout=30)

    class Meeting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            barrier.wait()
            result = super().step(closure)
            barrier.wait()
            return result

    optimizers = [make(Meeting) for _ in range(2)]
    threads = [threading.Thread(target=o.step) for o in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    outside = [(what, nested) for what, name, nested in recorder.seen if name == "Meeting" and not nested]
    assert sorted(outside) == [("after", False)] * 2 + [("before", False)] * 2


def test_a_failure_in_a_thread_is_nobody_elses() -> None:
    model = sparsify(Blocks(), SCHEDULE)
    optimizer = torch.optim.SGD(param_groups(model), LR)
    other = make(Broken)
    other.trouble = TroubleError()  # type: ignore[attr-defined]
    inside: list[list[float]] = []

    def fail_elsewhere(*_: Any) -> None:
        def work() -> None:
            with pytest.raises(TroubleError):
                other.step()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
        inside.append(rates_of(optimizer))

    optimizer.register_step_pre_hook(fail_elsewhere)
    backward(model)
    optimizer.step()
    assert max(inside[0]) > 2 * LR, "the step under way kept its rates"
    assert rates_of(optimizer) == [LR] * len(optimizer.param_groups)
    assert sparsifier(model).step_count == 1


def test_classes_and_copies_made_later_are_guarded() -> None:
    sparsify(Blocks(), SCHEDULE)

    class Later(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    optimizer = make(Later)
    assert Later.step.hooked  # type: ignore[attr-defined]
    for one in (optimizer, copy.deepcopy(optimizer)):
        handle = one.register_step_pre_hook(raising(TroubleError()))
        with pytest.raises(TroubleError):
            one.step()
        handle.remove()
        assert not steps._running.steps
        one.step()


def test_a_compiled_step_is_counted() -> None:
    model = sparsify(Blocks(), SCHEDULE)
    optimizer = torch.optim.SGD(param_groups(model), LR)

    @torch.compile(backend="aot_eager")
    def step() -> None:
        optimizer.step()

    for count in range(1, 4):
        optimizer.zero_grad()
        backward(model, count)
        step()
        assert sparsifier(model).step_count == count
        assert rates_of(optimizer) == [LR] * len(optimizer.param_groups)
    assert_zero_outside(model, optimizer)


def test_gradients_that_were_changed_are_masked_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping changes them all; a GPU then needs one launch and not one a weight."""
    calls: list[int] = []

    def counted(whole: list[Any]) -> None:
        if whole:
            calls.append(len(whole))
        zero_all_inactive_(whole)

    monkeypatch.setattr(weight_module, "zero_all_inactive_", counted)
    model = sparsify(nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), Constant(0.5, growth="none"), block=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 16)).square().sum().backward()
    assert calls == [1, 1, 1]  # each as it comes
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad += 1  # not even zeros are kept
    optimizer.step()
    assert calls == [1, 1, 1, 3]
    calls.clear()
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()  # finds them as they were masked
    assert calls == [1, 1, 1]
    for weight in sparsifier(model).weights.values():
        parameter = model.get_parameter(weight.name)
        assert not parameter[~weight.grid.expand(weight.mask)].any()
