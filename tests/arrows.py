"""Reads which modules import which, without running them.

An arrow points from a module to one that it imports: at its top, inside a function, under ``TYPE_CHECKING``,
relatively, or by ``import_module`` with a name written out. That a module also runs the packages around it is no arrow.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import networkx


class Arrow(NamedTuple):
    """``source`` imports ``target``; both are full names of modules."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def sources(folders: Mapping[str, Path]) -> dict[str, str]:
    """Full name -> text of every module below some folders. A package's name ends in ``.__init__``.

    Args:
        folders: package -> where it stands. A folder inside another, or named for a package inside another, is fine.
    """
    found = {}
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            found[".".join([package, *file.relative_to(folder).with_suffix("").parts])] = file.read_text()
    return found


def arrows(modules: Mapping[str, str]) -> list[Arrow]:
    """Every import of every module. Targets among the modules are named as there; others as they are written."""
    return [
        Arrow(source, target, line)
        for source, text in modules.items()
        for target, line in _imports(source, ast.parse(text), modules)
    ]


def _imports(source: str, tree: ast.AST, modules: Mapping[str, str]) -> Iterator[tuple[str, int]]:
    def module(name: str) -> str:
        return f"{name}.__init__" if f"{name}.__init__" in modules else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield module(alias.name), node.lineno
        elif isinstance(node, ast.ImportFrom):
            # Of a package as of a module: its name here ends in __init__, so one level is its own folder.
            around = source.split(".")[: -node.level] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = module(f"{base}.{alias.name}")
                yield inside if inside in modules else module(base), node.lineno
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield module(str(argument.value)), node.lineno


def _name(function: ast.expr) -> str:
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def room(module: str, package: str, order: Sequence[str], top: Iterable[str] = ()) -> str:
    """The room that a module stands in: the first part of its name below the package.

    Args:
        order: Rooms from low to high. The highest holds the package itself and the modules in ``top``.

    Raises:
        LookupError: The room has no place in the order.
    """
    name = module.removeprefix(f"{package}.").split(".")[0]
    if name == "__init__" or name in top:
        return order[-1]
    if name not in order:
        raise LookupError(f"{module}: {name} has no place in the order of rooms {', '.join(order)}")
    return name


def against(order: Sequence[str], package: str, found: Iterable[Arrow], top: Iterable[str] = ()) -> list[Arrow]:
    """The arrows within a package that point to a higher room."""
    return [
        arrow
        for arrow in found
        if arrow.target.startswith(f"{package}.")
        and order.index(room(arrow.source, package, order, top)) < order.index(room(arrow.target, package, order, top))
    ]


def cycles(found: Iterable[Arrow]) -> list[list[str]]:
    """Modules that import each other, each set sorted."""
    graph = networkx.DiGraph([(arrow.source, arrow.target) for arrow in found])
    loops = {node for node in graph if graph.has_edge(node, node)}
    return sorted(
        sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1 or part <= loops
    )
