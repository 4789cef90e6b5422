"""Whether the kernels are right on this machine's GPU: the tests of tests/gpu, what finds most first.

    python -m benchmarks.gpu check                         # ends within 3 minutes
    python -m benchmarks.gpu check --device cpu --smoke    # tries it without a GPU

Each test runs in one of several processes of its own, so that one that crashes or hangs costs no other; needs pytest
and hypothesis. Results go to OUT/check.jsonl as they come. What was right before, with the same code, card and torch,
is not run again, so that a second call goes on where the first ended.

Exit status: 0 if all is right; 1 if anything is wrong, does not compile, dies or hangs; 2 if there is nothing to check
on; 3 if nothing is wrong, but time was over first.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .keep import FOLDER, PACKAGE, Line, Lines, fingerprint
from .pool import NothingCollected, Pool

OUTCOMES = ("right", "wrong", "not compiled", "died", "hung", "skipped", "not reached")
GOOD = ("right", "skipped")
BAD = ("wrong", "not compiled", "died", "hung")
_SMOKE_TESTS = 3
_TEST_SECONDS = 120.0


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--minutes", type=float, default=3.0, help="all is ended after these")
    p.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"default {FOLDER}")
    p.add_argument("-n", "--processes", type=int, default=_processes(), help="default: the cores but two, 14 at most")
    p.add_argument("--timeout", type=float, default=_TEST_SECONDS, help="seconds after which a test hangs")
    p.add_argument("-k", metavar="EXPRESSION", help="pytest's: tests whose names match")
    p.add_argument("--again", action="store_true", help="run what was right before too")
    p.add_argument("--device", help="cpu: run the kernels of the CPU, which tries the tests themselves")
    p.add_argument("--smoke", action="store_true", help="a few tests: tries the command")
    p.add_argument("--tests", default="tests/gpu", help=argparse.SUPPRESS)
    return p


def _processes() -> int:
    return max(1, min(14, (os.cpu_count() or 1) - 2))


def _group(name: str) -> tuple[str, str]:
    """Topic and test of a name: ``tests/gpu/test_products_on_gpu.py::test_every_tile[...]`` is of (products, every
    tile)."""
    file, _, function = name.partition("::")
    topic = re.sub(r"^test_|_on_gpu$", "", Path(file).stem)
    return topic.replace("_", " "), function.partition("[")[0].removeprefix("test_").replace("_", " ")


def table(results: Iterable[Line]) -> list[tuple[str, ...]]:
    """A line for each test function, the sum last: how many of each outcome, and seconds with those of compilation."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    everything: Counter[str] = Counter()
    for result in results:
        for count in (counts.setdefault(_group(result["test"]), Counter()), everything):
            count.update({result["outcome"]: 1, "seconds": result["seconds"], "compiling": result["compiling"]})
    return [
        (*key, *(str(count[o] or "") for o in OUTCOMES), f"{count['seconds']:.1f}", f"{count['compiling']:.1f}")
        for key, count in [*counts.items(), (("all", ""), everything)]
    ]


class Results:
    """What is known of each test: lines of the file that tell of this code, card and torch, the newest of each."""

    def __init__(self, path: Path, again: bool) -> None:
        self._lines, self._again = Lines(path), again
        self._code = fingerprint((*PACKAGE, "tests"))
        self._on = ""
        self.newest: dict[str, Line] = {}

    def missing(self, tests: Sequence[str], on: str) -> list[str]:
        """Those that have yet to be shown right."""
        self._on = on
        if not self._again:
            known = (r for r in self._lines.read() if (r["code"], r["on"]) == (self._code, on))
            self.newest = {r["test"]: r for r in known if r["test"] in tests}
        return [t for t in tests if t not in self.newest or self.newest[t]["outcome"] not in GOOD]

    def add(self, result: Line) -> None:
        line = {**result, "on": self._on, "code": self._code, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._lines.add(line)
        self.newest[result["test"]] = line


def _report(tests: Sequence[str], results: Results) -> int:
    """Print the table and what is not right; the exit status."""
    nothing = {"outcome": "not reached", "seconds": 0.0, "compiling": 0.0}
    found = [results.newest.get(test, {"test": test, **nothing}) for test in tests]
    head = ("topic", "test", *OUTCOMES, "seconds", "compiling")
    lines = [head, *table(found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    outcomes = {r["outcome"] for r in found}
    return 1 if outcomes & set(BAD) else 3 if "not reached" in outcomes else 0


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit status."""
    args = parser().parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    if args.device is not None:
        os.environ["MST_TESTS_DEVICE"] = args.device
    results = Results(args.out / "check.jsonl", args.again)
    chosen: list[str] = []

    def choose(collected: list[str], on: str) -> list[str]:
        chosen.extend(collected[:_SMOKE_TESTS] if args.smoke else collected)
        missing = results.missing(chosen, on)
        print(f"{on}: {len(chosen)} tests, {len(chosen) - len(missing)} right before", flush=True)
        return missing

    pytest_arguments = [args.tests, *(("-k", args.k) if args.k else ())]
    pool = Pool(pytest_arguments, args.processes, args.timeout, end, choose)
    try:
        for result in pool.run():
            results.add(result)
            if result["outcome"] not in ("right", "skipped"):
                print(
                    f"{result['outcome'].upper()} {result['test']} ({result['seconds']:g} s): {result['why']}",
                    flush=True,
                )
    except NothingCollected as error:
        print(f"benchmarks.gpu check: {error}")
        return 2
    if not chosen:
        print("benchmarks.gpu check: no test was collected; there is no CUDA GPU here (--device cpu --smoke tries it)")
        return 2
    print()
    return _report(chosen, results)
