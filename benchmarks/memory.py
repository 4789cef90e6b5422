"""Peak memory of training, each side in a process of its own.

python -m benchmarks.memory --config small --context 512 --batch 4
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch

from .ledger import record

STEPS = 4


def child(args: argparse.Namespace) -> None:
    """Train a few steps and print the peak of resident memory in MiB."""
    import mst_compile

    from .train_step import build, stepper

    torch.set_num_threads(args.threads)
    model = build(args.config, args.context)
    if args.side == "mst":
        mst_compile.sparsify(
            model, mst_compile.MixedSparsity.published(STEPS, warmup=1, restoration=1, settle=1, sparsity=args.sparsity)
        )
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.context))
    step = stepper(model, args.side, ids, "float32")
    for _ in range(STEPS):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="small")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("inductor", "mst"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        child(args)
        return
    peak = {}
    for side in ("inductor", "mst"):
        command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--side", side]
        peak[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    ratio = peak["mst"] / peak["inductor"]
    case = f"gpt2-{args.config} T={args.context} batch={args.batch} S={args.sparsity}, all three phases"
    for side in peak:
        record("memory", case, side, peak[side], peak[side] / peak["inductor"], 1, "float32",
               "median_s: peak MiB; ratio: of dense")  # fmt: skip
    print(f"{case}: dense {peak['inductor']:.0f} MiB, mst {peak['mst']:.0f} MiB: {ratio:.3f}x")


if __name__ == "__main__":
    main()
