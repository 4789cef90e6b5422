"""State of an optimizer that is coded, or cannot be written when masks change: what grows there begins with none, and
an event of many weights is whole or says what it could not do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import pytest
import torch
from coded import Coded, CodedSGD
from helpers import Blocks
from mask_cases import element_masks
from situations import X, train
from torch import Tensor, nn
from training import batches, loss_of

from mst_compile import Constant, MSTWarning, sparsifier, sparsify
from mst_compile.errors import OptimizerError
from mst_compile.state.run import Run
from mst_compile.state.weight import SparseWeight

_EVENT = 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=MSTWarning)
        yield


def started(optimizer_class: type[torch.optim.Optimizer] = CodedSGD) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = sparsify(Blocks(), Constant(0.7, interval=_EVENT, growth="random"))
    return model, optimizer_class(model.parameters(), lr=0.01)  # type: ignore[call-arg]


def grown_in(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask & ~before[name] for name, mask in element_masks(model).items()}


# -- coded state -------------------------------------------------------------------------------------------------------


def test_blocks_grow_without_a_past_in_a_tensor_subclass() -> None:
    model, optimizer = started()
    train(model, optimizer, _EVENT - 1)
    before = element_masks(model)
    loss_of(model, next(batches(1))).backward()
    for name, mask in before.items():
        optimizer.state[model.get_parameter(name)]["momentum"].codes[~mask] = 5.0
    optimizer.step()
    for name, grown in grown_in(model, before).items():
        assert grown.any(), name
        assert not optimizer.state[model.get_parameter(name)]["momentum"].codes[grown].any(), name


class BookedSGD(torch.optim.Optimizer):
    """Momentum in 8-bit codes with a book beside them, as bitsandbytes keeps it."""

    def __init__(self, parameters: object, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["qmap1"], state["state1"] = (
                    torch.linspace(-1, 1, 257)[1:],
                    torch.full_like(p, 127, dtype=torch.uint8),
                )
                state["qmap1"][127] = 0.0
            p.sub_(state["qmap1"][state["state1"].long()] + p.grad, alpha=self.param_groups[0]["lr"])
            state["state1"].add_((p.grad * 10).round().to(torch.int8).to(torch.uint8))


def test_blocks_that_a_mask_gives_start_without_codes() -> None:
    """Of an optimizer that was not known when the mask was given: its state is there, in blocks that are active now."""
    torch.manual_seed(0)
    model = Blocks()
    optimizer = BookedSGD(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    sparsify(model, Constant(0.7, growth="none"))
    before = element_masks(model)
    for name, mask in before.items():
        optimizer.state[model.get_parameter(name)]["state1"][~mask] = 200
    for name, mask in sparsifier(model).masks.items():
        sparsifier(model).apply_mask(name, torch.ones_like(mask))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, mask in before.items():
        assert bool((optimizer.state[model.get_parameter(name)]["state1"][~mask] == 127).all()), name


# -- what cannot be written --------------------------------------------------------------------------------------------


class _Refusing(Coded):
    """Takes nothing any more."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Coded):
            raise RuntimeError("no room")
        return super().__torch_dispatch__(func, types, args, kwargs)


def _refuse(model: nn.Module, optimizer: torch.optim.Optimizer, which: int) -> str:
    """The state of one weight takes nothing from now on; returns its name."""
    name = list(sparsifier(model).weights)[which]
    state = optimizer.state[model.get_parameter(name)]
    state["momentum"] = _Refusing(state["momentum"].codes)
    return name


@pytest.mark.parametrize("which", [0, 1, -1])
def test_an_event_with_state_that_cannot_be_written(which: int) -> None:
    """All masks change, and all that can be is 0 outside of them; then it is said, and no step is taken with old
    state."""
    whole, other = started()
    train(whole, other, _EVENT)
    model, optimizer = started()
    train(model, optimizer, _EVENT - 1)
    events = []
    sparsifier(model).on_event(events.append)
    name = _refuse(model, optimizer, which)
    loss_of(model, X).backward()
    with pytest.raises(OptimizerError, match=f"CodedSGD keeps momentum of {name} in a _Refusing.*no room"):
        optimizer.step()
    own = sparsifier(model)
    assert own.step_count == _EVENT
    assert [event.step for event in events] == [_EVENT]
    for each, mask in element_masks(model).items():
        p = model.get_parameter(each)
        assert torch.equal(own.masks[each], sparsifier(whole).masks[each])
        assert torch.equal(p, whole.get_parameter(each))
        assert p.grad is None or not p.grad[~mask].any()
        assert each == name or not optimizer.state[p]["momentum"].codes[~mask].any()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(OptimizerError, match="no room"):
        train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert own.step_count == _EVENT
    p = model.get_parameter(name)
    optimizer.state[p]["momentum"] = Coded(optimizer.state[p]["momentum"].codes)  # it can be written again
    optimizer.zero_grad()
    train(model, optimizer)
    assert own.step_count == _EVENT + 1
    assert not optimizer.state[p]["momentum"].codes[~element_masks(model)[name]].any()


def test_a_given_mask_with_state_that_cannot_be_written() -> None:
    model, optimizer = started()
    train(model, optimizer)
    name = _refuse(model, optimizer, 0)
    mask = ~sparsifier(model).masks[name]
    with pytest.raises(OptimizerError, match="no room"):
        sparsifier(model).apply_mask(name, mask)
    assert torch.equal(sparsifier(model).masks[name], mask)
    assert not model.get_parameter(name).detach()[~element_masks(model)[name]].any()
    with pytest.raises(OptimizerError, match="no room"):
        train(model, optimizer)


class Stretched(torch.optim.SGD):
    """State of one number, in the shape of the weight."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            size = self.state[p].setdefault("size", torch.ones(1, 1).expand(p.shape) if p.dim() == 2 else torch.ones(1))
            p.sub_(size * p.grad, alpha=1e-2)


def test_one_number_for_all_elements_is_no_state_of_elements() -> None:
    """To set it to 0 where a weight is masked would set it to 0 everywhere."""
    model, optimizer = started(Stretched)
    train(model, optimizer, 2 * _EVENT)
    for name in sparsifier(model).weights:
        assert bool((optimizer.state[model.get_parameter(name)]["size"] == 1).all())


def test_an_interrupt_within_an_event_with_state_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is interrupted is finished, state that cannot be written included."""
    model, optimizer = started()
    train(model, optimizer, _EVENT - 1)
    _refuse(model, optimizer, 1)
    note, calls = Run._note_versions, []

    def interrupt(own: Iterable[tuple[SparseWeight, nn.Parameter]]) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        note(own)

    monkeypatch.setattr(Run, "_note_versions", staticmethod(interrupt))
    loss_of(model, X).backward()
    with pytest.raises((KeyboardInterrupt, OptimizerError)):
        optimizer.step()
    assert sparsifier(model).step_count == _EVENT
    for name, mask in element_masks(model).items():
        assert not model.get_parameter(name).detach()[~mask].any()
    with pytest.raises(OptimizerError, match="no room"):
        train(model, optimizer)
