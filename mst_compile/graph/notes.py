"""Say in words what a graph does with a sparse weight, and say it once where time is lost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mst_compile.errors import MSTWarning
from mst_compile.graph.context import Site
from mst_compile.state.attention import AttentionState
from mst_compile.state.weight import SparseWeight


def note_attention(state: AttentionState, sites: Sequence[Site]) -> None:
    """Keep what became of each attention for ``explain``, and warn once if none could be made sparse."""
    for site in sites:
        state.reasons[site.where] = f"{state.sparse} ({site.form})" if site.replaced else f"full: {site.reason}"
    if state.warned or any(not reason.startswith("full") for reason in state.reasons.values()):
        return
    state.warned = True
    why = "; ".join(f"{where}: {reason}" for where, reason in list(state.reasons.items())[:3]) or "none was found"
    warnings.warn(
        f"the schedule asks for {state.sparse} attention, but attention in this graph stays full ({why})",
        MSTWarning,
        stacklevel=2,
    )


def warn_unmatched(weights: Sequence[SparseWeight]) -> None:
    """Warn of weights whose products in a graph all stay dense, once each; unstructured masks without kernels are meant
    to."""
    lost = [w for w in weights if w.can_be_sparse and not w.uses.warned]
    if not lost:
        return
    for weight in lost:
        weight.uses.warned = True
    reasons = "; ".join(f"{w.name}: {', '.join(w.uses.unmatched)}" for w in lost[:3])
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    warnings.warn(
        f"sparse weights of this graph ({len(lost)}) stay in dense products, which is correct but "
        f"saves no time ({reasons}{more}); mst_compile.explain(model) lists all",
        MSTWarning,
        stacklevel=2,
    )


def warn_written(weights: Sequence[SparseWeight]) -> None:
    """Warn of weights with values outside their active blocks, once each: sparse products would leave those out."""
    new = [w for w in weights if not w.uses.written]
    if not new:
        return
    for weight in new:
        weight.uses.written = True
    names = ", ".join(w.name for w in new[:3]) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
    warnings.warn(
        f"values stand outside the active blocks of {names}: somebody has written or loaded them. Compiled calls run "
        "dense products, as eager mode does, until they are 0 again. When an optimizer steps, values that a state dict "
        "brought choose the masks anew as far as the density allows, and all others are set to 0",
        MSTWarning,
        stacklevel=2,
    )
