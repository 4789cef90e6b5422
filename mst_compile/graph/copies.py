"""Copies of Dynamo's graphs, of which each variant of one changes its own."""

from __future__ import annotations

import contextlib

import torch
from torch import fx


def clone(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that keeps all that AOTAutograd and Inductor read off it."""
    new = fx.GraphModule(graph_module, fx.Graph())
    copies: dict[fx.Node, fx.Node] = {}
    output = new.graph.graph_copy(graph_module.graph, copies)
    if output is not None:
        new.graph.output(output)
    for old, copy in copies.items():
        if hasattr(old, "_dynamo_source"):
            copy._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
        _forget_parameter(copy)
    new.meta = dict(graph_module.meta)
    for attribute in ("_param_name_to_source", "_backend_id", "compile_subgraph_reason"):
        if hasattr(graph_module, attribute):
            setattr(new, attribute, getattr(graph_module, attribute))
    for child_name, child in graph_module.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(new, child_name, clone(child))
    new.recompile()
    return new


def _forget_parameter(node: fx.Node) -> None:
    """Dynamo's note of which Parameter came in holds a weak reference to it, which Dynamo itself drops soon: with one
    PyTorch would not swap the Parameter's content, as ``Module.to`` does with DTensors."""
    argument = node.meta.get("grapharg")
    with contextlib.suppress(Exception):  # it may be gone
        if argument is not None and isinstance(argument.example, torch.nn.Parameter):
            del node.meta["grapharg"]


def recompile(graph_module: fx.GraphModule) -> None:
    """Make a changed graph, and the bodies in it, run as changed."""
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()
