"""Ways to call and train a compiled model that are not the plain loop: compiled equals eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEBUG, Blocks, compiled, static
from mask_cases import element_masks
from oracles import assert_reordered, assert_same_course
from situations import X
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from training import assert_zero_outside, batches, fresh, loss_of

from mst_compile import Constant, MSTWarning, sparsifier, sparsify

SCHEDULE = Constant(0.7, interval=3, growth="gradient")
STEPS = 8


def gradients_at_last(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> None:
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss_of(run, x), parameters), strict=True):
        p.grad = g


def twice(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> None:
    loss = loss_of(run, x)
    loss.backward(retain_graph=True)
    loss.backward()


def backward_compiled(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> None:
    """Compiled autograd hands the backward pass over, to this backend too."""
    compiler = torch.compile(backend="mst", options=DEBUG)
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss_of(run, x).backward()


def watched(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> None:
    with torch.autograd.set_detect_anomaly(True):
        loss_of(run, x).backward()


LOOPS = {"autograd.grad": gradients_at_last, "twice": twice, "compiled": backward_compiled, "anomaly": watched}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_other_backward_passes(name: str) -> None:
    def trained(compile_it: bool) -> nn.Module:
        model = fresh(SCHEDULE)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
        run: Any = compiled(model) if compile_it else model
        backward = twice if name == "twice" else LOOPS["autograd.grad"]
        for x in batches(STEPS):
            (LOOPS[name] if compile_it else backward)(run, x, model)
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier(model).step_count == STEPS
        assert_zero_outside(model, optimizer, gradients=False)
        return model

    eager = trained(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stay in dense products", MSTWarning)
        fast = trained(True)
    for p, q in zip(fast.parameters(), eager.parameters(), strict=True):
        assert_same_course(p, q, 64)
    assert all(torch.equal(m, sparsifier(eager).masks[n]) for n, m in sparsifier(fast).masks.items())


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_do_as_under_other_backends(when: str) -> None:
    """Of modules, Parameters and gradients, put there before the first compiled call, or after it, when Dynamo does not
    look for those of modules."""

    def seen(ours: bool) -> tuple[Tensor, list[str], dict[str, Tensor]]:
        model = fresh(static())
        torch._dynamo.reset()
        run: Any = compiled(model) if ours else torch.compile(model, backend="aot_eager")
        told: list[str] = []

        def note(what: str, result: Any) -> Any:
            told.append(what)
            return result

        if when == "after":
            run(X)
        layer = model.layers[0][1]
        layer.register_forward_pre_hook(lambda _, args: note("before", (args[0] + 1,)))
        layer.register_forward_hook(lambda _, __, out: note("forward", out * 2))
        layer.register_full_backward_hook(lambda _, found, __: note("backward", (found[0] * 0.5,)))
        layer.weight.register_hook(lambda found: note("gradient", found * 3))
        layer.weight.register_post_accumulate_grad_hook(lambda _: note("accumulated", None))
        loss = loss_of(run, X)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert not found["layers.0.1.weight"][~element_masks(model)["layers.0.1.weight"]].any()
        return loss.detach(), sorted(told), found

    loss, told, gradients = seen(True)
    usual, expected, exact = seen(False)
    assert told == expected
    assert {"gradient", "accumulated"} <= {*told}
    assert when == "after" or len(told) == 5
    assert_reordered(loss, usual, 64)
    for name, gradient in gradients.items():
        assert_reordered(gradient, exact[name], 512)


SHAPES: dict[str, Callable[[], Tensor]] = {
    "rows apart": lambda: torch.randn(64, 32)[::2],
    "columns apart": lambda: torch.randn(16, 64)[:, ::2],
    "shifted": lambda: torch.randn(16, 33)[:, 1:],
    "transposed": lambda: torch.randn(4, 32, 5).mT,
    "expanded": lambda: torch.randn(1, 32).expand(16, 32),
    "channels last": lambda: torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
    "no row": lambda: torch.randn(0, 32),
    "no row of a batch": lambda: torch.randn(2, 0, 32),
    "one row": lambda: torch.randn(1, 32),
    "a vector": lambda: torch.randn(32),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_any_layout(shape: str) -> None:
    model, x = fresh(static()), SHAPES[shape]()
    outs = []
    for run in (model, compiled(model)):
        given = x.detach().requires_grad_()
        out = run(given)
        wanted = [given, *model.parameters()]
        model.zero_grad()
        out.square().sum().backward()
        outs.append([out.detach(), *(t.grad for t in wanted)])
    for usual, got in zip(*outs, strict=True):
        assert got.shape == usual.shape
        if got.numel():
            assert_reordered(got, usual, 512)


def test_other_weights_and_several_models_at_once() -> None:
    """Weights that are handed in are dense ones, whatever masks the model has."""
    models = [sparsify(Blocks(), static(), seed=seed) for seed in range(3)]
    run = compiled(models[0])
    other = {name: torch.randn_like(p) for name, p in models[0].named_parameters()}
    for _ in range(2):  # in turn with its own
        assert_reordered(functional_call(run, other, (X,)), functional_call(models[0], other, (X,)), 512)
        assert_reordered(run(X), models[0](X), 512)
    parameters, _ = stack_module_state(models)

    def of_each(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return vmap(lambda own: functional_call(models[0], own, (x,)))(parameters)

    expected = torch.stack([model(X) for model in models])
    assert_reordered(of_each(parameters, X), expected, 512)
    assert_reordered(compiled(of_each)(parameters, X), expected, 512)


def test_a_whole_step_in_one_compiled_function() -> None:
    def trained(compile_it: bool) -> nn.Module:
        model = fresh(SCHEDULE)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)

        def step(x: Tensor) -> Tensor:
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        run = compiled(step) if compile_it else step
        for x in batches(STEPS):
            run(x)
        assert sparsifier(model).step_count == STEPS
        assert_zero_outside(model, optimizer, gradients=False)
        return model

    for p, q in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        assert_same_course(p, q, 64)
