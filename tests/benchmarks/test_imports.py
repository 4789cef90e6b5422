"""Benchmarks and examples, which no test runs in full, find all that they import."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = sorted(
    ".".join(f.relative_to(ROOT).with_suffix("").parts)
    for f in (ROOT / "benchmarks").rglob("*.py")
    if f.stem not in ("__init__", "__main__")
)
MODULES = sorted(".".join(f.relative_to(EXAMPLES).with_suffix("").parts) for f in EXAMPLES.rglob("*.py"))


@pytest.mark.parametrize("name", [*BENCHMARKS, *(m for m in MODULES if not m.endswith("__init__"))])
def test_it_imports(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), str(EXAMPLES), *sys.path])
    importlib.import_module(name)
