"""Import ``mst_compile`` from a checkout that nobody installed.

An installation puts the repository's ``lowering/`` and ``kernels/`` inside the package (``package-dir`` in
pyproject.toml). The finder below does the same, as a last resort: an installed package is found before it.
"""

from __future__ import annotations

import importlib.util
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
