"""Fixed cost of the backend a call: what it adds in front of the compiled graph of a model with 48 sparse weights.

python -m benchmarks.overhead
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import mst_compile
from mst_compile.graph.compiler import Variant
from mst_compile.graph.dispatch import Dispatch

from .ledger import record

WEIGHTS = 48
CALLS = 2000


def main() -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(WEIGHTS)))
    mst_compile.sparsify(model, mst_compile.Constant(0.5, growth="none"), block=4)
    caught: list[Dispatch] = []
    original = Dispatch.__call__

    def spy(self: Dispatch, *args: object) -> object:
        caught[:] = [self]
        inputs[:] = args
        return original(self, *args)

    inputs: list[object] = []
    Dispatch.__call__ = spy  # type: ignore[method-assign]
    out = torch.compile(model, backend="mst", options={"mst.inner": "aot_eager", "mst.dense_threshold": 1.0})(
        torch.randn(4, 32)
    )
    Dispatch.__call__ = original  # type: ignore[method-assign]
    dispatch = caught[0]
    assert dispatch._indices(inputs, inputs) is not None, "the sparse variant must be the one measured"
    dispatch._variants = {(True, False): Variant(lambda *args: out)}  # nothing but the backend's own work
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        dispatch(*inputs)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    record(
        "overhead", f"{WEIGHTS} weights", "mst", median, median * 1e6, CALLS, "float32", "ratio: microseconds a call"
    )
    print(f"{WEIGHTS} weights: {median * 1e6:.1f} us a call")


if __name__ == "__main__":
    main()
