"""How the state of blocks that have just grown begins: second moments, and what begins at no 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mst_compile.blocks.bulk import Average, begin_averages, block_mean_square
from mst_compile.blocks.shards import is_sharded, local_part

from .optimizers import book_of, gradient_scale, keeps_zeros, scale_of, state_like, survey
from .weight import SparseWeight

_ENOUGH = 4  # edge of a block whose mean square is an estimate
# Key of the state -> how its average decays; "state2" is bitsandbytes' second moment.
_SECOND_MOMENTS = {"exp_avg_sq": "beta2", "square_avg": "alpha", "state2": "beta2"}

# Of PyTorch's optimizers, keys of the state of single elements that does not begin at 0 -> what of the group it begins
# at. ASGD's eta and mu and NAdam's product of momenta are of a whole weight.
_BEGIN: dict[type[Optimizer], dict[str, str]] = {
    optim.Rprop: {"step_size": "lr"},
    optim.Adagrad: {"sum": "initial_accumulator_value"},
}


def begin_elsewhere(optimizer: Optimizer) -> Mapping[str, str]:
    """Keys of what an optimizer begins at another number than 0, and which value of its group that is."""
    return next((keys for kind, keys in _BEGIN.items() if isinstance(optimizer, kind)), {})


@torch.no_grad()
def start_fresh(optimizer: Optimizer, own: Iterable[tuple[SparseWeight, Tensor]]) -> None:
    """Before the first step of regrown blocks: let state that the optimizer does not begin at 0 be in them what it is
    of a Parameter that is made now.

    Args:
        own: as :func:`start_second_moments` has them.
    """
    keys = begin_elsewhere(optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]} if keys else {}
    for weight, parameter in own if keys else ():
        state, group = optimizer.state.get(parameter, {}), groups[id(parameter)]
        for key in keys.keys() & state.keys():
            if weight.grown is None or state[key].shape != parameter.shape:
                continue
            local, part = local_part(state[key])
            blocks = part.of(weight.grid.expand(weight.grown)).to(local.device)
            begun = torch.where(
                blocks, torch.as_tensor(group[keys[key]], dtype=local.dtype, device=local.device), local
            )
            local.copy_(begun)
            if local.data_ptr() != state[key].data_ptr() and not is_sharded(state[key]):
                state[key].copy_(begun.view_as(state[key]))  # a stack that is no matrix by its strides


@torch.no_grad()
def start_second_moments(optimizer: Optimizer, own: Iterable[tuple[SparseWeight, Tensor]]) -> None:
    """Before the first step of regrown blocks: let their second moment begin at its first estimate, not at 0.

    Adam divides the average of squared gradients, begun at 0, by ``1 - beta2**step`` because it knows how few it has
    seen; but the step count is the whole weight's. After thousands of steps nothing is corrected, the average of a
    regrown weight is ``1 - beta2`` of one square, and its first updates are ``(1 - beta1) / sqrt(1 - beta2)`` (3.2 for
    the default betas) and later up to 7 times the learning rate. Begun at the square of its first gradient, or at the
    block's mean square where that is larger, no first update exceeds ``1 - beta1`` of the learning rate and the rate
    then rises as the first moment fills, as for a weight that has been there for long. One element says too little of
    its block if there are few: below blocks of 4 the mean is that of all blocks that grew. (The trouble is described
    in SMET, arXiv 2606.00888.)

    Args:
        own: weights and their Parameters, of which those count that have a gradient, and blocks that grew at the last
            topology event.
    """
    found: list[Average] = []
    coded: list[tuple[dict[str, Any], str, Average]] = []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for weight, parameter in own:
        gradient, grown, group = parameter.grad, weight.grown, groups.get(id(parameter), {})
        if gradient is None or grown is None:
            continue
        state = optimizer.state.get(parameter, {})
        for key, average in state_like(optimizer, parameter):
            if key in _SECOND_MOMENTS:
                found.append(Average(gradient, average, weight.grid, grown, *_correction(state, key, group)))
        codes = [] if keeps_zeros(optimizer) or is_sharded(parameter) else _coded_averages(optimizer, state)
        for key in codes:
            told = Average(gradient, state[key], weight.grid, grown, *_correction(state, key, group))
            coded.append((state, key, told))
    if not found and not coded:
        return
    scale = gradient_scale(optimizer)
    for one in begin_averages(found, scale):
        mask, begun = _first_estimate(one, scale)
        local = local_part(one.average)[0]
        if is_traceable_wrapper_subclass(local):  # 8-bit state: through its own copies
            plain = torch.empty(local.shape, dtype=torch.float32, device=local.device).copy_(local)
            local.copy_(torch.where(mask, begun, plain))
        else:
            local.copy_(torch.where(mask, begun.to(local.dtype), local))
    for state, key, one in coded:
        _write_codes(state, key, *_first_estimate(one, scale))


def _first_estimate(of: Average, scale: float) -> tuple[Tensor, Tensor]:
    """Which elements of this rank's part lie in the blocks, and what an average of them begins at."""
    gradient, part = local_part(of.gradient)
    means = block_mean_square(of.gradient, of.grid)
    if of.grid.block < _ENOUGH:
        means = torch.full_like(means, means[of.blocks].mean().item())
    mask = part.of(of.grid.expand(of.blocks)).to(gradient.device)
    least = part.of(of.grid.expand(means)).to(gradient.device)
    correction = 1.0 - of.beta ** (float(of.steps) + 1.0) if of.beta else 1.0
    return mask, torch.maximum(gradient.float().square(), least) / (scale * scale) * correction


