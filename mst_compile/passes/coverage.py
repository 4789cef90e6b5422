"""Say in words what a graph does with a sparse weight."""

from __future__ import annotations

from torch import fx


def describe(node: fx.Node) -> str:
    """A short name of what ``node`` computes, with the module it stands in."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    stack = node.meta.get("nn_module_stack")
    where = next(reversed(stack.values()))[0] if stack else ""
    return f"{target} in {where}" if where else str(target)
