"""What other training code does to a sparse model, situation by situation; any order of it is in
test_state_machine.py."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled
from mask_cases import element_masks
from oracles import assert_reordered
from situations import X, same, start, train
from torch import Tensor, nn
from training import assert_zero_outside, batches, loss_of

from mst_compile import Constant, MSTWarning, explain, sparsifier, sparsify
from mst_compile.errors import MSTError
from mst_compile.schedule import Mixed

# -- whoever writes a weight -------------------------------------------------------------------------------------------


def _copy(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)


def _data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(0.01)


def _other_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.detach() + 0.01


def _vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector + 0.01, model.parameters())


def _reset(model: nn.Module) -> None:
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)  # type: ignore[operator]


@pytest.mark.parametrize("write", [_copy, _data, _other_data, _vector, _reset])
def test_a_written_weight_is_noticed(write: Callable[[nn.Module], None]) -> None:
    model, run, optimizer = start()
    train(run, optimizer, 3)
    masks = sparsifier(model).masks
    write(model)
    with pytest.warns(MSTWarning, match=r"outside the active blocks of layers\.0\.1\.weight, .*dense products"):
        same(model, run)
    assert all(row.kernel == "dense" and "outside the active blocks" in row.status for row in explain(model))
    with pytest.warns(MSTWarning, match=r"are set to 0 now that an optimizer steps: \d+\.\d\d% of its squared"):
        train(run, optimizer)
    assert_zero_outside(model, optimizer, gradients=False)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier(model).masks.items())
    same(model, run)
    assert all(row.kernel == "block-sparse" for row in explain(model))


def test_other_values_at_the_same_address() -> None:
    """Data that is replaced twice may stand where the first has been freed."""
    model, run, optimizer = start()
    train(run, optimizer, 3)
    parameter = model.layers[0][1].weight
    memory = bytearray(parameter.detach().numpy().tobytes())

    def put() -> None:
        parameter.data = torch.frombuffer(memory, dtype=torch.float32).view_as(parameter)

    put()
    loss_of(run, X)  # where recording begins or ends values are looked at anyway
    address, version = parameter.data_ptr(), parameter._version
    parameter.data = torch.zeros_like(parameter)
    memory[:] = torch.full_like(parameter, 0.1).detach().numpy().tobytes()
    put()
    assert (parameter.data_ptr(), parameter._version) == (address, version)
    with pytest.warns(MSTWarning, match="outside the active blocks"):
        assert_reordered(run(X).detach(), model(X).detach(), 512)
    with pytest.warns(MSTWarning, match="are set to 0 now that an optimizer steps"):
        train(run, optimizer)
    assert_zero_outside(model, optimizer, gradients=False)


def test_averages_are_swapped_in_and_out_again() -> None:
    model, run, optimizer = start("random", interval=2)
    shadow = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        train(run, optimizer, 3)
        for s, p in zip(shadow, model.parameters(), strict=True):
            s.lerp_(p.detach(), 0.5)
    with torch.no_grad():
        for _ in range(3):  # beyond the first calls, at which values are looked at in any case
            run(X)
    train(run, optimizer)
    kept = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MSTWarning)
        for values in (shadow, kept):
            for p, value in zip(model.parameters(), values, strict=True):
                p.data.copy_(value)
            with torch.no_grad():
                assert_reordered(run(X), model(X), 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost: the weights are back
        train(run, optimizer)


# -- copies and checkpoints --------------------------------------------------------------------------------------------


def test_copies_have_the_values_that_they_were_given() -> None:
    model, run, optimizer = start("random", interval=2)
    train(run, optimizer, 2)
    target, average = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    fast_target, fast_average = compiled(target), compiled(average)
    same(target, fast_target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MSTWarning)
        for _ in range(3):
            train(run, optimizer, 2)
            average.update_parameters(model)
            with torch.no_grad():
                for a, b in zip(target.parameters(), model.parameters(), strict=True):
                    a.copy_(b)
            same(target, fast_target)
            same(average, fast_average)


def test_masks_follow_values_that_come_without_them() -> None:
    """A best checkpoint with other masks of the same density."""
    model, run, optimizer = start("random", interval=2)
    train(run, optimizer, 2)
    best = {k: v.clone() for k, v in model.state_dict().items()}
    masks = sparsifier(model).masks
    train(run, optimizer, 8)
    assert any(not torch.equal(mask, masks[name]) for name, mask in sparsifier(model).masks.items())
    model.load_state_dict(best)
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MSTWarning)
        same(model, run)
        loss_of(run, X).backward()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for name, mask in element_masks(model).items():
        value = model.state_dict()[name]
        assert not value[~mask].any()
        assert torch.equal(value, best[name]), "nothing was cut"


def test_masks_do_not_follow_what_is_written_after_values_that_fit() -> None:
    """A checkpoint of the very masks, and then noise on all weights: it is cut, and the masks stay."""
    model, run, optimizer = start()
    masks = sparsifier(model).masks
    model.load_state_dict(model.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    _copy(model)
    with pytest.warns(MSTWarning, match="outside the active blocks"):
        train(run, optimizer)
    assert all(torch.equal(mask, masks[name]) for name, mask in sparsifier(model).masks.items())


def test_a_written_weight_that_is_frozen_with_its_gradient() -> None:
    """The optimizer still steps it, by a gradient that is 0: what was written stays, and compiled calls see it. None of
    it stays in the optimizer's state when the weight is trained again."""
    model, run, _ = start()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    train(run, optimizer)
    name, mask = next(iter(element_masks(model).items()))
    loss_of(run, X).backward()
    optimizer.zero_grad(set_to_none=False)
    weight = model.get_parameter(name).requires_grad_(False)
    _copy(model)
    for _ in range(3):  # a new graph's first two calls look at the values
        loss_of(run, X).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert weight.detach()[~mask].any()
    assert_reordered(run(X).detach(), model(X).detach(), 512)
    weight.requires_grad_(True)
    train(run, optimizer)
    assert_zero_outside(model, optimizer)


