"""Which learning rate suits an optimizer on sparse weights: a small byte-level GPT under a static 80 % mask, and dense.

python -m benchmarks.density_rate muon DIR        # train.txt and val.txt, or .xz, from examples/quality/corpus.py

Hidden matrices are trained by the optimizer that is named, everything else by AdamW. Every run prints a line; at the
end stands the table, rate factors by seeds, each with the exponent r of ``density ** -r`` that it is. A run also prints
how its updates look on the active elements, in its middle: their RMS, and of Muon's what masking leaves of their norm.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, _muon

import mst_compile
from examples.quality.model import GPT, hidden_weights
from examples.quality.sizes import Study
from examples.quality.training import Text, evaluate, training_batch, validation_batches

COEFFICIENTS = (3.4445, -4.775, 2.0315)
Weights = Sequence[nn.Parameter]


@dataclass(frozen=True)
class Contender:
    """An optimizer and what to try with it.

    Attributes:
        make: of the hidden matrices and a rate; without weight decay.
        looks: of the matrices after a step, what they were before it, the optimizer and its rate: what to say of it.
        rate: the dense model's best, which factors multiply. dense_rates: where that was looked for.
        factors: what the rate is multiplied by on sparse weights.
    """

    make: Callable[[Weights, float], Optimizer]
    looks: Callable[[Weights, list[Tensor], Optimizer, float], str]
    rate: float
    dense_rates: tuple[float, ...]
    factors: tuple[float, ...]


def orthogonalised(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz as in ``torch.optim.Muon``, in float32: many CPUs multiply bfloat16 ten times as slowly."""
    a, b, c = coefficients
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


def _muon_of(weights: Weights, rate: float) -> Optimizer:
    _muon._zeropower_via_newtonschulz = orthogonalised
    return torch.optim.Muon(weights, lr=rate, weight_decay=0.0)


def _adafactor_of(weights: Weights, rate: float) -> Optimizer:
    return torch.optim.Adafactor(weights, lr=rate, weight_decay=0.0)


def _transformers_adafactor_of(weights: Weights, rate: float) -> Optimizer:
    """As the Trainer of Hugging Face makes it: the rate is not multiplied by the RMS of the weights."""
    from transformers.optimization import Adafactor

    return Adafactor(list(weights), lr=rate, scale_parameter=False, relative_step=False)


def look_at_muon(weights: Weights, before: list[Tensor], optimizer: Optimizer, rate: float) -> str:
    """RMS and spectral norm of Muon's updates on active elements; 1 is what the RMS is in a dense model."""
    sizes, norms = [], []
    for p in weights:
        update = orthogonalised(optimizer.state[p]["momentum_buffer"], COEFFICIENTS, 5, 1e-7)
        active = p.detach() != 0
        sizes.append(update[active].square().mean().sqrt().item() * max(p.shape) ** 0.5)
        norms.append(torch.linalg.matrix_norm(update * active, 2).item() / torch.linalg.matrix_norm(update, 2).item())
    return f"update on active elements: RMS {sum(sizes) / len(sizes):.2f}, norm {sum(norms) / len(norms):.2f}"


def look_at_change(weights: Weights, before: list[Tensor], optimizer: Optimizer, rate: float) -> str:
    """RMS of what active elements changed by, in rates; and as a share of their own RMS."""
    sizes, shares = [], []
    for p, old in zip(weights, before, strict=True):
        active = p.detach() != 0
        change = (p.detach() - old)[active].square().mean().sqrt().item()
        sizes.append(change / rate)
        shares.append(change / old[active].square().mean().sqrt().item())
    size, share = (sum(values) / len(values) for values in (sizes, shares))
    return f"change of active elements: RMS {size:.3f} rates, {share:.4f} of their own"


