"""Mixtures of experts of transformers, whose experts are stacks of matrices, compiled and trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEBUG, element_masks, loss_and_grads, static, statuses
from oracles import assert_as_good_as
from torch import nn

import mst_compile

transformers = pytest.importorskip("transformers")
F32, BF16 = torch.float32, torch.bfloat16
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16, **SIZES
    ),
}


def build(kind: str, experts: str = "grouped_mm") -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config._experts_implementation = experts
    return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


def words() -> torch.Tensor:
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "dtype"), [("mixtral", F32), ("qwen3_moe", BF16)])
def test_experts_become_sparse(kind: str, dtype: torch.dtype) -> None:
    """Both products of all experts, in the form that transformers chooses for the dtype; as right as in eager mode.

    The graph runs as it is traced: a router that is rounded otherwise, as Inductor does it, may choose others."""
    model = mst_compile.sparsify(build(kind).to(dtype), static(), block=8)
    ids = words()
    args = {"input_ids": ids, "labels": ids, "use_cache": False}
    run = torch.compile(model, backend="mst", options=DEBUG)
    eager, actual = (loss_and_grads(model, function, (), args) for function in (model, run))
    wide = build(kind).to(dtype)
    wide.load_state_dict(model.state_dict())
    wide = wide.float() if dtype == BF16 else wide.double()
    for layer in wide.modules():  # PyTorch's grouped product knows no float64
        if hasattr(layer, "config"):
            layer.config._experts_implementation = "eager"
    truth = loss_and_grads(wide, wide, (), args)
    for name, mask in element_masks(model).items():
        truth[f"grad {name}"] *= mask.view(truth[f"grad {name}"].shape)
        assert not actual[f"grad {name}"][~mask.view(truth[f"grad {name}"].shape)].any(), name
    for name, exact in truth.items():
        assert_as_good_as(actual[name], eager[name], exact.double(), dtype, name)
    experts = {name: status for name, status in statuses(model).items() if ".experts." in name}
    assert len(experts) == 2
    assert all(status.startswith("matched (1 use") for status in experts.values()), experts


def test_experts_are_trained_in_one_graph() -> None:
    """Tokens go elsewhere at every step, and masks change: no graph is compiled anew, and the loss falls."""
    torch._dynamo.utils.counters.clear()
    model = mst_compile.sparsify(
        build("mixtral"), mst_compile.MixedSparsity(20, sparsity=0.7, interval=3, growth="mixed"), block=8
    )
    run = torch.compile(model, backend="mst", options=DEBUG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, losses = words(), []
    for _ in range(12):
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        for name, mask in element_masks(model).items():
            weight = model.get_parameter(name)
            assert not weight[~mask.view(weight.shape)].any(), name
    assert losses[-1] < losses[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    weights = mst_compile.sparsifier(model).weights
    assert any(weight.changes > 2 for name, weight in weights.items() if ".experts." in name)


def test_experts_that_are_copied_for_every_token_are_read_where_they_lie() -> None:
    model = mst_compile.sparsify(build("mixtral", "batched_mm"), static(), block=8)
    ids = words()
    args = {"input_ids": ids, "labels": ids, "use_cache": False}
    run = torch.compile(model, backend="mst", options=DEBUG)
    eager, actual = (loss_and_grads(model, function, (), args) for function in (model, run))
    wide = build("mixtral", "batched_mm")
    wide.load_state_dict(model.state_dict())
    truth = loss_and_grads(wide.double(), wide, (), args)
    for name, mask in element_masks(model).items():
        truth[f"grad {name}"] *= mask.view(truth[f"grad {name}"].shape)
    for name, exact in truth.items():
        assert_as_good_as(actual[name], eager[name], exact, F32, name)
    experts = {name: status for name, status in statuses(model).items() if ".experts." in name}
    assert len(experts) == 2
    assert all(status.startswith("matched (1 use") for status in experts.values()), experts
