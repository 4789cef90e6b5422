"""One answer for all ranks of a run, where each could have measured another.

Ranks that multiply dense and sparse at the same step would wait for each other, and compile at different times. The
first rank to ask answers for all, through the group's key-value store. The answer stands for the whole run: whoever
refreshed it would part from those that asked before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

_agreed: dict[str, str] = {}  # question -> answer, of this run


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def given_answer(question: str) -> str | None:
    """The answer that this rank has had before."""
    return _agreed.get(question)


def first_answer(question: str, answer: Callable[[], str]) -> str | None:
    """What the first rank to ask ``question`` answers; the others wait as long as that takes, and for nothing else: no
    rank waits for one that has not asked.

    Args:
        answer: called on the first rank alone; not empty.

    Returns:
        None where the ranks' store keeps nothing, as that of pretended ranks; then no rank's does.
    """
    if question in _agreed:
        return _agreed[question]
    store, key = dist.distributed_c10d._get_default_store(), f"mst_compile/{question}"
    try:
        asked = store.add(f"{key} asked", 1)
        if asked == 1:
            # That store counts too from torch 2.14 on: what nobody would be told is not worth measuring.
            store.set(f"{key} begun", "yes")
            if store.get(f"{key} begun") != b"yes":
                return None
            own = ""
            try:
                own = answer()
            finally:
                store.set(key, own)
        found = store.get(key).decode() if asked > 0 else ""
    except RuntimeError:
        return None
    if found:
        _agreed[question] = found
    return found or None
