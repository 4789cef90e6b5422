"""KeyboardInterrupt anywhere in our own code, as Ctrl-C raises it between any two lines; then training goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks
from torch import nn

import mst_compile
from mst_compile import Constant, param_groups, sparsifier, sparsify
from mst_compile.state import steps
from mst_compile.state.run import Run

_OURS = str(Path(mst_compile.__file__).parent)
_EVENT = 3  # the step after which masks change
_MOMENTS = 45


class Interrupter:
    """Raises KeyboardInterrupt at the ``at``-th line of ours; counts them where that is None."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def run(self, function: Callable[[], object]) -> None:
        before = sys.gettrace()
        sys.settrace(self._entered)
        try:
            function()
        except KeyboardInterrupt:
            assert self.at is not None
        finally:
            sys.settrace(before)

    def _entered(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(_OURS) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._line


class Training:
    def __init__(self, growth: str) -> None:
        torch.manual_seed(0)
        self.model = sparsify(Blocks(16, 1), Constant(0.7, interval=_EVENT, growth=growth), block=4)
        self.groups = param_groups(self.model, weight_decay=0.1)
        self.optimizer = torch.optim.AdamW(self.groups, 1e-2)
        for _ in range(_EVENT - 1):
            self.step()

    def step(self) -> None:
        self.model(torch.randn(8, 16)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> None:
        """All is 0 outside the masks, and rates are what they were."""
        for name, mask in element_masks(self.model).items():
            parameter = self.model.get_parameter(name)
            state = [v for v in self.optimizer.state[parameter].values() if v.shape == parameter.shape]
            for tensor in (parameter.detach(), *state):
                assert not tensor[~mask].any(), name
        assert {group["lr"] for group in self.optimizer.param_groups} == {1e-2}
        assert not steps._running.steps


def interrupted(what: str, growth: str, at: int | None) -> tuple[Training, Interrupter]:
    """Training whose third step, or the event behind it alone, is interrupted."""
    training, interrupter = Training(growth), Interrupter(at)
    if what == "step":
        interrupter.run(training.step)
        return training, interrupter
    complete = Run.complete_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "complete_step", lambda run: interrupter.run(lambda: complete(run)))
        training.step()
    return training, interrupter


@pytest.mark.parametrize("growth", ["random", "gradient"])
@pytest.mark.parametrize("what", ["step", "event"])
def test_an_interrupt_leaves_nothing_half_done(what: str, growth: str) -> None:
    _, counted = interrupted(what, growth, None)
    for at in range(1, counted.lines, max(1, counted.lines // _MOMENTS)):
        training, _ = interrupted(what, growth, at)
        taken = sparsifier(training.model).step_count
        assert taken in (_EVENT - 1, _EVENT)
        training.optimizer.zero_grad()
        training.step()
        training.check()
        # The step that was broken off counts if weights have moved; then its event has happened, or is made up for.
        assert sparsifier(training.model).step_count in (taken + 1, _EVENT + 1)
        for _ in range(_EVENT):
            training.step()
        training.check()
        assert not sparsifier(training.model)._run.overdue


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_an_event_that_was_interrupted_is_the_event(growth: str) -> None:
    """What was planned has happened as if nobody had interrupted it, in weights and state, bit for bit."""
    whole, counted = interrupted("event", growth, None)
    masks = {name: weight.mask for name, weight in sparsifier(whole.model).weights.items()}
    changed = 0
    for at in range(1, counted.lines, max(1, counted.lines // _MOMENTS)):
        training, _ = interrupted("event", growth, at)
        run = sparsifier(training.model)._run
        if run.overdue or run.step_count < _EVENT:  # nothing has changed, and the next step makes up for it
            continue
        changed += 1
        for name, weight in sparsifier(training.model).weights.items():
            assert torch.equal(weight.mask, masks[name])
            assert weight.active == weight.grid.count_elements(weight.mask)
            assert torch.equal(training.model.get_parameter(name), whole.model.get_parameter(name))
        training.check()
    assert changed > 5


def test_an_interrupt_at_the_door_of_a_step() -> None:
    """Between being entered and anything else: later steps would be taken for parts of it, and not count."""
    training = Training("random")
    enter = steps._enter

    def interrupt(optimizer: torch.optim.Optimizer, guard: FrameType | None) -> Any:
        enter(optimizer, guard)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_enter", interrupt)
        with pytest.raises(KeyboardInterrupt):
            training.step()
    training.optimizer.zero_grad()
    for _ in range(2):
        training.step()
    training.check()
    assert sparsifier(training.model).step_count == _EVENT + 1


def test_an_error_at_the_end_of_a_step_keeps_no_scaled_rates() -> None:
    """Several are told of the end: what one raises is not in the others' way."""
    training = Training("random")

    class Told(nn.Module):
        def before_step(self, step: steps.Step) -> None:
            def end(failed: bool) -> None:
                raise KeyboardInterrupt

            step.at_end(end)

        def after_step(self, step: steps.Step) -> None: ...

    told = Told()
    steps.watch_steps(told)
    with pytest.raises(KeyboardInterrupt):
        training.step()
    steps._watchers.discard(told)
    training.optimizer.zero_grad()
    training.step()
    training.check()


class _Failing(torch.autograd.Function):
    """Raises in the backward pass, when asked to."""

    fails = True

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if _Failing.fails:
            raise KeyboardInterrupt
        return gradient


@pytest.mark.parametrize("queued", [True, False])
def test_a_backward_pass_that_ends_early_defers_no_later_step(queued: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers step within the backward pass, for whose end the count waits: one that never comes, or one that was
    queued twice, because an interrupt came between being queued and being known to be."""
    torch.manual_seed(0)
    model = sparsify(
        nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), Constant(0.5, interval=_EVENT, growth="random"), block=4
    )
    changed: list[int] = []
    sparsifier(model).on_event(lambda event: changed.append(event.step))
    for p in model.parameters():
        own = torch.optim.SGD([p], 1e-2)

        def hook(_: torch.Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            own.zero_grad()

        p.register_post_accumulate_grad_hook(hook)
    monkeypatch.setattr(_Failing, "fails", not queued)
    if queued:
        engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]

        class Engine:
            def __getattr__(self, name: str) -> Any:
                return getattr(engine, name)

            def queue_callback(self, function: Callable[[], None]) -> None:
                engine.queue_callback(function)
                engine.queue_callback(function)

        monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", Engine())

    def step() -> None:
        model[1](_Failing.apply(model[0](torch.randn(8, 16)))).square().mean().backward()

    taken = 0
    if not queued:
        with pytest.raises(KeyboardInterrupt):
            step()
        monkeypatch.setattr(_Failing, "fails", False)
        step()
        taken = sparsifier(model).step_count
        assert taken in (1, 2)  # of the first, half was done
    for n in range(1, 2 * _EVENT):
        step()
        assert sparsifier(model).step_count == taken + n
        assert changed == list(range(_EVENT, taken + n + 1, _EVENT))
    for name, mask in element_masks(model).items():
        assert not model.get_parameter(name).detach()[~mask].any()