CONTENDERS = {
    "muon": Contender(
        _muon_of, look_at_muon, 0.01, (0.0025, 0.005, 0.01, 0.02, 0.04), (0.25, 0.5, 0.7, 1.0, 1.4, 2.24, 5.0)
    ),
    "adafactor": Contender(
        _adafactor_of, look_at_change, 0.025, (0.014, 0.02, 0.025, 0.03, 0.04), (0.7, 1.0, 1.5, 2.24, 3.3, 5.0)
    ),
    "transformers-adafactor": Contender(
        _transformers_adafactor_of,
        look_at_change,
        1.7e-3,
        (1e-3, 1.4e-3, 1.7e-3, 2e-3, 2.8e-3, 4e-3),
        (0.7, 1.0, 1.5, 2.24, 3.3, 5.0),
    ),
}


def schedule(study: Study) -> Iterator[float]:
    """Warm-up, plateau, linear decay to 0: what rates are multiplied by, step by step."""
    warm, decay = max(1, round(study.warmup * study.steps)), max(1, round(study.decay * study.steps))
    for step in range(study.steps):
        yield min(1.0, (step + 1) / warm, (study.steps - step) / decay)


def train(
    contender: Contender, study: Study, text: Text, seed: int, rate: float, sparsity: float, block: int
) -> tuple[float, str]:
    """Validation loss after a run, and what the contender's ``looks`` saw in its middle."""
    torch.manual_seed(seed)
    model = GPT(study.shape)
    if sparsity:
        masks = mst_compile.Constant(sparsity, growth="none", total_steps=study.steps)
        mst_compile.sparsify(model, masks, block=block, exclude="head", seed=seed)
    hidden = [p for _, p in hidden_weights(model) if isinstance(p, nn.Parameter)]
    ids = {id(p) for p in hidden}
    others = [p for p in model.parameters() if id(p) not in ids]
    optimizer = contender.make(hidden, rate)
    adam = torch.optim.AdamW(others, lr=study.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    seen = ""
    for step, factor in enumerate(schedule(study)):
        x, y = training_batch(text.train, study, seed, step)
        loss: Tensor = model(x, y)
        loss.backward()
        optimizer.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate * factor, study.learning_rate * factor
        looked_at = step == study.steps // 2
        before = [p.detach().clone() for p in hidden] if looked_at else []
        optimizer.step()
        adam.step()
        if looked_at:
            seen = contender.looks(hidden, before, optimizer, rate * factor)
        model.zero_grad()
    return evaluate(model, validation_batches(text.validation, study), study), seen


def named(factor: float, sparsity: float) -> str:
    """A factor of the dense model's rate, and the exponent of the density that it is."""
    exponent = -math.log(factor) / math.log(1 - sparsity)
    return f"{sparsity:.0%} sparse, rate x {factor:g} (r = {exponent + 0.0:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", choices=tuple(CONTENDERS))
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--dense-rates", type=float, nargs="*", help="default: the optimizer's")
    parser.add_argument("--rate", type=float, help="the dense model's best; default: the optimizer's")
    parser.add_argument("--factors", type=float, nargs="*", help="default: the optimizer's")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    contender = CONTENDERS[args.optimizer]
    study = Study(width=args.width, heads=4, context=64, steps=args.steps, dtype="float32", validation_batches=40)
    files = [next(args.corpus.glob(f"{name}.txt*")) for name in ("train", "val")]
    text = Text.load(*files)
    dense = contender.dense_rates if args.dense_rates is None else args.dense_rates
    factors = contender.factors if args.factors is None else args.factors
    best = contender.rate if args.rate is None else args.rate
    rows = [(f"dense, rate {rate:g}", rate, 0.0) for rate in dense]
    rows += [(named(f, args.sparsity), best * f, args.sparsity) for f in factors]
    table = []
    for name, rate, sparsity in rows:
        found = []
        for seed in args.seeds:
            loss, seen = train(contender, study, text, seed, rate, sparsity, args.block)
            print(f"{name}, seed {seed}: {loss:.4f}  {seen}", flush=True)
            found.append(loss)
        mean = sum(found) / len(found)
        table.append(f"| {name} | {' | '.join(f'{v:.3f}' for v in found)} | {mean:.3f} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
