"""What a run knows about itself, and where results go: the ledger, the terminal and the summary at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from .. import ledger
from .plan import Budget


@dataclass
class Run:
    """Conditions and results of one run.

    Attributes:
        runs: rounds of interleaved timing.
        path: the ledger to append to, the repository's own if None.
        progress: file that tells a supervisor which cell and which stage of it runs.
        index: number of the cell that runs.
        without: rivals that take no part.
        cut: whether a part of the cell that runs was left out, because time was over.
        rows: lines of the summary: case, density, operation, side, milliseconds dense and of the side, ratio, verdict.
    """

    device: torch.device
    dtype: torch.dtype
    budget: Budget
    runs: int
    path: Path | None = None
    progress: Path | None = None
    index: int = 0
    without: set[str] = field(default_factory=set)
    cut: bool = False
    rows: list[tuple[str, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def stage(self, name: str) -> None:
        """Leave word for the supervisor, should this process die or hang now; ``name``: "mst" or a rival."""
        if self.progress is not None:
            self.progress.write_text(f"{self.index} {name}")

    def usable(self) -> bool:
        """False once a kernel has broken the GPU's context, after which every call of this process fails."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return False
        return True

    def record(self, benchmark: str, case: str, side: str, median_s: float, ratio: float, note: str) -> None:
        """Append a row to the ledger; arguments as for :func:`benchmarks.ledger.record`."""
        ledger.record(
            benchmark, case, side, median_s, ratio, self.runs, self.dtype_name, note, device=self.device, path=self.path
        )

    def failed(self, benchmark: str, case: str, side: str, reason: str) -> None:
        """Record that ``side`` gave no time for ``case``: not a number, and why."""
        reason = " ".join(reason.split())[:300]
        print(f"FAILED {case} {side}: {reason}", flush=True)
        self.failures.append(f"{case} {side}")
        self.record(benchmark, case, side, float("nan"), float("nan"), f"failed: {reason}")

    def skipped(self, what: str) -> None:
        print(f"skipped, no time left: {what}", flush=True)
        self.cut = True

    def print_summary(self) -> None:
        if self.rows:
            print()
            ledger.print_table(("case", "density", "operation", "side", "dense ms", "side ms", "ratio", ""), self.rows)
        for line in self.failures:
            print(f"failed: {line}")
