"""Memory that runs out in a CPU kernel is an error of that call, whichever allocation it is that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mst_compile.kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")


def test_memory_that_runs_out_is_an_error(tmp_path: Path) -> None:
    script = Path(__file__).with_name("exhausted.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    failures = {tuple(line.split()[:2]): int(line.split()[2]) for line in done.stdout.splitlines()}
    assert len(failures) == 16
    assert all(count >= 3 for count in failures.values()), failures
