"""What a recorder writes while a model trains. None of it is worth the training: what cannot be written is said once,
waits, and is written when it can be."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mst_compile.errors import MSTWarning

from . import files, history, sinks

Kept = Mapping[str, Iterable[files.Record]]


class Records:
    """The files of a run that grow, and where else its scalars go.

    Args:
        folder: where they are; it exists.
        kept: the records that each file begins with, by its name.
        others: take scalars too.

    Raises:
        WriteError: a file cannot be written.
    """

    def __init__(self, folder: Path, kept: Kept, others: Sequence[sinks.Sink]) -> None:
        self._folder, self._others, self._told = folder, others, False
        with contextlib.ExitStack() as opened:
            self._scalars, self._events, self._masks = (
                _closing(opened, files.Lines(folder / name, kept[name]))
                for name in (history.SCALARS, history.EVENTS, history.MASKS)
            )
            self._table = _closing(opened, files.Table(folder / history.TABLE, folder / history.SCALARS))
            opened.pop_all()

    def add_row(self, row: files.Record) -> None:
        """Write a record of scalars everywhere."""
        with self.going_on():
            self._scalars.add(row)
        with self.going_on():
            if not self._scalars.waiting:
                self._table.add(row, self._scalars.count)
        self.tell(row["step"], sinks.named(row))

    def add_event(self, record: files.Record) -> None:
        with self.going_on():
            self._events.add(record)

    def add_masks(self, record: files.Record) -> None:
        with self.going_on():
            self._masks.add(record)

    def tell(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hand scalars to those that are no files."""
        for other in self._others:
            with self.going_on():
                other.add(step, scalars)

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Let what the system refuses be no reason to stop training: it is said, once."""
        try:
            yield
        except OSError as error:
            if not self._told:
                self._told = True
                warnings.warn(
                    f"records of {str(self._folder)!r} cannot be written ({error.strerror or error}): training goes "
                    "on, and they wait in memory until they can be",
                    MSTWarning,
                    stacklevel=6,
                )

    def close(self) -> None:
        """Write what waits, and close everything; what is lost is said."""
        lines = (self._scalars, self._events, self._masks)
        for each in lines:
            with self.going_on():
                each.write()
        with self.going_on():
            if not self._scalars.waiting:
                self._table.complete(self._scalars.count)
        lost = sum(each.waiting for each in lines)
        for closing in (*lines, self._table, *self._others):
            with self.going_on():
                closing.close()
        if lost:
            warnings.warn(
                f"{lost} records of {str(self._folder)!r} could not be written to the end and are lost: make room, or "
                "name another folder, before the next run",
                MSTWarning,
                stacklevel=4,
            )


def _closing(stack: contextlib.ExitStack, opened: Any) -> Any:
    stack.callback(opened.close)
    return opened
