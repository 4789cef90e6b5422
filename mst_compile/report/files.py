"""Files of records: one JSON object a line, written so that a crash loses at most the line being written."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
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
    if not file.exists():
        return []
    found: list[Record] = []
    *lines, rest = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for i, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is None:
            raise RecordError(f"{file}, line {i} is no record: {line[:80]!r}; remove the line, or the file")
        found.append(record)
    last = _parsed(rest)  # a whole record whose end of line was not written counts
    return found if last is None else [*found, last]


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def replace(file: Path, content: str | bytes) -> None:
    """Write a file so that it holds either what it held or all of ``content``, whenever the process dies or the disk is
    full. A text is written in UTF-8, what cannot be (of a name that the system could not read) as escapes."""
    data = content.encode("utf-8", errors="backslashreplace") if isinstance(content, str) else content
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(data)
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
        """Begin with the records in ``kept``; what else the file holds is gone."""
        replace(file, "".join(f"{dumps(record)}\n" for record in kept))
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
        rows = read(self._source)
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        if self._columns:
            writer.writeheader()
            writer.writerows(rows)
        replace(self._file, text.getvalue())
        self._out = open(self._file, "a", encoding="utf-8", newline="")  # noqa: SIM115  (closed by close)

    def close(self) -> None:
        if self._out is not None:
            self._out.close()
