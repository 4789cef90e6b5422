"""A sparse model for inference, whose layers keep their active blocks alone."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mst_compile.api import densify
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.packed import pack, unpack, why_no_packed
from mst_compile.blocks.shards import is_sharded
from mst_compile.errors import (
    ArgumentError,
    CheckpointError,
    GradientError,
    MSTWarning,
    ParallelismError,
    WeightError,
)
from mst_compile.ops.packed import VERSION
from mst_compile.rules.checks import check_model
from mst_compile.state.selection import is_linear
from mst_compile.state.sparsifier import some_parts_of
from mst_compile.state.weight import SparseWeight

from .copies import active, unwrapped, weights_of

_logger = logging.getLogger("mst_compile")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PackedWeight(nn.Module):
    """The active blocks of a linear weight. It stands where the weight stood, shared by all layers that share it.

    ``torch.nn.functional.linear`` takes it as a weight; any other function of PyTorch refuses it.

    Attributes:
        grid: the blocks over the weight as ``[outputs, inputs]``.
        transposed: whether it was stored as ``[inputs, outputs]``.
        outputs, inputs, block: of the grid.
        values, index: see :mod:`mst_compile.blocks.packed`; buffers.
    """

    values: Tensor
    index: Tensor

    def __init__(self, values: Tensor, index: Tensor, grid: BlockGrid, transposed: bool) -> None:
        super().__init__()
        self.grid, self.transposed, self.version = grid, transposed, VERSION
        self.outputs, self.inputs, self.block = grid.rows, grid.cols, grid.block
        self.register_buffer("values", values)
        self.register_buffer("index", index)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Share of the blocks that are active."""
        return (self.index.numel() - self.grid.block_rows - 1) / self.grid.blocks

    def to_dense(self) -> Tensor:
        """The weight in the shape in which it was stored, 0 outside the active blocks."""
        dense = unpack(self.values, self.index, self.grid)
        return dense.t().contiguous() if self.transposed else dense.contiguous()

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x[..., inputs] W^T + bias``, in ``x``'s dtype.

        Raises:
            GradientError: gradients are recorded and an operand requires one.
            ArgumentError: ``x`` has another number of features or another dtype than the weight.
        """
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise GradientError(
                "a packed layer is for inference and has no gradients, but its input or bias requires one: call the "
                "model under torch.no_grad(), or train the model that it was packed from"
            )
        # Compiled code guards all that is read here, at every call and mostly out of a cache that weights have swept:
        # buffers not by attribute, for which it looks into the module's two other dicts first, and no grid.
        held: dict[str, Any] = self._buffers
        values, index, kind = held["values"], held["index"], x.device.type
        # No autocast on meta, and Dynamo of torch 2.11 knows no torch.amp.is_autocast_available to be asked.
        if kind != "meta" and torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        elif x.dtype != values.dtype:
            raise ArgumentError(
                f"the input is {x.dtype} and the packed weight {values.dtype}: cast one of them, as by "
                f"model.to({x.dtype})"
            )
        if x.shape[-1] != self.inputs:
            raise ArgumentError(f"the input has shape {tuple(x.shape)} and the layer takes {self.inputs} features")
        packed: Tensor = torch.ops.mst.packed_linear(x, values, index, bias, self.outputs, self.block, VERSION)
        return packed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        if function is nn.functional.linear and isinstance(given["weight"], cls):
            return given["weight"].linear(given["input"], given.get("bias"))
        raise ArgumentError(
            f"{getattr(function, '__name__', function)} takes no packed weight: pass weight.to_dense(), or leave the "
            "layer out of what is packed"
        )

    def extra_repr(self) -> str:
        return f"{self.grid.rows}x{self.grid.cols}, block={self.grid.block}, density={self.density:.3f}"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: Any,
    ) -> None:
        """Other masks may be loaded, with as many blocks as they have."""
        own = {f"{prefix}{name}": name for name in ("values", "index")}
        missing_keys += [key for key in own if strict and key not in state_dict]
        given = [state_dict[key] for key in own if key in state_dict]
        if len(given) < len(own):
            return
        values, index = (tensor.detach() for tensor in given)
        reason = why_no_packed(values, index, self.grid)
        if reason is not None:
            raise CheckpointError(
                f"{prefix}values and {prefix}index are no packed weight of {self.grid.rows} x {self.grid.cols} in "
                f"blocks of {self.grid.block}: {reason}"
            )
        self.values, self.index = values.to(self.values, copy=True), index.to(self.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"the packed weight is of version {state.get('version')} and this mst_compile packs version {VERSION}: "
                "pack the sparse model again"
            )
        super().__setstate__(state)
        self.outputs, self.inputs, self.block = self.grid.rows, self.grid.cols, self.grid.block
        _lower()


class PackedLinear(nn.Module):
    """A linear layer with a :class:`PackedWeight`, made by :func:`packed` of ``nn.Linear`` or Conv1D.

    Attributes:
        weight: the packed weight. bias: a Parameter, or None.
    """

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.grid.cols, weight.grid.rows
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.weight.linear(x, self._parameters["bias"])
        return product

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise CheckpointError(
                f"{prefix}weight is a whole weight there and packed here: load it into the model before it is packed"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def packed(model: nn.Module) -> nn.Module:
    """A copy of a sparse model for inference, whose linear layers keep their active blocks alone.

    Blocks lie in the order in which a product reads them, so that a weight is read, and kept, in proportion to its
    density, whatever its block: the faster form, above all for few tokens, and the smaller one. It runs in eager mode
    and under ``torch.compile`` with any backend. The copy is in evaluation mode and none of its Parameters requires a
    gradient; ``model`` stays as it is.

    Sparse weights of ``nn.Linear`` and Hugging Face Conv1D layers are packed: ``weight`` of the layer, a
    :class:`PackedLinear` now, is a :class:`PackedWeight`. Layers that shared a weight share the packed one. What stays
    as it was, with a warning that names it: weights of classes derived from these, as in ``nn.MultiheadAttention``, of
    layers with hooks, and other Parameters. An embedding whose weight a packed head shares keeps the whole one, beside
    the head's blocks.

    ``state_dict``, ``torch.save``, ``deepcopy`` and ``.to()`` serve the copy as they do any module; its state dict has
    ``weight.values`` and ``weight.index`` in place of a packed weight, and loads into packed copies of the same model
    alone, whatever their masks. There are kernels on a CPU in float32 and bfloat16. Elsewhere a layer computes the same
    by way of the whole weight, made at each call.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
        WeightError: no layer can be packed, or a weight holds values outside its active blocks.
        ParallelismError: a weight is spread over ranks.
    """
    check_model("packed", model)
    some_parts_of(model)
    for name, weight, parameter in weights_of(unwrapped(model)):
        _check(name, weight, parameter)
    copied = copy.deepcopy(unwrapped(model))
    sparse = {id(parameter): (name, weight) for name, weight, parameter in weights_of(copied)}
    held = [parameter for _, _, parameter in weights_of(copied)]  # their ids stay theirs
    densify(copied)
    root, stays = _replaced(copied, sparse)
    del held
    names = [name for name, _ in sparse.values() if name not in stays]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in stays.items())
    if not names:
        raise WeightError(f"no sparse weight of the model can be packed. {reasons}")
    if stays:
        warnings.warn(f"These weights are not packed. {reasons}", MSTWarning, stacklevel=2)
    _logger.info("packed: %s", ", ".join(names))
    _lower()
    return root.eval().requires_grad_(False)


def _check(name: str, weight: SparseWeight, parameter: Tensor) -> None:
    if is_sharded(parameter):
        raise ParallelismError(
            f"{name} is spread over ranks: gather the model's state, load it into a plain model with export.load or "
            "sparsify, and pack that"
        )
    if not weight.look(parameter):
        raise WeightError(
            f"{name} holds values outside its active blocks, which would be lost: take a training step, or load the "
            "masks that belong to the values"
        )


def _replaced(model: nn.Module, sparse: Mapping[int, tuple[str, SparseWeight]]) -> tuple[nn.Module, dict[str, str]]:
    """The model with packed layers in it, and by name the sparse weights that no layer of it has packed: why."""
    layers: dict[int, nn.Module] = {}
    weights: dict[tuple[int, bool], PackedWeight] = {}
    stays: dict[str, str] = {}
    keep = [*model.modules()]  # no module's id may become another's
    for module, attribute, parameter in _holders(keep, sparse):
        name, weight = sparse[id(parameter)]
        reason = _why_not(module, attribute)
        if reason is not None:
            stays.setdefault(name, reason)
            continue
        key = id(parameter), not isinstance(module, nn.Linear)
        if key not in weights:
            weights[key] = _packed(parameter, weight, transposed=key[1])
        layers[id(module)] = PackedLinear(weights[key], module.bias)  # type: ignore[arg-type]
    for module in keep:
        for attribute, child in module._modules.items():
            if id(child) in layers:
                module._modules[attribute] = layers[id(child)]
    packed_names = {sparse[key][0] for key, _ in weights}
    return layers.get(id(model), model), {name: why for name, why in stays.items() if name not in packed_names}


def _holders(modules: list[nn.Module], sparse: Mapping[int, Any]) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in modules:
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in sparse:
                yield module, attribute, parameter


def _why_not(module: nn.Module, attribute: str) -> str | None:
    """Why a module's weight stays, or None if it can be packed."""
    kind = type(module).__name__
    if not is_linear(module) or attribute != "weight":
        return f"{attribute} of {kind} is no weight of nn.Linear or Conv1D"
    if type(module) is not nn.Linear and isinstance(module, nn.Linear):
        return f"{kind} is a class derived from nn.Linear, which may do more with it"
    hooked = [hooks for hooks in _HOOKS if getattr(module, hooks)]
    return f"its layer has hooks ({', '.join(hooked)})" if hooked else None


def _packed(parameter: Tensor, weight: SparseWeight, transposed: bool) -> PackedWeight:
    grid, mask, dense = weight.grid, active(weight, parameter), parameter.detach()
    if transposed:
        grid, mask, dense = BlockGrid(grid.cols, grid.rows, grid.block), mask.t(), dense.t()
    return PackedWeight(*pack(dense, grid, mask), grid, transposed)


def _lower() -> None:
    """Let Inductor know the operator, now: code from its cache calls kernels by name, whatever backend asks for it."""
    from mst_compile.lowering import inductor  # noqa: F401  (takes seconds, as it imports Inductor)
