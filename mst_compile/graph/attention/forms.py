"""The forms in which attention is found: each looks at one node and says what attention ends or stands there, or None.

Attention that is written in a new way needs a function in :data:`FORMS`, and nothing else: what its mask does, whether
the operator can stand in for it, and how the graph is rewritten is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from mst_compile.graph.attention import softmax
from mst_compile.graph.attention.found import Attention
from mst_compile.graph.fx import ATTENTION, Region, arguments, calls
from mst_compile.graph.multihead import is_multihead, why_opaque


def sdpa_arguments(node: fx.Node) -> dict[str, Any]:
    return arguments(node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def sdpa(_: Region, node: fx.Node) -> Attention | None:
    """``scaled_dot_product_attention``."""
    if not calls(node, {ATTENTION}):
        return None
    given = sdpa_arguments(node)
    return Attention(
        "sdpa",
        node,
        given["query"],
        given["key"],
        given["value"],
        causal=given.get("is_causal", False) is True,
        mask=given.get("attn_mask"),
        scale=given.get("scale"),
        dropout=[given.get("dropout_p", 0.0)],
        grouped=bool(given.get("enable_gqa")),
    )


def _multihead(_: Region, node: fx.Node) -> Attention | None:
    """What :mod:`mst_compile.graph.multihead` left."""
    if not is_multihead(node):
        return None
    return Attention("multihead", node, reason=why_opaque(node) or "it was not written out")


FORMS: list[Callable[[Region, fx.Node], Attention | None]] = [sdpa, softmax.find, _multihead]
"""The ways to write attention, and those that are only told about."""
