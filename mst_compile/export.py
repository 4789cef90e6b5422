"""A sparse model for others: a plain copy, block-sparse tensors, and a safetensors file that holds the masks.

Nothing that these functions make needs mst_compile where it is read; only :func:`load` makes a model sparse again.
"""

from __future__ import annotations

import base64
import binascii
import copy
import glob
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

from mst_compile.api import densify, sparsify
from mst_compile.blocks.bulk import block_mean_abs
from mst_compile.blocks.grid import BlockGrid
from mst_compile.errors import CheckpointError, MaskError, MissingPackageError
from mst_compile.rules.checks import check_model, shown
from mst_compile.rules.constant import Constant
from mst_compile.state.selection import Override
from mst_compile.state.sparsifier import parts_of, some_parts_of
from mst_compile.state.weight import SparseWeight

__all__ = ["load", "plain", "save", "to_bsr"]

_KEY, _VERSION = "mst_compile", 1
_MOST_BYTES = 90 << 20  # of masks in a header, which may have 100 MB
_COMPILED = "_orig_mod."


def plain(model: nn.Module) -> nn.Module:
    """A copy of a sparse model, with its zeros, that nothing of us is left on.

    It computes what ``model`` does in eager mode, and pickles, exports (``torch.export``, ONNX) and quantises as the
    model would that was never sparse. ``model`` stays as it is.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("plain", model)
    some_parts_of(model)
    return densify(copy.deepcopy(_unwrapped(model)))


def to_bsr(model: nn.Module) -> dict[str, Tensor]:
    """The sparse weights of a model as PyTorch's block-sparse tensors (``torch.sparse_bsr``), by name.

    A tensor holds the values of the active blocks alone, copied, in the weight's shape, dtype and device; an active
    block of zeros is held too, and so is a block outside the mask that holds values all the same. BSR knows whole
    blocks only, so a weight whose shape its block does not divide gets the largest block that does.
    ``model.state_dict() | to_bsr(model)`` is the whole model, and ``to_dense()`` gives back each weight bit for bit.
    What can be multiplied with them is up to PyTorch.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("to_bsr", model)
    some_parts_of(model)
    return {name: _bsr(p.detach(), weight, _active(weight, p)) for name, weight, p in _weights(model)}