def test_a_dense_checkpoint_is_cut_when_it_is_trained_and_not_before() -> None:
    dense = Blocks()
    model, run, optimizer = start()
    active = {name: int(mask.sum()) for name, mask in sparsifier(model).masks.items()}
    model.load_state_dict(dense.state_dict())
    assert_reordered(model(X), dense(X), 1)
    with pytest.warns(MSTWarning, match="outside the active blocks"):
        same(model, run)
    loss_of(run, X).backward()
    with pytest.warns(MSTWarning, match=r"are set to 0 now that an optimizer steps: [1-9]\d\.\d\d%"):
        optimizer.step()
    assert_zero_outside(model, optimizer, gradients=False)
    for name, mask in sparsifier(model).masks.items():
        assert int(mask.sum()) == active[name]
        assert bool(mask.any(0).all())
        assert bool(mask.any(1).all())
    same(model, run)


def test_an_optimizer_loaded_before_sparsify() -> None:
    model, run, optimizer = start("random", interval=2)
    train(run, optimizer, 5)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    weights, state = torch.load(io.BytesIO(buffer.getvalue()))
    again = Blocks()
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    other.load_state_dict(state)
    sparsify(again, Constant(0.7, interval=2, growth="random"))
    again.load_state_dict(weights)
    for m, o in ((model, optimizer), (again, other)):
        train(m, o, 3)
    assert sparsifier(again).step_count == sparsifier(model).step_count == 8
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# -- gradients from anywhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["autograd.grad", "torch.func", "noise", "noise in a hook", "left over"])
@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_gradients_from_anywhere(how: str, make: Any) -> None:
    model, _, _ = start()
    optimizer = make(model.parameters(), 1e-2, **({"momentum": 0.9} if make is torch.optim.SGD else {}))
    parameters = dict(model.named_parameters())
    if how == "autograd.grad":
        found = torch.autograd.grad(loss_of(model, X), list(parameters.values()))
    elif how == "torch.func":
        values = {n: p.detach() for n, p in parameters.items()}
        call = torch.func.grad(lambda v: loss_of(lambda x: torch.func.functional_call(model, v, x), X))
        found = tuple(call(values).values())
    else:
        loss_of(model, X).backward()
        found = tuple(p.grad + (0.1 if how == "noise" else 0.0) for p in parameters.values())  # type: ignore[operator]
    for p, g in zip(parameters.values(), found, strict=True):
        p.grad = g
    if how == "noise in a hook":
        optimizer.register_step_pre_hook(lambda *_: [p.grad.add_(1.0) for p in parameters.values()] and None)
    if how == "left over":
        for name, mask in sparsifier(model).masks.items():
            sparsifier(model).apply_mask(name, mask.roll(1, 0))
    optimizer.step()
    assert_zero_outside(model, optimizer, gradients=False)


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X, factors: Iterable[float] = ()
) -> Callable[[], Tensor]:
    """A closure as PyTorch documents it; ``factors`` of its losses, call by call."""
    todo = list(factors)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (todo.pop(0) if todo else 1.0) * loss_of(model, x)
        loss.backward()
        return loss

    return closure


