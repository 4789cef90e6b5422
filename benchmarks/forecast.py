"""What ``mst_compile.forecast`` says before a run against what the run then takes: FLOPs and seconds.

    python -m benchmarks.forecast --steps 200 --threads 2

Compilation is in neither figure: a step that compiled is charged what the next one took.
"""

from __future__ import annotations

import argparse
import time

import torch

import mst_compile
from mst_compile.flops import Meter

from .ledger import record
from .schedule import _compilations, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=5, help="times that each density is measured for the forecast")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args)
    mst_compile.sparsify(model, mst_compile.MixedSparsity.published(args.steps, sparsity=args.sparsity))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss, backend="mst", dynamic=False)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(0, args.vocab, (args.batch, args.context), generator=generator)
    per_step = args.batch * args.context
    expected = mst_compile.forecast(
        model, tokens=args.steps * per_step, tokens_per_step=per_step, loss=lambda: compiled(batch), optimizer=optimizer
    )
    print(expected)
    meter, seconds, owed = Meter(model, per_step, rest=expected.rest), 0.0, 0
    for _ in range(args.steps):
        batch = torch.randint(0, args.vocab, (args.batch, args.context), generator=generator)
        compilations, start = _compilations(), time.perf_counter()
        meter.step()
        compiled(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if _compilations() > compilations:
            owed += 1
            continue
        seconds += (time.perf_counter() - start) * (1 + owed)
        owed = 0
    report(args, expected, meter, seconds)


def report(args: argparse.Namespace, expected: mst_compile.Forecast, meter: Meter, seconds: float) -> None:
    assert expected.seconds is not None
    case = f"gpt2 d={args.width} L={args.layers} V={args.vocab} T={args.context} batch={args.batch}"
    case += f" S={args.sparsity} steps={args.steps}"
    flops = expected.flops / meter.flops
    note = f"median_s: whole run; ratio: forecast to measured; FLOPs: forecast {expected.flops:.6g}"
    note += f", measured {meter.flops:.6g}, ratio {flops:.4f}"
    record("forecast", case, "measured", seconds, 1.0, args.steps, "float32", "median_s: whole run")
    record("forecast", case, "forecast", expected.seconds, expected.seconds / seconds, args.steps, "float32", note)
    print(f"FLOPs: forecast {expected.flops:.4g}, measured {meter.flops:.4g}: {flops:.4f}")
    print(f"seconds: forecast {expected.seconds:.1f}, measured {seconds:.1f}: {expected.seconds / seconds:.3f}")


if __name__ == "__main__":
    main()
