"""The passes in the order in which they run, and on which of a graph's copies."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from torch import fx

from mst_compile.graph import grouped, linear, multihead, served
from mst_compile.graph.attention import causal, full, patterned
from mst_compile.graph.context import Context, Pass
from mst_compile.graph.copies import recompile


class Stage(enum.Enum):
    """A graph is rewritten in up to three stages, each on a copy of what an earlier one made.

    Both kinds of product start from the same graph, and attention is given its pattern, or made fast, in either.
    """

    GRAPH = "every variant"
    PRODUCTS = "variants with sparse products"
    PATTERN = "variants with a pattern in their attention"
    FULL = "variants without one"


PASSES: list[tuple[Stage, Pass]] = [
    (Stage.GRAPH, multihead.run),
    (Stage.GRAPH, causal.run),
    (Stage.PRODUCTS, grouped.run),
    (Stage.PRODUCTS, linear.run),
    (Stage.PRODUCTS, served.report),
    (Stage.PATTERN, patterned.run),
    (Stage.FULL, full.run),
]


def of(stage: Stage) -> list[Pass]:
    return [rewrite for at, rewrite in PASSES if at is stage]


def apply(passes: Iterable[Pass], graph_module: fx.GraphModule, context: Context) -> int:
    """Run passes one after the other, in place; returns at how many places they rewrote the graph."""
    changed = sum(rewrite(graph_module, context) for rewrite in passes)
    if changed:
        recompile(graph_module)
    return changed
