"""Learning rates and weight decays that follow the density of sparse weights."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn, optim

from mst_compile.errors import ArgumentError, MSTWarning
from mst_compile.rules.checks import as_number, check_model, check_number, shown
from mst_compile.rules.laws import Law, check_law, factor

from .binding import of
from .weight import SparseWeight

DENSITY_RATE = "density_rate"
DENSITY_DECAY = "density_decay"
INDEPENDENT = "independent"  # of the learning rate's law: lr * weight_decay is the dense model's
_warned: weakref.WeakSet[optim.Optimizer] = weakref.WeakSet()
_ROUNDING = 1 + 1e-6
_OWN = "callable"  # what a state dict holds of a law that is a function: it cannot hold the function
# Classes whose updates of a weight have a size of their own, by name, as there are several of one: the largest r of
# density ** -r that suits them, as measured (docs/guide.md, python -m benchmarks.density_rate), and why it is not 1.
_SIZED = {
    "Muon": (0.0, "orthogonalises its updates, which are as large at a low density as in a dense model"),
    "Adafactor": (0.25, "gives the update of a whole weight one size, so that the fewer elements move the more each"),
}
# L2 in them is a part of the gradient, whose scale does not matter to the update. Of Adam, NAdam and RAdam the group
# says so itself; then it holds for whoever steps on their behalf, too.
_SCALE_FREE = (optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta, optim.RMSprop)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    density_rate: Law = 1.0,
    density_decay: Law = INDEPENDENT,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, in which the learning rate of sparse weights follows their density.

    ``torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=1e-3)``

    An output of a sparse weight sums over fewer inputs, so the rate that suits the dense model moves it too little: it
    should grow as the density falls (SµPar, arXiv 2405.15743). A group with ``"density_rate": r`` steps with its
    learning rate times ``density ** -r``, where density is the mean over the group's sparse weights at that step;
    ``group["lr"]`` itself, and so any scheduler, stays as it is. The rule carries a rate over from the dense model: one
    that is too large for that becomes much too large for sparse weights.

    Decoupled weight decay multiplies a weight by ``1 - lr * weight_decay`` each step, and so does L2 in plain SGD: with
    the rate alone it would grow as well. ``"density_decay": "independent"``, which a group with a ``density_rate`` has
    unless it says otherwise, keeps that product as in the dense model: ``weight_decay`` is divided, for the step, by
    what the rate is multiplied by. In Adam, NAdam, RAdam (not decoupled), Adamax, Adagrad, Adadelta and RMSprop L2 is a
    part of a gradient that is normalised afterwards; there ``weight_decay`` stays. Any other optimizer is taken for a
    decoupled one.

    The rule is Adam's. Muon's update keeps its size whatever the density, and Adafactor's has one root mean square over
    the whole weight: give them ``density_rate=0`` and ``0.25``, as a warning says where one gives more.

    Both keys work in groups of your own, and both take other laws: a number r for ``density ** -r``, ``"graphcore"``
    (:func:`mst_compile.rules.laws.graphcore`), ``"none"`` (which 0 means as well), or a function of the density that
    returns the factor, which is asked at every step. A ``density_decay`` that is such a law multiplies
    ``weight_decay``, whatever the optimizer. A group of your own that names neither steps as in the dense model.

    Args:
        model: a sparsified model.
        weight_decay: of sparse weights and other matrices; vectors have none. Every group says its own, so that a
            ``weight_decay`` given to the optimizer itself, or its default, counts for none of them.
        density_rate: law of the learning rate; 1 is SµPar's rule, ``"none"`` gives all weights the same learning rate.
        density_decay: ``"independent"``, or a law of the weight decay; ``"none"`` leaves it as it is, so that decoupled
            decay grows with the rate.

    Returns:
        A group for the sparse weights of each target density (layers of one shape) and schedule, one for other
        parameters of two and more dimensions, and one for vectors.

    Raises:
        ModelError: ``model`` is no module.
        ArgumentError: ``weight_decay`` or ``density_rate`` is negative or not finite, or a law is none.
    """
    check_model("param_groups", model)
    weight_decay = check_number("weight_decay", weight_decay, least=0)
    laws = {DENSITY_RATE: _check_rate(DENSITY_RATE, density_rate)}
    laws[DENSITY_DECAY] = _check_decay(DENSITY_DECAY, density_decay)
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
        {"params": members, "weight_decay": weight_decay, **laws} for members in sparse.values()
    ]
    groups += [{"params": k, "weight_decay": d} for k, d in zip(kinds, (weight_decay, 0.0), strict=True)]
    return [group for group in groups if group["params"]]