def _correction(state: Mapping[str, Any], key: str, group: Mapping[str, Any]) -> tuple[float, Tensor | float]:
    """How the average decays, and how many steps were taken, where the optimizer will divide by ``1 - beta2**step``."""
    if _SECOND_MOMENTS[key] != "beta2" or "step" not in state or "betas" not in group:
        return 0.0, 0.0
    return float(group["betas"][1]), state["step"]


def _coded_averages(optimizer: Optimizer, state: Mapping[str, Any]) -> list[str]:
    """Keys of second moments in 8-bit codes, with a scale for each group of them."""
    codes = survey(optimizer).codes
    return [k for k in codes if k in _SECOND_MOMENTS and k in state and isinstance(state.get(scale_of(k)), Tensor)]


def _write_codes(state: dict[str, Any], key: str, mask: Tensor, values: Tensor) -> None:
    """Let 8-bit codes say ``values`` under ``mask``.

    The scale of a group, by which its codes are multiplied, grows where a value is larger, and its other codes are then
    written anew; all other groups stay as they are, bit for bit. How codes are grouped must follow from how many scales
    there are, or nothing is written.
    """
    codes, book, scales = state[key], state[book_of(key)], state[scale_of(key)]
    size = _group_size(codes.numel(), scales.numel())
    if size is None:
        return
    group = torch.arange(codes.numel(), device=codes.device) // size
    mask, values = mask.reshape(-1), values.reshape(-1)
    flat = codes.reshape(-1)
    said = book[flat.long()] * scales.reshape(-1)[group]
    wanted = torch.where(mask, values, said)
    largest = scales.reshape(-1).scatter_reduce(0, group, wanted.where(mask, 0.0).to(scales.dtype), "amax")
    changed = mask | (largest > scales.reshape(-1))[group]
    order = book.argsort()
    middles = (book[order][1:] + book[order][:-1]) / 2
    nearest = order[torch.bucketize(wanted / largest[group].clamp_min(torch.finfo(scales.dtype).tiny), middles)]
    codes.copy_(torch.where(changed, nearest.to(codes.dtype), flat).view_as(codes))
    scales.copy_(largest.view_as(scales))


def _group_size(elements: int, groups: int) -> int | None:
    """How many codes share a scale, a power of 2, if that many groups follow from it."""
    return next((size for size in (1 << i for i in range(4, 16)) if -(-elements // size) == groups), None)
