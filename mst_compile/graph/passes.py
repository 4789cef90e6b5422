"""The passes in the order in which they run, and on which of a graph's copies."""

from __future__ import annotations

from torch import fx

from mst_compile.graph import linear, multihead
from mst_compile.graph.attention import causal, patterned
from mst_compile.graph.context import Context, Pass
from mst_compile.graph.fx import recompile

# A graph is rewritten in up to three stages, each on a copy of what the one before it made: both kinds of product start
# from the same graph, and a pattern is given to the attention of each.
GRAPH: tuple[Pass, ...] = (multihead.run, causal.run)
PRODUCTS: tuple[Pass, ...] = (linear.run,)
PATTERN: tuple[Pass, ...] = (patterned.run,)


def apply(passes: tuple[Pass, ...], graph_module: fx.GraphModule, context: Context) -> int:
    """Run passes one after the other, in place; returns at how many places they rewrote the graph."""
    changed = sum(rewrite(graph_module, context) for rewrite in passes)
    if changed:
        recompile(graph_module)
    return changed