def _check_rate(name: str, law: object) -> Law:
    return check_law(name, law, least=0)


def _check_decay(name: str, law: object) -> Law:
    return law if isinstance(law, str) and law == INDEPENDENT else check_law(name, law)


# -- during a step -----------------------------------------------------------------------------------------------------


def scale_rates(
    optimizer: optim.Optimizer,
    own: list[tuple[SparseWeight, nn.Parameter]],
    before: list[tuple[dict[str, Any], dict[str, Any]]],
    held: Callable[[Tensor], Sequence[SparseWeight]] | None = None,
) -> None:
    """Let groups with a law step with their learning rate and weight decay scaled.

    Args:
        before: takes up what :func:`restore_rates` needs, before anything is scaled: an interrupt may come then.
        held: which sparse weights are in the group of a Parameter that is a copy of some of them; a group has one
            such Parameter, or several of which each says all.

    Raises:
        ArgumentError: the law of a group is none, or one of the user's returned no factor. Nothing has changed.
    """
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for group in optimizer.param_groups:
        if group.get(DENSITY_RATE) is None and group.get(DENSITY_DECAY) is None:
            continue
        rate, decay = _laws_of(group)
        if held is None:
            inside = [weight for p in group["params"] if (weight := of(p)) is not None]
        else:
            inside = list(held(group["params"][0])) if group["params"] else []
        # Of modules that were sparsified separately each is told of the step: one of them scales the group.
        if not inside or not any(weight is inside[0] for weight, _ in own):
            continue
        active, total = sum(w.active for w in inside), sum(w.numel for w in inside)
        if active:
            found.append((group, _scaled(optimizer, group, rate, decay, active / total)))
            _warn_of_sized_updates(optimizer, group, found[-1][1], active / total)
    before += [(group, {key: group[key] for key in scaled}) for group, scaled in found]
    for group, scaled in found:
        group.update(scaled)


def _laws_of(group: dict[str, Any]) -> tuple[Law, Law]:
    rate, decay = group.get(DENSITY_RATE), group.get(DENSITY_DECAY)
    of_group = "{!r} of a parameter group".format
    return (
        _check_rate(of_group(DENSITY_RATE), 0 if rate is None else rate),
        _check_decay(of_group(DENSITY_DECAY), INDEPENDENT if decay is None else decay),
    )


def _warn_of_sized_updates(
    optimizer: optim.Optimizer, group: dict[str, Any], scaled: dict[str, Any], density: float
) -> None:
    """Some updates grow by themselves on fewer elements: what the rate grows by must not do so once more."""
    found = next((_SIZED[cls.__name__] for cls in type(optimizer).__mro__ if cls.__name__ in _SIZED), None)
    if found is None or optimizer in _warned or "lr" not in scaled:
        return
    (most, why), given, taken = found, float(group["lr"]), float(scaled["lr"])
    if taken <= given * factor(DENSITY_RATE, most, density, positive=True) * _ROUNDING:
        return
    _warned.add(optimizer)
    name, law = type(optimizer).__name__, shown(group[DENSITY_RATE])
    warnings.warn(
        f"{name} {why}, and {DENSITY_RATE!r}: {law} of its parameter group multiplies its rate by {taken / given:.3g}. "
        f"{f'density ** -{most:g}' if most else 'The rate of the dense model'} was measured to suit it better "
        f"(docs/guide.md): use param_groups(model, density_rate={most:g}) for it",
        MSTWarning,
        stacklevel=5,
    )


