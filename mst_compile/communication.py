"""Public door to data parallelism; see :mod:`mst_compile.parallel`."""

from .parallel.ddp import ActiveBlocks, reduce_active_blocks
from .parallel.ranks import check_ranks

__all__ = ["ActiveBlocks", "check_ranks", "reduce_active_blocks"]
