"""Records of runs: a line of JSON each while the study goes on, a row of CSV each in the end."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import spikes
from .config import Config
from .configurations import KNOWN
from .sizes import Study

Record = dict[str, Any]

CONTROL = "static-b8"  # its topology never changes
STUDY = ("layers", "context", "batch", "learning_rate", "dtype", "unique")
PLAIN: tuple[str, ...] = (
    "width",
    "steps",
    "val_loss",
    "train_loss",
    "flops",
    "flops_relative",
    "seconds",
    "processor_seconds",
)
# The lowest of the validation losses taken on the way and at the end, and all of them: "240:2.1301 480:1.9207 …".
BEST = ("best_loss", "best_step", "checks")
PLAIN += ("compile_seconds", "density_min", "density", "nonzero", "dead_hidden", "dead_values", "torch", "cpu")
SPIKE = ("step", "rise", "z", "threshold", "events", "own")
COLUMNS: tuple[str, ...] = ("name", "seed", "settings", *STUDY, "text", "blocks", *PLAIN, *BEST)
COLUMNS += tuple(f"spike{after}_{part}" for after in spikes.AFTER for part in SPIKE)


def read(file: Path) -> list[Record]:
    """All records of a JSON-lines file; a line that was cut off by a crash is left out."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(file: Path, record: Record) -> None:
    """Add a record."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cut_off = file.exists() and not file.read_bytes().endswith(b"\n")
    with file.open("a") as stream:
        stream.write("\n" * cut_off + json.dumps(record) + "\n")


def is_done(records: Iterable[Record], config: Config, seed: int, study: Study, text: str) -> bool:
    """Whether the run is there already, with these very settings; those that a record does not tell are the study's
    defaults, since it is older than they are.

    Args:
        text: the fingerprint of the text; a record without one is taken to be of it.
    """
    wanted = json.loads(json.dumps({"name": config.name, "seed": seed, "settings": config.settings()}))
    defaults, asked = asdict(Study()), asdict(study)
    return any(
        all(record[key] == value for key, value in wanted.items())
        and {**defaults, **record["study"]} == asked
        and record.get("text") in (None, text)
        for record in records
    )


def rows(records: Sequence[Record]) -> list[Record]:
    """The CSV's rows, in the order of the configurations; of repeated runs the newest counts."""
    # Those of other studies and texts are no repetitions.
    studies: dict[tuple[int | None, int, str], dict[tuple[str, int], Record]] = {}
    for r in records:
        study = (r["study"].get("unique"), r["study"]["steps"], r.get("text") or "")
        studies.setdefault(study, {})[r["name"], r["seed"]] = r
    order = {name: i for i, name in enumerate(KNOWN)}
    found = []
    for study in sorted(studies, key=lambda study: (study[0] is not None, -(study[0] or 0), -study[1], study[2])):
        newest = studies[study]
        known = sorted((key for key in newest if key[0] in order), key=lambda key: (order[key[0]], key[1]))
        found += [_row(newest[key], newest) for key in known]
    return found


def _row(record: Record, others: dict[tuple[str, int], Record]) -> Record:
    row = {key: record[key] for key in ("name", "seed", *PLAIN)}
    row["settings"] = json.dumps(record["settings"], sort_keys=True)
    row["blocks"] = " ".join(map(str, record["blocks"]))
    row["text"] = record.get("text") or ""
    row |= {key: record["study"].get(key) for key in STUDY}
    if record.get("checks"):
        checks = [*record["checks"], (record["steps"], record["val_loss"])]
        loss, step = min((loss, step) for step, loss in checks)
        row |= {"best_loss": loss, "best_step": step, "checks": " ".join(f"{step}:{loss:.4f}" for step, loss in checks)}
    cosine, long = record["settings"].get("decay") == "cosine", isinstance(record["settings"].get("length"), int)
    suffix = "-cosine" if cosine else "-long" if long else ""
    dense, static = (others.get((name + suffix, record["seed"])) for name in ("dense", CONTROL))
    if not record["events"] or dense is None or len(dense["losses"]) != len(record["losses"]):
        return row  # runs of other lengths cannot be subtracted step by step
    control = None if static is None else spikes.difference(static["losses"], dense["losses"])
    curve = spikes.difference(record["losses"], dense["losses"])
    for after in spikes.AFTER:
        spike = spikes.largest_rise(curve, record["events"], after, control)
        if spike is not None:
            row |= {f"spike{after}_{key}": value for key, value in asdict(spike).items()}
    return row


def write_csv(file: Path, found: Sequence[Record]) -> None:
    """Write the rows, figures rounded to what is worth reading."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for row in found:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(file: Path) -> list[Record]:
    """The rows again, numbers as numbers."""
    with file.open(newline="") as stream:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def by_name(rows: Iterable[Record]) -> dict[str, list[Record]]:
    """The rows of each configuration, in the order of their first ones."""
    named: dict[str, list[Record]] = {}
    for row in rows:
        named.setdefault(row["name"], []).append(row)
    return named


def curve(row: Record) -> list[tuple[int, float]]:
    """Validation losses on the way and at the end, as (step, loss); none where there were no checks."""
    return [(int(step), float(loss)) for step, loss in (pair.split(":") for pair in str(row["checks"] or "").split())]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"True": True, "False": False, "": None}.get(text, text)
