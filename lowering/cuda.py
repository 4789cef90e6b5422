"""The record of NVIDIA GPUs. They have no kernels in eager mode: Inductor generates all from templates."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mst_compile.kernels.triton.table import copied_times, grouped_shares
from torch import Tensor

from mst_compile.blocks.bulk import Average, Kind
from mst_compile.blocks.grid import TILE_BLOCK, BlockGrid

from . import crossover, device

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLOATS = (*_DTYPES, torch.float64)  # whose blocks kernels can measure
_MIN_HEAD, _MAX_HEAD, _MAX_HEAD_FLOAT32 = 16, 256, 128  # accumulators of larger ones do not fit the registers
_WIDEST = 8  # bytes of an element that kernels can write zeros to
_MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies


def why_unsupported(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: int) -> str | None:
    """Why there is no GPU kernel for these operands, or None if there is one."""
    reason = _why_no_kernels()
    if reason is not None:
        return f"no kernels: {reason}"
    if x_dtype not in _DTYPES or weight_dtype not in _DTYPES:
        return f"no GPU kernel for input {x_dtype}, weight {weight_dtype}"
    if block < TILE_BLOCK:
        return f"no GPU kernel for block {block}: the finest is {TILE_BLOCK}"
    return None


def why_no_attention(dtype: torch.dtype, size: int, value_size: int) -> str | None:
    """Why there is no GPU attention kernel for heads of these sizes in ``dtype``, or None if there is one."""
    reason = _why_no_kernels()
    if reason is not None:
        return f"no kernels: {reason}"
    largest = _MAX_HEAD_FLOAT32 if dtype == torch.float32 else _MAX_HEAD
    if dtype not in _DTYPES or not all(_MIN_HEAD <= n <= largest for n in (size, value_size)):
        return f"no GPU attention kernel for {device.heads_of(size, value_size)} in {dtype}"
    return None


@functools.cache
def _why_no_kernels() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the GPU kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    return None


def _c_compiler() -> str | None:
    """What Triton builds its launchers with, or None."""
    return _found(os.environ.get("CC"))


@functools.cache
def _found(named: str | None) -> str | None:
    if named:
        return named if shutil.which(named.split()[0]) else None
    return next(filter(shutil.which, ("gcc", "clang", "cc")), None)


def _why_absent() -> str | None:
    if torch.cuda.is_available():
        return None
    return "torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"


def _facts() -> list[device.Fact]:
    """GPU, Triton and the C compiler that Triton builds its launchers with."""
    properties = torch.cuda.get_device_properties(0)
    size = f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
    found = importlib.util.find_spec("triton") is not None
    version = importlib.metadata.version("triton") if found else "none"
    compiler = _c_compiler()
    return [
        device.Fact("GPU", f"{properties.name}, {size}, {capability}", _why_no_kernels()),
        device.Fact("triton", version, None if found else "install triton"),
        device.Fact(
            "C compiler",
            compiler or os.environ.get("CC") or "none",
            None if compiler else "Triton needs one: install gcc, or point CC to it",
        ),
    ]


class _Bulk:
    """Passes over whole weights, see :mod:`mst_compile.blocks.bulk`."""

    launches = True

    def __init__(self) -> None:
        self._works = False  # known once it does: it is asked of every weight at every step

    def takes(self, tensor: Tensor, grid: BlockGrid) -> bool:
        """A CUDA graph's capture cannot take the upload of a table, which has no address yet when it is replayed."""
        if not grid.tiled or tensor.stride(-1) != 1 or tensor.element_size() > _WIDEST:
            return False
        # Eager mode, which needs no compiler otherwise, is not to begin to.
        self._works = self._works or (_why_no_kernels() is None and _c_compiler() is not None)
        return self._works and not torch.cuda.is_current_stream_capturing()

    def zero_inactive_(self, tensors: Sequence[Tensor], indexes: Sequence[Tensor], grids: Sequence[BlockGrid]) -> None:
        from mst_compile.kernels.triton import zero  # where there is no triton, nothing is taken

        zero.zero_inactive_(tensors, indexes, grids)

    def measures(self, tensor: Tensor, kind: Kind) -> bool:
        return tensor.dtype in _FLOATS

    def measure(self, tensors: Sequence[Tensor], grids: Sequence[BlockGrid], kind: Kind) -> Tensor:
        from mst_compile.kernels.triton import measure

        return measure.measure(tensors, grids, kind)

    def begins(self, average: Average) -> bool:
        return average.gradient.dtype in _FLOATS and average.average.dtype in _FLOATS

    def begin(self, averages: Sequence[Average], scale: float) -> None:
        from mst_compile.kernels.triton import averages as kernel

        kernel.begin(averages, scale)


_LEAST = 1e-6  # a crossover that stands for 0, of products that are never faster sparse


def _times(layers: Sequence[device.Layer], tuned: bool) -> list[device.LayerTimes]:
    """One crossover for all weights of a graph that are no stacks, a bound for each stack. A graph's products are all
    dense or all sparse, so that their times have one unit: the operations of dense ones."""
    single = [layer.grid for layer in layers if not layer.dense]
    density = crossover.of_weights(single, tuned) if single else 1.0
    weight = 0.0, 1 / max(density, _LEAST)
    return [_of_layer(layer, *(_of_stack(layer) if layer.dense else weight)) for layer in layers]


def _of_stack(layer: device.Layer) -> tuple[float, float]:
    return grouped_shares(layer.grid, layer.tokens / max(1, layer.groups))


def _of_layer(layer: device.Layer, fixed: float, per_density: float) -> device.LayerTimes:
    """Times of a layer whose sparse products take ``fixed + per_density * density`` of what dense ones do."""
    dense = layer.grid.rows * layer.grid.cols * max(1, layer.tokens)
    more = copied_times(layer.weight_dtype.itemsize) if layer.dense == device.COPIES else 1
    times = device.Times(dense * more, device.WORTH * dense * fixed, device.WORTH * dense * per_density)
    return dict.fromkeys(device.PRODUCTS[: 3 if layer.trained else 1], times)


def _lowerings() -> Mapping[str, Callable[..., Any]]:
    from .gpu_inductor import LOWERINGS

    return LOWERINGS


device.register(
    device.Device(
        "cuda",
        why_unsupported=why_unsupported,
        why_no_attention=why_no_attention,
        times=_times,
        # At the default density of .2 the products of 4096 x 4096 take 1/1.97 of dense ones with blocks of 64 on an
        # H100, 1/1.24 with 32 (docs/gpu.md).
        default_block=64,
        finest_block=TILE_BLOCK,  # a coarse grid costs density, a finer one all that could be saved
        rounds_weights=True,  # tensor cores take two operands of one dtype
        multiplies_stacks=True,
        bulk=_Bulk(),
        lowerings=_lowerings,
        why_absent=_why_absent,
        facts=_facts,
    )
)
