"""Models that torch.multiprocessing hands to other processes: pickled, their Parameters in memory that both share."""

from __future__ import annotations

import copy
import warnings
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from helpers import Blocks, compiled
from mask_cases import element_masks
from torch import nn

from mst_compile import Constant, MSTWarning, sparsifier, sparsify

SCHEDULE = Constant(0.7, interval=2)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def handed_over(model: nn.Module) -> nn.Module:
    """As the function of a spawned process gets it."""
    return ForkingPickler.loads(bytes(ForkingPickler.dumps(model)))


@pytest.mark.parametrize("through", ["the model", "its compiled wrapper"])
def test_a_model_that_is_handed_over_is_sparse(through: str) -> None:
    model = sparsify(Blocks(), SCHEDULE)
    train(model)
    other = handed_over(model if through == "the model" else compiled(model))
    assert repr(sparsifier(other)) == repr(sparsifier(model))
    assert all(p.is_shared() for p in other.parameters())
    x = torch.randn(4, 32)
    plain = getattr(other, "_orig_mod", other)
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))
        torch.testing.assert_close(compiled(plain)(x), model(x))


def test_who_trains_shared_weights_is_told_what_that_means() -> None:
    """Once; and who trains a copy of his own, or trained before the model was handed over, is not."""
    model = sparsify(Blocks(), SCHEDULE)
    with warnings.catch_warnings(action="error", category=MSTWarning):
        train(model)
        other = handed_over(model)
        train(copy.deepcopy(other))
        train(model)
    with pytest.warns(MSTWarning, match=r"processes share.*one process alone may train.*copy\.deepcopy") as told:
        train(other)
    assert len([w for w in told if "processes share" in str(w.message)]) == 1
    for name, mask in element_masks(other).items():
        assert not other.get_parameter(name).detach()[~mask].any()


def test_who_evaluates_sees_the_weights_and_masks_of_who_trains() -> None:
    model = sparsify(Blocks(), SCHEDULE)
    other = handed_over(model)
    options = {"mst.inner": "aot_eager", "mst.dense_threshold": 1.0}
    fast, x = torch.compile(other, backend="mst", options=options), torch.randn(4, 32)
    with torch.no_grad():
        fast(x)
    before = {name: weight.mask.clone() for name, weight in sparsifier(model).weights.items()}
    for _ in range(2):
        train(model, 4)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x))
    assert any(not weight.mask.equal(before[name]) for name, weight in sparsifier(model).weights.items())
