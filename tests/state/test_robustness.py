"""What training loops do to a model: replace, freeze, copy, reload and skip, each with a test that it survives."""

from __future__ import annotations

import copy
import gc
import io
import math
import weakref
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, static
from mask_cases import element_masks
from torch import nn

from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.errors import CheckpointError, ScheduleError
from mst_compile.state.binding import of


def round_trip(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, round_trip])
def test_a_model_that_holds_a_sparse_weight_itself(how) -> None:
    model = sparsify(nn.Linear(32, 64), static())
    twin = how(model)
    assert sparsifier(twin) is not sparsifier(model)
    assert torch.equal(sparsifier(twin).masks["weight"], sparsifier(model).masks["weight"])
    assert next(sparsifier(twin).parameters())[1] is twin.weight


@pytest.mark.parametrize("how", [copy.deepcopy, round_trip])
def test_a_copy_of_a_module_out_of_its_model_is_dense(how) -> None:
    model = sparsify(Blocks(), static())
    part = how(model.layers[0])
    part.load_state_dict(model.layers[0].state_dict())  # tells the owners of sparse weights, which the copy has none of
    assert torch.equal(part[1].weight, model.layers[0][1].weight)
    compiled(model.layers[0])(torch.randn(64, 32)).sum().backward()  # a graph that they may share
    for run in (part, compiled(part)):
        part.zero_grad()
        run(torch.randn(64, 32)).square().sum().backward()
        assert bool((part[1].weight.grad != 0).all())
    assert sparsifier(sparsify(part, static(0.5))).density == pytest.approx(0.5, abs=0.05)
    model.load_state_dict(model.state_dict(), assign=True)  # its own modules still tell
    assert all(of(parameter) is weight for weight, parameter in sparsifier(model).parameters())


def test_a_model_is_freed() -> None:
    def use() -> weakref.ref[Any]:
        model = sparsify(Blocks(), static())
        model(torch.randn(2, 32)).sum().backward()
        return weakref.ref(model.layers[0][1].weight)

    reference = use()
    gc.collect()
    assert reference() is None


def test_weights_that_are_unfrozen_later_have_masked_gradients() -> None:
    model = Blocks().requires_grad_(False)
    sparsify(model, static(), include="*")
    model.requires_grad_(True)
    model(torch.randn(4, 32)).square().sum().backward()
    for name, mask in element_masks(model).items():
        assert not dict(model.named_parameters())[name].grad[~mask].any()


def test_nan_is_no_length() -> None:
    with pytest.raises(ScheduleError, match="nan"):
        MixedSparsity.published(10, warmup=math.nan)


@pytest.mark.parametrize("key", ["masks", "step", "seed"])
def test_incomplete_checkpoints(key: str) -> None:
    own = sparsifier(sparsify(Blocks(), static()))
    state = own.state_dict()
    del state[key]
    with pytest.raises(CheckpointError, match=key):
        own.load_state_dict(state)


def test_load_state_dict_assign() -> None:
    model = sparsify(Blocks(), Constant(0.6, interval=2))
    old = list(model.parameters())
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    assert sparsifier(model).step_count == 1
    del old


def test_a_fused_optimizer_that_skips_a_step_is_not_counted() -> None:
    model = sparsify(Blocks(), Constant(0.6, interval=2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.randn(2, 32)).sum() * math.inf).backward()
    scaler.step(optimizer)
    assert sparsifier(model).step_count == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topology_change_between_forward_and_backward_in_eager_mode(dtype: torch.dtype) -> None:
    model = sparsify(Blocks().to(dtype), Constant(0.7, interval=1, growth="random"), auto_step=False)
    loss = model(torch.randn(4, 32, dtype=dtype)).sum()
    sparsifier(model).step()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_dense_checkpoint_in_a_sparse_model() -> None:
    """Eager and compiled mode part ways: eager reads what stands outside the masks."""
    model = sparsify(Blocks(), static())
    model.load_state_dict(Blocks().state_dict())
    x = torch.randn(2, 32)
    torch.testing.assert_close(torch.compile(model, backend="mst", options={"mst.inner": "aot_eager"})(x), model(x))
