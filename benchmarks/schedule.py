"""A whole schedule of MixedSparsity against dense training: time, compilations, cost of the topology events.

    python -m benchmarks.schedule --steps 200 --threads 2                # the default schedule
    python -m benchmarks.schedule --steps 200 --threads 2 --published    # the paper's

Both models take each step in turn, so that noise hits them alike. Compilation is not counted in the times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import GPT2Config, GPT2LMHeadModel

import mst_compile

from .ledger import record


def build(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=args.width, n_layer=args.layers, n_head=args.width // 64, n_positions=args.context,
        vocab_size=args.vocab,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    return model


def stepper(model: nn.Module, backend: str) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(lambda ids: model(input_ids=ids, labels=ids).loss, backend=backend, dynamic=False)

    def step(ids: torch.Tensor) -> None:
        compiled(ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def time_events(sparsifier: mst_compile.Sparsifier) -> list[float]:
    """Wrap the topology work of a sparsifier; returns the list that its seconds go to."""
    spent: list[float] = []

    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object, **options: object) -> None:
            start = time.perf_counter()
            function(*args, **options)
            spent.append(time.perf_counter() - start)

        return run

    # step() holds the change of topology, before_step() the harvest of the growth scores that precedes it
    stepping = sparsifier._stepping
    stepping.step = timed(stepping.step)  # type: ignore[method-assign]
    stepping.before_step = timed(stepping.before_step)  # type: ignore[method-assign]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sparsity", type=float, help="of the plateau; default 0.8, published 0.9")
    parser.add_argument("--published", action="store_true", help="the paper's schedule")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense, sparse = build(args), build(args)
    make = mst_compile.MixedSparsity.published if args.published else mst_compile.MixedSparsity
    schedule = make(args.steps) if args.sparsity is None else make(args.steps, sparsity=args.sparsity)
    mst_compile.sparsify(sparse, schedule)
    events = time_events(mst_compile.sparsifier(sparse))
    steps = {"inductor": stepper(dense, "inductor"), "mst": stepper(sparse, "mst")}
    seconds = dict.fromkeys(steps, 0.0)
    counters.clear()
    generator = torch.Generator().manual_seed(1)
    for _ in range(args.steps):
        ids = torch.randint(0, args.vocab, (args.batch, args.context), generator=generator)
        for side, step in steps.items():
            compilations = _compilations()
            start = time.perf_counter()
            step(ids)
            if _compilations() == compilations:  # a step that compiled is not training time
                seconds[side] += time.perf_counter() - start
    report(args, schedule.sparsity, seconds, sum(events))


def _compilations() -> int:
    inductor = counters["inductor"]
    return inductor["fxgraph_cache_miss"] + inductor["fxgraph_cache_hit"] + inductor["fxgraph_cache_bypass"]


def report(args: argparse.Namespace, sparsity: float, seconds: dict[str, float], events: float) -> None:
    ratio = seconds["inductor"] / seconds["mst"]
    graphs = counters["stats"]["unique_graphs"]
    model = f"gpt2 d={args.width} L={args.layers} V={args.vocab} T={args.context} batch={args.batch}"
    case = f"{model} S={sparsity}{'' if args.published else ' default'} steps={args.steps}"
    record("schedule", case, "inductor", seconds["inductor"], 1.0, args.steps, "float32", "median_s: whole run")
    record("schedule", case, "mst", seconds["mst"], ratio, args.steps, "float32", "median_s: whole run")
    share = events / seconds["mst"]
    record(
        "schedule", case, "topology events", events, share, args.steps, "float32", "ratio: share of mst's training time"
    )
    print(f"{case}: dense {seconds['inductor']:.1f} s, mst {seconds['mst']:.1f} s: {ratio:.2f}x")
    print(f"topology events {events:.2f} s = {share:.2%} of the mst run")
    print(
        f"Dynamo graphs of both models {graphs}; Inductor graphs (forward and backward count apart) {_compilations()}"
    )


if __name__ == "__main__":
    main()
