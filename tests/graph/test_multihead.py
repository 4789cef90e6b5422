"""Multi-head attention is one node for Dynamo; written out, it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_backend import (
    Backend,
    T,
    assert_close,
    assert_same_training,
    causal_mask,
    compiled,
)
from attention_models import HEADS, WIDTH, Case
from torch import Tensor, fx, nn

import mst_compile


class Heads(nn.Module):
    """``nn.MultiheadAttention`` with everything that its function may be given."""

    def __init__(self, options: dict[str, Any], module: dict[str, Any]) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, **module)
        self.options = options
        if options.get("attn_mask") is not None:  # a tensor of a dictionary would do as well
            self.register_buffer("mask", options["attn_mask"])

    def forward(self, x: Tensor, y: Tensor, hidden: Tensor | None = None) -> Any:
        other = y if self.options.get("cross") else x
        options = {k: v for k, v in self.options.items() if k not in ("cross", "weights", "padding")}
        if "attn_mask" in options:
            options["attn_mask"] = self.mask
        out, weights = self.heads(x, other, other, key_padding_mask=hidden, **options)
        return (out, weights) if self.options.get("weights") else out


HIDDEN = ~causal_mask()
MULTIHEAD: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "plain": ({"need_weights": False}, {}, 1, 2),
    "batch first": ({"need_weights": False}, {"batch_first": True}, 1, 2),
    "bool mask": ({"need_weights": False, "attn_mask": HIDDEN}, {}, 1, 2),
    "float mask": ({"need_weights": False, "attn_mask": torch.zeros(T, T).masked_fill(HIDDEN, -torch.inf)}, {}, 1, 2),
    "hint": ({"need_weights": False, "attn_mask": HIDDEN, "is_causal": True}, {}, 1, 2),
    "mask of heads": ({"need_weights": False, "attn_mask": HIDDEN.expand(2 * HEADS, T, T)}, {}, 1, 2),
    "padding": ({"need_weights": False, "padding": True}, {}, 1, 2),
    "padding and mask": ({"need_weights": False, "padding": True, "attn_mask": HIDDEN}, {}, 1, 2),
    "weights unused": ({"attn_mask": HIDDEN, "is_causal": True}, {}, 1, 2),
    "no bias": ({"need_weights": False}, {"bias": False}, 1, 2),
    "cross": ({"need_weights": False, "cross": True}, {}, 1, 3),
    "sizes": ({"need_weights": False, "cross": True}, {"kdim": WIDTH, "vdim": WIDTH, "bias": False}, 1, 3),
    "weights used": ({"weights": True}, {}, 0, 0),
    "key bias": ({"need_weights": False}, {"add_bias_kv": True}, 0, 0),
    "zero attention": ({"need_weights": False}, {"add_zero_attn": True}, 0, 0),
}


@pytest.mark.parametrize("name", MULTIHEAD)
def test_multihead_attention_is_written_out(name: str) -> None:
    options, module, expanded, linears = MULTIHEAD[name]
    torch.manual_seed(0)
    model, backend = Heads(options, module), Backend()
    shape = (2, T, WIDTH) if module.get("batch_first") else (T, 2, WIDTH)
    hidden = torch.arange(T)[None] >= torch.tensor([T, T - 3])[:, None] if options.get("padding") else None
    seen = ~hidden.T if hidden is not None else None  # queries at padding have no defined result
    case = Case(name, "", model, (torch.randn(shape), torch.randn(shape), hidden), {}, 0, compare=seen)
    assert_same_training(case, backend)
    assert backend.expanded == expanded
    targets = [n.target for n in backend.nodes()]
    assert targets.count(torch._C._nn.linear) == linears
    assert ("multihead" in {site.form for site in backend.sites}) is (not expanded)
    causal = options.get("attn_mask") is not None
    assert len(backend.operators()) == (causal and expanded), backend.sites


def test_the_packed_projection_becomes_one_sparse_product() -> None:
    """Queries, keys and values are one linear layer on the whole parameter."""
    backend = Backend()
    model = Heads({"need_weights": False}, {})
    compiled(model, backend)(torch.randn(T, 2, WIDTH), torch.randn(T, 2, WIDTH))
    first = next(n for n in backend.nodes() if n.target is torch._C._nn.linear)
    weight = first.args[1]
    assert isinstance(weight, fx.Node)
    assert weight.op == "placeholder"
    assert weight.meta["example_value"].shape == (3 * WIDTH, WIDTH)


@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)])
def test_bool_masks_of_the_function_say_what_to_hide(masks: tuple[bool, bool]) -> None:
    """The module turns them into numbers first; the function takes them as they are."""
    module = nn.MultiheadAttention(WIDTH, HEADS)

    def attend(x: Tensor, hidden: Tensor, keys: Tensor) -> Tensor:
        return nn.functional.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, need_weights=False,
            attn_mask=hidden if masks[0] else None, key_padding_mask=keys if masks[1] else None,
        )[0]  # fmt: skip

    args = torch.randn(T, 2, WIDTH), HIDDEN, torch.arange(T)[None] >= torch.tensor([T, T - 3])[:, None]
    backend = Backend()
    assert_close(compiled(attend, backend)(*args), attend(*args))
    assert backend.expanded == 1


# -- in evaluation, layers that take batches first are one function of PyTorch's own ---------------------------------

PADDED = torch.arange(T)[None] >= torch.tensor([T, T - 3])[:, None]
MASKS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "no mask": (None, None),
    "keys": (None, PADDED),
    "causal": (HIDDEN, None),
    "both": (HIDDEN, PADDED),
    "a query sees nothing": (None, torch.tensor([[False] * T, [True] * T])),
}
LAYERS: dict[str, dict[str, Any]] = {
    "norms after": {"activation": "relu"},
    "norms before": {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-2},
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("masks", MASKS)
def test_a_layer_in_evaluation_is_written_out(masks: str, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **LAYERS[kind]).eval()
    for parameter in model.parameters():  # norms and biases that do nothing would show nothing
        nn.init.normal_(parameter, std=0.3)
    mst_compile.sparsify(model, mst_compile.Constant(0.7, growth="none"), block=4)
    x, (mask, padding) = torch.randn(2, T, WIDTH), MASKS[masks]
    torch._dynamo.reset()
    fast = torch.compile(model, backend="mst", options={"mst.inner": "eager", "mst.dense_threshold": 1})
    with torch.no_grad():
        got, want = fast(x, mask, padding), model(x, mask, padding)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any() == (masks == "a query sees nothing")
    assert_close(got.nan_to_num(), want.nan_to_num(), 4 * WIDTH)
    rows = list(mst_compile.explain(model))
    assert len(rows) == 4
    for row in rows:
        assert row.status.startswith("matched (1 use)"), row
        assert "used by" not in row.status, row
