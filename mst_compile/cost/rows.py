"""One row a linear weight of a sparsified model: what became of it and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mst_compile.blocks.shards import is_sharded
from mst_compile.cost.flops import linear_training
from mst_compile.graph.skipped import skipped
from mst_compile.lowering import device
from mst_compile.state.binding import of
from mst_compile.state.sparsifier import Part
from mst_compile.state.uses import is_multiplied
from mst_compile.state.weight import SparseWeight


@dataclass(frozen=True)
class Row:
    """One weight. ``flops`` counts forward, grad-input and grad-weight per token, ``dense_flops`` without sparsity.

    ``density`` is the mask's, ``nonzero`` the share of elements that are not 0: less where blocks have grown that did
    not train, be it that no step was taken yet or that the units they belong to are dead. Of a weight that FSDP2 has
    sharded it is about the rows on this rank. ``exception`` says that the weight was made sparse and its products are
    not, or not all, for another reason than that dense ones are faster. A weight that is in the model no more, or with
    another shape, has the shape of what is there now, no block, and density 1. A stack of matrices, as of experts, has
    a shape of three dimensions and counts no FLOPs, as nobody knows how many tokens each of them will see.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    density: float
    nonzero: float
    target: float
    kernel: str
    status: str
    flops: int
    dense_flops: int
    exception: bool = False


def rows_of(part: Part) -> Iterator[Row]:
    """Rows of the sparse weights of a part, then of the linear ones that stay dense."""
    modules = {id(module): module for module in part.module.modules()}
    for weight, parameter, owners in part.sparsifier.held():
        name = part.full(weight.name)
        inside = any(id(owner) in modules for owner in owners)
        row = _replaced(part, name, weight, parameter, inside)
        yield row or _row(part, name, weight, parameter)  # type: ignore[arg-type]
    yield from _skipped(part)


def _skipped(part: Part) -> Iterator[Row]:
    """The linear weights of a sparsified module that stay dense, and what else its compiled graphs multiply."""
    parameters = {name: p for name, p in part.module.named_parameters() if not is_lazy(p)}
    for name, reason in part.sparsifier.skipped.items():
        parameter = parameters.get(name)
        if of(parameter) is not None:
            continue  # it became sparse with a part of its own
        yield _left_dense(part, name, parameter, reason)
    for name, parameter in parameters.items():
        if name not in part.sparsifier.skipped and of(parameter) is None and is_multiplied(parameter):
            yield _left_dense(part, name, parameter, _why_own(parameter))


def _why_own(parameter: nn.Parameter) -> str:
    """Why a Parameter that products take, and no linear layer holds, is not sparse."""
    if parameter.dim() == 2:
        return "a matrix that no linear layer holds: include it to make it sparse"
    return f"no matrix and no stack of matrices, by its shape {tuple(parameter.shape)}"


def _left_dense(part: Part, name: str, parameter: nn.Parameter | None, reason: str) -> Row:
    """The row of a weight that was not made sparse."""
    shape: tuple[int, ...] = _shape(parameter)
    flops, nonzero = 6 * shape[0] * shape[1], 1.0 if parameter is None else _nonzero(parameter)
    if parameter is not None and parameter.dim() > 2:
        shape = tuple(parameter.shape)
    return Row(part.full(name), shape, None, 1.0, nonzero, 1.0, "dense", f"skipped: {reason}", flops, flops)


def _row(part: Part, name: str, weight: SparseWeight, parameter: nn.Parameter) -> Row:
    kernel, status, exception = _products(part, weight, parameter)
    if weight.index is not None and not (parameter.is_meta or is_sharded(parameter) or weight.look(parameter)):
        kernel, exception = "dense", True
        status += "; values stand outside the active blocks: dense products until an optimizer steps"
    if weight.cuts_blocks:
        status += f"; this rank's part begins within blocks of {weight.grid.block}: products take more than is active"
    if not parameter.requires_grad:
        status += "; frozen: it keeps this mask whatever the schedule says"
    status += f"; {weight.note}" if weight.note else ""
    status += "; tied" if weight.tied else ""
    grid = weight.grid
    target = max(weight.density_target, 1 / min(grid.matrix.shape))
    flops = linear_training(weight), round(6 * weight.numel * weight.per_token)
    shape = weight.shape
    if weight.stacked:
        status += f"; FLOPs of a token in {weight.visits} of its {grid.matrices} matrices"
        status += f"; this rank multiplies {weight.signature[3]} of them" if weight.part is not None else ""
    nonzero = _nonzero(parameter)
    return Row(name, shape, grid.block, weight.density, nonzero, target, kernel, status, *flops, exception)


