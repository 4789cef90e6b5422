"""CPU kernels against dense matrix products: forward + grad-input + grad-weight of one linear layer.

    python -m benchmarks.cpu_kernels --threads 1 2 --dtypes fp32 bf16 --densities .3 .1

Each sample runs the three dense products (``torch.mm`` into preallocated outputs) and the three sparse ones back to
back, so that a noisy machine disturbs both alike. A cell is the median over samples of dense time / sparse time. With
one thread times are the thread's CPU time, else wall-clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from mst_compile.kernels.cpu.library import Library
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "grad-input", "grad-weight")


class Layer:
    """Operands of one linear layer with weight ``[rows, cols]``, and its three products, dense and sparse."""

    def __init__(self, rows: int, cols: int, tokens: int, dtype: torch.dtype) -> None:
        self.rows, self.cols = rows, cols
        self.w = torch.randn(rows, cols, dtype=dtype)
        self.x, self.dy = torch.randn(tokens, cols, dtype=dtype), torch.randn(tokens, rows, dtype=dtype)
        self.y, self.dx, self.dw = torch.empty_like(self.dy), torch.empty_like(self.x), torch.empty_like(self.w)

    def dense(self) -> list[Callable[[], object]]:
        wt, dyt = self.w.t(), self.dy.t()
        return [
            lambda: torch.mm(self.x, wt, out=self.y),
            lambda: torch.mm(self.dy, self.w, out=self.dx),
            lambda: torch.mm(dyt, self.x, out=self.dw),
        ]

    def sparse(self, lib: Library, index: Tensor, block: int) -> list[Callable[[], object]]:
        return [
            lambda: lib.spmm(self.x, self.w, None, index, block, True, self.y),
            lambda: lib.spmm(self.dy, self.w, None, index, block, False, self.dx),
            lambda: lib.grad_weight(self.dy, self.x, index, block, self.dw),
        ]


def _times(calls: list[Callable[[], object]], clock: Callable[[], float]) -> list[float]:
    times = []
    for call in calls:
        start = clock()
        call()
        times.append(clock() - start)
    return times


def measure(layer: Layer, lib: Library, block: int, density: float, samples: int, threads: int) -> list[float]:
    """Median ratios dense / sparse: of the sum, then of each pass; last the sparse sum in milliseconds."""
    grid = BlockGrid(layer.rows, layer.cols, block)
    index = new_index(grid)
    mask = torch.zeros(grid.blocks, dtype=torch.bool)
    mask[torch.randperm(grid.blocks)[: max(1, round(density * grid.blocks))]] = True  # exactly this density
    write_index(index, grid, mask.view(grid.shape))
    dense, sparse = layer.dense(), layer.sparse(lib, index, block)
    clock = time.thread_time if threads == 1 else time.perf_counter
    pairs = [(_times(dense, clock), _times(sparse, clock)) for _ in range(samples + 1)][1:]
    ratios = [statistics.median(sum(d) / sum(s) for d, s in pairs)]
    ratios += [statistics.median(d[i] / s[i] for d, s in pairs) for i in range(3)]
    return [*ratios, statistics.median(sum(s) for _, s in pairs) * 1e3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", default=["768x768", "3072x768", "768x3072"], help="rows x cols of W")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=7)
    parser.add_argument("--isa", default=None, help="instruction set, see kernels/cpu/build.py")
    args = parser.parse_args()
    lib = Library(args.isa)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.tokens} tokens, median of {args.samples}, isa {args.isa or 'best'}")
    print("| threads | dtype | W | block | density | total | forward | grad-input | grad-weight | sparse ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtypes:
            for shape in args.shapes:
                rows, cols = map(int, shape.split("x"))
                layer = Layer(rows, cols, args.tokens, DTYPES[dtype])
                for block in args.blocks:
                    for density in args.densities:
                        *ratios, ms = measure(layer, lib, block, density, args.samples, threads)
                        cells = " | ".join(f"{r:.2f}x" for r in ratios)
                        print(
                            f"| {threads} | {dtype} | {shape} | {block} | {density} | {cells} | {ms:.1f} |", flush=True
                        )


if __name__ == "__main__":
    main()
