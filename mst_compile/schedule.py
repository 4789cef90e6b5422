"""Public door to schedules and what they are made of; see :mod:`mst_compile.rules`."""

from .rules.attention import Attention
from .rules.constant import Constant
from .rules.gradual_pruning import GradualPruning
from .rules.growth import SET, Growth, Mixed, NoGrowth, RigL
from .rules.mixed_sparsity import MixedSparsity
from .rules.patterns import Parts, Pattern
from .rules.schedule import Schedule

__all__ = [
    "SET",
    "Attention",
    "Constant",
    "GradualPruning",
    "Growth",
    "Mixed",
    "MixedSparsity",
    "NoGrowth",
    "Parts",
    "Pattern",
    "RigL",
    "Schedule",
]