def _products(part: Part, weight: SparseWeight, parameter: nn.Parameter) -> tuple[str, str, bool]:
    """Kernel, status, and whether that is not what the user asked for."""
    seen = weight.uses
    if seen.matched or seen.served:
        uses = f"{seen.matched} use{'s' * (seen.matched > 1)}" if seen.matched else "shared graph"
        status = f"matched ({uses})"
        if seen.unmatched:
            status += f"; dense: {', '.join(seen.unmatched)}"
        # What a graph runs is noted when it runs: a mask may have become full since.
        full = weight.is_dense and seen.dense_threshold is not None and seen.dense_threshold <= 1
        if seen.dense_now or full:
            status += "; dense products at the present density, where they are faster"
            return "dense", status, bool(seen.unmatched)
        if seen.dense_products:
            status += f"; dense {', '.join(seen.dense_products)} at the present density, where faster"
        return "block-sparse", status, bool(seen.unmatched)
    if seen.unmatched:
        return "dense", f"not matched: {', '.join(seen.unmatched)}", True
    missing = device.of(parameter.device.type).why_unsupported(parameter.dtype, parameter.dtype, weight.grid.block)
    if missing:
        return "dense", missing, True
    frame = skipped(_around(part.module, weight.name))
    if frame is None:
        return "dense", 'not seen by backend="mst" yet', True
    return "dense", f"Dynamo skipped this frame and runs it eagerly: {frame}; TORCH_LOGS=graph_breaks says why", True


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules whose ``forward`` leads to the weight ``name``, the innermost first."""
    found = [model]
    for part in name.split(".")[:-1]:
        inner = found[-1]._modules.get(part)
        if inner is None:
            break
        found.append(inner)
    return found[::-1]


# -- weights that are in the model no more -----------------------------------------------------------------------------


def _replaced(part: Part, name: str, weight: SparseWeight, parameter: nn.Parameter | None, inside: bool) -> Row | None:
    """The row of a weight in whose place the model holds something else; None if the weight is there."""
    was = f"it was made sparse as {'x'.join(map(str, weight.shape))}"
    advice = "sparsify after such changes (densify first)"
    if not inside:
        try:
            there = part.module.get_submodule(weight.name.rpartition(".")[0])
        except AttributeError:
            return _dense(name, None, "-", f"gone from the model; {was}")
        value, kind = _weight_in(there, weight.name.rpartition(".")[2]), type(there).__name__
        if value is not None and of(value) is weight:
            return None  # another module, as for quantization-aware training, that holds the same Parameter
        if is_quantised(value):
            return _dense(name, value, "quantised", f"replaced by {kind} ({_kind(value)}): dense products, zeros kept")
        return _dense(name, value, "dense", f"replaced by a module {kind}, not a sparse one; {was}: {advice}")
    if parameter is None:
        return _dense(name, None, "-", f"gone from its module; {was}")
    if is_quantised(parameter):
        return _dense(name, parameter, "quantised", f"quantised ({_kind(parameter)}): dense products, zeros kept")
    if tuple(parameter.shape) != weight.shape:
        return _dense(name, parameter, "dense", f"resized, not sparse any more; {was}: {advice}")
    return None


def _dense(name: str, value: Tensor | None, kernel: str, status: str) -> Row:
    shape = _shape(value)
    flops, nonzero = 6 * shape[0] * shape[1], math.nan if value is None else _nonzero(value)
    return Row(name, shape, None, 1.0, nonzero, 1.0, kernel, status, flops, flops, True)


def _weight_in(module: nn.Module, attribute: str) -> Tensor | None:
    """What a module has in place of a weight: quantised layers of torch.ao keep theirs behind a method."""
    found = getattr(module, attribute, None)
    found = found() if callable(found) and not isinstance(found, Tensor) else found
    return found if isinstance(found, Tensor) else None


def is_quantised(value: Tensor | None) -> bool:
    """Whether a tensor holds no floating-point elements of its own: torch's quantised dtypes and torchao's classes."""
    if value is None or is_sharded(value):
        return False
    return value.is_quantized or not value.dtype.is_floating_point or is_traceable_wrapper_subclass(value)


def _kind(value: Tensor | None) -> str:
    assert value is not None
    return type(value).__name__ if is_traceable_wrapper_subclass(value) else str(value.dtype).removeprefix("torch.")


def _shape(value: Tensor | None) -> tuple[int, int]:
    return (int(value.shape[0]), int(value.shape[1])) if value is not None and value.dim() == 2 else (0, 0)


@torch.no_grad()
def _nonzero(parameter: Tensor) -> float:
    """Share of elements that are not 0, NaN without any.

    No other rank takes part: often one alone asks.
    """
    local = parameter.detach()
    if is_sharded(local):
        local = local.to_local()  # type: ignore[attr-defined]
    if local.is_quantized or (is_traceable_wrapper_subclass(local) and hasattr(local, "dequantize")):
        local = local.dequantize()
    return math.nan if local.is_meta or not local.numel() else int(local.count_nonzero()) / local.numel()
