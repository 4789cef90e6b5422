"""Which learning rate suits Muon on sparse weights: a small byte-level GPT under a static 80 % mask, and dense.

python -m benchmarks.muon DIR        # train.txt and val.txt, or .xz, from examples/quality/corpus.py

Hidden matrices are Muon's, everything else AdamW's. Every run prints a line; at the end stands the table, rate factors
by seeds. It also prints what Muon's update is on the active elements: its RMS, and its spectral norm after masking.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import _muon

import mst_compile
from examples.quality.model import GPT, hidden_weights
from examples.quality.sizes import Study
from examples.quality.training import Text, evaluate, training_batch, validation_batches

FACTORS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.24, 5.0)  # of the dense model's rate; the last is 1 / density
COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz as in ``torch.optim.Muon``, in float32: many CPUs multiply bfloat16 ten times as slowly."""
    a, b, c = coefficients
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def rates(study: Study) -> Iterator[float]:
    """Warm-up, plateau, linear decay to 0."""
    warm, decay = max(1, round(study.warmup * study.steps)), max(1, round(study.decay * study.steps))
    for step in range(study.steps):
        yield min(1.0, (step + 1) / warm, (study.steps - step) / decay)


def looks(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
    """RMS and spectral norm of Muon's updates on active elements; 1 is what the RMS is in a dense model."""
    sizes, norms = [], []
    for p in weights:
        update = orthogonalised(optimizer.state[p]["momentum_buffer"], COEFFICIENTS, 5, 1e-7)
        active = p.detach() != 0
        sizes.append(update[active].square().mean().sqrt().item() * max(p.shape) ** 0.5)
        norms.append(torch.linalg.matrix_norm(update * active, 2).item() / torch.linalg.matrix_norm(update, 2).item())
    return f"update on active elements: RMS {sum(sizes) / len(sizes):.2f}, norm {sum(norms) / len(norms):.2f}"


def train(study: Study, text: Text, seed: int, rate: float, sparsity: float, block: int) -> tuple[float, str]:
    """Validation loss after a run, and what :func:`looks` saw in its middle."""
    torch.manual_seed(seed)
    model = GPT(study.shape)
    if sparsity:
        schedule = mst_compile.Constant(sparsity, growth="none", total_steps=study.steps)
        mst_compile.sparsify(model, schedule, block=block, exclude="head", seed=seed)
    hidden = [p for _, p in hidden_weights(model) if isinstance(p, nn.Parameter)]
    ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(hidden, lr=rate, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=study.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    seen = ""
    for step, factor in enumerate(rates(study)):
        x, y = training_batch(text.train, study, seed, step)
        loss: Tensor = model(x, y)
        loss.backward()
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate * factor, study.learning_rate * factor
        muon.step()
        adam.step()
        if step == study.steps // 2:
            seen = looks(hidden, muon)
        model.zero_grad()
    return evaluate(model, validation_batches(text.validation, study), study), seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--dense-rates", type=float, nargs="*", default=[0.0025, 0.005, 0.01, 0.02, 0.04])
    parser.add_argument("--rate", type=float, default=0.01, help="the dense model's, which factors multiply")
    parser.add_argument("--factors", type=float, nargs="*", default=FACTORS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    _muon._zeropower_via_newtonschulz = orthogonalised
    study = Study(width=args.width, heads=4, context=64, steps=args.steps, dtype="float32", validation_batches=40)
    files = [next(args.corpus.glob(f"{name}.txt*")) for name in ("train", "val")]
    text = Text.load(*files)
    rows = [(f"dense, rate {rate:g}", rate, 0.0) for rate in args.dense_rates]
    rows += [(f"{args.sparsity:.0%} sparse, rate x {f:g}", args.rate * f, args.sparsity) for f in args.factors]
    table = []
    for name, rate, sparsity in rows:
        found = []
        for seed in range(args.seeds):
            loss, seen = train(study, text, seed, rate, sparsity, args.block)
            print(f"{name}, seed {seed}: {loss:.4f}  {seen}", flush=True)
            found.append(loss)
        mean = sum(found) / len(found)
        table.append(f"| {name} | {' | '.join(f'{v:.3f}' for v in found)} | {mean:.3f} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
