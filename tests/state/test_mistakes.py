"""Every mistake raises its own error, says the offending value, and has changed nothing."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, static, unchanged
from torch import nn

from mst_compile import Constant, MixedSparsity, densify, explain, sparsifier, sparsify
from mst_compile.errors import (
    AlreadySparseError,
    BlockSizeError,
    CheckpointError,
    MSTError,
    MSTWarning,
    NotSparseError,
    ScheduleError,
    SelectionError,
    TopologyChangedError,
    WeightError,
)
from mst_compile.state import steps

SPARSE = static(0.7)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of other tests that still live would warn too."""
    monkeypatch.setattr(steps, "_watchers", weakref.WeakSet())


def refuses(error: type[MSTError], model: nn.Module, *words: str, schedule: Any = SPARSE, **options: Any) -> None:
    with unchanged(model), pytest.raises(error) as caught:
        sparsify(model, schedule, **options)
    for word in words:
        assert word in str(caught.value)
    if error is not AlreadySparseError:
        with pytest.raises(NotSparseError):
            sparsifier(model)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, 90, math.nan])
@pytest.mark.parametrize("make", [lambda s: Constant(s), lambda s: MixedSparsity.published(10, s)])
def test_sparsity_out_of_range(make: Callable[[float], Any], sparsity: float) -> None:
    with pytest.raises(ScheduleError, match=repr(sparsity).replace(".", r"\.")):
        make(sparsity)


@pytest.mark.parametrize("schedule", [0.9, "mixed", None, MixedSparsity, object()])
def test_not_a_schedule(schedule: Any) -> None:
    refuses(ScheduleError, Blocks(), "not a schedule", schedule=schedule)


@pytest.mark.parametrize("block", [0, -8, 3, 12, 256, 8.0, "8", True])
def test_block_is_no_power_of_two(block: Any) -> None:
    refuses(BlockSizeError, Blocks(), repr(block), "power of two", block=block)


def test_block_fits_no_layer() -> None:
    refuses(BlockSizeError, Blocks(), "128", "32x64", block=128)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"include": "decoder.*"}, "decoder.*"),
        ({"include": ["layers.0.1", "nothing"]}, "nothing"),
        ({"exclude": "nowhere"}, "nowhere"),
        ({"include": []}, "[]"),
        ({"include": [3]}, "[3]"),
        ({"include": "layers.0.1", "exclude": "layers.*"}, "exclude"),
    ],
)
def test_patterns_that_match_nothing(options: dict[str, Any], word: str) -> None:
    refuses(SelectionError, Blocks(), word, **options)


def test_nothing_to_sparsify() -> None:
    refuses(SelectionError, nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(8)), "no weight")
    refuses(SelectionError, nn.Sequential(nn.Linear(32, 2)), "narrow")
    with pytest.raises(SelectionError, match="dict"):
        sparsify({}, SPARSE)  # type: ignore[arg-type]


def test_sparsify_twice() -> None:
    model = sparsify(Blocks(), SPARSE)
    own = sparsifier(model)
    refuses(AlreadySparseError, model, "densify")
    refuses(AlreadySparseError, nn.Sequential(model, nn.Linear(8, 8)), "part of it")
    refuses(AlreadySparseError, model.layers[0], "densify")
    assert sparsifier(model) is own


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = Blocks()
    refuses(WeightError, model, "layers.0.1.weight", "meta device")
    with pytest.raises(WeightError, match=r"0\.weight is not initialised"):
        sparsify(nn.Sequential(nn.LazyLinear(8)), SPARSE)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = nn.Parameter(torch.zeros(32, 32).to(dtype), requires_grad=False)
    refuses(WeightError, model, "1.weight", str(dtype), include="*")
    assert "frozen" in sparsifier(sparsify(model, SPARSE)).skipped["1.weight"], "left out unless named"


def test_functions_that_need_a_sparse_model() -> None:
    model = Blocks()
    for function in (sparsifier, densify, explain):
        with unchanged(model), pytest.raises(NotSparseError, match="sparsify"):
            function(model)


