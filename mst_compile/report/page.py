"""A report of recorded runs as one HTML file that needs nothing else: no network, no scripts, figures inside."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from . import files
from .course import MOST_EVENTS, Change
from .figures import figures, svg
from .history import History

_TITLES = {"loss": "Loss against steps, time and FLOPs", "density": "Density and phases"}
_HEAD = ["run", "steps", "loss", "val. loss", "TFLOP", "of its dense model's", "training", "compiling", "tokens/s"]
_HEAD += ["density at the end"]


def render(histories: Sequence[History]) -> str:
    """The page, all that comes from the runs escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    histories = distinguished(histories)
    machines = {tuple(sorted(map(str, history.about.get("machine", {}).items()))) for history in histories}
    return environment.get_template("page.html.jinja").render(
        title=" and ".join(history.label for history in histories) if len(histories) < 3 else f"{len(histories)} runs",
        results={"head": _HEAD, "rows": [_result(history) for history in histories]},
        savings=savings(histories),
        machines=len(machines),
        figures=[
            {"title": _TITLES.get(name, "Masks"), "data": base64.b64encode(svg(figure).encode()).decode()}
            for name, figure in figures(histories)
        ],
        runs=[_run(history) for history in histories],
    )


def write(histories: Sequence[History], file: Path) -> None:
    """Write the page to a file, whole or not at all."""
    files.replace(file, render(histories))


def distinguished(histories: Sequence[History]) -> list[History]:
    """The runs, those of equal labels numbered."""
    counts, seen, found = Counter(history.label for history in histories), Counter[str](), []
    for history in histories:
        seen[history.label] += 1
        more = f" ({seen[history.label]})" if counts[history.label] > 1 else ""
        found.append(History(**{**vars(history), "label": history.label + more}))
    return found


def savings(histories: Sequence[History]) -> list[str]:
    """What each sparse run saved against its dense model, and against the first dense run if there is one."""
    dense = next((history for history in histories if not history.sparse and history.rows), None)
    found = []
    for history in histories:
        if not history.sparse or not history.rows:
            continue
        share = history.last("flops_of_dense")
        line = f"{history.label}: {share:.0%} of the FLOPs of its dense model in as many steps." if share else ""
        if dense is not None:
            line = f"{history.label} against {dense.label}: " + "; ".join(_against(history, dense)) + "."
        if line:
            found.append(line)
    return found


def _against(history: History, dense: History) -> list[str]:
    parts = []
    for name, unit, size in (("flops", "TFLOP", 1e12), ("seconds", "s of training", 1.0)):
        mine, theirs = history.last(name), dense.last(name)
        if mine and theirs:
            less = "less" if mine < theirs else "more"
            parts.append(
                f"{_short(mine / size)} in place of {_short(theirs / size)} {unit}, {abs(1 - mine / theirs):.0%} {less}"
            )
    for name, words in (("val_loss", "validation loss"), ("loss", "training loss")):
        mine, theirs = history.last(name), dense.last(name)
        if mine is not None and theirs is not None:
            parts.append(f"{words} {mine:.3f} in place of {theirs:.3f}")
            break
    steps = [run.rows[-1]["step"] for run in (history, dense)]
    return parts if steps[0] == steps[1] else [f"{steps[0]} steps in place of {steps[1]}", *parts]


def _result(history: History) -> list[str]:
    flops, density = history.last("flops"), history.last("density")
    return [
        history.label,
        str(history.rows[-1]["step"]) if history.rows else "0",
        _number(history.last("loss"), ".3f"),
        _number(history.last("val_loss"), ".3f"),
        "" if flops is None else _short(flops / 1e12),
        _number(history.last("flops_of_dense"), ".0%"),
        _number(history.last("seconds"), ".1f", " s"),
        _number(history.last("compile_seconds"), ".1f", " s"),
        _number(history.speed(), ".0f"),
        _number(density if history.sparse else None, ".2f"),
    ]


def _run(history: History) -> dict[str, Any]:
    """What the page says of one run."""
    changes = history.changes()
    events = [
        [str(e["step"]), e["phase"], _number(e["density"], ".3f"), str(e["dropped"]), str(e["grown"]), e["skipped"]]
        for e in changes.first
    ]
    left = changes.count - MOST_EVENTS
    return {
        "label": history.label,
        "sparse": history.sparse,
        "about": _about(history.about),
        "time": _time(history),
        "phases": _phases(history),
        "events": events,
        "more_events": f"{left} more are in events.jsonl." if left > 0 else "",
        "weights": _weights(changes.weights),
        "sample": history.sample,
    }


def _about(about: dict[str, Any]) -> list[list[str]]:
    """What was trained, how and where, as rows of a table."""
    sparse = about.get("sparse", [])
    elements = sum(rows * cols for rows, cols in (w["shape"] for w in sparse))
    blocks = ", ".join(str(b) for b in sorted({w["block"] for w in sparse}))
    where = about.get("machine", {})
    found = {
        "model": f"{about.get('model')}, {about.get('parameters', 0):,} parameters, {about.get('dtype')}",
        "sparse": f"{len(sparse)} weights of {elements:,} elements, blocks of {blocks}" if sparse else "no weight",
        "schedule": about.get("schedule", ""),
        "first masks": about.get("first_masks", ""),
        "tokens a step": about.get("tokens_per_step") or "",
        "processor": f"{where.get('processor')}, {where.get('threads')} threads, {about.get('device')}",
        "versions": f"mst_compile {where.get('mst_compile')}, torch {where.get('torch')}, Python {where.get('python')}",
        "started": about.get("started", ""),
        "resumed at steps": ", ".join(map(str, about.get("resumed", []))),
    } | {str(name): value for name, value in about.get("notes", {}).items()}
    return [[name, str(value)] for name, value in found.items() if value not in ("", None)]


def _time(history: History) -> list[list[str]]:
    """Training, compilation and the rest of the time since the run began."""
    training, compiling, wall = (history.last(n) for n in ("seconds", "compile_seconds", "wall_seconds"))
    if training is None or compiling is None or not wall:
        return []
    parts = {
        "training steps": training,
        "compiling": compiling,
        "validation, data and the rest": wall - training - compiling,
    }
    return [[name, f"{max(0.0, s):.1f}", f"{max(0.0, s) / wall:.0%}"] for name, s in {**parts, "all": wall}.items()]


def _phases(history: History) -> list[list[str]]:
    """Steps, seconds and FLOPs of each phase, from what was so far at its ends."""
    found, dense = [], history.about.get("dense_flops_per_step")
    before: dict[str, Any] = {"step": 0}
    for name, first, end in history.phases:
        inside = [row for row in history.rows if first < row["step"] <= end]
        if not inside:
            continue
        now = inside[-1]
        steps, seconds, flops = (now.get(n, 0) - before.get(n, 0) for n in ("step", "seconds", "flops"))
        tera, share = ("", "") if not dense or not steps else (_short(flops / 1e12), f"{flops / (steps * dense):.0%}")
        found.append([name, str(steps), f"{seconds:.1f}", tera, share])
        before = now
    return found


def _weights(changes: Mapping[str, Change]) -> list[list[str]]:
    """Each weight over all events."""
    return [[name, str(c.events), str(c.dropped), str(c.grown), f"{c.density:.3f}"] for name, c in changes.items()]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _short(value: float) -> str:
    """Three digits that count."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
