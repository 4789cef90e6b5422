"""Public door to schedules; see :mod:`mst_compile.rules.schedule`."""

from .rules.schedule import Constant, MixedSparsity, Schedule

__all__ = ["Constant", "MixedSparsity", "Schedule"]
