"""How long a step of each configuration takes, measured in turn: what a run's own seconds on a shared machine are not.

A run takes minutes, in which others use caches and memory as well. Here every configuration trains for some seconds,
one after the other, and again; what counts is the median of the rounds.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Config
from .records import Record
from .sizes import Study
from .training import Text, train

COLUMNS = ("name", "width", "dtype", "threads", "cpu", "torch", "rounds", "steps", "milliseconds", "least", "most")


def measure(
    configs: Sequence[Config], study: Study, text: Text, rounds: int, steps: int, device: torch.device
) -> list[Record]:
    """Processor time of a step of each configuration, in milliseconds: median, least and most of ``rounds``.

    Args:
        steps: of each configuration in a round; those that compile are not counted.
    """
    found: dict[str, list[dict[str, Any]]] = {config.name: [] for config in configs}
    for _ in range(rounds):
        for config in configs:
            record = train(config, 0, study, text, stop=steps, device=device)
            found[config.name].append(record)
            print(f"{config.name:28} {1000 * record['processor_seconds'] / steps:.1f} ms a step", flush=True)
    return [_row(records, study, rounds, steps) for records in found.values()]


def _row(records: Sequence[Record], study: Study, rounds: int, steps: int) -> Record:
    times = [1000 * record["processor_seconds"] / steps for record in records]
    row = {key: records[0][key] for key in ("name", "width", "cpu", "torch")}
    row |= {"dtype": study.dtype, "threads": torch.get_num_threads(), "rounds": rounds, "steps": steps}
    return row | {"milliseconds": statistics.median(times), "least": min(times), "most": max(times)}


def write(file: Path, rows: Sequence[Record]) -> None:
    """Add the rows to a CSV, in place of older ones of the same configurations, processor, threads and dtype."""
    old = [row for row in read(file) if not any(_key(row) == _key(new) for new in rows)] if file.exists() else []
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in [*old, *rows]:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def read(file: Path) -> list[Record]:
    """The rows again, numbers as numbers."""
    whole, broken = ("width", "threads", "rounds", "steps"), ("milliseconds", "least", "most")
    with file.open(newline="") as stream:
        rows: list[Record] = list(csv.DictReader(stream))
    for row in rows:
        row |= {key: int(row[key]) for key in whole} | {key: float(row[key]) for key in broken}
    return rows


def _key(row: Record) -> tuple[Any, ...]:
    return tuple(str(row[key]) for key in ("name", "cpu", "threads", "dtype"))
