"""Modules that are changed after the first compiled call: what a compiled model notices is Dynamo's to say, as under
any backend; masks and zeros hold whatever it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import compiled, static
from mask_cases import element_masks
from oracles import assert_reordered
from situations import X
from torch import Tensor, nn
from torch.nn.utils import parametrize
from training import fresh, loss_of

from mst_compile import MSTWarning

Undo = Callable[[], object]


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 2


def hooked(register: str, hook: Callable[..., Any]) -> Callable[[nn.Module], Undo]:
    return lambda layer: getattr(layer, register)(hook).remove


def for_every_module(_: nn.Module) -> Undo:
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, __, out: out * 2 if isinstance(module, nn.Linear) else None
    )
    return hook.remove


def another_forward(layer: nn.Module) -> Undo:
    usual = layer.forward
    layer.forward = lambda x: usual(x) * 2
    return lambda: layer.__dict__.pop("forward")


def another_forward_of_the_class(_: nn.Module) -> Undo:
    usual = nn.Linear.forward
    nn.Linear.forward = lambda self, x: usual(self, x) * 2  # type: ignore[method-assign]
    return lambda: setattr(nn.Linear, "forward", usual)


def computed(name: str) -> Callable[[nn.Module], Undo]:
    def change(layer: nn.Module) -> Undo:
        parametrize.register_parametrization(layer, name, Doubled())
        return lambda: parametrize.remove_parametrizations(layer, name, leave_parametrized=False)

    return change


HOOKS: dict[str, Callable[[nn.Module], Undo]] = {
    "forward hook": hooked("register_forward_hook", lambda _, __, out: out * 2),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda _, args: (args[0] + 1,)),
    "backward hook": hooked("register_full_backward_hook", lambda _, found, __: (found[0] * 2,)),
    "backward pre-hook": hooked("register_full_backward_pre_hook", lambda _, found: (found[0] * 2,)),
}
NEVER = {"hook for every module": for_every_module, "forward of the class": another_forward_of_the_class}
ALWAYS = {"forward": another_forward, "bias": computed("bias"), "weight": computed("weight")}
CHANGES = HOOKS | NEVER | ALWAYS
Seen = dict[str, Tensor]


def seen(change: Callable[[nn.Module], Undo], backend: str, removed: bool) -> Seen:
    """Loss and gradients of the call after the change, or after it was taken back, of a model that is trained on."""
    torch._dynamo.reset()
    model = fresh(static())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    outside = {model.get_parameter(name): ~mask for name, mask in element_masks(model).items()}
    run: Any = model
    if backend == "mst":
        run = compiled(model)
    elif backend != "none":
        run = torch.compile(model, backend=backend)

    def step() -> Seen:
        loss = loss_of(run, X)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert all(not p.grad[mask].any() for p, mask in outside.items())
        optimizer.step()
        for p, mask in outside.items():
            assert not p[mask].any()
            assert not optimizer.state[p]["momentum_buffer"][mask].any()
        optimizer.zero_grad()
        return {"loss": loss.detach()} | found

    undo = None
    try:
        undo = change(model.layers[0][1]) if removed else None
        step()
        if undo is None:
            undo = change(model.layers[0][1])
        else:
            undo, taken_back = None, undo
            taken_back()
        found = step()
        step()
        return found
    finally:
        if undo is not None:
            undo()


def assert_same(found: Seen, expected: Seen) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_reordered(value, expected[name], 64 if name == "loss" else 512)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_after_the_first_call(name: str, asked: bool) -> None:
    """Hooks are noticed if Dynamo is asked to look for them (``skip_nnmodule_hook_guards = False``), what every module
    shares never is, and everything else always."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not asked), warnings.catch_warnings():
        if name != "weight":  # a product with a weight that is computed is dense
            warnings.filterwarnings("error", ".*stay in dense products", MSTWarning)
        eager, ours = (seen(CHANGES[name], backend, False) for backend in ("none", "mst"))
        noticed = name in ALWAYS or (asked and name in HOOKS)
        usual = eager if noticed else seen(CHANGES[name], "aot_eager", False)
    assert_same(ours, usual)
    if not noticed:
        with pytest.raises(AssertionError):
            assert_same(ours, eager)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_taken_back_after_the_first_call(name: str) -> None:
    """It is noticed, whatever Dynamo was asked."""
    assert torch._dynamo.config.skip_nnmodule_hook_guards, "PyTorch's own default"
    assert_same(seen(CHANGES[name], "mst", True), seen(CHANGES[name], "none", True))
