"""Start the benchmark in a process of its own, and start it again behind a cell that hung or crashed.

A kernel that reads out of bounds breaks the GPU's context for its whole process, and one that hangs cannot be
interrupted: neither may cost the cells that follow, or make the command run on for ever.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .plan import RIVALS

CUT = 3  # time was over while a cell ran
BROKEN = 75  # the worker has recorded the failure and must be replaced
WORKER = "MST_BENCHMARK_WORKER"
CELL_SECONDS = 200.0  # a cell that takes longer hangs
GRACE_SECONDS = 40.0
_POLL_SECONDS = 0.2

Command = Callable[[Sequence[str]], list[str]]


def command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *arguments]


def supervise(
    argv: Sequence[str],
    minutes: float,
    make: Command = command,
    cell_seconds: float = CELL_SECONDS,
    grace: float = GRACE_SECONDS,
) -> int:
    """Run workers until one comes to the end of the cells or time is over; the worst of their exit statuses.

    Args:
        argv: the user's options; later ones win, so that ours are appended.
        make: from options to the command line of a worker.
        grace: seconds beyond the minutes, for the cell that runs when they end.
    """
    end, worst = time.monotonic() + 60 * minutes, 0
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        more: list[str] = []
        while True:
            progress.unlink(missing_ok=True)
            # When to end, not how long to run: a worker takes seconds to start. The clock is the machine's.
            arguments = make([*argv, *more, "--progress", str(progress), "--end", str(end)])
            status = _work(arguments, progress, end + grace, cell_seconds)
            if status in (0, 1, 2):
                return max(worst, status)
            if status != BROKEN and time.monotonic() >= end + grace:
                print("benchmarks.gpu: time was over within a cell; what was measured is in the ledger")
                return worst or CUT
            worst = 1
            if not progress.exists() or time.monotonic() > end:
                print(f"benchmarks.gpu: the worker ended ({_why(status)}); time is over or it reached no cell")
                return worst
            more = _after(more, *_place(progress), status)


def _place(progress: Path) -> tuple[int, str]:
    """The cell and the stage of it that a worker was at."""
    index, stage = progress.read_text().split()
    return int(index), stage


def _after(more: list[str], index: int, stage: str, status: int) -> list[str]:
    """Options of the worker that goes on behind the cell that broke the last one."""
    without = [part for part in more if part in RIVALS]
    if stage != "mst":
        without.append(stage)
    died = [] if status == BROKEN else ["--died", f"{stage}:{_why(status)}"]
    return ["--from", str(index + 1), *died, *(part for name in without for part in ("--without", name))]


def _why(status: int) -> str:
    if status == BROKEN:
        return "the GPU's context was broken"
    return f"killed by {signal.Signals(-status).name}, a crash or a hang" if status < 0 else f"exit status {status}"


def _work(arguments: list[str], progress: Path, end: float, cell_seconds: float) -> int:
    """Exit status of one worker, killed with all its children if it hangs in a cell or at ``end``."""
    process = subprocess.Popen(arguments, env={**os.environ, WORKER: "1"}, start_new_session=True)
    try:
        while process.poll() is None:
            # The file is written anew when a cell begins and when a rival's turn comes.
            began = progress.stat().st_mtime if progress.exists() else time.time()
            if time.monotonic() > end or time.time() - began > cell_seconds:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
