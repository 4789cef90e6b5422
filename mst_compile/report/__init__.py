"""Follow a training run and report on it: :class:`Recorder` for any loop, ``python -m mst_compile report`` for a page.

matplotlib is imported when something is drawn, TensorBoard and Weights & Biases when they are asked for.
"""

from .history import History, read
from .recorder import Recorder

__all__ = ["History", "Recorder", "read"]
