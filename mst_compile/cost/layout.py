"""How ``explain`` prints: groups of alike layers, in at most 100 columns."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mst_compile.cost.rows import Row

WIDTH = 100
_HEAD = ("layers", "shape", "block", "density", "non-zero", "target", "kernel", "MFLOPs/token")
_MOST_REASONS = 3


@dataclass(frozen=True)
class Group:
    """Layers that are alike in shape, block, density, kernel and status."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]


def groups(rows: Iterable[Row]) -> list[Group]:
    """Alike rows together, in the order of the first of each; exceptions before sparse weights before others."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.shape, row.block, round(row.density, 3), row.kernel, row.status, row.exception)
        found.setdefault(key, []).append(row)
    return sorted((Group(tuple(alike)) for alike in found.values()), key=lambda g: _rank(g.first))


def _rank(row: Row) -> int:
    return 0 if row.exception else 1 if row.block is not None else 2


def wrapped(text: str, indent: int = 0) -> list[str]:
    """Lines of at most 100 columns."""
    own, more = " " * indent, " " * (indent + 4)
    return textwrap.wrap(text, WIDTH, initial_indent=own, subsequent_indent=more, break_on_hyphens=False)


def table(found: Sequence[Group]) -> list[str]:
    """A line of numbers a group, under it names and status."""
    cells = [_HEAD, *map(_cells, found)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]
    lines: list[str] = []
    for line, group in zip(cells, [None, *found], strict=True):
        lines += wrapped("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
        if group is not None:
            lines += wrapped(", ".join(short_names([r.name for r in group.rows])), 4)
            lines += wrapped(group.first.status, 4)
    return lines


def _cells(group: Group) -> tuple[str, ...]:
    row, count = group.first, len(group.rows)
    shares = sorted(f"{r.nonzero:.3f}" for r in group.rows)
    target = sorted(f"{r.target:.3f}" for r in group.rows)
    flops, dense = sum(r.flops for r in group.rows) / 1e6, sum(r.dense_flops for r in group.rows) / 1e6
    return (
        str(count),
        "x".join(map(str, row.shape)),
        "-" if row.block is None else str(row.block),
        f"{row.density:.3f}",
        shares[0] if shares[0] == shares[-1] else f"{shares[0]}-{shares[-1]}",
        target[0] if target[0] == target[-1] else f"{target[0]}-{target[-1]}",
        row.kernel,
        f"{_millions(flops)} of {_millions(dense)}",
    )


def _millions(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"


def short_names(names: Sequence[str]) -> list[str]:
    """Names that differ in their numbers alone as one: ``h.0-3,5.mlp.weight``; those with several numbers in the first
    that differs."""
    found: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)), None)
        key = tuple(parts) if at is None else (*parts[:at], "\0", *parts[at + 1 :])
        found.setdefault(key, []).append(-1 if at is None else int(parts[at]))
    return [".".join(_ranges(numbers) if part == "\0" else part for part in key) for key, numbers in found.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers, neighbours as a range: ``0-3,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def counts(rows: Sequence[Row]) -> list[str]:
    """Of how many weights what is true."""
    sparse, dense = [r for r in rows if r.block is not None], [r for r in rows if r.block is None]
    elements = sum(math.prod(r.shape) for r in sparse)
    density = sum(r.density * math.prod(r.shape) for r in sparse) / max(1, elements)
    served, wrong = sum(r.kernel == "block-sparse" for r in sparse), sum(r.exception for r in rows)
    lines = [f"{len(sparse)} sparse weights, density {density:.3f}: {served} in block-sparse products"]
    faster = sum(r.kernel == "dense" and not r.exception for r in sparse)
    lines[0] += f", {faster} in dense ones, chosen at this density" if faster else ""
    left = sum(not r.exception for r in dense)
    lines.append(f"{left} linear weights stay dense; exceptions: {wrong or 'none'}")
    return lines


def reasons(found: Sequence[Group]) -> list[str]:
    """Why there are exceptions, the most frequent reasons first."""
    why: dict[str, int] = {}
    for group in found:
        if group.first.exception:
            why[group.first.status] = why.get(group.first.status, 0) + len(group.rows)
    most = sorted(why.items(), key=lambda item: -item[1])
    lines = [line for reason, count in most[:_MOST_REASONS] for line in wrapped(f"{count}: {reason}", 4)]
    return lines + ([f"    and {len(most) - _MOST_REASONS} more reasons"] if len(most) > _MOST_REASONS else [])
