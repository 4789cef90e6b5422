"""Files of records: one JSON object a line, written so that a crash loses at most the line being written.

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
from typing import IO, Any

from mst_compile.errors import RecordError

Record = dict[str, Any]


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
    behind the other, and they may be made of the file as it was."""
    parts: Iterable[str | bytes] = [content] if isinstance(content, str | bytes) else content
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            for part in parts:
                out.write(part.encode("utf-8", errors="backslashreplace") if isinstance(part, str) else part)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # A full disk names no file, other errors the temporary one.
        raise type(error)(error.errno, error.strerror, str(file)) from error


class Lines:
    """A file of records that grows."""

    def __init__(self, file: Path, kept: Iterable[Record] = ()) -> None:
        """Begin with the records in ``kept``, which may come from the file; what else it holds is gone."""
        replace(file, (f"{dumps(record)}\n" for record in kept))
        self._out: IO[str] = open(file, "a", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115  (closed by close)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one record, through to the operating system."""
        self._out.write(f"{dumps(record)}\n")
        self._out.flush()

    def close(self) -> None:
        self._out.close()


class Table:
    """The same records as CSV. A column that is new is added to all rows: the file is then written anew."""

    def __init__(self, file: Path, source: Path) -> None:
        """Begin with the records that are in ``source``, the file that :class:`Lines` writes."""
        self._file, self._source = file, source
        self._out: IO[str] | None = None
        self._begin()

    def add(self, record: Record) -> None:
        """Write one record, which ``source`` holds already."""
        if not record.keys() <= set(self._columns):
            self._begin()
            return
        assert self._out is not None
        csv.DictWriter(self._out, self._columns).writerow(record)
        self._out.flush()

    def _begin(self) -> None:
        self.close()
        self._columns: list[str] = list(dict.fromkeys(name for row in each(self._source) for name in row))
        replace(self._file, self._lines() if self._columns else "")
        self._out = open(self._file, "a", encoding="utf-8", newline="")  # noqa: SIM115  (closed by close)

    def _lines(self) -> Iterator[str]:
        """The lines of the file, of all records of the source."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        for row in each(self._source):
            writer.writerow(row)
            yield text.getvalue()
            text.seek(0)
            text.truncate()

    def close(self) -> None:
        if self._out is not None:
            self._out.close()
