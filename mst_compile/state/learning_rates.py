"""Learning rates that follow the density of sparse weights."""

from __future__ import annotations

from typing import Any

from torch import nn, optim

from mst_compile.rules.checks import check_model, check_number

from .weight import SparseWeight, of

DENSITY_RATE = "density_rate"


def param_groups(model: nn.Module, *, weight_decay: float = 0.0, density_rate: float = 1.0) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, in which the learning rate of sparse weights follows their density.

    ``torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=1e-3)``

    An output of a sparse weight sums over fewer inputs, so the rate that suits the dense model moves it too little: it
    should grow as the density falls (SµPar, arXiv 2405.15743). A group with ``"density_rate": r`` steps with its
    learning rate times ``density ** -r``, where density is the mean over the group's sparse weights at that step;
    ``group["lr"]`` itself, and so any scheduler, stays as it is. The key works in groups of your own as well. The rule
    carries a rate over from the dense model: one that is too large for that becomes much too large for sparse weights.

    Args:
        model: a sparsified model.
        weight_decay: of sparse weights and other matrices; vectors have none.
        density_rate: 1 is SµPar's rule, 0 gives all weights the same learning rate.

    Returns:
        A group for the sparse weights of each target density (layers of one shape) and schedule, one for other
        parameters of two and more dimensions, and one for vectors.

    Raises:
        ModelError: ``model`` is no module.
        ArgumentError: ``weight_decay`` or ``density_rate`` is negative or not finite.
    """
    check_model("param_groups", model)
    weight_decay = check_number("weight_decay", weight_decay, least=0)
    density_rate = check_number(DENSITY_RATE, density_rate, least=0)
    sparse: dict[tuple[int, float], list[nn.Parameter]] = {}
    kinds: list[list[nn.Parameter]] = [[], []]
    for parameter in model.parameters():
        weight = of(parameter)
        if weight is not None:
            schedule = id(weight.attention)  # one of each module that was sparsified
            sparse.setdefault((schedule, weight.density_target), []).append(parameter)
        else:
            kinds[0 if parameter.dim() >= 2 else 1].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members, "weight_decay": weight_decay, DENSITY_RATE: density_rate} for members in sparse.values()
    ]
    groups += [{"params": k, "weight_decay": d} for k, d in zip(kinds, (weight_decay, 0.0), strict=True)]
    return [group for group in groups if group["params"]]


def scale_rates(
    optimizer: optim.Optimizer, own: list[tuple[SparseWeight, nn.Parameter]]
) -> list[tuple[dict[str, Any], Any]]:
    """Let groups with a ``density_rate`` step with their learning rate scaled; returns what :func:`restore_rates`
    needs.

    Raises:
        ArgumentError: the rate of a group is negative or not finite. No learning rate has changed.
    """
    before: list[tuple[dict[str, Any], Any]] = []
    for group, rate in [(group, _rate_of(group)) for group in optimizer.param_groups]:
        if rate == 0:
            continue
        inside = [weight for p in group["params"] if (weight := of(p)) is not None]
        # Of modules that were sparsified separately each is told of the step: one of them scales the group.
        if not inside or not any(weight is inside[0] for weight, _ in own):
            continue
        active, total = sum(w.active for w in inside), sum(w.numel for w in inside)
        if 0 < active < total:
            before.append((group, group["lr"]))
            group["lr"] = group["lr"] * (active / total) ** -rate
    return before


def _rate_of(group: dict[str, Any]) -> float:
    rate = group.get(DENSITY_RATE)
    return 0.0 if rate is None else check_number(f"{DENSITY_RATE!r} of a parameter group", rate, least=0)


def restore_rates(before: list[tuple[dict[str, Any], Any]]) -> None:
    """Undo :func:`scale_rates`."""
    for group, rate in before:
        group["lr"] = rate
