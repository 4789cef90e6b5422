"""Locks of the operating system on open files: other processes see them, and they go when their holder dies."""

from __future__ import annotations


def lock(file: int) -> bool:
    """Lock an open file, if nobody else has, in this process or another. OSError where there are no locks."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError("no file locks on this platform") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int) -> None:
    """Closing the file alone would leave it locked while a forked child has it open too."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_UN)
