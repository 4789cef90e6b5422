"""Values that a program writes outside the masks, with a trace in the version of the tensor and without: whoever writes
them and whenever, an optimizer's step ends it, and says so."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks
from situations import X, train
from torch import Tensor, nn
from training import assert_zero_outside, batches, loss_of

from mst_compile import Constant, MSTWarning, export, sparsifier, sparsify
from mst_compile.state import lookout

Write = Callable[[nn.Module], None]
OUTSIDE = "outside the active blocks of"


def steps_to_see(model: nn.Module) -> int:
    """Steps within which every row is looked at once."""
    return sum(lookout._steps_of(weight.grid) for weight in sparsifier(model)._run.weights)


def model_of(growth: str = "none", interval: int = 10**6, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(Blocks(), Constant(0.7, interval=interval, growth=growth, **options))  # type: ignore[arg-type]


def weights_of(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.dim() == 2)


# -- who writes --------------------------------------------------------------------------------------------------------


def _load(model: nn.Module) -> None:
    model.load_state_dict({n: torch.ones_like(p) for n, p in model.named_parameters() if p.dim() == 2}, strict=False)


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in weights_of(model):
            p.add_(0.1)


def _foreach(model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_add_(list(weights_of(model)), 0.1)


def _init(model: nn.Module) -> None:
    for p in weights_of(model):
        nn.init.normal_(p)


def _data_init(model: nn.Module) -> None:
    """As the models of transformers begin."""
    for p in weights_of(model):
        p.data.normal_()


def _data_copy(model: nn.Module) -> None:
    for p in weights_of(model):
        p.data.copy_(torch.ones_like(p))


def _data_foreach(model: nn.Module) -> None:
    torch._foreach_add_([p.data for p in weights_of(model)], 0.1)


def _numpy(model: nn.Module) -> None:
    for p in weights_of(model):
        p.detach().numpy()[:] += 0.1


def _average(model: nn.Module) -> None:
    average = torch.optim.swa_utils.AveragedModel(model)
    for p in average.parameters():
        p.data.add_(0.1)
    for p, other in zip(model.parameters(), average.parameters(), strict=True):
        p.data.copy_(other.data)


def _one_row(model: nn.Module) -> None:
    list(weights_of(model))[-1].data[-1].fill_(0.1)


WRITES = [_load, _in_place, _foreach, _init, _data_init, _data_copy, _data_foreach, _numpy, _average, _one_row]


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_before_the_first_step(write: Write) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    write(model)
    with pytest.warns(MSTWarning, match="are set to 0 now that an optimizer steps"):
        train(model, optimizer)
    assert_zero_outside(model, optimizer, gradients=False)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("moment", ["between steps", "between forward and backward", "before the step"])
def test_what_is_written_in_mid_run(write: Write, moment: str) -> None:
    """What leaves a trace is seen at once, what leaves none when its rows are looked at: here there are few."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    if moment == "between steps":
        write(model)
    loss = loss_of(model, X)
    if moment == "between forward and backward":
        write(model)
    try:
        loss.backward()
    except RuntimeError:  # PyTorch's word on what has a trace
        loss_of(model, X).backward()
    if moment == "before the step":
        write(model)
    with pytest.warns(MSTWarning, match="are set to 0 now that an optimizer steps"):  # noqa: PT031
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, steps_to_see(model))
    assert_zero_outside(model, optimizer, gradients=False)


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_before_an_event(write: Write) -> None:
    model = model_of("random", interval=4)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    loss_of(model, next(batches(1))).backward()
    handle = optimizer.register_step_post_hook(lambda *_: write(model))
    # Our own hook on steps comes first: the writer's stands before the next.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MSTWarning)
        optimizer.step()
        handle.remove()
        train(model, optimizer, 4)
    assert_zero_outside(model, optimizer, gradients=False)


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_before_saving_and_export(write: Write) -> None:
    """Nothing is cut: both hold what the model computes with."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    write(model)
    x = next(batches(1))
    expected = model(x).detach()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = Blocks()
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(x), expected)
    assert torch.equal(export.plain(model)(x), expected)
    dense = {name: value.to_dense() for name, value in export.to_bsr(model).items()}
    assert dense
    for name, value in dense.items():
        assert torch.equal(value, model.get_parameter(name))


# -- what grows where something was written ----------------------------------------------------------------------------


@pytest.mark.parametrize("regrown", ["first estimate", "own steps"])
def test_blocks_grow_without_a_past_in_the_optimizer(regrown: str) -> None:
    """Its state was written where nobody would look and no weight shows it, as by who blends two of them."""
    model = model_of("random", interval=4, regrown=regrown)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    loss_of(model, next(batches(1))).backward()
    before = element_masks(model)
    for p in weights_of(model):
        second = optimizer.state[p]["exp_avg_sq"]
        second.copy_(torch.where(second == 0, 7.0, second))
    optimizer.step()
    for name, mask in element_masks(model).items():
        grown = mask & ~before[name]
        assert grown.any(), name
        p = model.get_parameter(name)
        assert not p.detach()[grown].any()
        for value in optimizer.state[p].values():
            assert value.shape != p.shape or not value[grown].any()


@pytest.mark.parametrize("write", [_in_place, _data_copy])
def test_a_given_mask_keeps_what_was_written_and_says_so(write: Write) -> None:
    model = model_of()
    train(model, torch.optim.AdamW(model.parameters(), 1e-2))
    name, mask = next(iter(sparsifier(model).masks.items()))
    write(model)
    before = model.get_parameter(name).detach().clone()
    with pytest.warns(MSTWarning, match=rf"{name} now has in its mask .* do not start at 0"):
        sparsifier(model).apply_mask(name, torch.ones_like(mask))
    assert torch.equal(model.get_parameter(name), before)


def test_a_given_mask_after_loading_is_no_reason_to_warn() -> None:
    model = model_of()
    train(model, torch.optim.AdamW(model.parameters(), 1e-2))
    name, mask = next(iter(sparsifier(model).masks.items()))
    _load(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier(model).apply_mask(name, torch.ones_like(mask))
    assert bool((model.get_parameter(name) == 1).all())


def test_a_mask_that_drops_little_cuts_what_nobody_saw() -> None:
    model = model_of()
    name, mask = next(iter(sparsifier(model).masks.items()))
    _data_copy(model)
    r, c = mask.nonzero()[0].tolist()
    mask[r, c] = False
    sparsifier(model).apply_mask(name, mask)
    assert not model.get_parameter(name).detach()[~element_masks(model)[name]].any()


# -- gradients ---------------------------------------------------------------------------------------------------------


def _noise(model: nn.Module) -> None:
    for p in weights_of(model):
        p.grad.data.add_(1.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_gradient_that_is_written_without_a_trace(passes: int) -> None:
    """Weights move outside of their masks, which the next look finds; of the optimizer's state nothing stays that would
    move them again, and who does it again is looked at at every step."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    with pytest.warns(MSTWarning, match="without a trace"):  # noqa: PT031
        for step, x in enumerate(batches(8)):
            for _ in range(passes):
                loss_of(model, x).backward()
                _noise(model)
            optimizer.step()
            optimizer.zero_grad()
            if step > 3:
                assert_zero_outside(model, optimizer, gradients=False)


def test_momentum_that_is_left_over_moves_nothing() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
    train(model, optimizer, 3)
    loss_of(model, next(batches(1))).backward()
    _noise(model)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.warns(MSTWarning, match=OUTSIDE):
        train(model, optimizer, 2)
    assert_zero_outside(model, optimizer, gradients=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)
    assert_zero_outside(model, optimizer, gradients=False)


def test_every_row_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few at each step."""
    monkeypatch.setattr(lookout, "_ELEMENTS", 100)
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 2)
    needed = steps_to_see(model)
    assert needed > 8
    for name, mask in element_masks(model).items():
        for row in range(0, len(mask), 19):
            where = (~mask[row]).nonzero()
            if not len(where):
                continue
            p: Tensor = model.get_parameter(name)
            p.data[row, where[0]] = 1.0
            with pytest.warns(MSTWarning, match=f"{OUTSIDE} {name}"):
                train(model, optimizer, needed)
            assert not p.detach()[~mask].any()
