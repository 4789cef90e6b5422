"""Dynamic sparse pretraining that saves time: masks that change during training, block-sparse kernels that skip them.

model = mst_compile.sparsify(model, mst_compile.MixedSparsity(total_steps=20_000))
model = torch.compile(model, backend="mst")
"""

from . import attention_op, ops  # noqa: F401  (registers torch.ops.mst)
from .api import densify, sparsifier, sparsify
from .errors import MSTError, MSTWarning
from .forecast import Forecast, forecast
from .optimizers import param_groups
from .report import explain
from .schedule import Constant, MixedSparsity
from .selection import Override
from .sparsifier import Sparsifier  # after ``api``: the function of this name is what users import
from .weights import SparseWeight

__all__ = [
    "Constant",
    "Forecast",
    "MSTError",
    "MSTWarning",
    "MixedSparsity",
    "Override",
    "SparseWeight",
    "Sparsifier",
    "densify",
    "explain",
    "forecast",
    "param_groups",
    "sparsifier",
    "sparsify",
]
__version__ = "0.1.0"
