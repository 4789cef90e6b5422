"""How much magnitude a permutation of channels could gather into few blocks.

    python examples/quality_permutation.py --data DIR/train.txt --val DIR/val.txt

Magnitude pruning in blocks keeps less of a weight than pruning single weights does. Channels can be put in another
order without changing what a model computes: the hidden units of an MLP, and the residual stream. Does some order
gather the large weights into blocks? This trains the study's dense model, and at some of its steps, for a density of
10 %, compares the share of the squared weights that the best blocks keep: in the order as it is, in the order that a
local search finds (pairs of channels are exchanged for as long as that helps; a local optimum, no bound), and of single
weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from quality.configurations import CONFIGURATIONS
from quality.model import GPT, hidden_weights
from quality.sizes import Study
from quality.training import Text, train

from mst_compile.rules.density import active_count, layer_densities

Energies = np.ndarray  # squared weights, float64
GAIN = 1e-9  # exchanges that gain less, relative to what all are worth, do not count


@dataclass
class Matrix:
    """Squared weights of one layer, and the groups of channels that its rows and columns belong to (None: fixed)."""

    energy: Energies
    groups: tuple[str | None, str | None]
    kept: int  # blocks

    def blocks(self, block: int) -> np.ndarray:
        """Sums over blocks, ``[rows / block, cols / block]``."""
        rows, cols = self.energy.shape
        return self.energy.reshape(rows // block, block, cols // block, block).sum((1, 3))

    def kept_energy(self, block: int) -> float:
        """Sum over the blocks that magnitude keeps."""
        return float(np.sort(self.blocks(block), axis=None)[-self.kept :].sum())

    def threshold(self, block: int) -> float:
        """Energy of the weakest block that is kept."""
        return float(np.sort(self.blocks(block), axis=None)[-self.kept])


def matrices(model: GPT, block: int, density: float) -> list[Matrix]:
    """The hidden weights of a model at their Erdos-Renyi densities."""
    weights = [(name, weight.detach().double().square().numpy()) for name, weight in hidden_weights(model)]
    densities = layer_densities(
        [(w.shape[0], w.shape[1]) for _, w in weights], 1 - density, "erdos-renyi", [None] * len(weights), 1 - density
    )
    found = []
    for (name, energy), own in zip(weights, densities, strict=True):
        hidden = f"hidden {name.split('.')[1]}"
        kind = name.split(".")[-2]
        groups = {
            "qkv": (None, "stream"),
            "proj": ("stream", None),
            "up": (hidden, "stream"),
            "down": ("stream", hidden),
        }
        kept = active_count(own, energy.size // block**2, 1)
        found.append(Matrix(energy, groups[kind], kept))
    return found


def gather(found: Sequence[Matrix], block: int, sweeps: int = 20) -> None:
    """Permute channels, in place, by exchanges of two for as long as more energy is kept.

    Twice: first by the sum of squared block energies, which rewards every step towards uneven blocks, then by what is
    kept, which does not see blocks far below the threshold.
    """
    names = sorted({g for m in found for g in m.groups if g is not None})
    for smooth in (True, False):
        before = sum(m.kept_energy(block) for m in found)
        for _ in range(sweeps):
            for name in names:
                _sweep([m for m in found if name in m.groups], name, block, smooth)
            after = sum(m.kept_energy(block) for m in found)
            if after - before <= 1e-4 * after:
                break
            before = after


def _sweep(found: Sequence[Matrix], name: str, block: int, smooth: bool) -> None:
    """Offer every channel of a group its best partner."""
    # One row a channel: its energy in each block of the other axis, of all matrices side by side.
    parts, thresholds = [], []
    for m in found:
        rows = m.energy if m.groups[0] == name else m.energy.T
        parts.append(rows.reshape(len(rows), -1, block).sum(2))
        thresholds.append(np.full(parts[-1].shape[1], m.threshold(block)))
    energy, threshold = np.concatenate(parts, 1), np.concatenate(thresholds)
    count = len(energy)
    order, home = np.arange(count), np.arange(count) // block
    sums = energy.reshape(count // block, block, -1).sum(1)

    def worth(values: np.ndarray) -> np.ndarray:
        return np.square(values).sum(-1) if smooth else np.maximum(values - threshold, 0).sum(-1)

    values = worth(sums)
    for a in range(count):
        mine = sums[home[a]] - energy[a] + energy
        theirs = sums[home] - energy + energy[a]
        gains = worth(mine) + worth(theirs) - values[home[a]] - values[home]
        gains[home == home[a]] = 0
        b = int(gains.argmax())
        if gains[b] > GAIN * values.sum():
            i, j = home[a], home[b]
            sums[i], sums[j] = mine[b], theirs[b]
            values[[i, j]] = worth(sums[[i, j]])
            energy[[a, b]], order[[a, b]] = energy[[b, a]], order[[b, a]]
    for m in found:
        m.energy = m.energy[order] if m.groups[0] == name else m.energy[:, order]


def shares(model: GPT, block: int, density: float) -> tuple[float, float, float]:
    """Share of all squared weights kept: blocks as they are, blocks after :func:`gather`, single weights."""
    found, single = matrices(model, block, density), matrices(model, 1, density)
    total = sum(float(m.energy.sum()) for m in found)
    before = sum(m.kept_energy(block) for m in found)
    gather(found, block)
    after = sum(m.kept_energy(block) for m in found)
    return before / total, after / total, sum(m.kept_energy(1) for m in single) / total


def main(argv: Sequence[str] | None = None) -> list[tuple[int, int, float, float, float]]:
    """Run the script; returns its rows: step, block, shares."""
    p = argparse.ArgumentParser(description="How much magnitude a permutation of channels gathers into blocks.")
    p.add_argument("--data", type=Path, required=True, help="training text")
    p.add_argument("--val", type=Path, required=True, help="validation text")
    p.add_argument("--steps", type=int, nargs="+", default=[0, 120, 1200], help="look at the model after so many steps")
    p.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    p.add_argument("--density", type=float, default=0.1)
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    found: list[tuple[int, int, float, float, float]] = []
    print("| steps | block | kept, order as it is | kept, channels permuted | kept, single weights |")
    print("|---|---|---|---|---|")

    def look(step: int, model: GPT) -> None:
        if step in args.steps:
            for block in args.blocks:
                row = (step, block, *shares(model, block, args.density))
                print(f"| {step} | {block} | {row[2]:.3f} | {row[3]:.3f} | {row[4]:.3f} |", flush=True)
                found.append(row)

    dense = next(c for c in CONFIGURATIONS if c.name == "dense")
    train(dense, 0, Study(), Text.load(args.data, args.val), look, stop=max(1, *args.steps))
    return found


if __name__ == "__main__":
    main()
