"""A form of a linear layer, or of attention, is added from outside by one function."""

from __future__ import annotations

import pytest
import torch
from attention_backend import Attention, Backend, check_form, compiled, tensors
from helpers import check_model, static, statuses
from helpers import compiled as compiled_by_us
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

import mst_compile
from mst_compile.graph import linear
from mst_compile.graph.attention import forms
from mst_compile.graph.attention.found import Attention as Found
from mst_compile.graph.fx import Region, calls


@torch.compiler.allow_in_graph
def library_linear(weight: Tensor, x: Tensor) -> Tensor:
    """A linear layer of somebody's library, which is one opaque node for Dynamo."""
    return x @ weight.t()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(96, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return library_linear(self.w, x)


def match_library_linear(node: fx.Node) -> linear.Match | None:
    if not calls(node, {library_linear}):
        return None
    weight, x = node.args
    return linear.Match(x, weight, rows_are_out=True)


def test_a_linear_form_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mst_compile.sparsify(Layer(), static(), include="w")
    with pytest.warns(mst_compile.MSTWarning, match="library_linear"):
        compiled_by_us(model)(torch.randn(2, 8, 32))
    assert statuses(model)["w"].startswith("not matched: used by library_linear")

    monkeypatch.setattr(linear, "FORMS", [*linear.FORMS, match_library_linear])
    torch._dynamo.reset()
    model = check_model(Layer, torch.randn(2, 8, 32), include="w")
    assert statuses(model)["w"].startswith("matched (1 use)")
    assert "dense" not in statuses(model)["w"]


@torch.compiler.allow_in_graph
def library_attention(values: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Causal attention of somebody's library."""
    return scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=0.25)


def find_library_attention(_: Region, node: fx.Node) -> Found | None:
    if not calls(node, {library_attention}):
        return None
    v, q, k = node.args
    return Found("library", node, q, k, v, causal=True, scale=0.25)


def test_an_attention_form_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    attention: Attention = lambda q, k, v: library_attention(v, q * 2.0, k) + q  # noqa: E731
    backend = Backend()
    compiled(attention, backend)(*tensors())
    assert backend.sites == []

    monkeypatch.setattr(forms, "FORMS", [*forms.FORMS, find_library_attention])
    backend = Backend()
    check_form(attention, backend)
    assert [(site.form, site.replaced) for site in backend.sites] == [("library", True)]
    assert len(backend.operators()) == 1
