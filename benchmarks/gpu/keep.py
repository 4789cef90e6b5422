"""Results that outlive a run: lines of JSON, written as they come, and of which code they tell. No torch.

Minutes on a GPU come in pieces. What one piece has found stands in a folder that the next is given.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .checkout import ROOT

FOLDER = Path("runs/gpu")
PACKAGE = ("mst_compile", "lowering", "kernels")
_SOURCES = {".py", ".cpp", ".h", ".jinja"}

Line = dict[str, Any]


def fingerprint(folders: Iterable[str] = PACKAGE) -> str:
    """Eight digits that change with any source in these folders of the checkout, committed or not."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SOURCES:
                found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:8]


class Lines:
    """A file of JSON lines. Each is on the disk once it is added, and one that a crash has cut off is not read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[Line]:
        found = []
        for text in self._path.read_text().splitlines() if self._path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(text))
        return found

    def add(self, line: Line) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write("\n" * cut_off + json.dumps(line) + "\n")
