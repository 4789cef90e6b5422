"""Measurements on disk: a few numbers each, under a name.

A file a measurement: processes that measure at the same time lose nothing of each other's, without a lock. A folder
that cannot be written costs no more than measuring again in the next process, which is said.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from mst_compile.kernels.cpu.folder import cache_dir, open_cache_dir

from mst_compile.errors import MSTWarning


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
        try:
            folder = self._folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = folder / f"{name}.json.{uuid.uuid4().hex}"  # machines that share the folder have the same processes
            try:
                draft.write_text(json.dumps(values))
                draft.replace(folder / f"{name}.json")
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            self._lost(error)

    def find(self, name: str) -> tuple[float, ...] | None:
        """The measurement of a name: as this process has it, else as it stands on disk."""
        if name in self.own:
            return self.own[name]
        try:
            file = self._folder() / f"{name}.json"
            there = file.exists()
        except OSError:
            return None
        found = self._read(file) if there else None
        if there and found is None:
            self._damaged(file)
        return found

    def starting_with(self, prefix: str) -> list[tuple[float, ...]]:
        """All measurements whose names begin so; those on disk, where other processes add some, count."""
        found = {name: numbers for name, numbers in self.own.items() if name.startswith(prefix)}
        with contextlib.suppress(OSError):
            for file in sorted(self._folder().glob(f"{prefix}*.json")):
                numbers = self._read(file)
                if numbers is not None:
                    found[file.stem] = numbers
        return list(found.values())

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
