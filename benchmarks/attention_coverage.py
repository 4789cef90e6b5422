"""Which attention is found in which model, and what is left as it was.

python -m benchmarks.attention_coverage            # print the table
python -m benchmarks.attention_coverage --write    # put it between the markers of docs/attention.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import mst_compile  # noqa: F401 - registers the operator
from mst_compile.graph import multihead, passes
from mst_compile.graph.attention import patterned
from mst_compile.graph.context import Context, Site
from mst_compile.rules.patterns import Parts

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "attention.md"
START, END = "<!-- attention coverage -->\n", "<!-- end -->"


def sites_of(case: Any) -> list[Site]:
    """What the pass says of each attention of a model."""
    found: list[Site] = []

    def backend(graph_module: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        context = Context(pattern=Parts(window=4))
        passes.apply((multihead.run, patterned.run), graph_module, context)
        found.extend(context.sites)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(case.model.train(), backend=backend)(*case.args, **case.kwargs)
    return found


def table(names: Iterable[str] | None = None) -> str:
    """A row a model and attention implementation; ``names`` picks some."""
    sys.path.insert(0, str(ROOT / "tests"))
    from attention_models import cases

    lines = ["| model | attention | found | replaced | why the others are not |", "|---|---|---|---|---|"]
    for name, make in cases().items():
        if names is not None and name not in names:
            continue
        case = make()
        sites = sites_of(case)
        reasons = Counter(site.reason for site in sites if not site.replaced)
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
        replaced = sum(site.replaced for site in sites)
        lines.append(f"| {case.name} | {case.implementation} | {len(sites)} | {replaced} | {why} |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace what stands between the markers; a page without them receives them at its end."""
    page = PAGE.read_text() if PAGE.exists() else ""
    block = f"{START}{text}\n{END}"
    if START in page:
        page = re.sub(re.escape(START) + r".*?" + re.escape(END), lambda _: block, page, flags=re.S)
    else:
        page = f"{page.rstrip()}\n\n{block}\n".lstrip()
    PAGE.write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="update docs/attention.md")
    text = table()
    if parser.parse_args().write:
        write(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
