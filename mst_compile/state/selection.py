"""Which weights of a model become sparse, at which density, on which block grid."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.layout import are_one_matrix
from mst_compile.blocks.memory import overlaps
from mst_compile.blocks.shards import is_sharded
from mst_compile.errors import BlockSizeError, SelectionError, WeightError
from mst_compile.lowering import device as devices
from mst_compile.rules.checks import as_whole, check_sparsity, shown
from mst_compile.rules.density import layer_densities
from mst_compile.rules.schedule import Schedule

from . import stacks

MAX_BLOCK = 128
MIN_BLOCK = devices.FINEST_BLOCK  # finer blocks are taken as they are asked for
# What PEFT, diffusers and adapters call the narrow layers that they add to a model that stays as it is.
ADAPTERS = frozenset(("lora_A", "lora_B", "lora_down", "lora_up", "adapter_down", "adapter_up"))


@dataclass(frozen=True)
class Override:
    """What is special about some weights: ``sparsify(..., overrides={"*.attn.*": Override(sparsity=0.5, block=4)})``.

    Args:
        sparsity: share of zeros when the schedule is at its highest sparsity, in [0, 1); it rises and falls in
            proportion to the schedule's. 0 keeps the weights dense. Default: the layer distribution decides.
        block: edge of their blocks, a power of two. Default: that of ``sparsify``.

    Raises:
        ScheduleError, BlockSizeError: a value is out of range.
    """

    sparsity: float | None = None
    block: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_block(self.block))
        if self.sparsity is not None:
            object.__setattr__(self, "sparsity", check_sparsity("sparsity of an override", self.sparsity))


@dataclass
class Candidate:
    """A weight that will be sparse. ``owners`` are all (module, attribute) pairs that hold the Parameter."""

    name: str
    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    tied: bool = False
    density: float = 1.0
    grid: BlockGrid | None = None
    note: str = ""
    visits: int = 1
    override: Override = field(default_factory=Override)


@dataclass
class Selection:
    """The outcome: what becomes sparse, why the other weights of linear modules and stacks of matrices do not, and how
    many elements these stacks have."""

    candidates: list[Candidate]
    skipped: dict[str, str] = field(default_factory=dict)
    stacked: int = 0


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer."""
    # Hugging Face's Conv1D is a linear layer that stores [in, out]. It is known by its name and attribute so that
    # transformers need not be imported.
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _is_projection(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter projects the inputs of multi-head attention, packed or one by one."""
    return isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight")


def _patterns(name: str, patterns: str | Iterable[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    found: list[Any] = [patterns] if isinstance(patterns, str) else _listed(patterns)
    if not found or not all(isinstance(p, str) and p for p in found):
        given = found if isinstance(patterns, Iterator) else patterns  # it has nothing left to show
        raise SelectionError(f"{name} must be a pattern or a non-empty list of patterns, got {shown(given)}")
    return found


def _listed(values: object) -> list[Any]:
    """What can be iterated over, as a list; of anything else, and of mappings, an empty one."""
    shape = getattr(values, "shape", (0,))  # arrays and tensors without dimensions cannot be
    if not isinstance(values, Iterable) or isinstance(values, Mapping) or shape == ():
        return []
    return list(values)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Shell-style match of a parameter name, with or without its last part ("blocks.0.fc" names its weight)."""
    return any(fnmatchcase(name, p) or fnmatchcase(name.rpartition(".")[0], p) for p in patterns)


def select(
    model: nn.Module,
    schedule: Schedule,
    block: int | None,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    overrides: Mapping[str, Override] | None = None,
    backbone: bool = True,
) -> Selection:
    """Find the weights to make sparse and lay block grids over them. Changes nothing."""
    block = check_block(block)
    selection = _find(model, _patterns("include", include), _patterns("exclude", exclude))
    candidates = selection.candidates
    shapes = [(c.parameter.shape[-2], c.parameter.shape[-1]) for c in candidates]
    counts = [c.parameter.shape[:-2].numel() for c in candidates]
    _take_overrides(candidates, overrides)
    highest = schedule.max_sparsity
    special = [c.override.sparsity for c in candidates]
    densities = layer_densities(shapes, highest, schedule.distribution, special, highest, counts)
    too_small = []
    for candidate, shape, density in zip(candidates, shapes, densities, strict=True):
        candidate.density = density
        wanted = candidate.override.block or block
        parameter = candidate.parameter
        candidate.grid, candidate.note = _grid(parameter.device, tuple(parameter.shape), density, wanted, backbone)
        if wanted is not None and wanted > min(shape):
            too_small.append(candidate.name)
    if block is not None and len(too_small) == len(candidates):
        sizes = ", ".join(f"{r}x{c}" for r, c in sorted(set(shapes)))
        raise BlockSizeError(f"block={block} is larger than every eligible weight ({sizes}); pass a smaller block")
    return selection


def _take_overrides(candidates: list[Candidate], overrides: Mapping[str, Override] | None) -> None:
    """Give each candidate the override of the first pattern that its name matches."""
    if overrides is None:
        return
    if not isinstance(overrides, Mapping):
        raise SelectionError(f"overrides maps patterns to Override(...), got {shown(overrides)}")
    for pattern, override in overrides.items():
        if not isinstance(pattern, str) or not pattern or not isinstance(override, Override):
            raise SelectionError(f"overrides maps patterns to Override(...), got {shown(dict(overrides))}")
        if not any(_matches(c.name, [pattern]) for c in candidates):
            names = ", ".join(repr(c.name) for c in candidates)[:200]
            raise SelectionError(f"override {pattern!r} matches no sparse weight; their names look like {names}")
    for candidate in candidates:
        found = (override for pattern, override in overrides.items() if _matches(candidate.name, [pattern]))
        candidate.override = next(found, candidate.override)


def check_block(block: object) -> int | None:
    """``block`` as an int if it is None or a power of two up to 128; else :class:`BlockSizeError` is raised."""
    if block is None:
        return None
    found = as_whole(block)
    if found is None or not 1 <= found <= MAX_BLOCK or found & (found - 1):
        raise BlockSizeError(
            f"block must be a power of two from 1 to {MAX_BLOCK}, got {shown(block)}; 8 suits a CPU, 32 or 64 a GPU, "
            "and 1 gives unstructured masks, which have kernels on a CPU alone"
        )
    return found


@dataclass
class _Found:
    """A parameter of the model: its names, who holds it, and what it is."""

    aliases: list[str]
    parameter: nn.Parameter
    holders: list[tuple[nn.Module, str]]

    def __post_init__(self) -> None:
        lazy = is_lazy(self.parameter)  # such a one has no shape yet
        self.stacked = not lazy and stacks.is_stack(self.parameter, self.holders)
        self.has_matrices = lazy or self.stacked or self.parameter.dim() == 2
        #: whether it is a weight of linear layers, or of experts
        self.is_linear = any(
            (attribute == "weight" and is_linear(module)) or _is_projection(module, attribute)
            for module, attribute in self.holders
        ) or (self.stacked and stacks.of_experts(self.aliases, self.holders))

    def is_named(self, patterns: list[str] | None) -> bool:
        return any(_matches(alias, patterns or []) for alias in self.aliases)

    def why_dense(self, include: list[str] | None, exclude: list[str] | None) -> str | None:
        """Why it stays dense; None if it does not, empty if nobody expects it to be sparse."""
        if not self.has_matrices:
            shape = tuple(self.parameter.shape)
            of_three = len(shape) == 3 and include is not None and self.is_named(include)
            return f"no matrix and no stack of matrices, by its shape {shape}" if of_three else ""
        if not (self.is_named(include) if include is not None else self.is_linear):
            if self.stacked and include is None:
                return "a stack of matrices that nothing says are weights of linear layers: include it if they are"
            return "not in include" if self.is_linear else _why_recurrent(self.holders)
        if self.is_named(exclude):
            return "in exclude"
        reason = _left_out(self.parameter, self.aliases) if include is None else None
        if reason is None and self.stacked:
            reason = stacks.why_not(self.parameter)
        if reason is None and not is_lazy(self.parameter) and min(self.parameter.shape[-2:]) < MIN_BLOCK:
            reason = f"shape {tuple(self.parameter.shape)} is narrower than a block of {MIN_BLOCK}"
        return reason


def _parameters(model: nn.Module) -> list[_Found]:
    """All parameters of the model, once each."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, attribute))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [_Found(names[id(p)], p, owners[id(p)]) for _, p in model.named_parameters()]


def _find(model: nn.Module, include: list[str] | None, exclude: list[str] | None) -> Selection:
    selection, known = Selection([], _parametrized(model)), _parameters(model)
    _check_patterns(known, include, exclude)
    for found in known:
        name, parameter = found.aliases[0], found.parameter
        reason = found.why_dense(include, exclude)
        if reason is not None:
            if reason:
                selection.skipped[name] = reason
                selection.stacked += parameter.numel() if found.stacked else 0
            continue
        if is_lazy(parameter):
            raise WeightError(
                f"{name} is not initialised yet (lazy module): run one forward pass before sparsify, or leave it "
                "dense with exclude"
            )
        _check_weight(name, parameter, found.holders)
        visits = stacks.visits(model, found.aliases, len(parameter)) if found.stacked else 1
        tied = len(found.holders) > 1
        selection.candidates.append(Candidate(name, parameter, found.holders, tied=tied, visits=visits))
    if not selection.candidates:
        raise SelectionError(
            "the model has no weight that can be made sparse: nn.Linear and Hugging Face Conv1D weights and stacks of "
            "experts are found by themselves, any other matrix and stack of matrices can be named by include, a frozen "
            "one too (scripted and quantised modules have none); skipped: "
            f"{selection.skipped or 'none'}"
        )
    return selection


def _check_patterns(known: Sequence[_Found], include: list[str] | None, exclude: list[str] | None) -> None:
    """Raise :class:`SelectionError` if a pattern names nothing, or one of ``include`` neither matrix nor stack."""
    for argument, patterns in (("include", include), ("exclude", exclude)):
        lost = [p for p in patterns or [] if not any(found.is_named([p]) for found in known)]
        if lost:
            names = (found.aliases[0] for found in known if found.has_matrices and not is_lazy(found.parameter))
            raise SelectionError(
                f"{argument}: {', '.join(map(repr, lost))} match no parameter; names look like "
                f"{', '.join(map(repr, names))[:200]}"
            )
    for pattern in include or []:
        named = [found for found in known if found.is_named([pattern])]
        if not any(found.has_matrices for found in named):
            first = named[0]
            raise SelectionError(
                f"include: {pattern!r} names no matrix, only {first.aliases[0]} of shape "
                f"{tuple(first.parameter.shape)}{f' and {len(named) - 1} more' if len(named) > 1 else ''}; weights of "
                "two dimensions can be sparse, and stacks of them in one Parameter of three"
            )


def _left_out(parameter: Tensor, aliases: Iterable[str]) -> str | None:
    """Why a weight is not made sparse unless it is named; None if it is."""
    if not parameter.requires_grad:
        return "frozen (requires_grad is False): include it to make it sparse"
    if any(part in ADAPTERS for alias in aliases for part in alias.split(".")):
        return "an adapter: include it to make it sparse"
    return None


def _why_recurrent(holders: Iterable[tuple[nn.Module, str]]) -> str:
    """Why a weight of a recurrent layer stays dense; empty if it is none of one."""
    layers = (type(module).__name__ for module, _ in holders if isinstance(module, nn.RNNBase | nn.RNNCellBase))
    kind = next(layers, None)
    return f"a weight of nn.{kind}, whose products are one function of PyTorch's that takes no masks" if kind else ""


def _parametrized(model: nn.Module) -> dict[str, str]:
    """Linear modules whose weight is computed, not held as a Parameter."""
    return {
        f"{name}.weight": "its weight is computed (parametrized), not a Parameter"
        for name, module in model.named_modules()
        if is_linear(module) and not isinstance(module._parameters.get("weight"), nn.Parameter)
    }


def _check_weight(name: str, parameter: Tensor, holders: list[tuple[nn.Module, str]]) -> None:
    """Raise :class:`WeightError` unless a weight can be trained sparse, as far as the weight itself is concerned."""
    problem = _problem(parameter)
    if any(isinstance(module, torch.jit.ScriptModule) for module, _ in holders):
        problem = "belongs to a ScriptModule, whose code runs without us: sparsify before torch.jit.script or trace"
    if problem is not None:
        raise WeightError(f"{name} {problem}. Or leave the weight out with exclude")


def _problem(parameter: Tensor) -> str | None:
    """What keeps a weight from being trained sparse, and what to do about it; None if nothing does."""
    if parameter.is_meta or is_fake(parameter):
        return (
            "is on the meta device, or fake: it has no values yet. Materialise the model first (model.to_empty(...), "
            "then initialise it)"
        )
    if not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
        return (
            f"has dtype {parameter.dtype}: only floating-point weights of 16 bits or more can be trained sparse; "
            "sparsify before quantising"
        )
    if parameter.layout != torch.strided:
        return f"has layout {parameter.layout}: only dense, strided weights can be trained; pass it through to_dense()"
    if is_traceable_wrapper_subclass(parameter) and not is_sharded(parameter):
        return f"is a {type(parameter).__name__}, which stands for other tensors; sparsify before it is wrapped"
    if parameter.is_inference():
        return "was made under torch.inference_mode and cannot be trained; make or load the model outside of it"
    if not parameter.is_leaf:
        return "is computed from other tensors (no leaf), so that no optimizer can train it; sparsify its source"
    if parameter.dim() == 3 and not is_sharded(parameter) and not are_one_matrix(parameter):
        return stacks.problem(parameter)
    if not is_sharded(parameter) and overlaps(parameter):
        return (
            f"has elements that share memory (shape {tuple(parameter.shape)}, strides {parameter.stride()}), as after "
            "expand: replace it by nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))"
        )
    return None


def check_memory(candidates: Iterable[Candidate], others: Iterable[tuple[str, Tensor]]) -> None:
    """Raise :class:`WeightError` if a candidate shares memory with another Parameter: the zeros of one would be values
    of the other. (One Parameter that several modules hold is fine.)

    Args:
        others: names and Parameters, the candidates among them or not.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, other in others:
        if _in_memory(other):
            by_storage.setdefault(other.untyped_storage().data_ptr(), []).append((name, other))
    for candidate in candidates:
        weight = candidate.parameter
        near = by_storage.get(weight.untyped_storage().data_ptr(), []) if _in_memory(weight) else []
        found = next((name for name, other in near if other is not weight and _share_elements(weight, other)), None)
        if found is not None:
            raise WeightError(
                f"{candidate.name} shares memory with {found}, which is another Parameter: tie them by letting both "
                "modules hold one Parameter, or replace one by nn.Parameter(weight.detach().clone()). Or leave the "
                "weight out with exclude"
            )


def _in_memory(tensor: Tensor) -> bool:
    if is_lazy(tensor):
        return False  # it has no shape yet
    plain = not is_sharded(tensor) and not is_traceable_wrapper_subclass(tensor) and not is_fake(tensor)
    return plain and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0


def _share_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    spans = []
    for tensor in (one, other):
        start, size = tensor.storage_offset(), tensor.element_size()
        last = start + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((start * size, (last + 1) * size))
    (first, end), (start, stop) = spans
    if end <= start or stop <= first:
        return False
    if one.dtype != other.dtype:
        return True
    # Columns of one matrix lie between each other's elements.
    used = torch.zeros(max(end, stop) // one.element_size(), dtype=torch.bool, device="cpu")
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _grid(
    device: torch.device, shape: tuple[int, ...], density: float, block: int | None, backbone: bool = True
) -> tuple[BlockGrid, str]:
    """The block grid of a weight; shrunk where the weight or the backbone is too coarse for the asked block, or the
    block does not divide the rows of a stack's matrices."""
    record = devices.of(device.type)
    wanted = block or record.default_block
    rows, cols = shape[-2:]
    if wanted < MIN_BLOCK:
        return BlockGrid.over(shape, wanted), ""
    size, finest = wanted, max(record.finest_block, MIN_BLOCK)
    coarsest = wanted
    while len(shape) == 3 and rows % coarsest:
        coarsest //= 2
    while size > coarsest or (
        size > finest
        and (size > min(rows, cols) or (backbone and _backbone_share(BlockGrid(rows, cols, size)) > density / 2))
    ):
        size //= 2
    grid = BlockGrid.over(shape, size)
    note = ""
    if size == coarsest != wanted:
        note = f"block {wanted} -> {size}: matrices of a stack have {rows} rows, and no block may lie in two of them"
    elif size != wanted and not backbone:
        note = f"block {wanted} -> {size}: the weight has only {min(rows, cols)} rows or columns"
    elif size != wanted:
        share = _backbone_share(BlockGrid(rows, cols, wanted))
        note = (
            f"block {wanted} -> {size}: at {wanted} the backbone alone would take {share:.0%} of the weight, "
            f"target density {density:.0%}"
        )
    share = _backbone_share(grid.matrix)
    if backbone and density < 1 and share > density:
        note += f"{'; ' * bool(note)}density cannot fall below the backbone's {share:.0%}"
    return grid, note


def _backbone_share(grid: BlockGrid) -> float:
    return 1.0 / min(grid.shape)