def _scaled(optimizer: optim.Optimizer, group: dict[str, Any], rate: Law, decay: Law, density: float) -> dict[str, Any]:
    """What of ``group`` is another in a step at ``density``."""
    faster = factor(DENSITY_RATE, rate, density, positive=True)
    if isinstance(decay, str) and decay == INDEPENDENT:
        decayed = 1.0 / faster if _decays_by_rate(optimizer, group) else 1.0
    else:
        decayed = factor(DENSITY_DECAY, decay, density, positive=False)
    found = {}
    for key, law, by in (("lr", DENSITY_RATE, faster), ("weight_decay", DENSITY_DECAY, decayed)):
        if by == 1.0 or (key == "weight_decay" and key not in group):
            continue
        value = group[key]
        if not isinstance(value, Tensor) and as_number(value) is None:
            raise ArgumentError(
                f"{law!r} of a parameter group multiplies its {key}, which is {shown(value)}: give the optimizer a "
                f"number for {key}, or the group {law!r}: 0"
            )
        found[key] = value * by
    return found


def _decays_by_rate(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether a step takes ``lr * weight_decay`` of a weight off, as decoupled decay does and L2 in a gradient that is
    used as it is."""
    decoupled = group.get("decoupled_weight_decay")
    return not isinstance(optimizer, _SCALE_FREE) if decoupled is None else bool(decoupled)


def restore_rates(before: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """Undo :func:`scale_rates`."""
    for group, values in before:
        group.update(values)


# -- in checkpoints ----------------------------------------------------------------------------------------------------


def pack_laws(groups: Iterable[dict[str, Any]]) -> None:
    """Let the groups of a state dict say their laws in full, in plain values."""
    for group in groups:
        if group.get(DENSITY_RATE) is not None and group.get(DENSITY_DECAY) is None:
            group[DENSITY_DECAY] = INDEPENDENT
        for key in (DENSITY_RATE, DENSITY_DECAY):
            if _is_function(group.get(key)):
                group[key] = _OWN


def unpack_laws(
    groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]], sparse: set[int]
) -> list[dict[str, Any]]:
    """Groups of a state dict as they are to be loaded.

    A sparse run that names a rate's law and none of the decay is from before there was one: its decay grew with the
    rate, and goes on so. A law that is a function is the one that the optimizer has.

    Args:
        groups: of the optimizer.
        saved: of the state dict.
        sparse: ids of the Parameters that were sparse when it was saved.

    Raises:
        ArgumentError: a law was a function, and the optimizer has none.
    """
    found = [dict(group) for group in saved]
    grew = False
    for group, loaded in zip(groups, found, strict=False):
        was_sparse = any(id(p) in sparse for p in group["params"])
        if was_sparse and loaded.get(DENSITY_RATE) is not None and DENSITY_DECAY not in loaded:
            loaded[DENSITY_DECAY] = 0.0
            grew |= bool(loaded[DENSITY_RATE] and loaded.get("weight_decay"))
        for key in (DENSITY_RATE, DENSITY_DECAY):
            if loaded.get(key) == _OWN:
                if not _is_function(group.get(key)):
                    raise ArgumentError(
                        f"this checkpoint's parameter group has a function of its own as {key!r}, which no checkpoint "
                        f"holds: build the optimizer with the same {key}=..., it has {shown(group.get(key))}"
                    )
                loaded[key] = group[key]
    if grew:
        warnings.warn(
            f"this checkpoint is of a run whose weight decay grew with the learning rate of sparse weights, and goes "
            f"on so ({DENSITY_DECAY!r}: 0.0 in its parameter groups). Set group[{DENSITY_DECAY!r}] = {INDEPENDENT!r} "
            "to keep lr * weight_decay as in the dense model from here on",
            MSTWarning,
            stacklevel=4,
        )
    return found


def _is_function(law: object) -> bool:
    return callable(law) and as_number(law) is None
