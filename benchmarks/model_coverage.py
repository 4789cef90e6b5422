"""Which types of models run sparse, and what of them stays dense.

python -m benchmarks.model_coverage                     # print the table, of all types of the installed transformers
python -m benchmarks.model_coverage llama mixtral       # of some
python -m benchmarks.model_coverage --write --keep FILE # put it between the markers of docs/models.md

All types take about half an hour on one core; FILE keeps what is done, so that a run which was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo.measure import Found, measure
from benchmarks.zoo.types import model_types

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
START, END = "<!-- model coverage -->\n", "<!-- end -->"
SECONDS = 40  # that one type may take


def measured(names: Sequence[str], keep: Path | None = None) -> list[Found]:
    """What is found of each type; what ``keep`` holds is taken from there."""
    lines = keep.read_text().splitlines() if keep is not None and keep.exists() else []
    known = {found.name: found for found in (Found(**json.loads(line)) for line in lines)}
    for name in names:
        if name in known:
            continue
        known[name] = _in_time(name)
        if keep is not None:
            with keep.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(known[name])) + "\n")
    return [known[name] for name in names]


def _in_time(name: str) -> Found:
    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return measure(name)
    except Exception as error:
        stopped = isinstance(error, TimeoutError) or "TimeoutError" in str(error)
        return Found(name, f"takes longer than {SECONDS} s" if stopped else f"fails: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)


# -- the page ----------------------------------------------------------------------------------------------------------


def cells(found: Found) -> tuple[str, str]:
    """What a row says of a type's attention, and of what stays dense."""
    replaced = ["replaced"] if "replaced" in found.attention else []
    attention = "; ".join(replaced + sorted(why for why in found.attention if why != "replaced")) or "none found"
    return attention, "; ".join(sorted(found.dense)) or "nothing"


def table(all_found: Sequence[Found]) -> str:
    """Alike types in one row: the largest groups first."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for found in all_found:
        if not found.why_not:
            groups.setdefault(cells(found), []).append(found)
    lines = ["| types | sparse | attention | what stays dense |", "|---|---|---|---|"]
    for (attention, dense), alike in sorted(groups.items(), key=lambda item: (item[0][1] != "nothing", -len(item[1]))):
        shares = sorted({percent(f.share) for f in alike})
        span = f"{shares[0]} %" if len(shares) == 1 else f"{shares[0]} to {shares[-1]} %"
        names = ", ".join(sorted(f.name for f in alike))
        lines.append(f"| {names} ({len(alike)}) | {span} | {attention} | {dense} |")
    return "\n".join(lines)


def percent(share: float) -> int:
    """A share in whole percent; 100 is all of it, and nothing less."""
    return 100 if share == 1 else min(99, round(100 * share))


def summary(all_found: Sequence[Found]) -> str:
    """How many types there are, of how many there is no model and why, and in how many all is sparse."""
    import transformers

    built = [f for f in all_found if not f.why_not]
    whole, most = sum(not f.dense for f in built), sum(f.share > 0.9 for f in built)
    missing = Counter(f.why_not.partition(":")[0] for f in all_found if f.why_not)
    why = "; ".join(f"{reason}: {count}" for reason, count in missing.most_common())
    replaced = sum("replaced" in f.attention for f in built)
    return (
        f"Of the {len(model_types())} model types of transformers {transformers.__version__} {len(all_found)} were "
        f"tried, and {len(built)} were made, compiled and run. In {whole} of them every product with a weight is "
        f"sparse, in {most} more than nine tenths of their FLOPs are, and in {replaced} causal attention was found and "
        f"replaced. Of the others there is no model here ({why})."
    )


def write(text: str) -> None:
    """Replace what stands between the markers."""
    page = PAGE.read_text()
    block = f"{START}{text}\n{END}"
    PAGE.write_text(re.sub(re.escape(START) + r".*?" + re.escape(END), lambda _: block, page, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types, default all")
    parser.add_argument("--write", action="store_true", help="update docs/models.md")
    parser.add_argument("--keep", type=Path, help="file of what is done")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_VERBOSITY"] = "1", "error"
    warnings.simplefilter("ignore")
    found = measured(given.types or model_types(), given.keep)
    text = f"{summary(found)}\n\n{table(found)}"
    if given.write:
        write(text)
    else:
        print(text)
    for one in found:
        if one.why_not:
            print(f"{one.name}: {one.why_not[:200]}", file=sys.stderr)


if __name__ == "__main__":
    main()
