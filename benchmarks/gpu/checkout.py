"""Import ``mst_compile`` from a checkout that nobody installed, and run scripts that need it.

    python -m benchmarks.gpu.checkout examples/quality_study.py --device cuda ...

An installation puts the repository's ``lowering/`` and ``kernels/`` inside the package (``package-dir`` in
pyproject.toml). The finder below does the same, as a last resort: an installed package is found before it.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = {
    "mst_compile": ROOT / "mst_compile",
    "mst_compile.lowering": ROOT / "lowering",
    "mst_compile.kernels": ROOT / "kernels",
}


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = _FOLDERS.get(fullname)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def make_importable() -> None:
    """Let ``import mst_compile`` work; does nothing the second time."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def run_script(arguments: Sequence[str]) -> None:
    """Run a script with its arguments as Python would, in a process where the backend ``"mst"`` is known too."""
    make_importable()
    import torch

    if "mst" not in torch._dynamo.list_backends():
        from mst_compile.graph.backend import mst

        torch._dynamo.register_backend(mst, name="mst")
    sys.argv = list(arguments)
    sys.path[0] = str(Path(arguments[0]).parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run_script(sys.argv[1:])
