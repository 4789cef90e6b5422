"""``python -m mst_compile report RUN [RUN ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mst_compile.errors import ArgumentError, MSTError, WriteError

from .history import overview

_ABOUT = "Write a report of recorded runs, one or several compared, as one HTML file that needs no network."


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(prog="python -m mst_compile report", description=_ABOUT)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that mst_compile.report.Recorder wrote")
    p.add_argument("--out", type=Path, help="file to write; default report.html in the first folder")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; exit status 2 if the runs cannot be read or the page not be written."""
    args = parser().parse_args(argv)
    try:
        out = write(args.runs, args.out)
    except MSTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report; returns its file.

    Raises:
        RecordError: a folder holds no run, or its files were damaged.
        ArgumentError: the file cannot be written where it shall be.
        MissingPackageError: matplotlib is not installed.
    """
    folders = [folder.expanduser() for folder in runs]
    histories = [overview(folder) for folder in folders]
    file = folders[0] / "report.html" if out is None else out.expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise ArgumentError(f"--out must name a file in a folder that exists, got {str(file)!r}")
    from . import page  # matplotlib, which takes a second

    try:
        page.write(histories, file)
    except WriteError as error:
        why = getattr(error.__cause__, "strerror", None) or error
        raise ArgumentError(f"--out must name a file that can be written, and {str(file)!r} is none: {why}") from error
    return file