def test_errors_are_the_builtin_ones_too() -> None:
    for error in (ScheduleError, BlockSizeError, SelectionError, WeightError, CheckpointError):
        assert issubclass(error, MSTError)
        assert issubclass(error, ValueError)
    for error in (AlreadySparseError, NotSparseError, TopologyChangedError):
        assert issubclass(error, MSTError)
        assert issubclass(error, RuntimeError)


# -- topology between forward and backward -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_topology_change_between_forward_and_backward(inner: str) -> None:
    model = sparsify(Blocks(), Constant(0.7, interval=1, growth="random"), auto_step=False)
    fast = compiled(model, inner)
    loss = fast(torch.randn(4, 32)).sum()
    sparsifier(model).step()
    with pytest.raises(TopologyChangedError, match=r"layers\.\d\.\d\.weight"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    fast(torch.randn(4, 32)).sum().backward()


def test_no_error_when_the_topology_rested() -> None:
    model = sparsify(Blocks(), Constant(0.7, interval=2, growth="random"), auto_step=False)
    loss = compiled(model)(torch.randn(4, 32)).sum()
    sparsifier(model).step()  # step 1 is no event
    loss.backward()


# -- checkpoints -------------------------------------------------------------------------------------------------------


def other_states() -> dict[str, Any]:
    good = sparsifier(sparsify(Blocks(), SPARSE)).state_dict()
    names = list(good["masks"])
    return {
        "missing": {**good, "masks": {n: good["masks"][n] for n in names[1:]}},
        "unexpected": {**good, "masks": {**good["masks"], "more": good["masks"][names[0]]}},
        "other blocks": sparsifier(sparsify(Blocks(), SPARSE, block=4)).state_dict()
        if sparsifier(sparsify(Blocks(), SPARSE)).weights[names[0]].grid.block != 4
        else sparsifier(sparsify(Blocks(), SPARSE, block=1)).state_dict(),
        "other dtype": {**good, "masks": {n: m.int() for n, m in good["masks"].items()}},
        "other version": {**good, "version": 99},
        "no state": {},
        "no dict": [1, 2],
    }


@pytest.mark.parametrize("which", list(other_states()))
def test_checkpoints_that_do_not_fit(which: str) -> None:
    model = sparsify(Blocks(), SPARSE, seed=3)
    own = sparsifier(model)
    masks, step, seed = own.masks, own.step_count, own.seed
    state = other_states()[which]
    with unchanged(model), pytest.raises(CheckpointError):
        own.load_state_dict(state)
    assert all(torch.equal(masks[n], m) for n, m in own.masks.items())
    assert (own.step_count, own.seed) == (step, seed)


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_never_steps_a_sparse_weight_warns_once() -> None:
    model = sparsify(Blocks(), SPARSE)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.dim() == 1], 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            model(torch.randn(2, 32)).sum().backward()
            optimizer.step()
    found = [w for w in caught if issubclass(w.category, MSTWarning)]
    assert len(found) == 1
    assert "SGD" in str(found[0].message)
    assert sparsifier(model).step_count == 0


def test_other_optimizers_do_not_warn() -> None:
    model, other = sparsify(Blocks(), SPARSE), nn.Linear(4, 4)
    optimizer, foreign = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)  # it is trained in eager mode
        for _ in range(30):
            (model(torch.randn(2, 32)).sum() + other(torch.randn(2, 4)).sum()).backward()
            foreign.step()
            optimizer.step()
    assert sparsifier(model).step_count == 30


def test_gradients_that_are_not_finite_skip_the_event() -> None:
    model = sparsify(Blocks(), Constant(0.7, interval=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    masks = sparsifier(model).masks
    (model(torch.randn(2, 32)).sum() * math.nan).backward()
    with pytest.warns(MSTWarning, match=r"step 1 skipped.*not finite"):
        optimizer.step()
    own = sparsifier(model)
    assert own.step_count == 1
    assert all(torch.equal(masks[n], m) for n, m in own.masks.items())
