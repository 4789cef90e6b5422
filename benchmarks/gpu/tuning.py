"""What Inductor's autotuner has measured, kept between processes and runs, each cell's apart.

Inductor keeps the times of a product's choices in one file of its cache folder, for the card and versions at hand, by
the operands' shapes, strides and dtypes and by each choice's source (``PersistentCache``, the same in torch 2.11 and
2.13): not by density. In a folder shared by cells one would take the tile that suits another. So each cell gets an
empty folder, and that file alone, some kilobytes, is put there before and taken from there after each tuning.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mst_compile.lowering import compat
from torch._inductor import utils as inductor_utils
from torch._inductor.codecache import PersistentCache

_CONSTANTS = re.compile(r"\b(BLOCK_M|BLOCK_K|WIDTH|GATHER|CHAIN|TMA|num_warps|num_stages)=(\w+)")


def product_of(choice: Any) -> str:
    """Which product one of the autotuner's choices computes: one of ours, or "dense"."""
    return getattr(choice, "mst_product", (None, "dense"))[1].split()[0]


def tile_of(choice: Any) -> str:
    """A choice's constants."""
    return " ".join("=".join(pair) for pair in _CONSTANTS.findall(getattr(choice, "description", "")))


class Keeper:
    """Keeps the times of every cell in one file of JSON, if a path is given.

    Attributes:
        winners: the product, tile and milliseconds of what was fastest, for each tuning since the cell began.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._case: str | None = None
        self.winners: list[tuple[str, str, float]] = []
        compat.on_tuned(self._tuned)

    @contextlib.contextmanager
    def cell(self, case: str) -> Iterator[None]:
        """Compile within with an empty cache that knows the times of this cell alone."""
        self.winners = []
        with inductor_utils.fresh_cache():
            times = self._read().get(case)
            if times is not None:
                PersistentCache().update_local_cache(times)
            self._case = case
            try:
                yield
            finally:
                self._case = None

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        known: dict[str, Any] = json.loads(self._path.read_text())
        return known.get(PersistentCache.get_system()["hash"], {})

    def _tuned(self, timings: dict[Any, float], *_: Any) -> None:
        """The autotuner has measured, and Inductor has written its file."""
        if self._case is None:
            return
        best = min(timings, key=lambda choice: timings[choice])
        self.winners.append((product_of(best), tile_of(best), timings[best]))
        if self._path is None:
            return
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        known.setdefault(PersistentCache.get_system()["hash"], {})[self._case] = PersistentCache().get_local_cache()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._path.with_suffix(".new")
        whole.write_text(json.dumps(known))
        whole.replace(self._path)
