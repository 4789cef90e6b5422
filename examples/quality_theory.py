"""Fit the law of losses to all recorded runs of the study, and say how well it predicts runs it has not seen.

    python examples/quality_theory.py                     # print it
    python examples/quality_theory.py --write             # docs/theory.md, mst_compile/cost/fitted.py

The law is in ``mst_compile/cost/loss_law.py``, the fit in ``quality/theory.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from quality import records, theory

ROOT = Path(__file__).parent.parent
TABLES = ("quality.csv", "quality_large.csv", "quality_regimes.csv")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    p = argparse.ArgumentParser(description="Fit the law of losses to the recorded runs.")
    p.add_argument("--tables", type=Path, nargs="+", default=[ROOT / "benchmarks" / name for name in TABLES])
    p.add_argument("--write", action="store_true", help="write the page and the constants")
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "theory.md")
    p.add_argument("--constants", type=Path, default=ROOT / "mst_compile" / "cost" / "fitted.py")
    args = p.parse_args(argv)
    study = theory.Fitted([row for table in args.tables for row in records.read_csv(table)])
    if not args.write:
        print(theory.page(study), theory.constants(study), sep="\n\n")
        return
    theory.write(args.page, study)
    args.constants.write_text(theory.constants(study))


if __name__ == "__main__":
    main()
