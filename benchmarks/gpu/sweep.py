"""Times of tiles that the autotuner does not offer yet, each product by itself: what to add to tiles.py, and why.

    python -m benchmarks.gpu.sweep --blocks 128,64,32 --densities .1,.3 --out tiles.csv

One line a tile: block, density, product, the template's constants, milliseconds, and TFLOP/s in active blocks. A tile
that does not compile has no line. Times are the autotuner's own: one ``do_bench`` each.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from mst_compile.kernels.triton import tiles
from mst_compile.kernels.triton.tiles import GemmTile, GradWeightTile
from mst_compile.lowering import compat
from torch._inductor import config as inductor_config
from torch._inductor import utils as inductor_utils

from .layers import Layer, ours
from .plan import GOAL, LayerCell
from .tuning import product_of, tile_of

# What was timed on an H100 and lost by more than a tenth is not here: runs of 26 and 27 November 2026, docs/gpu.md.
_GEMM = {
    128: [
        GemmTile(128, 64, 4, 3), GemmTile(128, 32, 4, 4), GemmTile(256, 64, 8, 3, chain=2),
        GemmTile(256, 64, 8, 4, tma=True), GemmTile(256, 64, 8, 3, chain=4, tma=True),
        GemmTile(256, 64, 16, 3, chain=2, tma=True),
    ],
    64: [
        GemmTile(128, 64, 4, 2), GemmTile(128, 64, 8, 3), GemmTile(128, 32, 4, 4), GemmTile(256, 64, 4, 2),
        GemmTile(256, 64, 8, 2),
    ],
    32: [GemmTile(256, 32, 4, 3), GemmTile(256, 32, 8, 3), GemmTile(128, 32, 4, 3)],
}  # fmt: skip
_GRAD_WEIGHT = {
    128: [GradWeightTile(1, 32, 4, 4), GradWeightTile(1, 128, 8, 3), GradWeightTile(1, 64, 4, 2)],
    64: [
        GradWeightTile(2, 64, 4, 4), GradWeightTile(2, 64, 8, 3), GradWeightTile(2, 64, 4, 2),
        GradWeightTile(4, 32, 8, 4), GradWeightTile(4, 64, 8, 3),
    ],
    32: [
        GradWeightTile(8, 64, 4, 3), GradWeightTile(8, 32, 4, 2), GradWeightTile(8, 32, 4, 4),
        GradWeightTile(16, 32, 8, 4), GradWeightTile(16, 32, 8, 3), GradWeightTile(4, 64, 4, 2),
        GradWeightTile(4, 128, 4, 2),
    ],
}  # fmt: skip


class Table:
    """Writes a line for each timing that the autotuner reports."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", newline="", buffering=1)
        self._writer = csv.writer(self._file, lineterminator="\n")
        self.cell: LayerCell | None = None

    def note(self, timings: dict[Any, float], name: str = "", *_: Any) -> None:
        cell = self.cell
        if cell is None:
            return
        active = 2e-9 * cell.m * cell.n * cell.k * cell.tuned_for
        for choice, milliseconds in sorted(timings.items(), key=lambda item: item[1]):
            figures = f"{milliseconds:.4f}", f"{active / milliseconds:.0f}"
            row = cell.block, cell.tuned_for, name, product_of(choice), tile_of(choice), *figures
            self._writer.writerow(row)
            print(*row, flush=True)


def _offer(block: int) -> None:
    for table, more in ((tiles.GEMM, _GEMM), (tiles.GRAD_WEIGHT, _GRAD_WEIGHT)):
        known = table[block, "half"]
        known += [tile for tile in more[block] if tile not in known]  # type: ignore[operator, attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="128,64,32")
    parser.add_argument("--densities", default=".1,.3")
    parser.add_argument("--products", default="forward,grad-input,grad-weight")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default=",".join(map(str, GOAL)), help="M,N,K")
    parser.add_argument("--out", type=Path, default=Path("tiles.csv"))
    args = parser.parse_args()
    m, n, k = map(int, args.size.split(","))
    # The crossovers that training looks up are of the tiles that training has.
    os.environ["MST_COMPILE_CACHE_DIR"] = tempfile.mkdtemp(prefix="mst-sweep-")
    table = Table(args.out)
    compat.on_tuned(table.note)
    device = torch.device(args.device)
    for block in map(int, args.blocks.split(",")):
        _offer(block)
        for density in map(float, args.densities.split(",")):
            table.cell = LayerCell(m, n, k, block, (density,), density)
            layer = Layer(table.cell, device, torch.bfloat16)
            layer.set_density(density)
            torch._dynamo.reset()
            with inductor_utils.fresh_cache(), inductor_config.patch(max_autotune_gemm=True), torch.no_grad():
                for name, call in ours(layer, density).items():
                    if name not in args.products.split(","):
                        continue
                    try:
                        call()
                    except Exception as error:
                        print(f"FAILED {block} {density} {name}: {error}"[:300], flush=True)


if __name__ == "__main__":
    main()