def save(model: nn.Module, path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a sparse model's state dict to a safetensors file, with its masks in the metadata.

    Names, shapes and values are those of the plain model, which can read the file without us
    (``safetensors.torch.load_file``); tensors that share memory are written once. :func:`load` also brings back the
    masks. The metadata ``"mst_compile"`` is JSON::

        {"version": 1,
         "tied": {name that is not in the file: name that is},
         "masks": {weight: {"block": edge, "blocks": [R, C], "active": base64 of zlib of bits}}}

    with a bit for each block, row by row, the first in the highest place of a byte. A block that holds values outside
    the mask, as in an average over several topologies, counts as active.

    Args:
        metadata: more to write beside it.

    Raises:
        NotSparseError: the model is not sparse.
        CheckpointError: it holds something that is no tensor, or more masks than the format has room for.
        MissingPackageError: safetensors is not installed.
    """
    check_model("save", model)
    some_parts_of(model)
    files = _safetensors()
    tensors, tied = _tensors(model)
    masks = {name: _written(weight, _active(weight, parameter)) for name, weight, parameter in _weights(model)}
    text = json.dumps({"version": _VERSION, "tied": tied, "masks": masks})
    if len(text) > _MOST_BYTES:
        raise CheckpointError(
            f"the masks take {len(text) >> 20} MB and a safetensors header has room for 100: sparsify with larger "
            "blocks, or save sparsifier(model).state_dict() with torch.save"
        )
    files.save_file(tensors, fspath(path), {"format": "pt", **(metadata or {}), _KEY: text})


def load(model: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Read a file of :func:`save` into a model: values and masks.

    A plain model becomes sparse, with the blocks and masks of the file and a schedule that keeps them; sparse products
    then run under ``torch.compile(model, backend="mst")``. A model that is sparse already must have the file's weights
    and blocks, and keeps its schedule and step count: to resume training use checkpoints.

    Returns:
        ``model`` itself.

    Raises:
        CheckpointError: the file has no masks, or does not fit the model. Nothing has changed then.
        MaskError: a mask does not fit its weight.
        MissingPackageError: safetensors is not installed.
    """
    check_model("load", model)
    root = _unwrapped(model)
    with _safetensors_open(path) as file:
        found = _read_header(file.metadata() or {}, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tensors |= {name: tensors[kept] for name, kept in found["tied"].items() if kept in tensors}
    state = _fitting(root, tensors, path)
    masks = {name: _read_mask(name, entry, tensors) for name, entry in found["masks"].items()}
    if parts_of(root):
        _check_same(root, {name: tuple(mask.shape) for name, (mask, _) in masks.items()}, path)
        for part in parts_of(root):
            for name in part.sparsifier.weights:
                part.sparsifier.apply_mask(name, masks[part.full(name)][0])
        root.load_state_dict(state)
        return model
    before = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    root.load_state_dict(state)
    try:
        _sparsify(root, {name: entry for name, entry in masks.items() if not bool(entry[0].all())})
    except BaseException:
        root.load_state_dict(before)
        raise
    return model


def _sparsify(model: nn.Module, masks: Mapping[str, tuple[Tensor, int]]) -> None:
    """Make ``model`` sparse with these masks and blocks, for good."""
    if not masks:
        return
    share = {name: 1 - int(mask.count_nonzero()) / mask.numel() for name, (mask, _) in masks.items()}
    sparsify(
        model,
        Constant(max(share.values()), growth="none"),
        include=[glob.escape(name) for name in masks],
        overrides={glob.escape(name): Override(share[name], block) for name, (_, block) in masks.items()},
        masks={name: mask for name, (mask, _) in masks.items()},
        guard="none",
        rescale=False,
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module within ``torch.compile``'s wrapper."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def _weights(model: nn.Module) -> Iterator[tuple[str, SparseWeight, Tensor]]:
    """Name in the whole model, state and Parameter of each sparse weight."""
    for part in parts_of(model):
        for weight, parameter in part.sparsifier.parameters():
            yield part.full(weight.name), weight, parameter


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict without what shares memory, and names that are left out -> those of the same tensor."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for key, tensor in model.state_dict().items():
        name = key.replace(_COMPILED, "")
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} of the state dict is {shown(tensor)}, no tensor, and safetensors holds tensors alone; save "
                "with torch.save"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if place in seen:
            tied[name] = seen[place]
            continue
        seen[place] = name
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        kept[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return kept, tied


def _fitting(model: nn.Module, tensors: Mapping[str, Tensor], path: Any) -> dict[str, Tensor]:
    """The state dict of ``model`` out of the file's tensors."""
    own = {key.replace(_COMPILED, ""): (key, tensor) for key, tensor in model.state_dict().items()}
    for what, names in (("lacks", own.keys() - tensors.keys()), ("has besides", tensors.keys() - own.keys())):
        if names:
            raise CheckpointError(f"{fspath(path)} is of another model: it {what} {', '.join(sorted(names)[:5])}")
    for name, (_, tensor) in own.items():
        if tensor.shape != tensors[name].shape:
            raise CheckpointError(
                f"{fspath(path)} is of another model: {name} has shape {tuple(tensors[name].shape)} there and "
                f"{tuple(tensor.shape)} here"
            )
    return {key: tensors[name] for name, (key, _) in own.items()}


def _check_same(model: nn.Module, masks: Mapping[str, tuple[int, ...]], path: Any) -> None:
    """Raise :class:`CheckpointError` unless these are the sparse weights of ``model``, in its blocks."""
    own = {name: tuple(weight.grid.shape) for name, weight, _ in _weights(model)}
    if own != masks:
        name = min(name for name in own.keys() | masks.keys() if own.get(name) != masks.get(name))
        raise CheckpointError(
            f"{fspath(path)} does not fit the sparse model: {name} has {masks.get(name, 'no')} blocks there and "
            f"{own.get(name, 'no')} here. Load it into the plain model, which becomes sparse as the file is"
        )


# ---- tensors and masks -----------------------------------------------------------------------------------------------


def _active(weight: SparseWeight, parameter: Tensor) -> Tensor:
    """The mask, with blocks that hold values all the same, as those of averages over several topologies do: whoever
    reads what is written gets every value."""
    return weight.mask | (block_mean_abs((parameter.detach() != 0).float(), weight.grid) > 0)


def _bsr(tensor: Tensor, weight: SparseWeight, active: Tensor) -> Tensor:
    rows, cols = tensor.shape
    block = math.gcd(weight.grid.block, rows, cols)
    finer = weight.grid.block // block
    mask = active.repeat_interleave(finer, 0).repeat_interleave(finer, 1)[: rows // block, : cols // block]
    mask = mask.to(tensor.device)
    values = tensor.view(rows // block, block, cols // block, block).transpose(1, 2)[mask]
    ptr = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return torch.sparse_bsr_tensor(ptr, mask.nonzero()[:, 1], values, tensor.shape, check_invariants=True)


def _written(weight: SparseWeight, active: Tensor) -> dict[str, Any]:
    bits = active.flatten().to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = (bits << torch.arange(7, -1, -1, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    text = base64.b64encode(zlib.compress(bytes(packed.tolist()))).decode()
    return {"block": weight.grid.block, "blocks": list(weight.grid.shape), "active": text}


def _read_mask(name: str, entry: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The mask and block of a weight.

    Raises:
        MaskError: it is no mask of the weight's blocks.
    """
    try:
        block = int(entry["block"])
        rows, cols = tensors[name].shape
        grid = BlockGrid(rows, cols, block)
        data = zlib.decompress(base64.b64decode(entry["active"], validate=True))
        count = grid.blocks
        if tuple(entry["blocks"]) != tuple(grid.shape) or len(data) != -(-count // 8):
            raise ValueError(f"{entry['blocks']} blocks of {block} do not make up {tuple(tensors[name].shape)}")
    except (KeyError, TypeError, ValueError, zlib.error, binascii.Error) as error:
        raise MaskError(f"the mask of {name} in the file cannot be read: {error!r}; save the model again") from error
    packed = torch.tensor(list(data), dtype=torch.uint8)[:, None]
    bits = (packed >> torch.arange(7, -1, -1, dtype=torch.uint8)) & 1
    return bits.flatten()[:count].bool().view(grid.shape), block


# ---- files -----------------------------------------------------------------------------------------------------------


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingPackageError("files of this kind need safetensors: pip install safetensors") from error
    return safetensors.torch


def _safetensors_open(path: str | PathLike[str]) -> Any:
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(fspath(path), framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{fspath(path)} is no safetensors file: {error}") from error


def _read_header(metadata: Mapping[str, str], path: Any) -> dict[str, Any]:
    """What :func:`save` wrote of masks."""
    try:
        found = json.loads(metadata[_KEY])
        if found["version"] == _VERSION and isinstance(found["masks"], dict) and isinstance(found["tied"], dict):
            return found
        problem = f"version {shown(found['version'])}"
    except KeyError as error:
        problem = f"no {error}"
    except (TypeError, ValueError) as error:
        problem = repr(error)
    raise CheckpointError(
        f"{fspath(path)} holds no masks that this version reads ({problem}); it must be written by "
        "mst_compile.export.save. Values alone load with safetensors.torch.load_file"
    )
