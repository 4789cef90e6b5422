"""What sparse pretraining costs in loss, and what it saves: small models, many configurations, two seeds.

    python examples/quality/corpus.py DIR                # or text of your own
    python examples/quality_study.py --data DIR/train.txt --val DIR/val.txt              # hours on one core; resumes
    python examples/quality_study.py --data DIR/train.txt --val DIR/val.txt --only dense mst-b8 --seeds 0 1 2
    python examples/quality_study.py --data DIR/train.txt.xz --val DIR/val.txt.xz --device cuda --minutes 9
    python examples/quality_study.py --data DIR/train.txt --val DIR/val.txt --regime repeat-16 --out runs/regimes.jsonl
    python examples/quality_study.py --collect          # runs -> benchmarks/quality.csv
    python examples/quality_study.py --report           # CSV -> docs/quality.md, docs/when.md
    python examples/quality_study.py --report --figure docs/when.svg                     # and its figure
    python examples/quality_study.py --report --budget-figure docs/budget.svg            # that of one budget

Trains a byte-level GPT (``quality/model.py``) under every configuration of ``quality/configurations.py``, in their
order of importance: first all of them with the first seed, then the main ones with the others. All go through the
library as a user would, ``mst_compile.sparsify(model, schedule)`` and ``torch.compile(model, backend="mst")``; dense
models run under Inductor. Initial weights, batches and their order are the same for every
configuration of a seed, learning rate and its schedule too unless the configuration is about them. Each finished run is
one line of ``--out``; runs that are there already are skipped, so the study can be stopped and continued at any time.

On a GPU (``--device cuda``) models of 42 million weights train under the few configurations that have kernels there, in
the order of what they decide; no run is begun that is expected to end after ``--minutes``. ``--rehearse 2`` before, for
each configuration in a process of its own, finds what fails and fills the compilers' caches while no run waits. Keep
their ``--out`` and ``--csv`` (benchmarks/quality_large.csv) apart from those of the small models.

``--regime`` gives every model the same FLOPs, that of a small dense one trained on a hundred tokens a weight, and lets
it choose width and number of steps: the dense frontier against models that are wider and sparse. ``plenty``: on text
that is hardly seen twice; ``repeat-4``, ``repeat-16``: on so little of it that the base sees it four or sixteen times
(``--csv`` benchmarks/quality_regimes.csv). ``twenty``: a fifth of these FLOPs, so twenty tokens a weight for the base;
``thrice``: three times as many, twenty for a dense model twice as wide.
``--regime plenty --seeds 0 --only NAME... --time 5`` measures what a step takes, the configurations in turn, on a
machine with nothing else to do.

The recorded runs, with the loss of every step, are kept; to go on from them:

    mkdir -p runs/quality && gunzip -c benchmarks/quality_runs.jsonl.gz > runs/quality/runs.jsonl
    mkdir -p runs/gpu && gunzip -c benchmarks/quality_large_runs.jsonl.gz > runs/gpu/quality.jsonl

The recorded results come from 58 MB of English: Debian documentation packages and the World English Bible, as
``quality/corpus.py`` collects them. Licences: World English Bible public domain; An Anarchist FAQ GPL-2; Debian
handbook GPL-2+/CC-BY-SA-3.0; Jargon File public domain; Linux documentation GPL-2; Python documentation PSF; Perl
documentation GPL-1+/Artistic. None of the text is part of this repository.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from quality import records, report, step_times
from quality.config import Config
from quality.configurations import BUDGET_QUEUE, CONFIGURATIONS, KNOWN, LARGE_QUEUE
from quality.sizes import LARGE, QUICK, REGIMES, Study
from quality.training import Text, train

ROOT = Path(__file__).parent.parent
STEPS = 60  # of a configuration in a round of --time


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description="Train the quality study, or report on it.")
    p.add_argument("--data", type=Path, help="training text; without it nothing is trained")
    p.add_argument("--val", type=Path, help="validation text")
    p.add_argument("--out", type=Path, default=Path("runs/quality/runs.jsonl"), help="one line of JSON a run")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these configurations alone, with every seed")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="all configurations train with the first one")
    p.add_argument("--threads", type=int, default=1, help="CPU threads")
    p.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of autocast; float32: none")
    p.add_argument("--regime", choices=REGIMES, help="models of one budget of FLOPs; text repeated so often")
    p.add_argument("--minutes", type=float, help="begin no run that is expected to end later than this")
    p.add_argument("--rehearse", type=int, metavar="STEPS", help="so many steps of each run, to fill compilers' caches")
    p.add_argument("--time", type=int, metavar="ROUNDS", help="time steps of the configurations in turn, no more")
    p.add_argument("--quick", action="store_true", help="a model and runs of seconds, to try the script itself")
    p.add_argument("--list", action="store_true", help="print the configurations and leave")
    p.add_argument("--collect", action="store_true", help="write --csv from --out")
    p.add_argument("--report", action="store_true", help="write --doc from --csv")
    p.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "quality.csv", help="the recorded results")
    p.add_argument(
        "--large-csv", type=Path, default=ROOT / "benchmarks" / "quality_large.csv", help="that of the large models"
    )
    p.add_argument(
        "--regimes-csv", type=Path, default=ROOT / "benchmarks" / "quality_regimes.csv", help="that of one budget"
    )
    p.add_argument(
        "--times-csv", type=Path, default=ROOT / "benchmarks" / "quality_step_times.csv", help="what --time finds"
    )
    docs = ROOT / "docs"
    p.add_argument("--doc", type=Path, nargs="+", default=[docs / "quality.md", docs / "when.md"], help="the reports")
    p.add_argument("--figure", type=Path, help="draw docs/when.svg, or another file")
    p.add_argument("--budget-figure", type=Path, help="draw docs/budget.svg, or another file")
    return p


def plan(only: Sequence[str] | None, seeds: Sequence[int]) -> list[tuple[Config, int]]:
    """Which runs, in which order."""
    unknown = [name for name in only or () if name not in KNOWN]
    if unknown:
        raise SystemExit(f"no configuration is called {', '.join(unknown)}; there are {', '.join(KNOWN)}")
    chosen = CONFIGURATIONS if only is None else [KNOWN[name] for name in only]
    return [(c, seed) for i, seed in enumerate(seeds) for c in chosen if i == 0 or c.main or only is not None]


def train_all(
    runs: Sequence[tuple[Config, int]],
    study: Study,
    text: Text,
    out: Path,
    device: torch.device,
    minutes: float | None = None,
) -> int:
    """Train what is missing in ``out``; returns how many runs that were.

    Args:
        minutes: a run that would end after these, were it as long as the longest so far, is left for the next time.
    """
    trained, start, longest = 0, time.monotonic(), 0.0
    for number, (config, seed) in enumerate(runs, 1):
        if records.is_done(records.read(out), config, seed, study, text.fingerprint):
            continue
        begin = time.monotonic()
        if minutes is not None and begin - start + longest > 60 * minutes:
            print(f"time is over; {config.name} with seed {seed} is the next to train", flush=True)
            break
        record = train(config, seed, study, text, device=device)
        records.append(out, record)
        longest = max(longest, time.monotonic() - begin)
        trained += 1
        print(
            f"{time.strftime('%H:%M:%S')}  {number:3}/{len(runs)}  {config.name:18} seed {seed}  "
            f"validation {record['val_loss']:.4f}  FLOPs {record['flops_relative']:.3f}  {record['seconds']:.0f} s "
            f"(+ {record['compile_seconds']:.0f} s compiling)  non-zero {record['nonzero']:.3f}  "
            f"dead {record['dead_hidden']:.3f}",
            flush=True,
        )
    return trained


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the number of runs trained."""
    p = parser()
    args = p.parse_args(argv)
    if args.list:
        for config in KNOWN.values():
            print(f"{config.name:18} {config.note}")
        return 0
    if (args.data is None) != (args.val is None):
        p.error("--data and --val go together")
    if args.data is None and not (args.collect or args.report):
        p.error("nothing to do: give --data and --val to train, --collect or --report to report")
    if args.device.type == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: there is no CUDA GPU here")
    torch.set_num_threads(args.threads)
    trained = 0
    if args.data is not None:
        large = args.device.type == "cuda"
        study, queue = (LARGE, LARGE_QUEUE) if large else (Study(), None)
        if args.regime is not None:
            study, queue = REGIMES[args.regime], BUDGET_QUEUE
        study = QUICK if args.quick else replace(study, dtype=args.dtype or study.dtype)
        runs = plan(args.only or queue, args.seeds)
        text = Text.load(args.data, args.val)
        if args.time:
            found = step_times.measure([config for config, _ in runs], study, text, args.time, STEPS, args.device)
            step_times.write(args.times_csv, found)
        elif args.rehearse:
            for config, seed in runs:
                train(config, seed, study, text, stop=args.rehearse, device=args.device)
        else:
            trained = train_all(runs, study, text, args.out, args.device, args.minutes)
    if args.collect:
        records.write_csv(args.csv, records.rows(records.read(args.out)))
    if args.report:
        tables = (args.csv, args.large_csv, args.regimes_csv)
        found = [records.read_csv(csv) if csv.exists() else [] for csv in tables]
        times = step_times.read(args.times_csv) if args.times_csv.exists() else []
        for doc in args.doc:
            report.write(doc, *found, times)
        if args.figure is not None:
            from quality import plots  # needs matplotlib

            plots.draw(args.figure, *found[:2])
        if args.budget_figure is not None:
            from quality import plots_budget

            plots_budget.draw(args.budget_figure, found[2], times)
    return trained


if __name__ == "__main__":
    main()
