"""A whole training step of an unmodified Hugging Face GPT-2, cross-entropy and fused AdamW included.

python -m benchmarks.train_step --config small --context 512 --batch 4 --sparsity 0.9 --threads 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import mst_compile

from .ledger import interleave, medians, print_table, record

CONFIGS = {
    "tiny": {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 4096},
    "small": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
}


def build(name: str, context: int) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        **CONFIGS[name], n_positions=context, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning that breaks Dynamo's graph in two
    return model


def stepper(model: nn.Module, backend: str, ids: torch.Tensor, dtype: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    compiled = torch.compile(loss_of, backend=backend, dynamic=False)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = compiled(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=tuple(CONFIGS), default="small")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--block", type=int, default=None)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", choices=("full", "local", "strided", "sparse", "fixed"), default="full")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense, sparse = build(args.config, args.context), build(args.config, args.context)
    schedule = mst_compile.Constant(args.sparsity, growth="none", attention=args.attention)
    mst_compile.sparsify(sparse, schedule, block=args.block)
    ids = torch.randint(0, dense.config.vocab_size, (args.batch, args.context))
    sides = {"inductor": stepper(dense, "inductor", ids, args.dtype), "mst": stepper(sparse, "mst", ids, args.dtype)}
    median = medians(interleave(sides, args.runs))
    ratio = median["inductor"] / median["mst"]
    density = mst_compile.sparsifier(sparse).density
    case = f"gpt2-{args.config} T={args.context} batch={args.batch} block={args.block or 'default'} d={density:.3f}"
    if args.attention != "full":
        case += f" attention={args.attention}"
    for side in sides:
        record("train_step", case, side, median[side], median["inductor"] / median[side], args.runs, args.dtype)
    print_table(("side", "seconds a step"), [(k, f"{v:.3f}") for k, v in median.items()])
    print(f"{case}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
