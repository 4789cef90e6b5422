"""Dynamic sparse pretraining that saves time: masks that change during training, block-sparse kernels that skip them.

model = mst_compile.sparsify(model, mst_compile.MixedSparsity(total_steps=20_000))
model = torch.compile(model, backend="mst")
"""

import importlib
from types import ModuleType

from . import report as report  # mst_compile.report.Recorder
from .api import densify, sparsifier, sparsify
from .cost.forecast import Forecast, forecast
from .cost.recommend import Recommendation, recommend
from .cost.report import explain
from .errors import MSTError, MSTWarning
from .rules.constant import Constant
from .rules.mixed_sparsity import MixedSparsity
from .rules.schedule import Schedule
from .state.learning_rates import param_groups
from .state.listeners import TopologyEvent
from .state.selection import Override
from .state.sparsifier import Sparsifier
from .state.weight import SparseWeight

__all__ = [
    "Constant",
    "Forecast",
    "MSTError",
    "MSTWarning",
    "MixedSparsity",
    "Override",
    "Recommendation",
    "Schedule",
    "SparseWeight",
    "Sparsifier",
    "TopologyEvent",
    "densify",
    "explain",
    "forecast",
    "param_groups",
    "recommend",
    "sparsifier",
    "sparsify",
]
__version__ = "0.1.0"

_DOORS = ("communication", "export", "flops", "recipes", "schedule")


def __getattr__(name: str) -> ModuleType:
    """``mst_compile.schedule`` and the other doors need no import of their own: it comes with the first use."""
    if name in _DOORS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
