"""Write the report's tables and statements from the recorded results, so that no figure there is typed by hand.

The document is ordinary text with places for generated parts, ``<!-- study:NAME -->`` to ``<!-- end -->``; only what
stands between the markers is replaced.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from . import budget
from .analysis import Results
from .configurations import CONFIGURATIONS, KNOWN
from .records import Record
from .sizes import BASE, LARGE
from .spikes import AFTER

_PART = re.compile(r"(<!-- study:(\w+) -->\n).*?(<!-- end -->)", re.S)
BLOCKS = (1, 4, 8, 16, 32, 64)
# Label -> names of its runs by block; where a coarse block leaves no room for the backbone it was left out.
FAMILIES: dict[str, dict[int, str]] = {
    "static 80 %": {1: "static-b1", 4: "static-b4", 8: "static-b8", 16: "static-b16", 32: "static-b32-free"},
    "MST 90 %, backbone": {1: "mst-b1", 4: "mst-b4", 8: "mst-b8"},
    "MST 90 %, coverage": {n: f"mst-b{n}-coverage" for n in (8, 16, 32, 64)},
    "MST 90 %, no backbone": {8: "mst-b8-free", 16: "mst-b16-free", 32: "mst-b32-free", 64: "mst-b64-free"},
}
# Labels and endings of the names of their runs.
GUARDS = (
    ("none", "free"),
    ("one side of each pair kept", "pair"),
    ("one block of each row and column kept", "coverage"),
    ("dead pairs revived", "revive"),
    ("backbone", ""),
    ("backbone", "backbone"),
)
DEFAULT = "start-80"  # what MixedSparsity does unless told otherwise
AROUND_DEFAULT = {c.name for c in CONFIGURATIONS if c.name.startswith(("start-", "at-once-")) and c.length == "full"}
DENSE_LONG = "dense-long"
LONGER: tuple[tuple[str | None, str], ...] = (  # short run and long one
    ("dense", DENSE_LONG),
    ("dense-small", "dense-152-long"),
    ("dense-128", "dense-128-long"),
    ("start-80", "start-80-long"),
    ("start-80-b4", "start-80-b4-long"),
    ("start-80-restore-30", "start-80-restore-30-long"),
    ("start-70", "start-70-long"),
    (None, "start-60-long"),
    ("static-b8", "static-b8-long"),
    ("mst-b8", "mst-b8-long"),
    *((None, f"{name}-apart-long") for name in ("dense-152", "dense-128", "start-80", "static-b8")),
)
APART = ("start-80-long", "static-b8-long", "dense-152-long", "dense-128-long")  # and the same with the decay apart
RATES = {"dense-152-long": "dense-152-long-rate-half", "start-80-long": "start-80-long-rate-half"}
TIME = "processor_seconds"  # others shared the processor
WHEN = ("static-b8", "static-b1", "start-80", "start-70", "start-80-b16", "mst-b8")
WHEN += ("static-b8-long", "start-80-long", "start-70-long", "start-60-long", "mst-b8-long")  # three tokens a weight
SKELETON = "# Quality\n\n" + "\n\n".join(
    f"<!-- study:{name} -->\n<!-- end -->"
    for name in ("setup", "table", "noise", "blocks", "guards", "default", "remedies", "longer", "spikes")
)


def write(
    file: Path, rows: list[Record], large: list[Record], regimes: Sequence[Record] = (), times: Sequence[Record] = ()
) -> None:
    """Bring the generated parts of the document up to date; a missing document is made of nothing else.

    Args:
        large: rows of the models trained on a GPU.
        regimes: rows of the models of one budget. times: of their steps.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else SKELETON + "\n"
    results = Results(rows)
    parts = {name: lambda part=part: part(results) for name, part in PARTS.items()}
    parts |= {"large": lambda: on_gpu(large), "regimes": lambda: budget.table(regimes, times)}
    file.write_text(_PART.sub(lambda m: f"{m[1]}{parts[m[2]]()}\n{m[3]}", text), encoding="utf-8")


