"""What this package knows of a device type, in one record each.

Whoever asks what a device can do asks its record: the selection of weights for its default block, the graph passes for
what has kernels, the dispatch between dense and sparse products for where dense ones take over, Inductor for its
lowerings. A device is added by one file that registers one record; nothing else names devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from mst_compile.blocks.bulk import Kernels
from mst_compile.blocks.bulk import register as register_bulk
from mst_compile.blocks.grid import BlockGrid
from mst_compile.ops import attention, grouped, linear, packed  # noqa: F401  (define what devices implement)
from mst_compile.ops.library import implement

FINEST_BLOCK = 4  # that a weight gets by itself; finer ones are for those who ask
_BLOCK = 32
GROUPED, LOOP, BATCH, COPIES = "grouped", "looped", "batched", "copied"
PRODUCTS = ("forward", "grad-input", "grad-weight")
WORTH = 0.97  # of the dense time: what a sparse product may take to be called faster


@dataclass(frozen=True)
class Layer:
    """One place of a graph where ``tokens`` are multiplied with a sparse weight.

    Attributes:
        transposed: how the weight is stored, see :mod:`mst_compile.ops.linear`.
        dtype: of the activations. weight_dtype: of the weight.
        bias: whether a bias is added.
        trained: whether gradients are wanted.
        groups: how many matrices of a stack, each with the grid, share the tokens.
        dense: how the dense model multiplies these: by the library's grouped product (``GROUPED``), a loop over them
            (``LOOP``), a batched product (``BATCH``) or one of a copy of its matrix for each token (``COPIES``); empty
            of a weight that is no stack.
    """

    grid: BlockGrid
    transposed: bool
    tokens: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    bias: bool
    trained: bool
    groups: int = 1
    dense: str = ""


class Times(NamedTuple):
    """Time of a dense product, and of the sparse one at density ``d``: ``fixed + per_density * d``.

    In any unit that the products of a graph share. ``call`` is what the product costs on top of either in a graph with
    sparse products, beside what the same product costs in one with dense products alone. ``falls_back``: a device that
    chooses runs the dense product in its place where that is faster; of a stack's matrices together it does not.
    """

    dense: float
    fixed: float
    per_density: float
    call: float = 0.0
    falls_back: bool = True

    def saved(self, density: float) -> float:
        """What the sparse product saves at ``density``; negative where it costs."""
        return self.dense - self.fixed - self.per_density * density

    @property
    def crossover(self) -> float:
        """The density from which the dense product is as fast or :data:`WORTH` faster; infinite where it never is."""
        density = (WORTH * self.dense - self.fixed) / self.per_density
        return math.inf if density > 1 else max(0.0, density)


LayerTimes = Mapping[str, Times]
"""Product of a layer (:data:`PRODUCTS`; the first alone if no gradients are wanted) -> its times."""


def at_crossover(layer: Layer, density: float) -> LayerTimes:
    """Times, in a unit of their own, of a layer of which no more is known than its crossover."""
    size = layer.grid.rows * layer.grid.cols * layer.groups
    return {product: Times(density * size / WORTH, 0.0, size) for product in PRODUCTS[: 3 if layer.trained else 1]}


@dataclass(frozen=True)
class Fact:
    """What this machine has for a device, as ``python -m mst_compile doctor`` prints it.

    Attributes:
        what, value: a word or two, and a line.
        problem: why kernels cannot run because of it, and what to do; None if all is well.
    """

    what: str
    value: str
    problem: str | None = None


def heads_of(size: int, value_size: int) -> str:
    """Heads of attention in words, for reasons."""
    return f"heads of {size}" if size == value_size else f"heads of {size} with values of {value_size}"


@dataclass(frozen=True)
class Device:
    """One device type.

    Attributes:
        type: as in ``torch.device.type``.
        why_unsupported: given the dtypes of input and weight and the block, why there is no kernel for such a product,
            or None if there is one.
        why_no_attention: the same of attention, given the dtype, the size of a query (or key) in a head and that of a
            value.
        times: given the layers of a graph, and whether a variant with sparse products has been compiled yet, how long
            their products take. The same on all ranks.
        attention_pays: given how many heads causal attention has in all sequences of a batch, its length, the sizes of
            a query and of a value in a head, its dtype, and whether gradients are wanted, whether the device's kernel
            is faster than what PyTorch runs. The same on all ranks.
        chooses: whether the operators themselves run the faster product at every call, where they are allowed to.
        default_block: block of weights for which the user names none.
        finest_block: finest block with kernels; a weight that the default suits badly gets no finer one (nor one below
            ``FINEST_BLOCK``), and a weight of one below both keeps no index.
        rounds_weights: whether its products read weights in the activations' dtype: they are rounded once for the
            product and the gradient of its input then, where others read them as they are.
        multiplies_stacks: whether it has products with stacks of matrices (:mod:`mst_compile.ops.grouped`); a weight
            that is one keeps no index elsewhere.
        implementations: operator (``"linear"``, ...) -> what computes it; it may decline, see
            :func:`mst_compile.ops.library.implement`.
        bulk: passes over whole weights, where the device has something better than PyTorch.
        lowerings: returns operator -> its Inductor lowering, which takes the operator's arguments as Inductor's IR and
            may decline (return None), as if it were absent: then the operator itself is called. A function, because
            Inductor is imported when something is compiled, not before; whatever generated code calls by name must
            exist once it has returned.
        why_not_compiled: why nothing can be compiled for the device on this machine, and what to do, or None. The
            model then runs in eager mode.
        keep_memory: asks the device's allocator to keep what it frees in the process.
        why_absent: why this machine has no such device, or None.
        facts: what this machine has for the device. May compile kernels.
    """

    type: str
    why_unsupported: Callable[[torch.dtype, torch.dtype, int], str | None]
    why_no_attention: Callable[[torch.dtype, int, int], str | None]
    times: Callable[[Sequence[Layer], bool], Sequence[LayerTimes]]
    attention_pays: Callable[[int, int, int, int, torch.dtype, bool], bool] = lambda *_: False
    chooses: bool = False
    default_block: int = _BLOCK
    finest_block: int = FINEST_BLOCK
    rounds_weights: bool = False
    multiplies_stacks: bool = False
    implementations: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    bulk: Kernels | None = None
    lowerings: Callable[[], Mapping[str, Callable[..., Any]]] = dict
    why_not_compiled: Callable[[], str | None] = lambda: None
    keep_memory: Callable[[], object] = lambda: None
    why_absent: Callable[[], str | None] = lambda: None
    facts: Callable[[], Sequence[Fact]] = tuple


_records: dict[str, Device] = {}


def register(device: Device) -> None:
    """Make ``device`` the record of its type, and its implementations those of the operators. Once a type."""
    key = torch._C._dispatch_key_for_device(device.type)
    for name, function in device.implementations.items():
        implement(name, key, function)
    if device.bulk is not None:
        register_bulk(device.type, device.bulk)
    _records[device.type] = device


def registered() -> list[Device]:
    return list(_records.values())


def of(device_type: str) -> Device:
    """The record of a device type; of one that nobody has registered, a record that says that it has no kernels."""
    return _records.get(device_type) or Device(
        device_type,
        why_unsupported=lambda *_: f"no kernel for device {device_type}",
        why_no_attention=lambda *_: f"no attention kernel for device {device_type}",
        times=lambda layers, _: [at_crossover(layer, 0.0) for layer in layers],  # all products are dense
    )
