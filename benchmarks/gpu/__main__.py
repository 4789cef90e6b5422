"""Ours against cuBLAS, torch's BSR and STK on one NVIDIA GPU: products, training steps and attention.

    python -m benchmarks.gpu                               # all, most important first, ends within 10 minutes
    python -m benchmarks.gpu --part layers --blocks 128,64 --densities .3,.1 --ledger gpu.csv
    python -m benchmarks.gpu --device cpu --smoke          # the same program on tiny sizes, without a GPU

Needs torch 2.11 to 2.14 with triton and a C compiler (triton's launcher is built by it), nothing else: run it at the
root of a checkout, installed or not, without network. Rows go to the ledger as they are measured. Exit status: 0, 1 if
a cell failed (its row says why), 2 if there is nothing to measure on.
"""

from __future__ import annotations

import os
import signal
import sys

from . import options, supervisor


def main() -> int:
    if supervisor.WORKER in os.environ:
        from . import cli  # imports torch, for which the supervisor has no use

        return cli.run(sys.argv[1:])
    minutes = options.parser(__doc__).parse_args().minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which ends the worker too
    return supervisor.supervise(sys.argv[1:], minutes)


if __name__ == "__main__":
    raise SystemExit(main())
