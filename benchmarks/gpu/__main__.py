"""Ours against cuBLAS, torch's BSR and STK on one NVIDIA GPU: products, training steps and attention.

    python -m benchmarks.gpu check                         # is it right? within 3 minutes; --help says more
    python -m benchmarks.gpu speed                         # what decides, within 6 minutes; goes on where it ended
    python -m benchmarks.gpu profile                       # ncu on what missed its goal
    python -m benchmarks.gpu                               # all, most important first, ends within 10 minutes
    python -m benchmarks.gpu --part layers --blocks 128,64 --densities .3,.1 --ledger gpu.csv
    python -m benchmarks.gpu --device cpu --smoke          # the same program on tiny sizes, without a GPU

Needs torch 2.11 to 2.14 with triton and a C compiler (triton's launcher is built by it), nothing else: run it at the
root of a checkout, installed or not, without network. Rows go to the ledger as they are measured; those of ``speed`` to
OUT/ledger.csv, beside cells.jsonl, which tells the next run with that folder what this code has been through on this
card, and tuning.json, the autotuner's times. Exit status: 0; 1 if a cell failed (its row says why); 2 if there is
nothing to measure on; 3 if time was over within a cell.
"""

from __future__ import annotations

import os
import signal
import sys

from . import check, options, profile, supervisor


def main() -> int:
    argv = sys.argv[1:]
    if supervisor.WORKER in os.environ:
        from . import cli  # imports torch, for which the supervisor has no use

        return cli.run(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which ends the workers too
    if argv[:1] in (["check"], ["profile"]):
        return (check if argv[0] == "check" else profile).main(argv[1:])
    args = options.parse(argv, __doc__)
    grace = 0.0 if args.what == "speed" else supervisor.GRACE_SECONDS
    return supervisor.supervise(argv, args.minutes, grace=grace)


if __name__ == "__main__":
    raise SystemExit(main())
