"""The folder on disk for compiled kernels and measurements, where nobody but the user can write.

Whoever writes there decides what this process loads and runs. A folder that the user names is taken as it is; the
default one is checked, and so are all folders and links on the way to it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "MST_COMPILE_CACHE_DIR"
_HAS_USERS = hasattr(os, "geteuid")  # else there is nothing to compare


class UntrustedFolderError(PermissionError):
    """Others than the user could put files into the default folder."""


def cache_dir() -> Path:
    """Where compiled libraries and measurements are kept; makes nothing.

    That is ``$MST_COMPILE_CACHE_DIR``, else ``mst_compile`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, else, for users
    who cannot write there, ``mst_compile_<user id>`` in the folder of temporary files.

    Raises:
        FileNotFoundError: there is none of these.
    """
    if os.environ.get(_VARIABLE):
        return Path(os.environ[_VARIABLE])
    home = _in_home()
    if home.is_absolute() and _exists_or_can_be_made(home):
        return home
    try:
        temporary = _in_temporary()
    except FileNotFoundError:
        if home.is_absolute():
            return home
        raise FileNotFoundError(f"neither a home nor a folder of temporary files is here: set {_VARIABLE}") from None
    return home if home.is_absolute() and not _exists_or_can_be_made(temporary) else temporary


def open_cache_dir() -> Path:
    """:func:`cache_dir`, made if absent, with access for the user alone.

    Raises:
        UntrustedFolderError: it is the default one, and others could write there.
        OSError: it cannot be made.
    """
    folder = cache_dir()
    if os.environ.get(_VARIABLE):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    _check(folder)  # before as well: nothing is put into a folder of another user
    missing = [step for step in (folder, *folder.parents) if not step.exists()]
    for step in reversed(missing):
        step.mkdir(mode=0o700, exist_ok=True)
    _check(folder)
    return folder


def _in_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~/.cache"))) / "mst_compile"


def _in_temporary() -> Path:
    user = f"_{os.geteuid()}" if _HAS_USERS else ""
    return Path(tempfile.gettempdir()) / f"mst_compile{user}"


def _exists_or_can_be_made(folder: Path) -> bool:
    nearest = next((step for step in (folder, *folder.parents) if os.path.exists(step)), None)
    if nearest is None or not os.path.isdir(nearest):
        return False
    return nearest == folder or os.access(nearest, os.W_OK | os.X_OK)


def _check(folder: Path) -> None:
    """Raise if anybody but the user and the administrator could put a file into ``folder``, or another in its place."""
    reason = _why_untrusted(folder) if _HAS_USERS else None
    if reason is not None:
        raise UntrustedFolderError(
            f"{reason}, so others could choose what is run from {folder}; set {_VARIABLE} to a folder in which only "
            "you can write"
        )


def _why_untrusted(folder: Path) -> str | None:
    trusted = {os.geteuid(), 0, os.stat("/").st_uid}  # root has another number within a user namespace
    *way, last = _steps(folder)
    for step in (*way, last):
        try:
            status = os.lstat(step)
        except FileNotFoundError:
            return None  # still to be made
        if status.st_uid not in trusted:
            return f"{step} belongs to another user (id {status.st_uid})"
        if stat.S_ISLNK(status.st_mode):
            continue
        shared = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid))
        # In a folder with the sticky bit, like /tmp, others can add files but not replace those of the user.
        if shared and (step == last or not status.st_mode & stat.S_ISVTX):
            return f"others may write to {step} (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _steps(path: Path) -> Iterator[Path]:
    """All folders and symbolic links that are looked up on the way to ``path``, itself last."""
    here, todo = Path("/"), list(reversed(Path(os.path.abspath(path)).parts[1:]))
    yield here
    for _ in range(1000):  # links may lead in a circle
        if not todo:
            return
        part = todo.pop()
        step = here.parent if part == ".." else here / part
        yield step
        if step.is_symlink():
            target = Path(os.readlink(step))
            here = Path("/") if target.is_absolute() else here
            todo += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            here = step
    raise OSError(f"{path} leads through too many symbolic links")


def _is_own_group(gid: int) -> bool:
    """Whether a group is the private one of the user, as many systems give each user one."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
