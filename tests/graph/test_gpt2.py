"""The model this is for: a Hugging Face GPT-2 with a tied head."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import check_model, loss_and_grads, statuses
from mask_cases import element_masks
from torch import nn
from torch._dynamo.utils import counters
from training import assert_zero_outside
from transformers import GPT2Config, GPT2LMHeadModel

from mst_compile import MixedSparsity, explain, sparsifier, sparsify

VOCABULARY = 101  # no multiple of any block


def build(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=48, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 16))


@functools.cache
def graphs_without_sparsity(layers: int) -> int:
    """How many graphs Dynamo makes of the plain model."""
    ids = torch.randint(0, VOCABULARY, (3, 16))
    torch.compile(build(layers), backend="eager")(ids, labels=ids)
    count = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    return count


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_eager_equals_compiled(inner: str, precision: torch.dtype, ids: torch.Tensor) -> None:
    contexts: dict[torch.dtype, Callable[[], contextlib.AbstractContextManager[Any]]] = {
        torch.float32: contextlib.nullcontext,
        torch.bfloat16: lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    depth = 1 if inner == "inductor" else 2
    usual = graphs_without_sparsity(depth)
    model = check_model(
        functools.partial(build, depth), ids, inner=inner, precision=precision, context=contexts[precision],
        forward_options={"labels": ids},
    )  # fmt: skip
    assert counters["stats"]["unique_graphs"] == usual, "sparse weights add no graph break"
    matched = {row.name for row in explain(model) if row.status.startswith("matched (1 use)")}
    layers = {
        f"transformer.h.{i}.{name}.weight"
        for i in range(depth)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert matched == layers | {"transformer.wte.weight"}
    assert set(sparsifier(model).weights) == matched
    assert "tied" in statuses(model)["transformer.wte.weight"]
    assert {row.kernel for row in explain(model)} == {"block-sparse"}
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


def test_a_short_schedule(ids: torch.Tensor) -> None:
    """Sparse, then dense again, learning all the while; the result is a plain checkpoint."""
    model = sparsify(build(), MixedSparsity.published(16, 0.8, warmup=3, restoration=3, settle=3, interval=2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    fast = torch.compile(model, backend="mst", options={"mst.inner": "aot_eager"})
    losses = []
    for _ in range(16):
        loss = fast(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        assert_zero_outside(model, optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(bool(m.all()) for m in element_masks(model).values())
    plain = build()
    plain.load_state_dict(model.state_dict())
    for name, value in loss_and_grads(plain, plain, (ids,), {"labels": ids}).items():
        torch.testing.assert_close(value, loss_and_grads(model, model, (ids,), {"labels": ids})[name])
