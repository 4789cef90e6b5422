"""Every kind of layer at every density against the dense model, with default options: is it ever slower?

    python -m benchmarks.never_slower                          # some minutes, a cell a line, the worst ones at the end
    python -m benchmarks.never_slower --dtype bfloat16 --shapes 256x1024,768x768 --blocks 8

One layer, forward and backward with bias, ``backend="mst"`` against ``backend="inductor"`` in turn. Products run dense
or sparse as was measured on this machine; times are measured anew where ``MST_COMPILE_TIMES`` names an empty folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import nn

import mst_compile
from mst_compile.rules import masks
from mst_compile.rules.density import active_count

from .layers import _step
from .ledger import interleave, medians, print_table, record

SHAPES = "256x256,256x1024,768x768,768x3072,3072x768,1024x4096,4096x4096"
DENSITIES = "1,.9,.8,.7,.6,.5,.4,.3,.2,.1,.05"


def cells(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, block: int, densities: list[float], runs: int
) -> Iterator[tuple[float, float, float, str]]:
    """Density, seconds dense and of ours, and which products ran dense, of a layer whose masks change in place."""
    inputs, outputs = shape
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, outputs, dtype=dtype)
    dense, layer = (nn.Linear(inputs, outputs, dtype=dtype) for _ in range(2))
    mst_compile.sparsify(layer, mst_compile.Constant(0.5, growth="none"), block=block)
    own = mst_compile.sparsifier(layer)
    weight = own.weights["weight"]
    sides = {"inductor": _step(dense, "inductor", x, grad), "mst": _step(layer, "mst", x, grad)}
    for density in densities:
        count = active_count(density, weight.grid.blocks, int(weight.backbone.sum()))
        own.apply_mask("weight", masks.random_mask(weight.backbone, count, masks.generator(0, 0, "weight")))
        median = medians(interleave(sides, runs))
        what = "all" if weight.uses.dense_now else ", ".join(weight.uses.dense_products)
        yield weight.density, median["inductor"], median["mst"], what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shapes", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--blocks", default="4,8,32")
    parser.add_argument("--densities", default=DENSITIES)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    densities, rows = [float(d) for d in args.densities.split(",")], []
    for shape in args.shapes.split(","):
        for block in map(int, args.blocks.split(",")):
            inputs, outputs = map(int, shape.split("x"))
            tokens = max(64, min(args.tokens, 1 << 33 >> (inputs * outputs).bit_length()))
            dtype = getattr(torch, args.dtype)
            for density, dense, ours, what in cells((inputs, outputs), tokens, dtype, block, densities, args.runs):
                case = f"{inputs}->{outputs} M={tokens} B={block} d={density:.3f}"
                note = f"dense products: {what or 'none'}"
                record("never_slower", case, "mst", ours, dense / ours, args.runs, args.dtype, note)
                rows.append((f"{dense / ours:.2f}", case, what))
                print(*rows[-1], flush=True)
    rows.sort(key=lambda row: float(row[0]))
    below = sum(float(row[0]) < 0.95 for row in rows)
    print(f"\n{len(rows)} cells, {below} below 0.95; the worst:")
    print_table(("ratio", "layer", "dense products"), rows[:12])


if __name__ == "__main__":
    main()
