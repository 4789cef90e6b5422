"""What a product costs more in a graph with sparse products than in one with dense products alone.

Most of it is the operator around the kernel: found by the dispatcher or by generated code, its operands looked at, a
result allocated. A product that runs dense there has the operator around it as well, and a weight gradient is in
addition masked, and summed for the bias in a pass of its own, which Inductor fuses with others in its dense graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from mst_compile.kernels import cpu as kernels

from mst_compile.blocks.grid import BlockGrid
from mst_compile.ops.linear import DENSITY

from . import cpu_dense, cpu_times, tuning
from .cpu_threads import one_thread
from .cpu_times import COLS, GRAD_WEIGHT, Product

_ROUNDS = 9
_CACHE = 1 << 20  # floats; more than a core's own cache holds
_TICK = 1e-9


def asked(product: Product) -> Product:
    """What is measured for a product: of a weight's gradient itself, of other kinds one block and one token."""
    if product.kind == GRAD_WEIGHT:
        return product
    return product._replace(rows=product.block, cols=product.block, tokens=1)


def measure(product: Product) -> float:
    """Seconds; takes some milliseconds. Leaves random states, modes and gradients alone."""
    threads = torch.get_num_threads()
    with cpu_times.undisturbed(), one_thread():  # several wait for one that a busy machine has put aside
        seconds = _least_difference(*_operator(product))
        if product.kind == GRAD_WEIGHT:
            seconds += _of_gradient(product) / threads
    return max(seconds, _TICK)


def _operator(product: Product) -> tuple[Callable[[], object], Callable[[], object]]:
    """The operator and its kernel, of operands so small that little else counts."""
    block, dtype = product.block, product.dtype
    index = tuning.realistic_index(BlockGrid(block, block, block), 1.0, "cpu")
    x, y = (torch.zeros(1, block, dtype=dtype, device="cpu") for _ in range(2))
    weight = torch.zeros(block, block, dtype=product.weight_dtype, device="cpu")
    if product.kind == GRAD_WEIGHT:
        colsum = torch.zeros(block, dtype=torch.float32, device="cpu") if product.bias else None
        given = (product.weight_dtype, product.bias, DENSITY, False)
        return (
            lambda: torch.ops.mst.linear_grad_weight.default(y, x, index, block, False, *given),
            lambda: kernels.grad_weight(y, x, index, block, weight, colsum, True),
        )
    transposed, bias = product.kind == COLS, weight[0] if product.bias else None
    return (
        lambda: torch.ops.mst.linear.default(x, weight, bias, index, block, transposed, DENSITY, False),
        lambda: kernels.spmm(x, weight, bias, index, block, not transposed, y),
    )


def _of_gradient(product: Product) -> float:
    """What the library's gradient of a weight costs more with zeros in it, and with a bias's.

    At the density at which its time is taken: zeros between fine blocks may cost as much as the product.
    """
    rows, cols = cpu_times.part_of(product)
    grid = BlockGrid(rows, cols, product.block)
    tokens = cpu_times.tokens_of(product, grid)
    a, b = (torch.ones(tokens, n, dtype=product.dtype, device="cpu") for n in (rows, cols))
    out = torch.empty(rows, cols, dtype=product.weight_dtype, device="cpu")
    colsum = torch.empty(rows, dtype=torch.float32, device="cpu") if product.bias else None
    index = tuning.realistic_index(grid, cpu_times.DENSITIES[0], "cpu")
    whole = (product.rows * product.cols) / (rows * cols) * product.tokens / tokens

    def alone() -> object:
        return torch.mm(a.t(), b, out=out) if out.dtype == a.dtype else out.copy_(a.t() @ b)

    return whole * _least_difference(
        lambda: cpu_dense.grad_weight(a, b, index, product.block, out, colsum, True), alone
    )


def _least_difference(with_it: Callable[[], object], without: Callable[[], object]) -> float:
    """How much longer one takes than the other, each found by the processor as a product leaves it: code and operands
    are no longer in a core's own cache."""
    least = [float("inf")] * 2
    memory = torch.empty(_CACHE, dtype=torch.float32, device="cpu")
    for _ in range(_ROUNDS):
        for i, side in enumerate((with_it, without)):
            memory.zero_()
            start = time.perf_counter()
            side()
            least[i] = min(least[i], time.perf_counter() - start)
    return least[0] - least[1]