def setup(results: Results) -> str:
    """What was trained, on what."""
    row = results.rows[0]
    dense = next(r for r in results.rows if r["name"] == "dense")
    tokens = row["batch"] * row["context"]
    seeds = sorted({r["seed"] for r in results.rows})
    return (
        f"{len(results.rows)} runs of {len(results.names)} configurations, seeds {', '.join(map(str, seeds))}: a "
        f"byte-level GPT of {row['layers']} layers, width {dense['width']} and context {row['context']}, "
        f"{dense['steps']} steps of {tokens} tokens ({dense['steps'] * tokens / 1e6:.2f} M tokens; "
        "`long` runs three times as many), AdamW at "
        f"{row['learning_rate']:g}, {row['dtype']}{' autocast' * (row['dtype'] == 'bfloat16')}"
        f"{_others_than(row['dtype'], results)}. "
        f"torch {row['torch']}, one thread on an {row['cpu']} that other processes shared, hence CPU seconds (training "
        "alone, compilation apart; the CSV has those of the clock too). FLOPs are training FLOPs relative to `dense`."
    )


def _others_than(dtype: str, results: Results) -> str:
    """Which runs are of another dtype than most."""
    others: dict[str, list[str]] = {}
    for row in results.rows:
        if row["dtype"] != dtype and row["name"] not in others.setdefault(row["dtype"], []):
            others[row["dtype"]].append(f"`{row['name']}`")
    return "".join(f" ({found}: {', '.join(dict.fromkeys(names))})" for found, names in others.items())


