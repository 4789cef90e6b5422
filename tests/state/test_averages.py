"""Averages of weights: copies of the model that others write, in whatever way, and compiled calls of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from helpers import Blocks, compiled
from oracles import assert_reordered
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import batches, loss_of

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.errors import MSTWarning

SCHEDULE = Constant(0.75, interval=2, growth="random")
Write = Callable[[nn.Module, nn.Module], None]


def through_data(average: nn.Module, model: nn.Module) -> None:
    for a, b in zip(average.parameters(), model.parameters(), strict=True):
        a.data.mul_(0.9).add_(b.data, alpha=0.1)


def without_gradients(average: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for a, b in zip(average.parameters(), model.parameters(), strict=True):
            a.lerp_(b, 0.1)


def through_state_dicts(average: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            a.mul_(0.9).add_(b, alpha=0.1)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = sparsify(Blocks(), SCHEDULE, block=4)
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(autouse=True)
def _quiet() -> object:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no graph compiled by backend|values stand outside", MSTWarning)
        yield


@pytest.mark.parametrize("write", [through_data, without_gradients, through_state_dicts])
@pytest.mark.parametrize("recording", [False, True])
def test_compiled_averages_equal_eager_ones(write: Write, recording: bool) -> None:
    """After every step, also where they are always called in the same mode: a write through .data leaves no trace."""
    model, optimizer = trained()
    average = copy.deepcopy(model)
    run, x = compiled(average), next(iter(batches(1)))
    for data in batches(6):
        step(model, optimizer, data)
        write(average, model)
        with torch.set_grad_enabled(recording):
            assert_reordered(run(x), average(x), 128)
    outside = [p[~w.grid.expand(w.mask)] for w, p in sparsifier(average).parameters()]
    assert all(bool(values.any()) for values in outside)  # the average of what was there when it was


def test_an_averaged_model() -> None:
    model, optimizer = trained()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    run, x = compiled(average), next(iter(batches(1)))
    for data in batches(6):
        step(model, optimizer, data)
        average.update_parameters(model)
        with torch.no_grad():
            assert_reordered(run(x), average(x), 128)
    assert sparsifier(average.module).step_count == 0  # it is none of the run's


def test_averages_that_go_into_the_model_and_out_again() -> None:
    """As evaluations do; weights of the run and its masks are as they were."""
    model, optimizer = trained()
    run, x = compiled(model), next(iter(batches(1)))
    average = [p.detach().clone() for p in model.parameters()]
    for data in batches(6):
        step(run, optimizer, data)
        for a, p in zip(average, model.parameters(), strict=True):
            a.lerp_(p.detach(), 0.1)
        own = [p.detach().clone() for p in model.parameters()]
        for a, p in zip(average, model.parameters(), strict=True):
            p.data.copy_(a)
        with torch.no_grad():
            assert_reordered(run(x), model(x), 128)
        for before, p in zip(own, model.parameters(), strict=True):
            p.data.copy_(before)
    assert sparsifier(model).step_count == 6
    assert all(not p.detach()[~w.grid.expand(w.mask)].any() for w, p in sparsifier(model).parameters())


def test_a_copy_at_rest_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is trained, calls ask no values: generating text would pay for it at every token."""
    from mst_compile.state import lookout

    model, optimizer = trained()
    average = copy.deepcopy(model)
    run, x = compiled(average), next(iter(batches(1)))
    looked: list[int] = []
    are_zero = lookout._are_zero

    def counting(*args: object) -> bool:
        looked.append(1)
        return are_zero(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(lookout, "_are_zero", counting)
    with torch.no_grad():
        for _ in range(4):
            run(x)
    assert not looked
    step(model, optimizer, x)
    looked.clear()  # the run's own looks
    with torch.no_grad():
        run(x)
        assert len(looked) == len(sparsifier(average).masks)
        run(x)
    assert len(looked) == len(sparsifier(average).masks)
