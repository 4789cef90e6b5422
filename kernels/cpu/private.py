"""A folder of this process's own, for what the cache on disk has no room for, or cannot be written.

A full disk, a quota or a folder that is read-only is no reason to train without kernels: they are compiled for this
process alone, and go with it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from mst_compile.errors import MSTWarning

_ROOM = 8 << 20  # bytes: twice what objects and library take

_made: dict[int, Path] = {}  # process -> its folder; a forked one has its parent's beside its own


def check_room(folder: Path) -> None:
    """Raise OSError if the folder has no room for what is compiled: by writing as much, as no system tells quotas."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
        left, chunk = _ROOM, bytes(1 << 20)
        while left > 0:
            left -= probe.write(chunk)


def has_room(folder: Path) -> bool:
    """Whether :func:`check_room` finds any."""
    try:
        check_room(folder)
    except OSError:
        return False
    return True


def private_folder() -> Path:
    """The folder, made at first use, where only the user can write; removed when the process ends.

    Raises:
        OSError: there is no place for it either.
    """
    own = os.getpid()
    if own not in _made:
        folder = Path(tempfile.mkdtemp(prefix="mst_compile_"))
        _made[own] = folder
        atexit.register(_remove, own, folder)
        check_room(folder)
    return _made[own]


def copy_of(library: Path) -> Path:
    """A copy of a library in the folder.

    Raises:
        OSError: there is no place for it, or it cannot be read.
    """
    copy = private_folder() / f"copy_of_{library.name}"  # not by the name that a library of the cache has
    shutil.copyfile(library, copy)
    return copy


def say_why(folder: Path, error: OSError) -> None:
    """Warn that what is compiled is not kept."""
    warnings.warn(
        f"the compiled kernels cannot be kept in {folder} ({reason(error)}): this process has compiled its own, which "
        "the next one must do again. Set MST_COMPILE_CACHE_DIR to a folder that can be written and has room for them",
        MSTWarning,
        stacklevel=2,
    )


def reason(error: OSError) -> str:
    """What the system says, without the names of temporary files."""
    return error.strerror or str(error)


def _remove(process: int, folder: Path) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
