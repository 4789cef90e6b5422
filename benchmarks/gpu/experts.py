"""The three products of a mixture of experts: ours against PyTorch's grouped product, on the same tensors."""

from __future__ import annotations

import torch
from mst_compile.lowering import inductor  # noqa: F401  (registers the lowerings)
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index
from mst_compile.ops import grouped as ops
from mst_compile.rules import masks
from mst_compile.rules.density import active_count
from mst_compile.rules.guard import backbone

from .layers import Layer, compare, compiled, densities_of
from .plan import ExpertsCell
from .report import Run
from .timing import Call

BENCHMARK = "gpu_experts"


class Stack(Layer):
    """Operands of experts with a weight ``[n, k]`` each, and ``m`` rows that went to them as a router sends them."""

    benchmark = BENCHMARK

    def __init__(self, cell: ExpertsCell, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.block = cell.block
        self.library = "torch._grouped_mm" if dtype == torch.bfloat16 else "torch.mm of each"
        self.grid = BlockGrid.over((cell.experts, cell.n, cell.k), cell.block)
        self.index = new_index(self.grid, device)
        self.x, self.grad, self._values = normal(cell.m, cell.k), normal(cell.m, cell.n), normal(*self.grid.dims)
        self.weight = torch.empty_like(self._values)
        self.mask = torch.zeros(self.grid.shape, dtype=torch.bool)
        self.sizes = _routed(cell.m, cell.experts)
        self.offsets = torch.tensor(self.sizes).cumsum(0).to(device, torch.int32)

    def set_density(self, density: float) -> None:
        """For each matrix a random mask of this density that leaves no block row or column empty, written in place."""
        matrix = self.grid.matrix
        spine = backbone(matrix.shape)
        count = active_count(density, matrix.blocks, int(spine.sum()))
        drawn = (masks.generator(0, e, "benchmark") for e in range(self.grid.count))
        self.mask = torch.cat([masks.random_mask(spine, count, generator) for generator in drawn])
        write_index(self.index, self.grid, self.mask)
        self.weight.copy_(self._values * self._inside())

    def _inside(self) -> Tensor:
        return super()._inside().view(self.grid.dims)

    def dense(self) -> dict[str, Call]:
        x, grad, weight, offsets = self.x, self.grad, self.weight, self.offsets
        if x.dtype == torch.bfloat16:
            return {
                "forward": lambda: torch._grouped_mm(x, weight.mT, offs=offsets),
                "grad-input": lambda: torch._grouped_mm(grad, weight, offs=offsets),
                "grad-weight": lambda: torch._grouped_mm(grad.t(), x, offs=offsets),
            }
        parts = list(zip(x.split(self.sizes), grad.split(self.sizes), weight, strict=True))
        return {  # on a CPU, to try the program
            "forward": lambda: [a @ w.t() for a, _, w in parts],
            "grad-input": lambda: [g @ w for _, g, w in parts],
            "grad-weight": lambda: [g.t() @ a for a, g, _ in parts],
        }

    def reference(self) -> dict[str, Tensor]:
        x, grad, weight = self.x.float(), self.grad.float(), self.weight.float()
        given = self.offsets, self.index, self.block, False
        return {
            "forward": ops.grouped_linear_reference(x, weight, *given),
            "grad-input": ops.grouped_grad_input_reference(grad, weight, *given),
            "grad-weight": ops.grouped_grad_weight_reference(grad, x, *given, torch.float32),
        }


def _routed(rows: int, experts: int) -> list[int]:
    """How many rows go to each: some half as many again as others."""
    share = torch.linspace(0.8, 1.2, experts)
    ends = (share.cumsum(0) / share.sum() * rows).round().long()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.long)).tolist()


def ours(stack: Stack, tuned_for: float) -> dict[str, Call]:
    """The operators as Inductor compiles them, each by itself, made for a density; compiled at their first call."""
    block, dtype = stack.block, stack.weight.dtype

    def linear(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.grouped_linear(x, weight, offsets, index, block, False, tuned_for)

    def grad_input(grad: Tensor, weight: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.grouped_linear_grad_input(grad, weight, offsets, index, block, False, tuned_for)

    def grad_weight(grad: Tensor, x: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.grouped_linear_grad_weight(grad, x, offsets, index, block, False, dtype, tuned_for)

    given = stack.offsets, stack.index
    return {
        "forward": compiled(linear, stack.x, stack.weight, *given),
        "grad-input": compiled(grad_input, stack.grad, stack.weight, *given),
        "grad-weight": compiled(grad_weight, stack.grad, stack.x, *given),
    }


@torch.no_grad()
def measure(cell: ExpertsCell, run: Run) -> None:
    """Compile once, then check and time every density."""
    stack = Stack(cell, run.device, run.dtype)
    calls = ours(stack, cell.tuned_for)
    for density in densities_of(cell, stack, run, "mst"):
        compare(cell, stack, run, density, "mst", calls)
