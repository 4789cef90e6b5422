"""The command: facts, trials and what follows from them, as lines of text."""

from __future__ import annotations

import argparse
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence

import torch

from mst_compile.doctor import trial
from mst_compile.lowering import device as devices
from mst_compile.lowering.device import Device

_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
_ADVICE = """Only products with sparse weights (and attention with a pattern) get faster; the rest of a training
step takes what it took. mst_compile.forecast(model, ...) says what a whole run costs,
mst_compile.explain(model) which weights have kernels."""


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(prog="python -m mst_compile doctor", description=__doc__)
    p.add_argument("--device", help="cpu, cuda, ...: this one alone; default: all that have kernels")
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command; exit status 0 if all devices that this machine has work, 1 if not, 2 for an unknown device."""
    args = parser().parse_args(argv)
    records = {record.type: record for record in devices.registered()}
    if args.device is not None and args.device not in records:
        print(f"there are kernels for {', '.join(records)}, none for device {args.device!r}", file=sys.stderr)
        return 2
    chosen = records.values() if args.device is None else [records[args.device]]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    good = [_examine(record, asked=args.device is not None) for record in chosen]
    print()
    print(_ADVICE if all(good) else "Not all is well: see the lines that begin with FAILED.")
    return 0 if all(good) else 1


def _examine(record: Device, asked: bool) -> bool:
    """Print all about one device; whether it works, or is absent and nobody asked for it."""
    print()
    absent = record.why_absent()
    if absent is not None:
        print(_line(record.type, absent, failed=asked))
        return not asked
    good = True
    for fact in record.facts():
        print(_line(f"{record.type} {fact.what}", fact.value), flush=True)
        if fact.problem is not None:
            print(_line("", fact.problem, failed=True), flush=True)
            good = False
    if not good:
        return False
    device = torch.device(record.type)
    for dtype in _DTYPES.get(record.type, (torch.float32,)):
        for run in (trial.linear, trial.attention):
            good = _right(run, device, dtype) and good
    return _fast(device) and good


def _right(run: Callable[..., list[trial.Verdict]], device: torch.device, dtype: torch.dtype) -> bool:
    name = f"{device.type} {run.__name__} {str(dtype).removeprefix('torch.')}"
    try:
        verdicts = run(device, dtype)
    except Exception as error:  # whatever a compiler or a kernel raises is what the user wants to know
        print(_line(name, _first_line(error), failed=True), flush=True)
        return False
    for verdict in verdicts:
        if not verdict.right:
            text = f"{verdict.what} is {verdict.error:.3g} roundings off, PyTorch's own {verdict.usual:.3g}"
            print(_line(name, text, failed=True), flush=True)
    good = all(verdict.right for verdict in verdicts)
    if good:
        worst = max(verdicts, key=lambda v: v.error)
        own = f"at most {worst.error:.2g} roundings from float64, PyTorch's own kernels {worst.usual:.2g}"
        print(_line(name, f"right: {own}"), flush=True)
    return good


def _fast(device: torch.device) -> bool:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        found = trial.speed(device, dtype)
    except Exception as error:
        print(_line(f"{device.type} speed", _first_line(error), failed=True), flush=True)
        return False
    times = f"dense {found.dense * 1e3:.2f} ms, sparse {found.sparse * 1e3:.2f} ms: {found.ratio:.2f}x"
    print(_line(f"{device.type} speed", f"a layer {found.what}"))
    print(_line("", f"forward and backward {times}"), flush=True)
    return True


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _line(name: str, text: str, failed: bool = False) -> str:
    """One finding, wrapped at 100 columns."""
    text = f"FAILED {text}" if failed else text
    return textwrap.fill(text, 100, initial_indent=f"{name:<24}", subsequent_indent=" " * 24, break_long_words=False)
