"""Say which weights train on dense products because no compiled graph has ever taken them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from mst_compile.errors import MSTWarning

from .uses import compiled_graphs
from .weight import SparseWeight


def warn_unseen(weights: Sequence[SparseWeight]) -> None:
    """Warn of those weights, all at once, and why as far as can be known; unstructured masks without kernels are
    meant to be dense."""
    unseen = [w.name for w in weights if w.can_be_sparse and not w.uses.seen]
    if not unseen:
        return
    names = ", ".join(unseen[:3]) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
    warnings.warn(
        f'no graph compiled by backend="mst" has taken {names} so far: the masked model trains correctly, but on dense '
        f"products, which saves no time. {_why()}",
        MSTWarning,
        stacklevel=7,
    )


def _why() -> str:
    if torch._dynamo.config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return (
            "torch.compile is turned off in this process, by TORCHDYNAMO_DISABLE=1 or TORCH_COMPILE_DISABLE=1 in its "
            "environment: unset them"
        )
    if compiled_graphs() == 0:
        return (
            "The backend has compiled nothing in this process: the model runs in eager mode or under another backend. "
            'Train what torch.compile(model, backend="mst") returns, or call model.compile(backend="mst")'
        )
    breaks = [str(reason).splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]]
    what = f" Dynamo broke or skipped frames: {'; '.join(breaks[:2])}." if breaks else ""
    return (
        "The backend has compiled other graphs: these weights are used in code that it was not given, that another "
        f"backend compiled, or that Dynamo skipped, like an LSTM or a loop that depends on data.{what} "
        'TORCH_LOGS="graph_breaks" tells where'
    )
