"""Parameters whose content PyTorch swaps for another's: under its future default, and by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import compiled
from torch import Tensor, nn
from training import assert_zero_outside

import mst_compile
from mst_compile import MixedSparsity, MSTWarning, sparsifier, sparsify
from mst_compile.state.uses import is_compiled

STEPS = 14
MIXED = MixedSparsity.published(STEPS, 0.8, warmup=4, restoration=4, settle=2, interval=2, ramp_interval=1)


@pytest.fixture(autouse=True)
def _swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    sparsify(model, MIXED, block=4)
    return model, torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=1e-2)


def batch(step: int) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, run: nn.Module | None = None) -> None:
    for step in steps:
        x = batch(step).to(next(model.parameters()).dtype)
        ((run or model)(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        assert_zero_outside(model, optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize("at", [0, 5, 11])
@pytest.mark.parametrize("compile_it", [False, True])
def test_a_model_that_is_converted_trains_on(at: int, compile_it: bool) -> None:
    """To another dtype and back, within every phase; the same bits as without."""
    model, optimizer = fresh()
    run = compiled(model) if compile_it else model
    train(model, optimizer, range(at), run)
    before = [*model.parameters()]
    model.to(torch.float64).to(torch.float32)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    train(model, optimizer, range(at, STEPS), run)
    expected, optimizer = fresh()
    train(expected, optimizer, range(STEPS), compiled(expected) if compile_it else expected)
    assert sparsifier(model).step_count == STEPS
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_gradients_that_wait_are_converted() -> None:
    """Accumulated before and after, and read for growth if the step asks for that: the step is the same."""
    for steps in (6, 7):
        after = {}
        for convert in (False, True):
            model, optimizer = fresh()
            train(model, optimizer, range(steps))
            model(batch(steps)).square().mean().backward()
            if convert:
                model.double().float()
            model(batch(steps + 1)).square().mean().backward()
            optimizer.step()
            assert_zero_outside(model, optimizer)
            after[convert] = [p.detach() for p in model.parameters()]
        for one, other in zip(after[False], after[True], strict=True):
            assert torch.equal(one, other)


def test_values_that_are_loaded_by_a_swap_are_cut() -> None:
    model, optimizer = fresh()
    train(model, optimizer, range(6))
    dense = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(dense)
    train(model, optimizer, range(6, 8))
    assert 0.1 < sparsifier(model).density < 0.9


def test_a_swap_by_hand_keeps_the_masks() -> None:
    model, optimizer = fresh()
    train(model, optimizer, range(6))
    weight, mask = model[0].weight, sparsifier(model).masks["0.weight"].clone()
    torch.utils.swap_tensors(weight, nn.Parameter(torch.ones(64, 32)))
    assert torch.equal(sparsifier(model).masks["0.weight"], mask)
    with pytest.warns(MSTWarning, match="outside the active blocks"):
        train(model, optimizer, range(6, 9))


def test_content_of_another_shape_is_as_a_parameter_that_was_replaced() -> None:
    model, optimizer = fresh()
    train(model, optimizer, range(6))
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(torch.ones(64, 16)))
    assert model(torch.ones(2, 16)).shape == (2, 32)


def test_what_was_noted_of_a_parameter_is_noted_after_a_swap() -> None:
    """As that a graph takes it: who makes it sparse again, on another grid, resets Dynamo for that."""
    model, _ = fresh()
    compiled(model)(batch(0))
    weight = model[0].weight
    assert is_compiled(weight)
    model.double()
    assert is_compiled(weight)
