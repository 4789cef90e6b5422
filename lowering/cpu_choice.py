"""Which product is faster on this CPU, ours or the library's dense one: measured where it is first asked.

A product of some shape, dtype, block and number of tokens is measured once (:mod:`.cpu_times`) and kept on disk, for
this processor, number of threads, instruction set, PyTorch and version of the kernels. Within a process an answer never
changes. Environment variable:

``MST_COMPILE_TIMES``
    a folder of measurements to go by, whatever machine they come from, and to add to: with it a run makes the same
    choices elsewhere as where it was first made
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from mst_compile.kernels import cpu as kernels

from . import cpu_times
from .agreement import first_answer, several_ranks
from .cpu_times import Product
from .device import WORTH, Layer, LayerTimes, Times
from .measured import Measurements, cache_folder

_UNKNOWN = Times(0.8 / WORTH, 0.0, 1.0)  # where nothing can be measured that all ranks would agree on

_lock = threading.RLock()
_known: dict[tuple[Product, int], Times] = {}  # product, threads -> what was measured


def of_product(product: Product) -> Times:
    """Seconds of a product, measured at the first call."""
    key = product, torch.get_num_threads()
    found = _known.get(key)
    if found is None:
        with _lock:
            found = _known.get(key)
            if found is None:
                found = _known[key] = _agreed(product)
    return found


def is_dense_faster(product: Product, active: int) -> bool:
    """Whether the dense product is the faster one of a weight with ``active`` of its blocks active."""
    blocks = -(-product.rows // product.block) * -(-product.cols // product.block)
    return active >= of_product(product).crossover * blocks


def times(layers: Sequence[Layer], _: bool) -> list[LayerTimes]:
    """Seconds of the products of each layer; of one that is not trained only the forward product is measured."""
    return [{name: of_product(product) for name, product in _products(layer).items()} for layer in layers]


def _products(layer: Layer) -> dict[str, Product]:
    grid, kinds = layer.grid, (cpu_times.ROWS, cpu_times.COLS)
    forward, back = reversed(kinds) if layer.transposed else kinds
    shape = grid.rows, grid.cols, grid.block, cpu_times.bucket(layer.tokens), layer.dtype, layer.weight_dtype
    found = {"forward": Product(forward, *shape)}
    if layer.trained:
        found["grad-input"] = Product(back, *shape)
        found["grad-weight"] = Product(cpu_times.GRAD_WEIGHT, *shape, layer.bias)
    return found


# ---- where times come from -------------------------------------------------------------------------------------------


def _agreed(product: Product) -> Times:
    if not several_ranks():
        return _own(product)
    answer = first_answer(_name(product), lambda: " ".join(map(repr, _own(product))))
    return _UNKNOWN if answer is None else Times(*map(float, answer.split()))


def _own(product: Product) -> Times:
    kept = _kept.find(_name(product))
    if kept is None:
        kept = cpu_times.measure(product)
        _kept.record(_name(product), kept)
    return Times(*kept)


def _name(product: Product) -> str:
    dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (product.dtype, product.weight_dtype))
    bias = " bias" if product.bias else ""
    return f"{product.rows}x{product.cols}-{product.block} {product.kind} {product.tokens} {dtypes}{bias}"


def _folder() -> Path:
    pinned = os.environ.get("MST_COMPILE_TIMES", "")
    return Path(pinned) if pinned else cache_folder(f"times-{_machine(torch.get_num_threads())}")


@functools.cache
def _machine(threads: int) -> str:
    """A name for all that times depend on."""
    parts = [kernels.processor_name(), kernels.choose_isa(), kernels.source_hash(), torch.__version__, str(threads)]
    parts += [f"{name}={os.environ.get(name, '')}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


_kept = Measurements(_folder, len(Times._fields))
