"""One linear layer, forward and backward, ``backend="mst"`` against ``backend="inductor"``.

python -m benchmarks.layers --threads 2 --dtype float32 --blocks 8,32 --densities 1,.3,.2,.1
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from torch import nn

import mst_compile
from mst_compile.rules import masks
from mst_compile.rules.density import active_count

from .ledger import interleave, medians, print_table, record

SHAPES = ((768, 768), (768, 3072), (3072, 768))


def _step(layer: nn.Linear, backend: str, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
    compiled = torch.compile(layer, backend=backend, dynamic=False)

    def step() -> None:
        x.grad = layer.weight.grad = layer.bias.grad = None
        compiled(x).backward(grad)

    return step


def _sparse_layer(
    shape: tuple[int, int], dtype: torch.dtype, block: int, density: float
) -> tuple[nn.Linear, mst_compile.SparseWeight]:
    """A layer with random active blocks of just this size: sparsify alone would shrink a block that is too coarse."""
    layer = nn.Linear(*shape, dtype=dtype)
    mst_compile.sparsify(layer, mst_compile.Constant(0.5, growth="none"), block=block)
    sparsifier = mst_compile.sparsifier(layer)
    weight = sparsifier.weights["weight"]
    count = active_count(density, weight.grid.blocks, int(weight.backbone.sum()))
    sparsifier.apply_mask("weight", masks.random_mask(weight.backbone, count, masks.generator(0, 0, "weight")))
    return layer, weight


def measure(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, blocks: list[int], densities: list[float], runs: int
) -> list:
    """Rows (shape, block, density, milliseconds dense, milliseconds sparse, ratio) of one layer shape."""
    inputs, outputs = shape
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, outputs, dtype=dtype)
    rows = []
    for block, density in itertools.product(blocks, densities):
        torch._dynamo.reset()
        dense = nn.Linear(inputs, outputs, dtype=dtype)
        sparse, real = _sparse_layer(shape, dtype, block, density)
        sides = {"inductor": _step(dense, "inductor", x, grad), "mst": _step(sparse, "mst", x, grad)}
        median = medians(interleave(sides, runs))
        ratio = median["inductor"] / median["mst"]
        case = f"{inputs}->{outputs} M={tokens} B={real.grid.block} d={real.density:.3f}"
        record("layers", case, "mst", median["mst"], ratio, runs, str(dtype).removeprefix("torch."))
        rows.append((f"{inputs}->{outputs}", real.grid.block, f"{real.density:.3f}", f"{median['inductor'] * 1e3:.1f}",
                     f"{median['mst'] * 1e3:.1f}", f"{ratio:.2f}x"))  # fmt: skip
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--blocks", default="4,8,16,32,64")
    parser.add_argument("--densities", default="1,.3,.2,.1")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    blocks, densities = [int(b) for b in args.blocks.split(",")], [float(d) for d in args.densities.split(",")]
    rows = []
    for shape in SHAPES:
        rows += measure(shape, args.tokens, getattr(torch, args.dtype), blocks, densities, args.runs)
    print()
    print_table(("layer", "block", "density", "inductor ms", "mst ms", "speed-up"), rows)


if __name__ == "__main__":
    main()
