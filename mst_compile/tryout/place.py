"""Where a try writes: a folder that can be written to, holds nothing of others, and is this process's for a while."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mst_compile.errors import ArgumentError
from mst_compile.report.history import ABOUT

RUNS = ("sparse", "dense")  # the folders in it, of which an earlier try's are replaced


def check(out: Path) -> None:
    """Raise if the folder is none that a try may write to, or replace.

    Raises:
        ArgumentError: it is a file, or holds folders of other things where the runs would be.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out must name a folder, and {str(out)!r} is a file")
    for folder in (out / name for name in RUNS):
        if folder.exists() and not (folder / ABOUT).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ArgumentError(
                f"--out: a try would replace {str(folder)!r}, which no try has written; name another folder"
            )


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the folder, and keep other tries out of it.

    Raises:
        ArgumentError: it cannot be made or written to, or another process has a try in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ArgumentError(
            f"--out must name a folder that can be written to, and {str(out)!r} is none: {error.strerror or error}"
        ) from error
    with contextlib.ExitStack() as stack:
        _lock(out, stack)
        yield


def _lock(out: Path, stack: contextlib.ExitStack) -> None:
    """Lock the folder until ``stack`` is left; on systems that lock no folders, do nothing."""
    try:
        import fcntl
    except ImportError:
        return
    place = os.open(out, os.O_RDONLY)
    stack.callback(os.close, place)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArgumentError(
            f"--out: another try is writing to {str(out)!r}; wait until it is over, or name another folder"
        ) from error
    except OSError:
        pass  # some network file systems
