"""The sparse weights of one model, and the Parameters that hold them now."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.shards import (
    check_placement,
    held_parameter,
    is_made_of_others,
    is_sharded,
    parameter_of,
    stored,
)
from mst_compile.errors import MSTWarning, WeightError
from mst_compile.rules.density import layer_densities
from mst_compile.rules.guard import Guard
from mst_compile.rules.schedule import Schedule

from . import names  # noqa: F401  (tells the profiler)
from .attention import AttentionState
from .binding import bind, is_at_home, of, unbind
from .indexes import epoch
from .ownership import forget_owner, remember_owner
from .selection import Candidate
from .weight import SparseWeight


class Weights:
    """Iterates over the weights; :meth:`parameters` pairs them with what their modules hold.

    Attributes:
        by_name: parameter name -> weight, in the model's order.
    """

    def __init__(self, candidates: list[Candidate], guard: Guard, attention: AttentionState) -> None:
        self.by_name = {c.name: SparseWeight.create(c, guard, attention) for c in candidates}
        self._overrides = [c.override.sparsity for c in candidates]
        self._owners = {c.name: c.owners for c in candidates}
        for name, owners in self._owners.items():
            for module, attribute in owners:
                remember_owner(module, attribute, self.by_name[name])
        self.bind({c.name: c.parameter for c in candidates})

    def __iter__(self) -> Iterator[SparseWeight]:
        return iter(self.by_name.values())

    def parameters(self) -> Iterator[tuple[SparseWeight, nn.Parameter]]:
        """Each weight with the Parameter that its module holds now."""
        for name, weight in self.by_name.items():
            yield weight, parameter_of(name, *self._owners[name][0])

    def owners(self, name: str) -> list[nn.Module]:
        """The modules that held the weight ``name`` when it became sparse."""
        return [module for module, _ in self._owners[name]]

    def of(self, optimizer: Optimizer) -> list[tuple[SparseWeight, nn.Parameter]]:
        """The weights that ``optimizer`` trains.

        Asked of every optimizer of the process: one that trains none of them is told nothing of their troubles.
        """
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = list(self.held())
        if any(of(parameter) is not weight for weight, parameter in own):
            self.follow_exchanged()
            own = list(self.held())
        return [(weight, parameter) for weight, parameter in own if id(parameter) in known]

    def held(self) -> Iterator[tuple[SparseWeight, nn.Parameter]]:
        """As :meth:`parameters`, without the weights that are gone from their modules."""
        for weight in self:
            parameter = held_parameter(*self._owners[weight.name][0])
            if parameter is not None:
                yield weight, parameter

    def follow_exchanged(self) -> None:
        """Let masks go along with Parameters that modules have exchanged among each other, as state in an optimizer
        does: each keeps its sparse state, under the name that it has now. What belongs to the place is the name, by
        which random numbers are drawn, and the density that is aimed at.

        Only where each of some weights is in the place of another of them, on the same grid, and none is shared.
        """
        there: dict[str, SparseWeight] = {}
        for name, weight in self.by_name.items():
            parameter = held_parameter(*self._owners[name][0])
            other = None if parameter is None else of(parameter)
            if other is not None and other is not weight:
                there[name] = other
        before = {name: self.by_name[name] for name in there}
        moved = {id(weight) for weight in there.values()}
        if not there or len(moved) < len(there) or moved != {id(weight) for weight in before.values()}:
            return
        if any(before[name].grid != weight.grid or len(self._owners[name]) > 1 for name, weight in there.items()):
            return
        places = {name: (weight.density_target, weight.visits) for name, weight in before.items()}
        for name, weight in there.items():
            self.by_name[name], weight.name = weight, name
            weight.density_target, weight.visits = places[name]
            remember_owner(*self._owners[name][0], weight)
        epoch.value += 1

    def check_replaced(self, model: nn.Module | None) -> None:
        """Raise :class:`WeightError` if ``model`` holds another, dense Parameter in a weight's place."""
        for weight in self if model is not None else ():
            *path, attribute = weight.name.split(".")
            try:
                there = model.get_submodule(".".join(path))._parameters.get(attribute)  # type: ignore[union-attr]
            except AttributeError:
                continue  # taken out of the model, or the model out of what was made sparse
            if there is not None and of(there) is None and of(stored(there)) is None:
                raise WeightError(
                    f"{weight.name} is another Parameter than the one that was made sparse, of shape "
                    f"{tuple(there.shape)}: its module has been replaced since, as resize_token_embeddings does. Call "
                    "sparsify after such changes (densify(model) first, if it is sparse already)"
                )

    def warn_untied(self) -> None:
        """Say of modules that shared a weight which now holds a Parameter of its own: that one trains dense."""
        for weight, parameter in self.held():
            for module, attribute in self._owners[weight.name][1:]:
                other = held_parameter(module, attribute)
                if other is None or other is parameter or of(other) is not None or is_sharded(other):
                    continue
                warnings.warn(
                    f"{type(module).__name__}.{attribute} was {weight.name} when the model was made sparse, which "
                    f"{len(self._owners[weight.name])} modules shared, and is a Parameter of its own now: it trains "
                    "dense. To make it sparse too, call sparsify after untying (densify(model) first)",
                    MSTWarning,
                    stacklevel=6,
                )

    def check_not_flattened(self, optimizer: Optimizer) -> None:
        """Raise :class:`ParallelismError` if ``optimizer`` trains Parameters that FSDP1 or DistributedDataParallel has
        made of others, and weights are gone.

        Which model they are of cannot be known; no optimizer of another kind is troubled.
        """
        if any(is_made_of_others(p) for group in optimizer.param_groups for p in group["params"]):
            for _ in self.parameters():
                pass

    def with_gradients(self) -> set[str]:
        """Names of the weights that have a gradient."""
        return {weight.name for weight, parameter in self.held() if parameter.grad is not None}

    def densities(self, schedule: Schedule, sparsity: float) -> list[float]:
        """Target density of each weight when ``schedule`` is at ``sparsity``."""
        grids = [w.grid.matrix for w in self]
        shapes, counts = [(grid.rows, grid.cols) for grid in grids], [w.grid.count for w in self]
        return layer_densities(shapes, sparsity, schedule.distribution, self._overrides, schedule.max_sparsity, counts)

    def bind(self, parameters: dict[str, Tensor]) -> None:
        """Hang the weights' state on their Parameters."""
        for name, parameter in parameters.items():
            self.by_name[name].adopted = True
            bind(parameter, self.by_name[name])

    def rebind(self) -> None:
        """Follow weights that moved to another device, were unfrozen, or whose Parameter object was replaced.

        Raises:
            ParallelismError: one is spread over ranks in a way that is not served.
            WeightError: modules that shared one hold two since they were made tensor-parallel one by one, or modules
                that had one each share one since.
        """
        known: dict[int, str] = {}
        self.follow_exchanged()
        for weight, parameter in self.parameters():
            first = known.setdefault(id(parameter), weight.name)
            if first is not weight.name:
                raise WeightError(
                    f"{first} and {weight.name} were made sparse with masks of their own and are one Parameter now: "
                    "tie weights before sparsify (densify(model) first, if it is sparse already)"
                )
            if is_at_home(weight, parameter):
                continue
            check_placement(weight.name, parameter)
            self._check_tied(weight.name, parameter)
            if bind(parameter, weight):
                weight.forget()

    def _check_tied(self, name: str, parameter: nn.Parameter) -> None:
        for module, attribute in self._owners[name][1:] if is_sharded(parameter) else ():
            other = held_parameter(module, attribute)
            if other is not None and other is not parameter:
                raise WeightError(
                    f"{name} was shared by {len(self._owners[name])} modules and is not any more: tensor parallelism "
                    f"has made a DTensor for each of them. Tie them again after parallelize_module, before the "
                    "optimizer is made (model.lm_head.weight = model.embedding.weight); both must be cut alike, as "
                    "RowwiseParallel cuts an embedding and ColwiseParallel a linear layer"
                )

    def release(self) -> None:
        """Leave the model as an ordinary one."""
        for _, parameter in self.parameters():
            unbind(parameter)
        for owners in self._owners.values():
            for module, _ in owners:
                forget_owner(module)
