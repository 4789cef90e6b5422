"""KeyboardInterrupts before chosen statements of ours, several in one run.

A trace function that raises is taken out by the interpreter, so that it can interrupt once and never what finishes what
was interrupted. Here the functions themselves are compiled again, with a call before each statement.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
from collections.abc import Collection, Iterator
from pathlib import Path
from types import CodeType, FunctionType

import mst_compile

_OURS = Path(mst_compile.__file__).parent
_TICK = "__mst_test_tick__"


class Interrupter:
    """Raises at the statements whose numbers are in ``at``, while :attr:`on`; counts all of them.

    Attributes:
        count: statements so far.
        raised: how many of them were interrupted.
    """

    def __init__(self, at: Collection[int] = ()) -> None:
        self.at, self.count, self.raised, self.on = at, 0, 0, True

    def __call__(self) -> None:
        if not self.on:
            return
        self.count += 1
        if self.count in self.at:
            self.raised += 1
            raise KeyboardInterrupt


class _Ticking(ast.NodeTransformer):
    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef):
            return node
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                setattr(node, name, [each for statement in block for each in (self._tick(statement), statement)])
        return node

    @staticmethod
    def _tick(before: ast.stmt) -> ast.stmt:
        call = ast.Expr(ast.Call(ast.Name(_TICK, ast.Load()), [], []))
        return ast.fix_missing_locations(ast.copy_location(call, before))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _ticking(file: Path) -> dict[tuple[str, int], CodeType]:
    """The code of all functions of a file, with a call before each statement, by name and line."""
    tree = _Ticking().visit(ast.parse(file.read_text(encoding="utf-8")))
    return {(c.co_qualname, c.co_firstlineno): c for c in _codes(compile(tree, str(file), "exec"))}


class Ticking:
    """Functions of the files below ``rooms`` of the package, with a call before each statement within :meth:`on`."""

    def __init__(self, *rooms: str) -> None:
        files = {str(f): _ticking(f) for room in rooms for f in sorted((_OURS / room).rglob("*.py"))}
        self._codes: list[tuple[FunctionType, CodeType, CodeType]] = []
        for function in gc.get_objects():
            # By its type: what asks for the class of a weak proxy asks what it stands for, which may be gone.
            if type(function) is FunctionType and function.__code__.co_filename in files:
                code = function.__code__
                new = files[code.co_filename].get((code.co_qualname, code.co_firstlineno))
                if new is not None and new.co_freevars == code.co_freevars:
                    self._codes.append((function, code, new))
        assert len(self._codes) > 10

    @contextlib.contextmanager
    def on(self, interrupter: Interrupter) -> Iterator[None]:
        """Within it, ``interrupter`` is called before each statement."""
        setattr(builtins, _TICK, interrupter)
        for function, _, new in self._codes:
            function.__code__ = new
        try:
            yield
        finally:
            for function, old, _ in self._codes:
                function.__code__ = old
            setattr(builtins, _TICK, lambda: None)  # of functions that were made meanwhile
