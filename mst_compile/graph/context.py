"""What graph passes are told and what they say: one small object that goes through all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from mst_compile.blocks.layout import Part
from mst_compile.graph.attention.constant import Constant
from mst_compile.rules.patterns import Parts
from mst_compile.state.weight import SparseWeight


@dataclass(frozen=True)
class Site:
    """One attention of a graph.

    Attributes:
        where: path of the module it stands in.
        form: which of :data:`mst_compile.graph.attention.forms.FORMS` it has, such as ``"sdpa"``.
        causal: whether it is causal self-attention that the pass understands.
        replaced: whether it runs on ``mst::attention`` now.
        reason: why not, else empty.
        shape: if replaced, that of the queries, ``(..., length, size)``, and then the size of a value; sizes may be
            symbolic.
    """

    where: str
    form: str
    causal: bool
    replaced: bool
    reason: str
    shape: tuple[Any, ...] = ()


class Slot(NamedTuple):
    """What a graph takes an index of: the sparse weight with this key, or a part of it that is multiplied alone."""

    key: int
    part: Part | None = None


@dataclass(frozen=True)
class Product:
    """One product of a graph with a sparse weight.

    Attributes:
        shape: of its input ``[..., in]``; sizes may be symbolic.
        dtype: of its input and output.
        transposed: how the weight is stored, see :mod:`mst_compile.ops.linear`.
        bias: whether it adds one.
        groups: of how many matrices of a stack, each of which multiplies some of the tokens.
        dense: how the program multiplies these, see :class:`mst_compile.lowering.device.Layer`.
    """

    shape: tuple[Any, ...]
    dtype: torch.dtype
    transposed: bool
    bias: bool
    groups: int = 1
    dense: str = ""


def _nothing_against(*_: Any) -> str | None:
    return None


def _never(*_: Any) -> bool:
    return False


@dataclass
class Context:
    """What the passes may know of a graph, and what they report of it.

    Attributes:
        weights: position among the graph's placeholders -> state of the sparse parameter that comes in there.
        pattern: the keys that queries shall see; None: what the model says.
        inputs: the graph's real inputs, if they are known; for masks in buffers once Dynamo has forgotten its own.
        why_unsupported: given a device type, the dtypes of input and weight and the block, why the device has no kernel
            for such a product, or None if it has one.
        why_no_attention: the same of attention, given a device type, its dtype, and the sizes of a query and a value.
        attention_pays: given a device type, how many heads causal attention has in all sequences of the batch, its
            length, the sizes of a query and a value, and its dtype, whether the operator is faster than the model's
            own.
        rounds_weights: given a device type, whether its products read weights in the activations' dtype.
        choose: whether products may run dense where that is faster.

        indices: the weights, or parts of them, whose index became an input of the graph, after all others and in this
            order.
        products: weight or part of it -> the products with it that became sparse.
        cut: keys of ``weights`` of which products take parts that begin or end within blocks.
        matched: keys of ``weights`` -> the places in the model's code where a product with it became sparse.
        unmatched: keys of ``weights`` -> why products with it stay dense.
        sites: what became of each attention.
        constants: buffers whose values the rewritten graph relies on.
    """

    weights: Mapping[int, SparseWeight] = field(default_factory=dict)
    pattern: Parts | None = None
    inputs: Sequence[Any] = ()
    why_unsupported: Callable[[str, torch.dtype, torch.dtype, int], str | None] = _nothing_against
    why_no_attention: Callable[[str, torch.dtype, int, int], str | None] = _nothing_against
    attention_pays: Callable[[str, int, int, int, int, torch.dtype], bool] = _never
    rounds_weights: Callable[[str], bool] = _never
    choose: bool = False

    indices: list[Slot] = field(default_factory=list)
    products: dict[Slot, list[Product]] = field(default_factory=dict)
    cut: set[int] = field(default_factory=set)
    matched: dict[int, list[str]] = field(default_factory=dict)
    unmatched: dict[int, list[str]] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)


Pass = Callable[[fx.GraphModule, Context], int]
"""A pass rewrites a graph in place, says in the context what it could not do, and returns at how many places it did."""
