"""Files of records: one JSON object a line, written so that a crash loses at most the line being written, and an
interrupt or a full disk none: what could not be written waits, and is written with what comes next.

A run may have a million of them: whoever can do with one after the other takes :func:`each`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mst_compile.errors import RecordError, WriteError

Record = dict[str, Any]
_MOST_WAITING = 8 << 20  # bytes of records that wait for a disk; some twenty thousand
_MOST_PATIENCE = 1024


def dumps(record: Mapping[str, Any]) -> str:
    """A line of strict JSON. It has no numbers that are not finite: they become "NaN", "Infinity" and "-Infinity"."""
    return json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def number(value: object) -> float | None:
    """The number that :func:`dumps` wrote; None of what is none."""
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read(file: Path) -> list[Record]:
    """All records of a file, none if it does not exist. A last line that was not finished does not count.

    Raises:
        RecordError: a line that is followed by others is no JSON object.
    """
    return list(each(file))


def each(file: Path) -> Iterator[Record]:
    """As :func:`read`, one after the other."""
    if not file.exists():
        return
    with open(file, encoding="utf-8", errors="replace", newline="\n") as lines:
        for i, line in enumerate(lines, 1):
            record = _parsed(line)  # a whole record whose end of line was not written counts
            if record is not None:
                yield record
            elif line.endswith("\n"):
                said = line.rstrip("\n")[:80]
                raise RecordError(f"{file}, line {i} is no record: {said!r}; remove the line, or the file")


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def replace(file: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file so that it holds either what it held or all of ``content``, whenever the process dies or the disk is
    full. Texts are written in UTF-8, what cannot be (of a name that the system could not read) as escapes; several one
    behind the other, and they may be made of the file as it was.

    Raises:
        WriteError: it cannot be written, and is as it was.
    """
    parts: Iterable[str | bytes] = [content] if isinstance(content, str | bytes) else content
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            for part in parts:
                out.write(part.encode("utf-8", errors="backslashreplace") if isinstance(part, str) else part)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk names no file, other errors the temporary one
            raise unwritten(file, error) from error
        raise


def unwritten(file: Path, error: OSError) -> WriteError:
    """The error of a file that cannot be written."""
    return WriteError(error.errno, f"{str(file)!r} cannot be written, and is as it was: {error.strerror or error}")


class _Growing:
    """A file that grows without a buffer: what a write has not taken is not in it, and known not to be."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor = -1

    def open(self) -> None:
        self.close()
        self._descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | getattr(os, "O_BINARY", 0))

    @property
    def is_open(self) -> bool:
        return self._descriptor >= 0

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> int:
        """Write what there is room for, at least one byte; how many they were. OSError if there is none."""
        return os.write(self._descriptor, data)

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


class Lines:
    """A file of records that grows."""

    def __init__(self, file: Path, kept: Iterable[Record] = ()) -> None:
        """Begin with the records in ``kept``, which may come from the file; what else it holds is gone.

        Raises:
            WriteError: the file cannot be written.
        """
        counted = 0

        def lines() -> Iterator[str]:
            nonlocal counted
            for record in kept:
                counted += 1
                yield f"{dumps(record)}\n"

        replace(file, lines())
        self._out = _Growing(file)
        self._out.open()
        # Where what waits begins in the file, what waits, and how many records there are with it: one value, so that
        # no interrupt comes between them.
        self._state = self._out.size(), b"", counted
        self.dropped = 0

    @property
    def count(self) -> int:
        """How many records the file has, with those that wait."""
        return self._state[2]

    @property
    def waiting(self) -> int:
        """How many records are not in the file, or not whole."""
        return self._state[1].count(b"\n") + self.dropped

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one record, through to the operating system, and all that wait.

        Raises:
            OSError: it could not be written, and waits; of more than some megabytes the newest are dropped.
        """
        base, waiting, count = self._state
        line = f"{dumps(record)}\n".encode("utf-8", errors="backslashreplace")
        if len(waiting) + len(line) <= _MOST_WAITING:
            self._state = base, waiting + line, count + 1
        else:
            self.dropped += 1
        self.write()

    def write(self) -> None:
        """Write what waits.

        Raises:
            OSError: it still waits.
        """
        base, waiting, count = self._state
        if not waiting:
            return
        # An interrupt may have come behind a write: the file itself says how much of it is there.
        written = self._out.size() - base
        if not 0 <= written <= len(waiting):  # somebody else has written to it
            base, written = self._out.size(), 0
        while written < len(waiting):
            written += self._out.write(waiting[written:])
        self._state = base + len(waiting), b"", count

    def close(self) -> None:
        self._out.close()


class Table:
    """The same records as CSV. A column that is new is added to all rows: the file is then written anew, as it is where
    a row is missing."""

    def __init__(self, file: Path, source: Path) -> None:
        """Begin with the records that are in ``source``, the file that :class:`Lines` writes.

        Raises:
            WriteError: the file cannot be written.
        """
        self._source, self._out = source, _Growing(file)
        self._columns: list[str] = []
        self._rows = self._patience = self._skipped = 0
        self._begin()

    def add(self, record: Record, count: int) -> None:
        """Write one record, the last of the ``count`` that ``source`` holds.

        Raises:
            OSError: it could not be written; one of the next calls writes it as well, or :meth:`complete`.
        """
        if self._skipped < self._patience:
            self._skipped += 1  # the whole file is not tried again each time that there is no room for it
            return
        if self._rows + 1 != count or not self._out.is_open or not record.keys() <= set(self._columns):
            self.complete(count)
            return
        line = self._text([record]).encode("utf-8", errors="backslashreplace")
        self._rows = -1  # until it is whole
        if self._out.write(line) == len(line):
            self._rows = count

    def complete(self, count: int) -> None:
        """Write the file anew unless it has all ``count`` records.

        Raises:
            WriteError: it cannot be written.
        """
        if self._rows == count and self._out.is_open:
            return
        self._patience, self._skipped = min(_MOST_PATIENCE, 2 * self._patience + 1), 0
        self._begin()
        self._patience = 0

    def _begin(self) -> None:
        self._rows = -1
        self._columns = list(dict.fromkeys(name for row in each(self._source) for name in row))
        counted = 0

        def lines() -> Iterator[str]:
            nonlocal counted
            yield self._text([dict(zip(self._columns, self._columns, strict=True))])
            for row in each(self._source):
                counted += 1
                yield self._text([row])

        replace(self._out.file, lines() if self._columns else "")
        self._out.open()
        self._rows = counted

    def _text(self, rows: Iterable[Record]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerows(rows)
        return text.getvalue()

    def close(self) -> None:
        self._out.close()
