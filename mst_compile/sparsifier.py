"""The one stateful class: it owns a model's masks, counts optimizer steps and changes the topology between them.

Within one training step::

    forward, backward   gradients arrive; outside the active blocks they are set to 0 as soon as they have accumulated
                        (kept dense on the step before a topology event, so that growth can read them)
    optimizer.step()    before: growth scores are harvested and the inactive part of the gradient is zeroed
                        after:  the step is counted and, on an event, the topology changes
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import topology, weights
from .blockops import block_mean_square, zero_blocks_
from .errors import AlreadySparseError, CheckpointError, MaskError, MSTWarning, NotSparseError, SelectionError
from .hybrid import AttentionState
from .schedule import Schedule, check_schedule
from .selection import Candidate, select
from .steps import watch_steps
from .weights import SparseWeight

_ATTRIBUTE = "_mst_sparsifier"
_OWNED = "_mst_owned_weights"
_STATE_VERSION = 1
_FEW = 0.05  # share of dropped blocks up to which visiting them alone beats a pass over the weight
_PATIENCE = 10  # foreign optimizer steps with gradients on sparse weights before the user is warned


class Sparsifier:
    """The sparse state of one model; made by :func:`sparsify`, found by :func:`sparsifier`."""

    def __init__(
        self, schedule: Schedule, candidates: list[Candidate], seed: int, auto_step: bool, skipped: dict[str, str]
    ) -> None:
        self.schedule = schedule
        self.seed = seed
        self.auto_step = auto_step
        self.skipped = skipped
        self.step_count = 0
        self._weights = {c.name: _new_weight(c) for c in candidates}
        self.attention = _new_attention(schedule)
        for weight in self._weights.values():
            weight.attention = self.attention
        self._owners = {c.name: c.owners for c in candidates}
        self._scores: dict[str, Tensor] = {}
        self._counting: weakref.ref[torch.optim.Optimizer] | None = None
        self._foreign_steps = 0
        for name, owners in self._owners.items():
            for module, attribute in owners:
                _remember_owner(module, attribute, self._weights[name])
        self._bind({c.name: c.parameter for c in candidates})

    # -- what users read -------------------------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, SparseWeight]:
        """Parameter name -> :class:`~mst_compile.weights.SparseWeight`."""
        return dict(self._weights)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> block mask, bool ``[ceil(rows / block), ceil(cols / block)]`` on the CPU (copies)."""
        return {name: w.mask.clone() for name, w in self._weights.items()}

    @property
    def density(self) -> float:
        """Share of the elements of all sparse weights that lie in active blocks."""
        return sum(w.density * w.numel for w in self._weights.values()) / sum(w.numel for w in self._weights.values())

    def parameters(self) -> Iterator[tuple[SparseWeight, nn.Parameter]]:
        """Each sparse weight with the Parameter that its module holds now."""
        for name, weight in self._weights.items():
            module, attribute = self._owners[name][0]
            parameter = module._parameters[attribute]
            assert parameter is not None
            yield weight, parameter

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Count one optimizer step and change the topology if the schedule says so.

        Called by a hook after every step of the optimizer that owns the sparse weights; call it yourself, after
        ``optimizer.step()`` and before the next forward pass, only with ``sparsify(..., auto_step=False)``.
        """
        self._rebind()
        self._harvest()
        self.step_count += 1
        for weight in self._weights.values():
            weight.loaded = None
        if self.schedule.is_topology_event(self.step_count):
            self._change_topology()
        self._scores = {}
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        """Choose the attention pattern of the next forward pass; and if the next step ends in a topology event whose
        growth reads gradients, have them computed on all blocks."""
        self.attention.pattern = _attention_at(self.schedule, self.step_count)
        wanted = self._wants_gradient(self.step_count + 1)
        for weight in self._weights.values():
            weight.set_dense_grad(wanted and weight.density_target < 1)

    def _wants_gradient(self, step: int) -> bool:
        schedule = self.schedule
        if schedule.growth not in ("mixed", "gradient") or not schedule.is_topology_event(step):
            return False
        return schedule.sparsity_at(step) > 0  # at sparsity 0 everything grows; there is nothing to choose

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Optimizer pre-hook: harvest growth scores, and let the optimizer see zeros outside the active blocks."""
        if self._owns(optimizer):
            self._optimizers.add(optimizer)
            self._rebind()
            self._harvest()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Optimizer post-hook: count the step if the optimizer owns sparse weights."""
        if not self.auto_step or _skipped_by_scaler(optimizer):
            return
        if self._owns(optimizer):
            if self._counting is None or self._counting() is None:
                self._counting = weakref.ref(optimizer)
            if self._counting() is optimizer:
                self.step()
        elif self.step_count == 0:
            self._warn_if_never_stepped(optimizer)

    def _owns(self, optimizer: torch.optim.Optimizer) -> bool:
        own = {id(p) for _, p in self.parameters()} if self._active else set()
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def _warn_if_never_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._foreign_steps < 0 or not any(p.grad is not None for _, p in self.parameters()):
            return
        self._foreign_steps += 1
        if self._foreign_steps >= _PATIENCE:
            self._foreign_steps = -1
            warnings.warn(
                f"{type(optimizer).__name__} has stepped {_PATIENCE} times but owns none of the sparse weights, so the "
                "sparsity schedule does not advance. Build the optimizer from model.parameters() of the sparsified "
                "model, or pass auto_step=False to sparsify and call sparsifier(model).step() yourself",
                MSTWarning,
                stacklevel=4,
            )

    def _harvest(self) -> None:
        for weight, parameter in self.parameters():
            if weight.dense_grad:
                weight.set_dense_grad(False)
                if parameter.grad is not None:
                    self._scores[weight.name] = block_mean_square(parameter.grad, weight.grid)
                    weight.zero_inactive_(parameter.grad)

    # -- topology --------------------------------------------------------------------------------------------------

    def _change_topology(self) -> None:
        sparsity = self.schedule.sparsity_at(self.step_count)
        bad = [name for name, score in self._scores.items() if not bool(score.isfinite().all())]
        if bad and sparsity > 0:
            warnings.warn(
                f"topology event at step {self.step_count} skipped: the gradient of {bad[0]} is not finite",
                MSTWarning,
                stacklevel=2,
            )
            return
        names = list(self._weights)
        densities = self._densities(sparsity)
        for name, density, (weight, parameter) in zip(names, densities, self.parameters(), strict=True):
            count = topology.active_count(density, weight.grid.blocks, int(weight.spine.sum()))
            drop = self.schedule.drop_fraction_at(self.step_count) if density < 1 else 0.0
            active = int(weight.mask.sum())
            if drop == 0.0 and count == active:
                continue
            only_grows = drop == 0.0 and count > active
            mask = topology.update_mask(
                weight.mask,
                weight.spine,
                weight.mask.float() if only_grows else block_mean_square(parameter, weight.grid),
                self._scores.get(name),
                count,
                drop,
                1.0 if self.schedule.growth == "gradient" else self.schedule.gradient_share,
                topology.generator(self.seed, self.step_count, name),
            )
            self._apply(weight, parameter, mask)

    def _densities(self, sparsity: float) -> list[float]:
        shapes = [(w.grid.rows, w.grid.cols) for w in self._weights.values()]
        return topology.DISTRIBUTIONS[self.schedule.distribution](shapes, sparsity)

    def _apply(self, weight: SparseWeight, parameter: nn.Parameter, mask: Tensor) -> None:
        """Take over a mask: dropped weights, their gradient and all their optimizer state become exactly 0.

        Grown blocks need no care: outside the active blocks weights and optimizer state are 0 already.
        """
        if torch.equal(weight.mask, mask):
            return
        dropped = weight.mask & ~mask
        weight.set_mask(mask)
        count = int(dropped.sum())
        if count == 0:
            return
        tensors: list[Tensor] = [parameter]
        if parameter.grad is not None:
            tensors.append(parameter.grad)
        for optimizer in self._optimizers:
            state = optimizer.state.get(parameter, {})
            tensors += [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        few = count < _FEW * dropped.numel()
        for tensor in tensors:
            if few:
                zero_blocks_(tensor, weight.grid, dropped)
            else:
                weight.zero_inactive_(tensor)

    def _draw_first_masks(self) -> None:
        sparsity = self.schedule.sparsity_at(0)
        if sparsity > 0:
            for density, (weight, parameter) in zip(self._densities(sparsity), self.parameters(), strict=True):
                count = topology.active_count(density, weight.grid.blocks, int(weight.spine.sum()))
                mask = topology.random_mask(weight.spine, count, topology.generator(self.seed, 0, weight.name))
                self._apply(weight, parameter, mask)
        self._prepare_next_step()

    def apply_mask(self, name: str, mask: Tensor) -> None:
        """Give one weight other active blocks, outside of the schedule; call it between a step and the next forward.

        Dropped weights, their gradient and their optimizer state become exactly 0, grown ones start at 0. The next
        topology event goes on from this mask.

        Args:
            name: a key of :attr:`masks`.
            mask: bool ``[ceil(rows / block), ceil(cols / block)]``.

        Raises:
            SelectionError: no sparse weight has this name.
            MaskError: the mask has another shape or dtype. Nothing has changed.
        """
        if name not in self._weights:
            raise SelectionError(f"no sparse weight is called {name!r}; there are {', '.join(self._weights)}")
        _check_mask(name, mask, self._weights[name])
        parameter = next(p for w, p in self.parameters() if w.name == name)
        self._apply(self._weights[name], parameter, mask.detach().cpu().clone())

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Step count, seed and masks; loads with ``torch.load(weights_only=True)``."""
        return {"version": _STATE_VERSION, "step": self.step_count, "seed": self.seed, "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Load the model's own state dict as well, before or after.

        Raises:
            CheckpointError: the state is of another format, or its masks do not fit this model. Nothing has changed.
        """
        _check_state(state, self._weights)
        self.step_count = state["step"]
        self.seed = state["seed"]
        self._scores = {}
        for weight, parameter in self.parameters():
            if weight.loaded is not None:
                parameter.data.copy_(weight.loaded)
                weight.loaded = None
            self._apply(weight, parameter, state["masks"][weight.name].clone())
            weight.zero_inactive_(parameter)
        self._prepare_next_step()

    # -- binding to Parameters ---------------------------------------------------------------------------------------

    def _bind(self, parameters: dict[str, nn.Parameter]) -> None:
        """Hang the state on the Parameters, and start to watch optimizers."""
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._counting = None
        self._foreign_steps = 0
        self._active = True
        for name, parameter in parameters.items():
            weights.bind(parameter, self._weights[name])
        watch_steps(self)

    def _rebind(self) -> None:
        """Follow weights that moved to another device, were unfrozen, or whose Parameter object was replaced."""
        for weight, parameter in self.parameters():
            if weights.bind(parameter, weight):
                weight.zero_inactive_(parameter)
                if parameter.grad is not None and not weight.dense_grad:
                    weight.zero_inactive_(parameter.grad)

    def release(self) -> None:
        """Detach from the model: it is an ordinary one again. Zeros stay zeros until an optimizer moves them."""
        for _, parameter in self.parameters():
            weights.unbind(parameter)
        for owners in self._owners.values():
            for module, _ in owners:
                _forget_owner(module)
        self._active = False
        self._foreign_steps = -1

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        kept = ("schedule", "seed", "auto_step", "skipped", "step_count", "_weights", "_owners", "_scores", "attention")
        state = {name: getattr(self, name) for name in kept}
        # The Parameters themselves too: while a copy is being made its modules do not have them yet.
        return state | {"parameters": {weight.name: parameter for weight, parameter in self.parameters()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parameters = state.pop("parameters")
        self.__dict__.update(state)
        self._bind(parameters)


def _remember_owner(module: nn.Module, attribute: str, weight: SparseWeight) -> None:
    """Let a module know its sparse weights, so that a checkpoint loaded into it cannot fill their zeros."""
    if _OWNED not in module.__dict__:
        module.__dict__[_OWNED] = {}
        module.register_load_state_dict_post_hook(_after_load)
    module.__dict__[_OWNED][attribute] = weight


def _forget_owner(module: nn.Module) -> None:
    if module.__dict__.pop(_OWNED, None) is not None:
        hooks = module._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _after_load]:
            del hooks[key]


def _after_load(module: nn.Module, incompatible_keys: Any) -> None:
    """``load_state_dict`` may bring other Parameter objects (``assign=True``) and values outside the active blocks."""
    for attribute, weight in module.__dict__.get(_OWNED, {}).items():
        parameter = module._parameters[attribute]
        if parameter is not None:
            weights.bind(parameter, weight)
            whole = parameter.detach().clone()
            weight.zero_inactive_(parameter)
            if not torch.equal(whole, parameter):
                weight.loaded = whole  # its masks may follow: Sparsifier.load_state_dict


def _skipped_by_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``GradScaler`` had a fused optimizer find infinite gradients: ``step`` was called but did nothing."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)


def _attention_at(schedule: Schedule, step: int) -> str:
    """A schedule written before attention patterns existed has full attention."""
    return schedule.attention_at(step) if hasattr(schedule, "attention_at") else "full"


def _new_attention(schedule: Schedule) -> AttentionState:
    stride = getattr(schedule, "stride", 128)
    window = getattr(schedule, "span", None) or stride
    return AttentionState(_attention_at(schedule, 0), getattr(schedule, "attention", "full"), window, stride)


def _new_weight(candidate: Candidate) -> SparseWeight:
    assert candidate.grid is not None
    return SparseWeight.create(
        candidate.name,
        candidate.grid,
        candidate.density,
        candidate.parameter.device,
        tied=candidate.tied,
        note=candidate.note,
    )


def _check_state(state: Any, own: dict[str, SparseWeight]) -> None:
    if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
        version = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"not a sparsifier state of version {_STATE_VERSION}: got {version!r}")
    for key, kind in (("step", int), ("seed", int), ("masks", dict)):
        if not isinstance(state.get(key), kind):
            raise CheckpointError(
                f"the sparsifier state has no {key!r} of type {kind.__name__}: got {state.get(key)!r}"
            )
    masks = state["masks"]
    if masks.keys() != own.keys():
        raise CheckpointError(
            f"the checkpoint's masks do not fit the model: missing {sorted(own.keys() - masks.keys())}, "
            f"unexpected {sorted(masks.keys() - own.keys())}; sparsify the model as it was when it was saved"
        )
    for name, weight in own.items():
        _check_mask(name, masks[name], weight)


def _check_mask(name: str, mask: Any, weight: SparseWeight) -> None:
    if not isinstance(mask, Tensor) or tuple(mask.shape) != weight.grid.shape or mask.dtype != torch.bool:
        got = f"{tuple(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise MaskError(
            f"the mask of {name} must have {weight.grid.shape} blocks of torch.bool (block {weight.grid.block}), got "
            f"{got}; a checkpoint needs the block that it was written with"
        )


def sparsify(
    model: nn.Module,
    schedule: Schedule,
    *,
    block: int | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    seed: int = 0,
    auto_step: bool = True,
) -> nn.Module:
    """Make the linear weights of ``model`` sparse in place, and let ``schedule`` drive them during training.

    Weights keep their Parameter, shape and storage; outside the active blocks they hold exactly 0. The model runs as
    it is, in eager mode too; ``torch.compile(model, backend="mst")`` makes the zeros save time. Call it before or after
    building the optimizer, and before or after moving the model.

    Args:
        model: any module. Weights of ``nn.Linear`` and Hugging Face ``Conv1D`` are eligible, a tied LM head included;
            embeddings, norms and biases stay dense.
        schedule: :class:`MixedSparsity`, :class:`Constant` or anything with their methods.
        block: edge of the square blocks, a power of two; default 8 on a CPU, 32 elsewhere. It shrinks for a weight
            whose backbone would take more than half of the target density (:func:`explain` says so). ``1`` gives
            unstructured masks on dense matrix products.
        include: shell-style patterns of parameter names; only these become sparse. Names of other 2-D parameters are
            accepted too.
        exclude: patterns of names that stay dense.
        seed: masks are a function of (seed, step, parameter name).
        auto_step: count steps by a hook on the optimizer; otherwise call ``sparsifier(model).step()``.

    Returns:
        ``model`` itself.

    Raises:
        ScheduleError, BlockSizeError, SelectionError, WeightError, AlreadySparseError: see the message; the model is
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise SelectionError(f"sparsify takes an nn.Module, got {type(model).__name__}")
    check_schedule(schedule)
    if _ATTRIBUTE in model.__dict__ or any(weights.of(p) is not None for p in model.parameters()):
        raise AlreadySparseError(
            "the model (or a part of it) is sparse already; call densify(model) first to start again with another "
            "schedule"
        )
    selection = select(model, schedule, block, include, exclude)
    new = Sparsifier(schedule, selection.candidates, seed, auto_step, selection.skipped)
    new._draw_first_masks()
    model.__dict__[_ATTRIBUTE] = new
    return model


def sparsifier(model: nn.Module) -> Sparsifier:
    """The :class:`Sparsifier` of a model that was sparsified, also through ``torch.compile``'s or DDP's wrapper.

    Raises:
        NotSparseError: the model is not sparse.
    """
    for module in model.modules():
        found = module.__dict__.get(_ATTRIBUTE)
        if found is not None:
            return found
    raise NotSparseError("the model is not sparse; call mst_compile.sparsify(model, schedule) first")


def densify(model: nn.Module) -> nn.Module:
    """End sparse training early: from now on every weight may become non-zero, and nothing of us is left on the model.

    Weights that are zero stay zero until the optimizer moves them.

    Raises:
        NotSparseError: the model is not sparse.
    """
    sparsifier(model).release()
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
    return model
