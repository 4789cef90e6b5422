"""A sparse model in the files of Hugging Face's ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mst_compile import Constant, explain, sparsify


def test_a_sparse_model_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    """Also while it is compiled in place: the file has the plain model's keys and the zeros."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    model = sparsify(GPT2LMHeadModel(config).eval(), Constant(0.8, growth="none"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.compile(backend="mst", options={"mst.inner": "eager"})
    ids = torch.arange(16)[None]
    with torch.no_grad():
        model(ids)
    assert any(row.status.startswith("matched") for row in explain(model))
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    after = dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert 0.7 < float((after["transformer.h.0.mlp.c_fc.weight"] == 0).double().mean()) < 0.9
