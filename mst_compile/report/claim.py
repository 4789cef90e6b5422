"""Who writes to a run's folder: one Recorder at a time, of this process or of another one.

Two of them would replace each other's files, and the last one's records would be left without a word. Other processes
are kept out by a lock of the operating system on a file in the folder, which ends with the process however it ends;
within this one the newer Recorder takes the folder over, as where a cell of a notebook is run again, and the older one
says so when it is used.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import IO

from mst_compile.errors import RecordError

try:
    import fcntl
except ImportError:  # Windows has no such locks: other processes are not noticed there
    fcntl = None  # type: ignore[assignment]

FILE = "writing.lock"


class Claim:
    """The right to write to ``folder``, which must exist, until :meth:`release`, or until it is taken over.

    Raises:
        RecordError: a Recorder of another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._process = folder.resolve(), os.getpid()
        self._lock: IO[str] | None = None
        self._taken_over = False
        before = _claims.get(self._folder)
        if before is None:
            self._lock = _locked(self._folder)
        else:  # the lock of a file ends when any of its handles is closed: it is handed on
            self._lock, before._lock = before._lock, None
            before._taken_over = True
        _claims[self._folder] = self

    @property
    def is_ours(self) -> bool:
        """Whether this process made it: a forked one has a copy, and trains what is not the run of the files."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raise :class:`RecordError` if the folder is another process's, or a newer Recorder has taken it over."""
        if not self.is_ours:
            raise RecordError(
                f"the recorder of {str(self._folder)!r} belongs to the process that this one was forked from; to "
                "record what is trained here make one with a folder of its own"
            )
        if self._taken_over:
            raise RecordError(
                f"a newer Recorder has taken over {str(self._folder)!r}, and what this one writes would be lost: give "
                "each run a folder of its own, and close a Recorder before the next one of its run is made"
            )

    def release(self) -> None:
        """Let others write to the folder. Can be called again."""
        if _claims.get(self._folder) is self:
            del _claims[self._folder]
        if self._lock is not None:
            with contextlib.suppress(OSError):  # the folder may be gone
                (self._folder / FILE).unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


_claims: weakref.WeakValueDictionary[Path, Claim] = weakref.WeakValueDictionary()


def _locked(folder: Path) -> IO[str] | None:
    """An open file that this process alone has locked; None where there are no locks.

    Raises:
        RecordError: another process has.
    """
    if fcntl is None:
        return None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(folder / FILE, "a", encoding="utf-8"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RecordError(
                f"a Recorder of another process is writing to {str(folder)!r}: name another folder, or wait until that "
                "process has closed it"
            ) from None
        except OSError:
            return None  # a file system without locks
        stack.pop_all()
    return file
