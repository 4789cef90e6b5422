"""A small sparse GPT-2 that writes text, and what it writes in eager mode."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from helpers import static
from oracles import assert_as_good_as
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import mst_compile


class Generation(NamedTuple):
    """A model, the prompt and options for ``generate``, and what came of them in float32 and in float64."""

    model: Any
    ids: Tensor
    options: dict[str, Any]
    want: Any
    exact: Any

    def check(self, got: Any) -> None:
        """The same text, by logits as near to float64."""
        assert torch.equal(got.sequences, self.want.sequences)
        for logits, usual, right in zip(got.logits, self.want.logits, self.exact.logits, strict=True):
            assert_as_good_as(logits, usual, right, torch.float32)


def generation(cache: str) -> Generation:
    """With a KV cache that is ``"static"`` or ``"dynamic"``."""
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
    return Generation(model, ids, options, want, exact)
