"""A C++ compiler that compiles nothing: it writes what it is told to, counts its calls, fails and hangs on demand."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

from mst_compile.kernels.cpu import build

_SCRIPT = """#!/bin/sh
echo "$*" >> {folder}/calls
[ "$1" = --version ] && echo stub 1.0 && exit 0
case "$*" in *-fopenmp*) [ -e {folder}/runtime ] || {{ echo no libomp >&2; exit 1; }} ;; esac
[ -e {folder}/on_compile ] && case "$*" in *" -c "*) . {folder}/on_compile ;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && cp {folder}/output "$2"; shift; done
exit 0
"""


class StubCompiler:
    """Knows OpenMP while its ``runtime`` exists, and writes the content of ``output``, at first one empty line."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.command = folder, folder / "c++"
        self.runtime, self.calls, self.output = (folder / name for name in ("runtime", "calls", "output"))
        self.output.write_text("\n")
        self.command.write_text(_SCRIPT.format(folder=folder))
        self.command.chmod(0o755)

    def on_compile(self, script: str) -> None:
        """What the shell does before a unit is written."""
        (self.folder / "on_compile").write_text(script)

    def hangs(self) -> None:
        """From now on, each unit waits for a child that does not end."""
        self.on_compile(f"sleep 1000 & echo $! >> {self.folder}/children; wait\n")

    def children(self) -> list[int]:
        """Those that were ever waited for."""
        file = self.folder / "children"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def end_children(self) -> None:
        for child in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def works(self) -> None:
        """From now on, again."""
        (self.folder / "on_compile").unlink()

    def called(self) -> list[str]:
        """The calls since the last time."""
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return calls

    def compiled(self) -> int:
        """How many units since the last time."""
        return sum(" -c " in call for call in self.called())

    def copies_kernels(self) -> None:
        """Write the kernels that work, so that what is built can be loaded."""
        shutil.copy(build.build("baseline"), self.output)
