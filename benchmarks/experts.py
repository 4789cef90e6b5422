"""A product of experts, a stack of matrices in one Parameter, forward and backward: ``backend="mst"`` against
``backend="inductor"``, which runs what transformers does (PyTorch's grouped product in bfloat16, an operator of the
library's own in float32), and a loop of dense products under Inductor for group sizes that never change.

python -m benchmarks.experts --threads 2 --dtype bfloat16 --experts 8,64 --densities 1,.5,.2,.1
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers.integrations.moe as _moe  # noqa: F401  (defines an operator)
from torch import Tensor, nn

import mst_compile
from mst_compile.rules import masks
from mst_compile.rules.density import active_count

from .ledger import interleave, medians, print_table, record


class Experts(nn.Module):
    """``experts`` matrices ``[out, in]``; rows come sorted by expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(experts, outputs, inputs, dtype=dtype) / inputs**0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return nn.functional.grouped_mm(x, self.w.transpose(-2, -1), offs=ends)
        return torch.ops.transformers.grouped_mm_fallback(x, self.w.transpose(-2, -1), ends)  # type: ignore[no-any-return]


class Loop(Experts):
    """The same of groups whose sizes are known."""

    def __init__(self, sizes: list[int], *of_experts: int, dtype: torch.dtype) -> None:
        super().__init__(len(sizes), *of_experts, dtype=dtype)
        self.sizes = sizes

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.cat([nn.functional.linear(rows, w) for rows, w in zip(x.split(self.sizes), self.w, strict=True)])


def _step(model: Experts, backend: str, x: Tensor, ends: Tensor, grad: Tensor) -> Callable[[], None]:
    compiled = torch.compile(model, backend=backend, dynamic=False)

    def step() -> None:
        x.grad = model.w.grad = None
        compiled(x, ends).backward(grad)

    return step


def _set_density(model: Experts, density: float) -> float:
    sparsifier = mst_compile.sparsifier(model)
    weight = sparsifier.weights["w"]
    count = active_count(density, weight.grid.blocks, int(weight.backbone.sum()))
    sparsifier.apply_mask("w", masks.random_mask(weight.backbone, count, masks.generator(0, 0, "w")))
    return weight.density


def measure(
    experts: int, shape: tuple[int, int], tokens: int, dtype: torch.dtype, block: int, densities: list[float], runs: int
) -> list:
    """Rows (experts, density, milliseconds of Inductor, of the loop and ours, and what both took in ours)."""
    inputs, outputs = shape
    torch.manual_seed(0)
    torch._dynamo.reset()
    sizes = torch.bincount(torch.randint(experts, (tokens,)), minlength=experts)
    ends = sizes.cumsum(0).int()
    x = torch.randn(tokens, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, outputs, dtype=dtype)
    sparse = Experts(experts, *shape, dtype)
    mst_compile.sparsify(sparse, mst_compile.Constant(0.5, growth="none"), block=block, include="w")
    sides = {
        "inductor": _step(Experts(experts, *shape, dtype), "inductor", x, ends, grad),
        "loop": _step(Loop(sizes.tolist(), *shape, dtype=dtype), "inductor", x, ends, grad),
        "mst": _step(sparse, "mst", x, ends, grad),
    }
    rows = []
    for density in densities:
        real = _set_density(sparse, density)
        median = medians(interleave(sides, runs))
        ratios = [median[side] / median["mst"] for side in ("inductor", "loop")]
        case = f"{experts} experts {inputs}->{outputs} M={tokens} B={block} d={real:.3f}"
        note = f"{ratios[1]:.3f} times a loop of dense products"
        record("experts", case, "mst", median["mst"], ratios[0], runs, str(dtype).removeprefix("torch."), note)
        rows.append((experts, f"{real:.3f}", *(f"{median[side] * 1e3:.1f}" for side in sides),
                     *(f"{ratio:.2f}x" for ratio in ratios)))  # fmt: skip
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--experts", default="8,64")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--densities", default="1,.5,.2,.1")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, densities = [], [float(d) for d in args.densities.split(",")]
    for experts in map(int, args.experts.split(",")):
        shape = args.inputs, args.outputs
        rows += measure(experts, shape, args.tokens, getattr(torch, args.dtype), args.block, densities, args.runs)
    print()
    print_table(("experts", "density", "inductor ms", "loop ms", "mst ms", "speed-up", "over the loop"), rows)


if __name__ == "__main__":
    main()
