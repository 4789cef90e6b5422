"""Under ``python -O`` there are no assert statements: ours tell type checkers what is known, and guard nobody."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mst_compile.kernels
import mst_compile.lowering

import mst_compile


def asserts() -> Iterator[tuple[str, ast.expr]]:
    folders = [Path(p) for m in (mst_compile, mst_compile.kernels, mst_compile.lowering) for p in m.__path__]
    for file in sorted({file for folder in folders for file in folder.rglob("*.py")}):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                yield f"{file.name}:{node.lineno}", node.test


def narrows(test: ast.expr) -> bool:
    """Whether it says no more than a type: ``x is not None``, ``isinstance(x, C)``."""
    if isinstance(test, ast.Compare):
        (right,) = test.comparators if len(test.comparators) == 1 else (None,)
        return isinstance(test.ops[0], ast.IsNot) and isinstance(right, ast.Constant) and right.value is None
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def test_asserts_say_types_alone() -> None:
    found = list(asserts())
    assert found
    assert [place for place, test in found if not narrows(test)] == []
