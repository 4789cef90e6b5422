"""Text generated with a KV cache by a sparse model, compiled in place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import DEBUG, static
from oracles import assert_as_good_as
from transformers import GPT2Config, GPT2LMHeadModel

import mst_compile


@pytest.mark.parametrize(("cache", "graphs"), [("static", 2), ("dynamic", 3)])
def test_generation_is_that_of_eager_mode(cache: str, graphs: int) -> None:
    """One graph for the prompt, one for a token, and one more for a cache that grows, however long it gets."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=None
    )  # fmt: skip
    model = mst_compile.sparsify(GPT2LMHeadModel(config).eval(), static(0.7), block=8)
    ids = torch.randint(64, (2, 6))
    options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    options |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    options |= {"attention_mask": torch.ones_like(ids), "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(ids, **options)
    exact = copy.deepcopy(model).double().generate(ids, **options)
    assert torch.equal(exact.sequences, want.sequences)
    torch._dynamo.utils.counters.clear()
    model.compile(backend="mst", options=DEBUG)
    got = model.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    for logits, usual, right in zip(got.logits, want.logits, exact.logits, strict=True):
        assert_as_good_as(logits, usual, right, torch.float32)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    rows = [row for row in mst_compile.explain(model) if row.density < 1]
    assert rows
    assert all(row.status.startswith("matched") for row in rows)
