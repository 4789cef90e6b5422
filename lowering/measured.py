"""Measurements on disk: a few numbers each, under a name.

A file a measurement: processes that measure at the same time lose nothing of each other's, without a lock. A folder
that cannot be written costs no more than measuring again in the next process, which is said.

What was measured while others had the processor is provisional: it stands for the processes that run at that moment,
and those that begin later measure again, until a measurement is undisturbed or as many as :data:`TRIES` have been made.
Then the least disturbed one stays, as of a machine that is always busy.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mst_compile.kernels.cpu.folder import cache_dir, open_cache_dir

from mst_compile.errors import MSTWarning

TRIES = 3
_BEGUN = time.time()  # this process, about; a forked one goes by its parent's


class _Provisional(NamedTuple):
    """What a file of a provisional measurement holds.

    Attributes:
        share: of the time in which the processor was at work for whoever measured.
        tries: how many measurements there have been; of these it is the one with the largest share.
        when: the last of them was made, in seconds since the epoch.
    """

    share: float
    tries: float
    when: float
    values: tuple[float, ...]


class Measurements:
    """The measurements of one kind.

    Args:
        folder: where they are kept; asked at every use, it may raise OSError. A change of what they depend on must
            lead to another folder: what stood in the old one would mislead.
        length: how many numbers make a measurement, all positive.
        lost: told why a measurement could not be written.
        damaged: told of a file that is no measurement, or cannot be read.

    Attributes:
        own: what this process has measured, for a folder that cannot be written.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        length: int,
        lost: Callable[[OSError], object] = lambda _: None,
        damaged: Callable[[Path], object] = lambda _: None,
    ) -> None:
        self._folder, self._length, self._lost, self._damaged = folder, length, lost, damaged
        self.own: dict[str, tuple[float, ...]] = {}

    def record(self, name: str, numbers: Sequence[float]) -> None:
        """Keep a measurement; a later one of the same name replaces it. What holds no positive number is left out."""
        values = self._checked(numbers)
        if values is None:
            return
        self.own[name] = values
        self._write(f"{name}.json", values)
        with contextlib.suppress(OSError):
            self._provisional_file(name).unlink(missing_ok=True)

    def record_provisional(self, name: str, numbers: Sequence[float], share: float) -> tuple[float, ...]:
        """Keep a measurement that was disturbed, unless one that was less so is there.

        Args:
            share: see :class:`_Provisional`; at least 0.

        Returns:
            The measurement that this process goes by: the least disturbed one of all.
        """
        values = self._checked(numbers)
        if values is None:
            return tuple(numbers)
        before = self._provisional(name)
        tries = 1 if before is None else before.tries + 1
        if before is not None and before.share > share:
            share, values = before.share, before.values
        self.own[name] = values
        if tries < TRIES:
            self._write(f"{name}.provisional", (share, tries, time.time(), *values))
        else:
            self.record(name, values)
        return values

    def find(self, name: str) -> tuple[float, ...] | None:
        """The measurement of a name: as this process has it, else as it stands on disk, where a provisional one counts
        if it was made since this process began."""
        if name in self.own:
            return self.own[name]
        try:
            file = self._folder() / f"{name}.json"
            there = file.exists()
        except OSError:
            return None
        found = self._read(file) if there else self._of_now(name)
        if there and found is None:
            self._damaged(file)
        return found

    def is_known(self, name: str) -> bool:
        """Whether :meth:`find` would find it; says nothing of damaged files."""
        if name in self.own:
            return True
        try:
            file = self._folder() / f"{name}.json"
        except OSError:
            return False
        return self._read(file) is not None or self._of_now(name) is not None

    def starting_with(self, prefix: str) -> list[tuple[float, ...]]:
        """All measurements whose names begin so; those on disk, where other processes add some, count."""
        found = {name: numbers for name, numbers in self.own.items() if name.startswith(prefix)}
        with contextlib.suppress(OSError):
            for file in sorted(self._folder().glob(f"{prefix}*.json")):
                numbers = self._read(file)
                if numbers is not None:
                    found[file.stem] = numbers
        return list(found.values())

    def _write(self, file_name: str, numbers: Sequence[float]) -> None:
        try:
            folder = self._folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = folder / f"{file_name}.{uuid.uuid4().hex}"  # machines that share the folder have the same processes
            try:
                draft.write_text(json.dumps(numbers))
                draft.replace(folder / file_name)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            self._lost(error)

    def _provisional_file(self, name: str) -> Path:
        return self._folder() / f"{name}.provisional"

    def _provisional(self, name: str) -> _Provisional | None:
        """As it stands on disk; None if there is none, or the file holds anything else."""
        try:
            read = json.loads(self._provisional_file(name).read_text())
            share, tries, when = (float(number) for number in read[:3])
            values = self._checked(read[3:])
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return None
        fits = 0 <= share <= 1 and 1 <= tries < TRIES and math.isfinite(when)
        return _Provisional(share, tries, when, values) if fits and values is not None else None

    def _of_now(self, name: str) -> tuple[float, ...] | None:
        """A provisional measurement of a process that has run beside this one."""
        found = self._provisional(name)
        return found.values if found is not None and _BEGUN <= found.when <= time.time() else None

    def _read(self, file: Path) -> tuple[float, ...] | None:
        """The numbers in a file, or None if it holds anything else, as when it was cut off."""
        try:
            return self._checked(json.loads(file.read_text()))
        except (OSError, ValueError, RecursionError):
            return None

    def _checked(self, numbers: object) -> tuple[float, ...] | None:
        if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != self._length:
            return None
        try:
            values = tuple(float(number) for number in numbers)
        except (TypeError, ValueError, OverflowError):
            return None
        return values if all(math.isfinite(number) and number > 0 for number in values) else None


def say_not_kept(error: OSError) -> None:
    """Warn, once in a process, that the user's cache takes no measurements."""
    try:
        _say_not_kept(str(cache_dir()), error.strerror or str(error))
    except OSError as there_is_none:
        _say_not_kept("a cache", str(there_is_none))


@functools.cache
def _say_not_kept(folder: str, reason: str) -> None:
    warnings.warn(
        f"what was measured cannot be kept in {folder} ({reason}): it counts for this process, and the next one "
        "measures anew. Set MST_COMPILE_CACHE_DIR to a folder that can be written",
        MSTWarning,
        stacklevel=3,
    )


def cache_folder(kind: str) -> Path:
    """A folder for measurements of one kind in the user's cache."""
    return open_cache_dir() / kind
