"""What turns a model sparse, finds its :class:`Sparsifier`, and makes it an ordinary one again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from mst_compile.blocks.shards import check_not_cut, check_placement
from mst_compile.errors import AlreadySparseError, MSTWarning, SelectionError
from mst_compile.parallel import (
    deepspeed,
    first_step,  # noqa: F401  (compares ranks)
    fsdp,
    tensor,  # noqa: F401  (follows tensor parallelism)
)
from mst_compile.rules.checks import check_choice, check_flag, check_model, check_seed
from mst_compile.rules.guard import GUARDS, Guard
from mst_compile.rules.schedule import Schedule, as_schedule
from mst_compile.state import binding
from mst_compile.state.ownership import forget_owner
from mst_compile.state.selection import Override, Selection, check_memory, select
from mst_compile.state.sparsifier import Sparsifier, attach, detach, parts_of, some_parts_of, sparsifier
from mst_compile.state.uses import forget_compiled, is_compiled

_logger = logging.getLogger("mst_compile")

__all__ = ["densify", "sparsifier", "sparsify"]


def sparsify(
    model: nn.Module,
    schedule: Schedule,
    *,
    block: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    overrides: Mapping[str, Override] | None = None,
    guard: Guard = "coverage",
    masks: Literal["magnitude", "random"] | Mapping[str, Tensor] | None = None,
    rescale: bool = True,
    seed: int = 0,
    auto_step: bool = True,
) -> nn.Module:
    """Make the linear weights of ``model`` sparse in place, and let ``schedule`` drive them during training.

    Weights keep their Parameter, shape and storage; outside the active blocks they hold exactly 0. The model runs as
    it is, in eager mode too; ``torch.compile(model, backend="mst")`` makes the zeros save time. Call it before or after
    building the optimizer, and before or after moving the model. Modules of one model that share no weight may be
    sparsified separately, with schedules of their own: :func:`explain`, :func:`param_groups`, :func:`densify` and the
    optimizer's state dict serve the whole model then, :func:`sparsifier` one module.

    Args:
        model: any module. Weights of ``nn.Linear`` and Hugging Face ``Conv1D`` are eligible, a tied LM head included,
            and stacks of experts' matrices in one Parameter ``[experts, rows, cols]``, each of which is trained as a
            weight of its own; embeddings, norms and biases stay dense, and so do frozen weights (``requires_grad``
            False) and adapters (``lora_A``, ``lora_B``, ...) unless ``include`` names them; :func:`explain` says so.
        schedule: :class:`MixedSparsity`, :class:`Constant` or an own one derived from :class:`Schedule`.
        block: edge of the square blocks, a power of two; default 8 on a CPU, 64 on NVIDIA GPUs, 32 elsewhere. It
            shrinks for a weight whose backbone would take more than half of the target density (:func:`explain` says
            so), to no less than 4. ``1`` gives unstructured masks; for 1 and 2 there are kernels on a CPU alone.
        include: shell-style patterns of parameter names; only these become sparse. Names of other matrices and stacks
            of matrices, of frozen weights and of adapters are accepted too.
        exclude: patterns of names that stay dense.
        overrides: patterns of names -> :class:`Override`, for weights with a sparsity or a block of their own. The
            first pattern that matches counts.
        guard: what drop-and-grow may not take. ``"coverage"``: the largest block of each block row and column.
            ``"backbone"``: a fixed wrapped block diagonal (:func:`mst_compile.rules.guard.backbone`), which random
            first masks contain with either guard. ``"none"``: anything may go; whole rows and columns of blocks empty,
            and may never come back.
        masks: where the schedule starts sparse, the masks that it starts with. ``"random"``: a uniform choice.
            ``"magnitude"``: the blocks of largest mean square (or as the schedule's ``magnitude`` says) of each weight,
            at the density that the schedule's distribution gives it, and with what ``guard`` keeps. A mapping of names
            of sparse weights to bool masks of their blocks, ``[ceil(rows / block), ceil(cols / block)]``, or elements,
            ``[rows, cols]`` (of a stack with ``experts`` in front): taken as they are, until a topology event returns
            to the schedule's density; other weights get masks by the default. None: ``"magnitude"`` if a weight was
            loaded by transformers' ``from_pretrained`` (from its version 5 on) or holds values that no initialiser
            draws, else ``"random"``; the log ``"mst_compile"``, ``sparsifier(model).first_masks`` and :func:`explain`
            say which, and why. Of freshly initialised models one in a million is mistaken
            (:func:`mst_compile.rules.fresh.looks_trained`); a short training may go unnoticed. A schedule that starts
            dense draws no first masks: what it drops on its way goes by magnitude anyway.
        rescale: where the schedule starts sparse, multiply the weights that stay by ``density ** -0.5``, so that a
            layer's outputs have the variance they had (the initialisation of SµPar, arXiv 2405.15743). Without it a
            freshly initialised model starts with signals that fade from layer to layer, and learns slower. Trained
            weights keep their values: with masks by magnitude, and given ones on weights that are not fresh, nothing
            is multiplied.
        seed: masks are a function of (seed, step, parameter name).
        auto_step: count steps by a hook on the optimizer; otherwise call ``sparsifier(model).step()``.

    Returns:
        ``model`` itself.

    Raises:
        ScheduleError, BlockSizeError, SelectionError, WeightError, MaskError, AlreadySparseError, ArgumentError: see
            the message; the model is unchanged.
        ParallelismError: ranks hold a weight in a layout that is not served; the model is unchanged.
    """
    check_model("sparsify", model)
    schedule = as_schedule(schedule)
    _check_plain(model)
    seed = check_seed("seed", seed, SelectionError)
    check_choice("guard", guard, GUARDS, SelectionError)
    rescale, auto_step = check_flag("rescale", rescale), check_flag("auto_step", auto_step)
    with torch.inference_mode(False):  # what is made here is written again at every event
        selection = select(model, schedule, block, include, exclude, overrides, guard != "none")
        check_memory(selection.candidates, [*model.named_parameters(), *binding.bound()])
        fsdp.adopt(model)
        for candidate in selection.candidates:
            check_placement(candidate.name, candidate.parameter)
            for module, _ in candidate.owners:
                check_not_cut(candidate.name, candidate.parameter, module)
        new = Sparsifier(schedule, selection.candidates, seed, auto_step, selection.skipped, guard)
        try:
            # It asks the schedule, which may be the user's, before it changes a weight.
            new.draw_first_masks(rescale, masks)
        except BaseException:
            new.release()
            raise
        attach(model, new)
        deepspeed.adopt(candidate.parameter for candidate in selection.candidates)
    for name, reason in selection.skipped.items():
        _logger.info("%s stays dense: %s", name, reason)
    _warn_of_stacks(selection)
    if any(is_compiled(candidate.parameter) for candidate in selection.candidates):
        torch._dynamo.reset()  # they were sparse before, perhaps on another grid of blocks, which graphs rely on
        forget_compiled()
    return model


def _warn_of_stacks(selection: Selection) -> None:
    """Say that most of a model stays dense, where experts are stacked in Parameters that cannot be sparse."""
    sparse = sum(candidate.parameter.numel() for candidate in selection.candidates)
    if selection.stacked > sparse:
        warnings.warn(
            f"{selection.stacked:,} elements are in stacks of matrices, as of experts, which stay dense; the weights "
            f"that become sparse have {sparse:,}, so that little time is saved. mst_compile.explain(model) lists them",
            MSTWarning,
            stacklevel=3,
        )


def _check_plain(model: nn.Module) -> None:
    """Raise :class:`AlreadySparseError` if a weight of ``model`` is sparse, here or as that of another module."""
    found = [(name, weight) for name, p in model.named_parameters() if (weight := binding.of(p)) is not None]
    if parts_of(model) or found:
        which = f": {found[0][0]} is, under the name {found[0][1].name}" if found else ""
        raise AlreadySparseError(
            f"the model (or a part of it) is sparse already{which}; call densify first, on the module that was "
            "sparsified, to start again with another schedule. Modules that share a weight must be sparsified as one: "
            "pass the module that holds both"
        )


def densify(model: nn.Module) -> nn.Module:
    """End sparse training early: from now on every weight may become non-zero, and nothing of us is left on the model,
    nor on its modules if they were sparsified separately.

    Weights that are zero stay zero until the optimizer moves them.

    A part of a sparse model that lives on without it, as what ``merge_and_unload`` returns of a model with adapters, is
    made ordinary too.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("densify", model)
    orphans = {id(p): p for p in model.parameters() if (weight := binding.of(p)) is not None and weight.is_orphan}
    for parameter in orphans.values():
        binding.unbind(parameter)
    for module in model.modules():
        if orphans.keys() & {id(p) for p in module._parameters.values()}:
            forget_owner(module)
    for part in parts_of(model) if orphans else some_parts_of(model):
        part.sparsifier.release()
    detach(model)
    return model
