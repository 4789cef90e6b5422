"""A model that is trained while nobody counts its steps: that is said, and nothing else is taken for it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import mst_compile
from mst_compile import MixedSparsity, MSTWarning, sparsifier, sparsify
from mst_compile.errors import ParallelismError

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
SILENT = "the sparsity schedule does not advance"


def fresh(**options: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    return sparsify(model, MixedSparsity(total_steps=40), block=8, **options)  # type: ignore[arg-type]


def backward(model: nn.Module) -> None:
    (model(X) - X).square().mean().backward()


def repeat(times: int, what: Callable[[], object]) -> None:
    for _ in range(times):
        what()


def by_hand(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad  # type: ignore[operator]
            p.grad = None


def through_data(model: nn.Module) -> None:
    """The Parameter's version stays as it was."""
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.01)  # type: ignore[arg-type]
        p.grad = None


def foreach(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), [p.grad for p in model.parameters()], alpha=-0.01)
    model.zero_grad()


def into_other_memory(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data - 0.01 * p.grad  # type: ignore[operator]
        p.grad = None


@pytest.mark.parametrize("update", [by_hand, through_data, foreach, into_other_memory])
@pytest.mark.parametrize("auto_step", [True, False])
def test_weights_that_no_optimizer_writes(update: Callable[[nn.Module], None], auto_step: bool) -> None:
    model = fresh(auto_step=auto_step)
    advice = r"Let step\(\) of a torch.optim.Optimizer" if auto_step else r"call sparsifier\(model\).step\(\) after"
    with pytest.warns(MSTWarning, match=rf"{SILENT}: 20 gradients of [02].weight have arrived.*{advice}") as caught:
        repeat(60, lambda: (backward(model), update(model)))
    assert len([w for w in caught if SILENT in str(w.message)]) == 1
    assert sparsifier(model).step_count == 0


def masters(model: nn.Module, flat: bool) -> Callable[[], None]:
    """An optimizer of copies in float64, which takes gradients away before it steps, as DeepSpeed's ZeRO does: all in
    one tensor, or each in its own."""
    own = list(model.parameters())
    copies = [p.detach().double() for p in own]
    copies = [torch.cat([c.flatten() for c in copies])] if flat else copies
    optimizer = torch.optim.AdamW(copies, 1e-3)

    def step() -> None:
        gradients = [p.grad.double() for p in own]  # type: ignore[union-attr]
        gradients = [torch.cat([g.flatten() for g in gradients])] if flat else gradients
        for c, g in zip(copies, gradients, strict=True):
            c.grad = g
        for p in own:
            p.grad = None
        optimizer.step()
        values: list[Tensor] = list(copies[0].split([p.numel() for p in own])) if flat else copies
        for p, value in zip(own, values, strict=True):
            p.data.copy_(value.view(p.shape))

    return step


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer_of_copies_that_leaves_no_gradients(flat: bool) -> None:
    model = fresh()
    step = masters(model, flat)
    with pytest.warns(MSTWarning, match=rf"{SILENT}: AdamW has stepped 10 times.*trains copies") as caught:
        repeat(60, lambda: (backward(model), step()))
    assert len([w for w in caught if SILENT in str(w.message)]) == 1


@pytest.mark.parametrize("stage", [1, 3])
def test_marks_of_deepspeed_are_known(stage: int) -> None:
    """By the attributes that its version 0.19 gives to Parameters; with itself: test_deepspeed.py. Another model's
    optimizer is let go on."""
    model = fresh()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer, other = torch.optim.AdamW([flat], 1e-3), torch.optim.AdamW([torch.zeros(4)], 1e-3)
    own = list(model.parameters())
    for p, part in zip(own, flat.split([p.numel() for p in own]), strict=True):
        if stage == 3:
            p._z3_optimizer = SimpleNamespace(optimizer=optimizer)  # type: ignore[attr-defined]
        else:
            p._hp_mapping = SimpleNamespace(hp_fragment=part)  # type: ignore[attr-defined]
    backward(model)
    before = flat.clone()
    flat.grad = torch.ones_like(flat)
    other.step()
    with pytest.raises(ParallelismError, match=r"DeepSpeed trains a copy of 0.weight.*Served are.*stage 2"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_a_run_that_was_resumed_stands_still_too() -> None:
    first = fresh()
    optimizer = torch.optim.AdamW(first.parameters(), 1e-3)
    for _ in range(5):
        backward(first)
        optimizer.step()
    model = fresh()
    model.load_state_dict(first.state_dict())
    sparsifier(model).load_state_dict(sparsifier(first).state_dict())
    assert sparsifier(model).step_count == 5
    step = masters(model, True)
    with pytest.warns(MSTWarning, match=SILENT):
        repeat(12, lambda: (backward(model), step()))


# -- what is no standstill ---------------------------------------------------------------------------------------------


def nothing(model: nn.Module) -> None:
    """Gradients that add up: of a large batch in small parts, or to look at them."""
    for _ in range(100):
        backward(model)


def lbfgs(model: nn.Module) -> None:
    """Weights move and gradients arrive many times within one step."""
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=60, tolerance_grad=0, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) - X).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def in_parts(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        for _ in range(30):
            backward(model)
        optimizer.step()
        optimizer.zero_grad()


def within_backward(model: nn.Module) -> None:
    optimizers = {p: torch.optim.SGD([p], 1e-3) for p in model.parameters()}

    def step(p: Tensor) -> None:
        optimizers[p].step()  # type: ignore[index]
        optimizers[p].zero_grad()  # type: ignore[index]

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(30):
        backward(model)


def counted_by_hand(model: nn.Module) -> None:
    for _ in range(30):
        backward(model)
        by_hand(model)
        sparsifier(model).step()


@pytest.mark.parametrize("train", [nothing, lbfgs, in_parts, within_backward, counted_by_hand])
def test_what_is_no_standstill(train: Callable[[nn.Module], None]) -> None:
    model = fresh(auto_step=train is not counted_by_hand)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        for expected in ("no graph compiled", "LBFGS keeps state"):
            warnings.filterwarnings("ignore", expected, MSTWarning)
        train(model)


def test_a_copy_is_watched_by_itself() -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    backward(model)
    optimizer.step()
    other = copy.deepcopy(model)
    with pytest.warns(MSTWarning, match=SILENT):
        repeat(25, lambda: (backward(other), by_hand(other)))


def test_nobody_listens_once_a_step_was_counted() -> None:
    """What is listened to costs a little at every gradient."""
    from mst_compile.state.binding import gradients

    model = fresh()
    own = set(sparsifier(model).weights.values())
    assert own & set(gradients) == own
    backward(model)
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert not own & set(gradients)
    assert mst_compile.sparsifier(model).step_count == 1