def table(results: Results) -> str:
    """All configurations."""
    lines = [
        "| run | configuration | validation loss | per seed | FLOPs | against dense of equal FLOPs | CPU seconds "
        "| density | non-zero | dead hidden | dead value/output |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for config in CONFIGURATIONS:
        rows = results.of(config.name)
        if not rows:
            continue
        gap = results.gap(config.name)
        density = f"{min(r['density_min'] for r in rows):.2f} to {rows[0]['density']:.2f}"
        cells = [
            f"`{config.name}`",
            config.note,
            f"{results.loss(config.name):.3f}",
            ", ".join(f"{r['val_loss']:.3f}" for r in rows),
            f"{results.mean(config.name, 'flops_relative'):.2f}",
            "" if gap is None or config.name in results.frontier_names else f"{gap:+.3f}",
            f"{results.mean(config.name, 'processor_seconds'):.0f}",
            density,
            f"{results.mean(config.name, 'nonzero'):.3f}",
            f"{100 * results.mean(config.name, 'dead_hidden'):.1f} %",
            f"{100 * results.mean(config.name, 'dead_values'):.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def noise(results: Results) -> str:
    """How far equal runs lie apart."""
    if results.noise is None:
        return "Too few configurations have a second seed to say how far equal runs lie apart."
    widest = sorted(results.scatter.items(), key=lambda item: -item[1])[:4]
    return (
        f"Over the {len(results.repeated)} configurations with {len(results.seeds)} seeds, and with what a seed "
        f"does to all of them alike taken out, the standard deviation of one run's loss is {results.noise:.4f} "
        "(estimated from the median, since a few scatter far more than most: the runs lie "
        f"apart by {', by '.join(f'{away:.3f} for `{name}`' for name, away in widest)}). A difference of two runs of "
        f"one seed counts below as more than noise from {results.threshold(1):.3f} (two standard deviations of a "
        f"difference), of two pairs of runs from {results.threshold(2):.3f} if both pairs agree."
    )


def blocks(results: Results) -> str:
    """Loss and dead units by block, and what that says."""
    lines = [f"| | {' | '.join('unstructured' if b == 1 else f'B = {b}' for b in BLOCKS)} |"]
    lines.append("|---|" + "---|" * len(BLOCKS))
    said = []
    for label, names in FAMILIES.items():
        cells = []
        for block in BLOCKS:
            name = names.get(block, "")
            if results.of(name):
                dead = 100 * results.mean(name, "dead_hidden")
                cells.append(f"{results.loss(name):.3f} ({dead:.0f} % dead)")
            else:
                cells.append("")
        lines.append(f"| {label} | {' | '.join(cells)} |")
        finest, *coarser = [names[b] for b in BLOCKS if b in names and results.of(names[b])] or [""]
        verdicts = [results.compare(name, finest) for name in coarser]
        parts = [f"`{v.name}` {v.difference:+.3f} ({v.word})" for v in verdicts]
        if parts:
            said.append(f"- {label}, against `{finest}`: {', '.join(parts)}.")
    pairs = (("mst-b8", "static-b8"), ("mst-b4", "static-b4"), ("mst-b1", "static-b1"), ("mst-b8-free", "mst-b8"))
    for name, other in pairs:
        if results.of(name) and results.of(other):
            v = results.compare(name, other)
            flops = results.mean(name, "flops_relative"), results.mean(other, "flops_relative")
            said.append(
                f"- `{name}` against `{other}`: {v.difference:+.3f} ({v.word}), for {flops[0]:.2f} against "
                f"{flops[1]:.2f} of dense FLOPs."
            )
    return "\n".join([*lines, "", *said])


def guards(results: Results) -> str:
    """What keeps hidden units alive, and what that does to the loss."""
    lines = [
        "| guard | B | loss | against none | | FLOPs | against dense of equal FLOPs | lowest density | non-zero "
        "| dead |",
        "|---|" + "---|" * 9,
    ]
    for block in BLOCKS:
        for label, ending in GUARDS:
            name, none = f"mst-b{block}" + f"-{ending}" * bool(ending), f"mst-b{block}-free"
            if not results.of(name) or not results.of(none):
                continue
            verdict, gap = results.compare(name, none), results.gap(name)
            cells = [label, str(block), f"{results.loss(name):.3f}"]
            cells += ["", ""] if name == none else [f"{verdict.difference:+.3f}", verdict.word]
            cells += [f"{results.mean(name, 'flops_relative'):.2f}", "" if gap is None else f"{gap:+.3f}"]
            cells += [f"{results.mean(name, 'density_min'):.2f}", f"{results.mean(name, 'nonzero'):.3f}"]
            cells += [f"{100 * results.mean(name, 'dead_hidden'):.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    said = []
    for block in BLOCKS:
        rivals = [n for n in (f"mst-b{block}", f"mst-b{block}-backbone") if results.of(n)]
        if rivals and results.of(f"mst-b{block}-coverage"):
            verdict = results.compare(f"mst-b{block}-coverage", rivals[-1])
            said.append(f"B = {block} {verdict.difference:+.3f} ({verdict.word})")
    return "\n".join([*lines, "", f"Rows and columns kept, against the backbone: {', '.join(said)}."])


def remedies(results: Results) -> str:
    """Every variant of the base, against it and against dense models of equal FLOPs."""
    names = [c.name for c in CONFIGURATIONS if c.kind != "dense" and c.length == "full"]
    return _against(results, BASE, names)


def default(results: Results) -> str:
    """The library's default with one thing changed."""
    return _against(results, DEFAULT, [c.name for c in CONFIGURATIONS if c.name in AROUND_DEFAULT])


def _against(results: Results, base: str, names: Sequence[str]) -> str:
    """Configurations against one of them, best first, and against dense models of equal FLOPs."""
    lines = [
        f"| variant | against `{base}` | | FLOPs | against dense of equal FLOPs |",
        "|---|---|---|---|---|",
    ]
    found = [results.compare(name, base) for name in names if name != base and results.of(name)]
    for verdict in sorted(found, key=lambda v: v.difference):
        gap = results.gap(verdict.name)
        note = next(c.note for c in CONFIGURATIONS if c.name == verdict.name)
        lines.append(
            f"| `{verdict.name}`: {note} | {verdict.difference:+.3f} | {verdict.word} | "
            f"{results.mean(verdict.name, 'flops_relative'):.2f} | {'' if gap is None else f'{gap:+.3f}'} |"
        )
    return "\n".join(lines)


def longer(results: Results) -> str:
    """What three times the training does to the distance from the dense model."""
    lines = [
        "| | FLOPs of dense | loss | less dense | loss, three times as long | less dense | less dense of equal FLOPs "
        "| each seed |",
        "|---|" + "---|" * 7,
    ]
    for short, long in LONGER:
        if not results.of(long):
            continue
        cells = []
        for own, dense in ((short, "dense"), (long, DENSE_LONG)):
            known = own is not None and bool(results.of(own))
            cells.append(f"{results.loss(own):.3f}" if known else "")
            cells.append(f"{results.compare(own, dense).difference:+.3f}" if known and own != dense else "")
        gaps = [] if long in results.frontier_names else results.gaps(long)
        cells += [f"{statistics.fmean(gaps):+.3f}" if gaps else "", ", ".join(f"{gap:+.3f}" for gap in gaps)]
        note = next(c.note for c in CONFIGURATIONS if c.name == (short or long))
        share = results.mean(long, "flops_relative") / results.mean(DENSE_LONG, "flops_relative")
        lines.append(f"| {note} | {share:.2f} | {' | '.join(cells)} |")
    verdicts = [results.compare(half, full) for full, half in RATES.items() if results.of(half) and results.of(full)]
    said = [f"`{v.name}` {v.difference:+.3f} ({v.word})" for v in verdicts]
    lines += ["", f"Half the learning rate in long runs: {', '.join(said)}."] if said else []
    pairs = [(name.replace("-long", "-apart-long"), name) for name in APART]
    verdicts = [results.compare(new, old) for new, old in pairs if results.of(new) and results.of(old)]
    said = [f"`{v.name}` {v.difference:+.3f} ({v.word})" for v in verdicts]
    lines += ["", f"Decay apart from the rate, against the same run without: {', '.join(said)}."] if said else []
    return "\n".join(lines)


def spikes(results: Results) -> str:
    """The largest rise after an event of each run with events."""
    heads = [f"rise over {after} steps | z | beyond chance" for after in AFTER]
    lines = [f"| run | seed | events | {' | '.join(heads)} |", "|---|---|---|" + "---|---|---|" * len(AFTER)]
    counted = dict.fromkeys(AFTER, 0)
    looked_at = 0
    for row in results.rows:
        if row.get(f"spike{AFTER[0]}_z") is None:
            continue
        looked_at += 1
        cells = [f"`{row['name']}`", str(row["seed"]), str(row[f"spike{AFTER[0]}_events"])]
        for after in AFTER:
            rise, z, threshold = (row[f"spike{after}_{part}"] for part in ("rise", "z", "threshold"))
            found = z > threshold
            counted[after] += found
            where = f"yes, step {row[f'spike{after}_step']}" if found else "no"
            cells += [f"{rise:+.3f}", f"{z:.1f}", where]
        lines.append(f"| {' | '.join(cells)} |")
    said = [f"{counted[after]} of {looked_at} runs over the {after} steps after an event" for after in AFTER]
    return "\n".join([*lines, "", f"Rises beyond chance: {'; '.join(said)}."])


def when(results: Results) -> str:
    """Sparse runs against dense ones of equal FLOPs, of equal time, and of full width."""
    lines = [
        "| run | configuration | loss | FLOPs of dense | less dense of equal FLOPs | time of dense "
        "| less dense of equal time | less dense, full width |",
        "|---|" + "---|" * 7,
    ]
    for name in WHEN:
        if not results.of(name):
            continue
        dense = DENSE_LONG if name.endswith("-long") else "dense"
        gaps = [results.gap(name, column) for column in ("flops_relative", TIME)]
        shares = [results.mean(name, column) / results.mean(dense, column) for column in ("flops_relative", TIME)]
        by_cost = [f"{s:.2f} | {'' if g is None else f'{g:+.3f}'}" for s, g in zip(shares, gaps, strict=True)]
        less = results.compare(name, dense).difference
        cells = [f"`{name}`", KNOWN[name].note, f"{results.loss(name):.3f}", *by_cost, f"{less:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def on_gpu(rows: Sequence[Record]) -> str:
    """Large models, each against the one whose FLOPs most of the others have."""
    order = [r for name in KNOWN for r in rows if r["name"] == name]
    base = {r["seed"]: r for r in order if r["name"] == LARGE.base}
    lines = [
        "| run | configuration | seed | steps | validation loss | against the first | FLOPs | seconds | ms a step |",
        "|---|" + "---|" * 8,
    ]
    for row in sorted(order, key=lambda r: (r["name"] != LARGE.base, r["seed"])):
        own = base.get(row["seed"])
        cells = [
            f"`{row['name']}`",
            KNOWN[row["name"]].note,
            str(row["seed"]),
            str(row["steps"]),
            f"{row['val_loss']:.3f}",
            "" if own is None or own is row else f"{row['val_loss'] - own['val_loss']:+.3f}",
            f"{row['flops']:.2e}",
            f"{row['seconds']:.0f}",
            f"{1000 * row['seconds'] / row['steps']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    said = f"{LARGE.layers} layers, {LARGE.width} wide unless a name says otherwise, context {LARGE.context}, "
    where = sorted({f"{r['cpu']}, torch {r['torch']}" for r in order})
    return "\n".join([*lines, "", f"{said}{LARGE.tokens} tokens a step. {', '.join(where)}."])


PARTS: dict[str, Callable[[Results], str]] = {
    "when": when,
    "setup": setup,
    "table": table,
    "noise": noise,
    "blocks": blocks,
    "guards": guards,
    "remedies": remedies,
    "default": default,
    "longer": longer,
    "spikes": spikes,
}
