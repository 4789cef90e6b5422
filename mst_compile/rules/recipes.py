"""Published recipes of dynamic sparse training as schedules, one function each.

Each returns a schedule with the paper's choices; further arguments are the schedule's own and replace them. With
``sparsify(model, schedule, block=1, guard="none")`` a topology event is the paper's to the weight; coarser blocks take
the place of single weights, and the default guard keeps the largest block of each block row and column. In all of them
weights that grow begin at 0, and what is drawn at random follows from the seed.
"""

from __future__ import annotations

from typing import Any

from .constant import Constant
from .gradual_pruning import GradualPruning
from .mixed_sparsity import MixedSparsity


def sparse_evolutionary(sparsity: float = 0.8, **changes: Any) -> Constant:
    """SET (arXiv 1707.04780, "Methods", and its Algorithm 1): Erdos-Renyi densities; at each event, an epoch apart in
    the paper, 30 % of the weights, the smallest, are dropped and as many grow at random, to the end of the run.

    Pass your epoch as ``interval``, or ``drop_fraction=0.1`` for a gentler form. The paper draws new weights at random;
    here they begin at 0.
    """
    chosen: dict[str, Any] = {"growth": "random", "drop_fraction": 0.3}
    return Constant(sparsity, **chosen | changes)


def rigl(total_steps: int, sparsity: float = 0.8, **changes: Any) -> Constant:
    """RigL (arXiv 1911.11134, section 3): every 100 steps, up to three quarters of the run, a share of the weights that
    falls from 30 % along a cosine is dropped by magnitude and grows by gradient; ERK densities."""
    chosen: dict[str, Any] = {"growth": "gradient", "drop_fraction": 0.3, "interval": 100, "total_steps": total_steps}
    if "events" in changes:
        del chosen["interval"]
    return Constant(sparsity, **chosen | changes)


def dynsparse(total_steps: int, sparsity: float = 0.9, events: int = 160, **changes: Any) -> Constant:
    """Structured DynSparse training of BERT (arXiv 2108.06277, Algorithm 1 and appendix "Hyperparameters specific to
    dynamic sparsity"): one sparsity in all layers, ``events`` equal parts of the run, after each of which a share that
    falls from 50 % along a cosine over the whole run is dropped by the L1 norm of blocks and grows at random.

    The paper takes 160 events for single weights and 80 for blocks of 16, and a learning rate of its own:
    ``param_groups(model, density_rate="graphcore")``.
    """
    chosen: dict[str, Any] = {"growth": "random", "drop_fraction": 0.5, "until": 1.0, "magnitude": "l1"}
    chosen |= {"distribution": "uniform", "total_steps": total_steps, "events": events}
    return Constant(sparsity, **chosen | changes)


def granet(total_steps: int, sparsity: float = 0.9, **changes: Any) -> GradualPruning:
    """GraNet from dense to sparse (arXiv 2106.10404, "Gradual Pruning with Zero-Cost Neuroregeneration"; the numbers
    are those of its code for ImageNet): gradual magnitude pruning over 30 % of the run, each pruning followed by the
    regrowth of a share that falls from 50 % along a cosine over the whole run, by gradient.

    ``initial_sparsity=0.5`` is its form from sparse to sparse, ``growth="none"`` pruning alone (arXiv 1710.01878).
    Densities over the layers are ERK throughout, where the paper prunes by one threshold for all layers.
    """
    return GradualPruning(total_steps, sparsity, **changes)


def sparse_then_dense(
    total_steps: int, sparsity: float = 0.75, dense: float | int = 0.2, **changes: Any
) -> MixedSparsity:
    """Sparse pretraining, dense at once afterwards (SPDF, arXiv 2303.10464, "Sparse Pre-training and Dense
    Fine-tuning"): the same sparsity in all layers, random masks that never change, and no mask at all for the last
    ``dense`` steps; weights that return begin at 0.

    Args:
        dense: a share of ``total_steps`` if a float, a number of steps if an int; in the paper the fine-tuning.
    """
    chosen: dict[str, Any] = {"warmup": 0, "restoration": 0, "settle": dense, "growth": "none"}
    return MixedSparsity(total_steps, sparsity, **chosen | {"distribution": "uniform"} | changes)


def mixed_sparsity_training(total_steps: int, sparsity: float = 0.9, **changes: Any) -> MixedSparsity:
    """Mixed Sparsity Training as published (arXiv 2408.11746): :meth:`MixedSparsity.published`."""
    return MixedSparsity.published(total_steps, sparsity, **changes)
