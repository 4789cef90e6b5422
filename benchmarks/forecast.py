"""What ``mst_compile.forecast`` says before a run against what the run then takes: FLOPs and seconds.

    python -m benchmarks.forecast --steps 200 --threads 2

Compilation is in neither figure: a step that compiled is charged what the next one took. On a machine with other work
the sum of all steps measures that work too, so the steps are also summed robustly, as the median of each kind of step
times their number; and a second forecast after the run, from rates measured then, tells whether the machine changed.
Beside every fourth step the dense model takes one under Inductor: what the whole run gains against it is compared with
the gain that was forecast.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import mst_compile
from mst_compile.cost.flops import Meter
from mst_compile.cost.timeline import timeline
from mst_compile.rules.patterns import PATTERNS

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
    parser.add_argument("--published", action="store_true", help="the paper's schedule instead of the default one")
    parser.add_argument("--attention", choices=tuple(PATTERNS), default="full")
    parser.add_argument("--dry", action="store_true", help="print alone, write nothing to the ledger")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build(args)
    kind = mst_compile.MixedSparsity.published if args.published else mst_compile.MixedSparsity
    mst_compile.sparsify(model, kind(args.steps, sparsity=args.sparsity, attention=args.attention))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss, backend="mst", dynamic=False)
    generator = torch.Generator().manual_seed(1)
    per_step = args.batch * args.context

    def draw() -> torch.Tensor:
        return torch.randint(0, args.vocab, (args.batch, args.context), generator=generator)

    def ask() -> mst_compile.Forecast:
        batch, tokens = draw(), args.steps * per_step
        return mst_compile.forecast(
            model, tokens=tokens, tokens_per_step=per_step, loss=lambda: compiled(batch), optimizer=optimizer
        )

    plain = build(args)
    dense_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    dense_loss = torch.compile(lambda ids: plain(input_ids=ids, labels=ids).loss, dynamic=False)

    def dense_step() -> None:
        dense_loss(draw()).backward()
        dense_optimizer.step()
        dense_optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        dense_step()
    start = time.perf_counter()
    before = ask()
    print(f"{before}\n{before.rates}\nforecast in {time.perf_counter() - start:.1f} s, compilation included")
    meter = Meter(model, per_step, rest=before.rest, attention_saved=before.attention_saved)
    dense: list[float] = []
    seconds = train(model, optimizer, lambda: compiled(draw()), meter, args.steps, dense_step, dense)
    robust = robust_sum(model, before, seconds)
    start = time.perf_counter()
    after = ask()
    print(f"forecast in {time.perf_counter() - start:.2f} s, all compiled")
    report(args, before, meter, seconds, robust, after)
    gains(args, before, statistics.median(dense) * args.steps, robust)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    meter: Meter,
    steps: int,
    dense_step: Callable[[], None],
    dense: list[float],
) -> list[float]:
    """Train; returns the seconds of each step, a step that compiled at those of the next one. Beside every fourth a
    dense one is taken, whose seconds go into ``dense``."""
    found: list[float] = []
    owed = 0
    for step in range(steps):
        if step % 4 == 0:
            start = time.perf_counter()
            dense_step()
            dense.append(time.perf_counter() - start)
        compilations, start = _compilations(), time.perf_counter()
        meter.step()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if _compilations() > compilations:
            owed += 1
            continue
        found += [time.perf_counter() - start] * (1 + owed)
        owed = 0
    return found


def robust_sum(model: nn.Module, expected: mst_compile.Forecast, seconds: list[float]) -> float:
    """Seconds of all steps, each taken at the median of its kind: alike in density, gradients and events."""
    line = timeline(mst_compile.sparsifier(model), len(seconds))
    active, gradient = (values.repeat_interleave(line.stop - line.start) for values in (line.active, line.gradient))
    events = set(line.events)
    kinds: dict[tuple[object, ...], list[float]] = {}
    for phase in expected.phases:
        for step in range(phase.start, min(phase.stop, len(seconds))):
            dense_grad = bool(gradient[step] > active[step])
            key = (phase.name, round(float(active[step])), dense_grad, step + 1 in events)
            kinds.setdefault(key, []).append(seconds[step])
    return sum(statistics.median(found) * len(found) for found in kinds.values())


def gains(args: argparse.Namespace, expected: mst_compile.Forecast, dense: float, sparse: float) -> None:
    """Print and record the gain over dense training, forecast and measured by medians."""
    forecast, measured = expected.decision.speedup, dense / sparse
    assert forecast is not None
    print(f"dense over sparse: forecast {forecast:.3f}x, measured {measured:.3f}x ({dense:.2f} s, {sparse:.2f} s)")
    if not args.dry:
        note = f"median_s: whole dense run, a step's median; ratio: dense over sparse; forecast {forecast:.3f}"
        record("forecast", case_of(args), "dense", dense, measured, args.steps, "float32", note)


def case_of(args: argparse.Namespace) -> str:
    case = f"gpt2 d={args.width} L={args.layers} V={args.vocab} T={args.context} batch={args.batch}"
    case += f" S={args.sparsity}{' published' if args.published else ''} steps={args.steps}"
    return case + (f" attention={args.attention}" if args.attention != "full" else "")


def report(
    args: argparse.Namespace,
    expected: mst_compile.Forecast,
    meter: Meter,
    steps: list[float],
    robust: float,
    after: mst_compile.Forecast,
) -> None:
    seconds = sum(steps)
    assert expected.seconds is not None
    assert after.seconds is not None
    case = case_of(args)
    flops = expected.flops / meter.flops
    note = f"median_s: whole run; ratio: forecast to measured; FLOPs: forecast {expected.flops:.6g}"
    note += f", measured {meter.flops:.6g}, ratio {flops:.4f}"
    robustly = f"median_s: whole run, each step at the median of its kind; forecast after the run {after.seconds:.3f} s"
    for phase in expected.phases:
        took = sum(steps[phase.start : phase.stop])
        print(f"{phase.name}: forecast {phase.seconds:.2f} s, measured {took:.2f} s")
    print(f"FLOPs: forecast {expected.flops:.6g}, measured {meter.flops:.6g}: {flops:.5f}")
    print(f"seconds: forecast {expected.seconds:.2f}, measured {seconds:.2f}: {expected.seconds / seconds:.3f}")
    print(
        f"by medians: measured {robust:.2f}: {expected.seconds / robust:.3f}; forecast afterwards {after.seconds:.2f}"
    )
    if args.dry:
        return
    record("forecast", case, "measured", seconds, 1.0, args.steps, "float32", "median_s: whole run")
    record("forecast", case, "measured by medians", robust, seconds / robust, args.steps, "float32", robustly)
    record("forecast", case, "forecast", expected.seconds, expected.seconds / seconds, args.steps, "float32", note)


if __name__ == "__main__":
    main()
