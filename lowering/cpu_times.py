"""How long a product takes on this machine: ours as a line over the density, and the library's dense one.

Machines are shared, so the sides are timed in turn and the least time of each counts. What is timed is cut to a size
that takes milliseconds: fewer tokens, and a part of a large weight, which costs our side a little, as its packing
of the weight is shared by fewer tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mst_compile.blocks.grid import BlockGrid

from . import cpu_dense, tuning
from .cpu_threads import one_thread
from .device import Times

ROWS, COLS, GRAD_WEIGHT = "rows", "cols", "grad-weight"

DENSITIES = (0.2, 0.7)
_TOKENS = 512  # a thread, beyond which times grow about in proportion
_MOST_TOKENS = 4096
_MOST_WEIGHTS = 2 << 20
_PROBE = 16  # tokens to find out with how slow a product is
_CALL_SECONDS = 0.05
_ROUNDS = 12
_SECONDS = 0.06  # after which no further round begins, if two calls of each side agree
_MOST_SECONDS = 0.2
_AGREE = 1.08
_CLEAR = 2.0  # how many times faster our side is at any density, that two rounds will do
_TICK = 1e-9


class Product(NamedTuple):
    """What decides the time of a product.

    Attributes:
        kind: :data:`ROWS`: outputs are the weight's rows; :data:`COLS`: its columns; :data:`GRAD_WEIGHT`.
        tokens: see :func:`bucket`.
        dtype: of activations and gradients. weight_dtype: of the weight, or its gradient.
        bias: whether a bias is added, or its gradient computed, in the same pass.
    """

    kind: str
    rows: int
    cols: int
    block: int
    tokens: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    bias: bool = False


def bucket(tokens: int) -> int:
    """The number of tokens to measure with in place of ``tokens``: a power of two, up to where times are proportional.

    More threads need more tokens to be kept busy.
    """
    most = _TOKENS
    while most < min(_MOST_TOKENS, _TOKENS * torch.get_num_threads()):
        most *= 2
    near = 1
    while near < most and 3 * near <= 2 * tokens:  # rounded to the nearer in ratio, about
        near *= 2
    return near


def measure(product: Product) -> Times:
    """Time a product, in seconds; takes about a tenth of one. Leaves random states, modes and gradients alone.

    What its call costs beside is not known here.
    """
    rows, cols = part_of(product)
    grid = BlockGrid(rows, cols, product.block)
    with undisturbed():
        tokens = tokens_of(product, grid)
        seconds = interleaved_sides(_sides(product, grid, tokens))
        threads = torch.get_num_threads()
        # Several threads on a busy machine wait at every product for the one that was put aside. Then one thread's
        # share of the work tells more.
        if threads > 1 and not _agree(seconds):
            tokens = max(1, tokens // threads)
            with one_thread():
                seconds = interleaved_sides(_sides(product, grid, tokens))
    dense, low, high = (min(times) for times in seconds)
    slope = max((high - low) / (DENSITIES[1] - DENSITIES[0]), _TICK)
    fixed = max(low - slope * DENSITIES[0], _TICK)
    scale = (product.rows * product.cols) / (rows * cols) * product.tokens / tokens
    return Times(dense * scale, fixed * scale, slope * scale)


def part_of(product: Product) -> tuple[int, int]:
    """Rows and columns of the weight to measure with."""
    rows, cols = product.rows, product.cols
    while rows * cols > _MOST_WEIGHTS:
        if rows >= cols:
            rows = -(-rows // 2 // product.block) * product.block
        else:
            cols = -(-cols // 2 // product.block) * product.block
    return rows, cols


def tokens_of(product: Product, grid: BlockGrid) -> int:
    """How many tokens to measure with: fewer where the dense product is slow, as in a dtype that the CPU lacks."""
    few = min(product.tokens, _PROBE)
    dense, threads = _sides(product, grid, few)[0], torch.get_num_threads()
    with one_thread():
        seconds = min(_seconds(dense) for _ in range(3)) / threads
    return max(few, min(product.tokens, int(_CALL_SECONDS / seconds * few)))


def _sides(product: Product, grid: BlockGrid, tokens: int) -> list[Callable[[], None]]:
    """The dense product, and ours at each of the densities."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = product.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    def empty(*shape: int, dtype: torch.dtype = product.dtype) -> Tensor:
        return torch.empty(shape, device="cpu", dtype=dtype)

    block = product.block
    indices = [tuning.realistic_index(grid, density, "cpu") for density in DENSITIES]
    if product.kind == GRAD_WEIGHT:
        a, b = random(tokens, grid.rows), random(tokens, grid.cols)
        out = empty(grid.rows, grid.cols, dtype=product.weight_dtype)
        colsum = empty(grid.rows, dtype=torch.float32) if product.bias else None
        return [
            lambda: cpu_dense.grad_weight(a, b, indices[0], block, out, colsum, True),
            *(lambda index=index: kernels.grad_weight(a, b, index, block, out, colsum, True) for index in indices),
        ]
    by_rows = product.kind == ROWS
    outputs, reduced = (grid.rows, grid.cols) if by_rows else (grid.cols, grid.rows)
    x, y = random(tokens, reduced), empty(tokens, outputs)
    weight = random(grid.rows, grid.cols, dtype=product.weight_dtype)
    bias = random(outputs, dtype=product.weight_dtype) if product.bias else None
    return [
        lambda: cpu_dense.linear(x, weight, bias, by_rows, y),
        *(lambda index=index: kernels.spmm(x, weight, bias, index, block, by_rows, y) for index in indices),
    ]


def interleaved_sides(sides: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call of the dense product and ours at the densities, in turn."""

    def clear(dense: float, _: float, high: float) -> bool:
        return high / DENSITIES[1] * _CLEAR < dense

    return interleaved(sides, clear)


def interleaved(sides: Sequence[Callable[[], object]], clear: Callable[..., bool]) -> list[list[float]]:
    """Seconds of each call of each side, taken in turn until they are known well enough.

    Args:
        clear: of the least times so far, whether two rounds will do.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    start = time.perf_counter()
    for turn in range(_ROUNDS):  # the first touches memory that is new
        for times, side in zip(seconds, sides, strict=True):
            times.append(_seconds(side))
        if not turn:
            continue
        spent = time.perf_counter() - start
        known = spent > _MOST_SECONDS or (spent > _SECONDS and _agree(seconds))
        if known or clear(*(min(times) for times in seconds)):
            break
    return seconds


def _agree(seconds: list[list[float]]) -> bool:
    """Whether the two fastest calls of each side took about as long."""
    return all(second < first * _AGREE for first, second in (sorted(times)[:2] for times in seconds))


def _seconds(side: Callable[[], object]) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Whoever asks may be compiling, counting, differentiating or casting."""
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield
