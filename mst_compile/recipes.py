"""Public door to published recipes as schedules; see :mod:`mst_compile.rules.recipes`."""

from .rules.recipes import (
    dynsparse,
    granet,
    mixed_sparsity_training,
    rigl,
    sparse_evolutionary,
    sparse_then_dense,
)

__all__ = [
    "dynsparse",
    "granet",
    "mixed_sparsity_training",
    "rigl",
    "sparse_evolutionary",
    "sparse_then_dense",
]
