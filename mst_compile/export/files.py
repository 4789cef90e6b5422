"""A safetensors file of a sparse model that holds its masks."""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import glob
import json
import os
import re
import uuid
import zlib
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor, nn

from mst_compile.api import sparsify
from mst_compile.blocks.grid import BlockGrid
from mst_compile.errors import ArgumentError, CheckpointError, MaskError, MissingPackageError, WriteError
from mst_compile.rules.checks import check_instance, check_model, shown
from mst_compile.rules.constant import Constant
from mst_compile.state.selection import Override
from mst_compile.state.sparsifier import parts_of, some_parts_of
from mst_compile.state.weight import SparseWeight

from .copies import active, unwrapped, weights_of

_KEY, _VERSION = "mst_compile", 1
_MOST_BYTES = 90 << 20  # of masks in a header, which may have 100 MB
_COMPILED = "_orig_mod."


def save(model: nn.Module, path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a sparse model's state dict to a safetensors file, with its masks in the metadata.

    Names, shapes and values are those of the plain model, which can read the file without us
    (``safetensors.torch.load_file``); tensors that share memory are written once. :func:`load` also brings back the
    masks. The metadata ``"mst_compile"`` is JSON::

        {"version": 1,
         "tied": {name that is not in the file: name that is},
         "masks": {weight: {"block": edge, "blocks": [R, C], "active": base64 of zlib of bits}}}

    with a bit for each block, row by row, the first in the highest place of a byte. A block that holds values outside
    the mask, as in an average over several topologies, counts as active. A file that is there stays until all of the
    new one is written, whatever interrupts that.

    Args:
        metadata: more to write beside it, texts by name.

    Raises:
        ArgumentError: ``metadata`` is no mapping of texts, or has the name ``"mst_compile"`` itself.
        NotSparseError: the model is not sparse.
        CheckpointError: it holds something that is no tensor, or more masks than the format has room for.
        WriteError: the file cannot be written.
        MissingPackageError: safetensors is not installed.
    """
    check_model("save", model)
    some_parts_of(model)
    more = _checked(metadata)
    files = _safetensors()
    tensors, tied = _tensors(model)
    masks = {name: _written(weight, active(weight, parameter)) for name, weight, parameter in weights_of(model)}
    text = json.dumps({"version": _VERSION, "tied": tied, "masks": masks})
    if len(text) > _MOST_BYTES:
        raise CheckpointError(
            f"the masks take {len(text) >> 20} MB and a safetensors header has room for 100: sparsify with larger "
            "blocks, or save sparsifier(model).state_dict() with torch.save"
        )
    target = os.path.realpath(path)  # of a link, what it leads to
    draft = f"{target}.{uuid.uuid4().hex}.tmp"  # a name that no file of the user's has, nor another process's draft
    try:
        files.save_file(tensors, draft, {"format": "pt", **more, _KEY: text})
        os.replace(draft, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _unwritten(target, error) from error
        raise


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
    root = unwrapped(model)
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


def _unwritten(target: str, error: BaseException) -> WriteError:
    """The error of a file that the system does not take; safetensors tells what that said as a text."""
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else errno.EIO
    reason = os.strerror(number) if number else error
    return WriteError(number, f"{target!r} cannot be written, and is as it was: {reason}")


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


def _checked(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """A user's metadata; raises :class:`ArgumentError` if there cannot be such."""
    check_instance("metadata", metadata, Mapping | None, "a mapping of names to texts")
    for name, value in (metadata or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise ArgumentError(
                f"metadata must be texts by name, got {shown(name)}: {shown(value)}; pass json.dumps of what is none"
            )
        if name == _KEY:
            raise ArgumentError(f"metadata[{_KEY!r}] is where the masks are written; give yours another name")
    return dict(metadata or {})


# ---- models ----------------------------------------------------------------------------------------------------------


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
    own = {name: tuple(weight.grid.shape) for name, weight, _ in weights_of(model)}
    if own != masks:
        name = min(name for name in own.keys() | masks.keys() if own.get(name) != masks.get(name))
        raise CheckpointError(
            f"{fspath(path)} does not fit the sparse model: {name} has {masks.get(name, 'no')} blocks there and "
            f"{own.get(name, 'no')} here. Load it into the plain model, which becomes sparse as the file is"
        )


# ---- tensors and masks -----------------------------------------------------------------------------------------------


def _written(weight: SparseWeight, mask: Tensor) -> dict[str, Any]:
    bits = mask.flatten().to("cpu", torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    packed = (bits << torch.arange(7, -1, -1, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)
    text = base64.b64encode(zlib.compress(bytes(packed.tolist()))).decode()
    return {"block": weight.grid.block, "blocks": list(weight.grid.shape), "active": text}


def _read_mask(name: str, entry: Any, tensors: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The mask and block of a weight.

    Raises:
        MaskError: it is no mask of the weight's blocks.
    """
    try:
        block = int(entry["block"])
        grid = BlockGrid.over(tensors[name].shape, block)
        data = zlib.decompress(base64.b64decode(entry["active"], validate=True))
        count = grid.blocks
        if tuple(entry["blocks"]) != tuple(grid.shape) or len(data) != -(-count // 8):
            raise ValueError(f"{entry['blocks']} blocks of {block} do not make up {tuple(tensors[name].shape)}")
    except (KeyError, TypeError, ValueError, zlib.error, binascii.Error) as error:
        raise MaskError(f"the mask of {name} in the file cannot be read: {error!r}; save the model again") from error
    packed = torch.tensor(list(data), dtype=torch.uint8, device="cpu")[:, None]
    bits = (packed >> torch.arange(7, -1, -1, dtype=torch.uint8, device="cpu")) & 1
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
