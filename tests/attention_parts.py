"""Every way to combine the parts of an attention pattern."""

from __future__ import annotations

from mst_compile.rules.patterns import FULL, Parts

COMBINATIONS = (
    "everything", "window", "chunk", "distances", "summaries",
    "window and distances", "chunk and distances", "window and summaries", "chunk and summaries",
)  # fmt: skip


def combine(what: str, window: int, stride: int, gap: int = 0, times: int = 1) -> Parts:
    """One of ``COMBINATIONS``; its distances begin ``gap`` behind the run, its summaries' chunks are ``times`` as long
    as its own."""
    return {
        "everything": lambda: FULL,
        "window": lambda: Parts(window=window),
        "chunk": lambda: Parts(chunk=stride),
        "distances": lambda: Parts(first=gap, step=stride),
        "summaries": lambda: Parts(summary=stride),
        "window and distances": lambda: Parts(window=window, first=window + gap, step=stride),
        "chunk and distances": lambda: Parts(chunk=window, first=window + gap, step=stride),
        "window and summaries": lambda: Parts(window=1, summary=stride),
        "chunk and summaries": lambda: Parts(chunk=stride, summary=stride * times),
    }[what]()