def trained_with(closed: bool, rule: Any) -> nn.Module:
    torch.manual_seed(0)
    model = sparsify(Blocks(), Constant(0.7, interval=4, growth=rule))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for x in batches(18):
        closure = closure_of(model, optimizer, x)
        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert_zero_outside(model, optimizer, gradients=False)
    return model


@pytest.mark.parametrize("rule", ["random", "gradient", "mixed", "none", Mixed(gradient_steps=3)], ids=str)
def test_a_closure_changes_nothing(rule: Any) -> None:
    """The same masks, weights, state and counts as the plain loop, bit for bit."""
    plain, closed = trained_with(False, rule), trained_with(True, rule)
    assert sparsifier(plain).step_count == sparsifier(closed).step_count == 18
    for name, mask in sparsifier(plain).masks.items():
        assert torch.equal(mask, sparsifier(closed).masks[name])
    for a, b in zip(plain.parameters(), closed.parameters(), strict=True):
        assert torch.equal(a, b)


class Twice(torch.optim.SGD):
    """Evaluates twice and uses the second gradients."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
            closure()
        return super().step()


def test_growth_reads_the_last_gradients_of_a_closure() -> None:
    scores = []
    for make, factors in ((torch.optim.SGD, ()), (Twice, (7.0, 1.0))):
        torch.manual_seed(0)
        model = sparsify(Blocks(), Constant(0.7, interval=4, growth=Mixed(gradient_steps=2)))
        optimizer = make(model.parameters(), 1e-2)
        for _ in range(2):
            optimizer.step(closure_of(model, optimizer))
        optimizer.step(closure_of(model, optimizer, factors=factors))
        scores.append([w.scores for w in sparsifier(model).weights.values()])
    for a, b in zip(*scores, strict=True):
        assert a is not None
        assert torch.equal(a, b)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412): weights are moved, and put back through ``.data``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.base = torch.optim.AdamW(self.param_groups, 1e-2)
        self.param_groups = self.base.param_groups
        self.before: list[Tensor] = []

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def first_step(self) -> None:
        self.before = [p.detach().clone() for p in self.parameters()]
        for p in self.parameters():
            p.add_(p.grad, alpha=0.05)  # type: ignore[arg-type]
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, before in zip(self.parameters(), self.before, strict=True):
            p.data = before
        self.base.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("closed", [False, True])
def test_an_optimizer_in_two_calls(closed: bool) -> None:
    model, run, _ = start("gradient", interval=3)
    optimizer = Sam(model.parameters())
    with warnings.catch_warnings():
        # On the step before an event gradients are dense, and so is what moves the weights for a moment.
        warnings.filterwarnings("ignore", "values stand outside", MSTWarning)
        for _ in range(10):
            loss_of(run, X).backward()
            if closed:
                optimizer.step(lambda: loss_of(run, X).backward())
            else:
                optimizer.first_step()
                loss_of(run, X).backward()
                optimizer.second_step()
            assert_zero_outside(model, optimizer.base, gradients=False)
    assert sparsifier(model).step_count == 10
    assert all(weight.changes > 3 for weight in sparsifier(model).weights.values())
    same(model, run)


# -- steps that fail, models that have nothing to do with each other ---------------------------------------------------


def test_a_parametrized_weight_breaks_nobody() -> None:
    model, _, optimizer = start()
    nn.utils.parametrize.register_parametrization(model.layers[0][1], "weight", nn.Identity())
    plain = nn.Linear(4, 4)
    other = torch.optim.SGD(plain.parameters(), 0.1)
    plain(torch.ones(4)).sum().backward()
    other.step()
    train(model, optimizer, 6)
    assert sparsifier(model).step_count == 6
    gone, _, trains = start()
    del gone.layers[0][1].weight
    other.step()
    with pytest.raises(MSTError, match="gone from its Linear"):
        trains.step()
    other.step()


def test_an_event_that_was_missed_is_made_up_for() -> None:
    """Two optimizers of which one stops: what the clock notices too late still happens."""
    model = sparsify(Blocks(), Constant(0.7, interval=2, growth="random"))
    first = torch.optim.SGD(model.layers[0].parameters(), 0.1)
    for _ in range(6):
        loss_of(model, X).backward()
        first.step()
        model.zero_grad()
    own = sparsifier(model)
    assert own.step_count in (5, 6)
    assert sum(w.changes for w in own.weights.values()) > 2 * len(own.weights)


def test_nothing_waits_for_ever() -> None:
    """Values and state that were loaded are held by model and optimizer alone."""
    model, run, optimizer = start()
    train(run, optimizer)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    references = [weakref.ref(v) for v in state.values()]
    model.load_state_dict(state)
    del state
    gc.collect()
    assert all(reference() is None for reference in references)
