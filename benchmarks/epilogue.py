"""What fusing an activation into the sparse product could save at most: a layer, the same with GELU, and GELU alone.

    python -m benchmarks.epilogue --threads 2

Fused, the activation would still be computed and its result still be written; saved would be reading the
pre-activation back from memory. The upper bound is the time of a pass that only reads it.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import mst_compile

from .ledger import interleave, medians, record

TOKENS, INPUTS, OUTPUTS = 2048, 768, 3072  # the widest activation of GPT-2 small at 4 x 512 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    layer = nn.Linear(INPUTS, OUTPUTS)
    mst_compile.sparsify(layer, mst_compile.Constant(0.9, growth="none"))
    plain = torch.compile(layer, backend="mst")
    fused = torch.compile(lambda x: torch.nn.functional.gelu(layer(x), approximate="tanh"), backend="mst")
    x, y = torch.randn(TOKENS, INPUTS), torch.randn(TOKENS, OUTPUTS)
    with torch.no_grad():
        sides = {"layer": lambda: plain(x), "layer + gelu": lambda: fused(x), "read": lambda: y.sum()}
        median = medians(interleave(sides, args.runs))
    share = median["read"] / median["layer + gelu"]
    case = f"{INPUTS}->{OUTPUTS} M={TOKENS} forward d=0.1"
    for side, seconds in median.items():
        record("epilogue", case, side, seconds, seconds / median["layer + gelu"], args.runs, "float32",
               "ratio: share of layer + gelu")  # fmt: skip
    print({side: f"{seconds * 1e3:.2f} ms" for side, seconds in median.items()})
    print(f"fusing GELU into the product saves at most {share:.1%} of the layer's forward pass")


if __name__ == "__main__":
    main()
