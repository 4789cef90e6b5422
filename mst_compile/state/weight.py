"""The sparse state of one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from mst_compile.blocks.bulk import block_mean_square, zero_all_inactive_, zero_inactive_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import Content, read_mask, write_dense_grad, write_index
from mst_compile.blocks.layout import Part, reaching
from mst_compile.blocks.memory import address_of
from mst_compile.blocks.shards import (
    gathered,
    is_sharded,
    local_part,
    part_multiplied,
    written_at,
)
from mst_compile.rules.density import active_count
from mst_compile.rules.guard import Guard, coverage
from mst_compile.rules.guard import backbone as wrapped_diagonal
from mst_compile.state.attention import AttentionState
from mst_compile.state.gradient import KnownGradient
from mst_compile.state.indexes import epoch, has_index, index_for
from mst_compile.state.ranges import Range
from mst_compile.state.selection import Candidate
from mst_compile.state.uses import Baseline, Uses
from mst_compile.state.young import Young

UNKNOWN = -1  # no version of a tensor


@dataclass(eq=False)
class SparseWeight(KnownGradient):
    """Block mask, packed index and bookkeeping of one weight; what is known of its gradient.

    Attributes:
        name: the parameter's name in the model.
        grid: the block grid over the weight as stored; of a stack of matrices in one Parameter over all their rows.
        density_target: density that the layer distribution gives at the schedule's highest sparsity.
        mask: bool ``[R, C]`` on the CPU, the active blocks.
        backbone: bool ``[R, C]``, the backbone, active in first masks; empty without a guard.
        guard: which blocks a topology event may not drop.
        index: the packed index on the weight's device, of ``part`` where there is one; of a stack one for each matrix;
            ``None`` where no kernel could ever ask for it.
        part: what products multiply on this rank of a tensor-parallel weight; None if that is the whole.
        ranges: parts of it that programs multiply alone, with indexes of their own.
        visits: to how many matrices of a stack a token goes, as to the experts that a router chooses; 1 if that is not
            known, and of a weight that is no stack.
        note: why the block differs from the one asked for, or why the weight stays dense.
        active: number of elements in active blocks.
        scores: growth scores since the last event, float32 ``[R, C]``; None where nothing was read.
        grown: blocks that grew at the last event and have not been stepped since, bool ``[R, C]``, or None.
        young: blocks whose first steps are not over, where the schedule has them take steps of their own.
        clean: version of the Parameter (``Tensor._version``) at which it was last known to be 0 outside the active
            blocks; ``UNKNOWN`` if somebody must look.
        address: where its elements were then.
        memory: what they were in: once it is freed another tensor may stand at the same address.
        dirty: version and address at which values were seen outside, by this rank.
        clean_here: version and address at which this rank's part of a spread weight was last seen to be 0 outside.
        recording: whether the compiled graph that last took the weight recorded gradients.
        trained: whether it was trained in this process; of a copy, which others may write averages to, nobody knows.
        looked: count of what has been trained in this process when a graph last took the weight.
        looks: how often it was to be looked at since, while nobody trained it.
        home: the Parameter that it is bound to, with its hook; None where somebody must look.
        timed: somebody times products under masks that are not the weight's: its values do not matter.
        unwritten: an interrupt may have kept the index from being that of the mask.
        baseline: compiled graphs shall run as if nothing were sparse, every block being active; and tell this.
        follows: whether values were loaded after the masks, so that masks have to follow them.
        moved: whether the weight has been trained since the last topology event.
        version: version of the Parameter after the last training step.
        driver: leads to the run that drives it as long as that is there: it goes with the model that was made sparse,
            while a module of it may live on.
        orphaned: the user was told that the run is gone.
        adopted: whether a run drives it. None drives what came along when a Parameter or a module was copied out of its
            model: these are dense, with the values that they were given.
    """

    name: str
    grid: BlockGrid
    density_target: float
    mask: Tensor
    backbone: Tensor
    guard: Guard
    index: Tensor | None
    tied: bool = False
    note: str = ""
    visits: int = 1
    part: Part | None = None
    ranges: tuple[Range, ...] = ()
    active: int = 0
    scores: Tensor | None = None
    grown: Tensor | None = None
    young: Young | None = None
    clean: int = UNKNOWN
    address: int = 0
    memory: StorageWeakRef | None = None
    dirty: tuple[int, int] | None = None
    clean_here: tuple[int, int] | None = None
    recording: bool | None = None
    trained: bool = False
    looked: int = UNKNOWN
    looks: int = 0
    home: TensorWeakRef | None = None
    timed: bool = False
    unwritten: bool = False
    baseline: Baseline | None = None
    follows: bool = False
    moved: bool = False
    version: int = UNKNOWN
    driver: Callable[[], object] | None = None
    orphaned: bool = False
    adopted: bool = True
    attention: AttentionState = field(default_factory=AttentionState)
    uses: Uses = field(default_factory=Uses)

    @classmethod
    def create(cls, candidate: Candidate, guard: Guard, attention: AttentionState) -> SparseWeight:
        """A weight whose blocks are all active."""
        grid = candidate.grid
        assert grid is not None
        mask = torch.ones(grid.shape, dtype=torch.bool, device="cpu")
        backbone = torch.zeros_like(mask) if guard == "none" else _backbone(grid)
        index = index_for(grid, candidate.parameter.device)
        told = candidate.tied, candidate.note, candidate.visits
        weight = cls(candidate.name, grid, candidate.density, mask, backbone, guard, index, *told, attention=attention)
        weight.set_mask(mask)
        return weight

    def __post_init__(self) -> None:
        # Plain attributes: the backend reads them at every call.
        self.numel = self.grid.rows * self.grid.cols
        self.shape = self.grid.dims
        self._lay_out(self.part)

    def _lay_out(self, part: Part | None) -> None:
        self.part = part
        self._indexed = self.grid
        if part is not None:
            own = part.grid(self.grid.block)
            self._indexed = replace(own, matrices=part.rows // self.grid.matrix.rows) if self.grid.matrices else own
        self.multiplied = self._indexed.matrix
        stack = (self._indexed.matrices,) if self.grid.matrices else ()
        self.signature = (self.multiplied.rows, self.multiplied.cols, self.multiplied.block, *stack)

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices in one Parameter, as of experts."""
        return self.grid.matrices > 0

    @property
    def per_token(self) -> float:
        """Share of the elements that a token meets at density 1."""
        return self.visits / self.grid.count

    @property
    def matrices(self) -> list[str]:
        """A name for each matrix, which its random numbers are drawn by: that of the weight if it is no stack."""
        return [f"{self.name}[{i}]" for i in range(self.grid.matrices)] if self.stacked else [self.name]

    @property
    def density(self) -> float:
        """Share of the elements that lie in active blocks."""
        return self.active / self.numel

    @property
    def is_orphan(self) -> bool:
        """Whether the run that drove it is gone: nobody will ever change its mask."""
        return self.driver is not None and self.driver() is None

    @property
    def can_be_sparse(self) -> bool:
        """Whether the user may expect sparse products: not of unstructured masks on a device that has none."""
        return self.index is not None or self.grid.block > 1

    @property
    def cuts_blocks(self) -> bool:
        """Whether what products multiply here begins within blocks: then they take more than the active ones."""
        return self.part is not None and (self.part.row % self.grid.block + self.part.col % self.grid.block) > 0

    @property
    def is_dense(self) -> bool:
        """Whether every block is active."""
        return self.active == self.numel

    def blocks_at(self, density: float) -> int:
        """Number of active blocks at a target density; of a stack in each matrix."""
        grid = self.grid.matrix
        return active_count(density, grid.blocks, max(1, int(self.backbone[: grid.block_rows].sum())))

    def safe_blocks(self, magnitude: Tensor) -> Tensor:
        """Blocks that a topology event may not drop, bool ``[R, C]``, given the blocks' ``magnitude``."""
        return self._covered(self.mask, magnitude) if self.guard == "coverage" else self.backbone

    def _covered(self, mask: Tensor, magnitude: Tensor) -> Tensor:
        """What covers every row and column of blocks, of each matrix."""
        pairs = zip(self.grid.split(mask), self.grid.split(magnitude), strict=True)
        return torch.cat([coverage(*pair) for pair in pairs])

    def set_mask(self, mask: Tensor) -> None:
        """Take over ``mask`` and write the index in place."""
        self.take_mask(mask)
        self._write_index()

    def take_mask(self, mask: Tensor) -> None:
        """Take over ``mask``; the index is still to be written, and is when it is next asked for."""
        young = self.young if self.young is None or self.timed else self.young.inside(mask)
        changed = {"mask": mask, "active": self.grid.count_elements(mask), "changes": self.changes + 1, "young": young}
        # At once, so that no interrupt comes between; an index that is kept from being written is when next asked for.
        self.__dict__.update(changed, clean=UNKNOWN, dirty=None, clean_here=None, unwritten=True)
        epoch.value += 1

    def _write_index(self) -> None:
        self.unwritten = True
        epoch.value += 1
        for index, grid, mask, dense_grad, changes in self.contents(self.mask):
            write_index(index, grid, mask, dense_grad=dense_grad, changes=changes)
        self.unwritten = False

    def contents(self, mask: Tensor) -> list[Content]:
        """What the index, if there is one, and those of ranges have to hold under a mask."""
        if self.index is None:
            return []
        held = mask if self.part is None else reaching(mask, self.part, self.grid.block)
        own = Content(self.index, self._indexed, held, self.dense_grad, self.changes)
        return [own, *(one.content(mask, self.grid.block, self.dense_grad, self.changes) for one in self.ranges)]

    @property
    def indexes(self) -> list[Tensor]:
        """The index, if there is one, and those of ranges."""
        return [] if self.index is None else [self.index, *(r.index for r in self.ranges)]

    def add_range(self, new: Range) -> None:
        """Keep the index of a part too."""
        self.ranges = (*self.ranges, new)
        self._write_index()

    def set_dense_grad(self, wanted: bool) -> None:
        """Ask kernels for the gradient on all blocks (growth reads it), or on the active ones alone."""
        if wanted != self.dense_grad:
            write_dense_grad(self.indexes, wanted)
            self.dense_grad = wanted

    def outside(self, device: torch.device) -> Tensor:
        """Which elements lie outside the active blocks: bool, of the weight's shape."""
        return self.grid.expand(~self.mask).view(self.shape).to(device)

    def zero_inactive_(self, tensor: Tensor) -> None:
        """Set a tensor of the weight's shape to 0 outside the active blocks, in place."""
        if not self.is_dense:
            zero_inactive_(tensor, self.grid, self.mask, self.index_of_whole)

    def _mask_on(self, device: torch.device) -> Tensor:
        """The mask there; an index that is there holds it."""
        index = self.index_of_whole
        held = index is not None and self.grid.tiled and index.device == device
        return read_mask(index, self.grid) if held else self.mask.to(device)  # type: ignore[arg-type]

    @property
    def index_of_whole(self) -> Tensor | None:
        """The index where it is that of the whole weight."""
        if self.unwritten:
            self._write_index()
        return self.place_of_index

    @property
    def place_of_index(self) -> Tensor | None:
        """Where the index of the whole weight is, which may still have to be written."""
        return self.index if self.part is None else None

    def follow(self, parameter: Tensor) -> None:
        """Keep the index of what products with ``parameter`` multiply on this rank, where they do."""
        part = part_multiplied(parameter)
        if part != self.part:
            self._lay_out(part)
            self.index, self.clean_here, self.ranges = None, None, ()
            epoch.value += 1
        self.to_device(parameter.device)

    def to_device(self, device: torch.device) -> None:
        """Follow a weight that was moved."""
        if self.index is None:
            with unset_fake_temporarily(), torch.inference_mode(False):  # also while a graph is compiled
                self.index = index_for(self._indexed, device)
                if self.index is not None:
                    self._write_index()
        elif self.index.device != device:
            self.index = self.index.to(device) if has_index(self._indexed, device) else None
            self.ranges = ()  # made anew where they are asked for
            epoch.value += 1

    # -- zeros: what is known of them --

    def note_clean(self, parameter: Tensor) -> None:
        """The parameter is 0 outside the active blocks, as it is now."""
        address = address_of(parameter)
        if address != self.address or self.memory is None or self.memory.expired():
            self.memory = StorageWeakRef(parameter.untyped_storage()) if address else None
        known = UNKNOWN if self.suspect and not is_sharded(parameter) else parameter._version
        self.clean, self.address, self.dirty, self.follows = known, address, None, False
        self.clean_here = written_at(parameter) if is_sharded(parameter) else None

    def forget(self) -> None:
        """Nothing is known of the parameter's values any more."""
        self.clean, self.dirty, self.clean_here = UNKNOWN, None, None

    def is_clean(self, parameter: Tensor) -> bool:
        """Whether nobody has written to the parameter since it was known to be 0 outside the active blocks.

        Writes through ``parameter.data`` in place leave no trace and are not seen. Of a weight that is spread over
        ranks only what was loaded is known to have been written: all of them answer the same.
        """
        if self.unwritten:
            self._write_index()
        if self.is_dense or is_sharded(parameter):
            return self.is_dense or self.clean != UNKNOWN
        known = self.clean == parameter._version and self.address == address_of(parameter)
        return known and (self.memory is None or not self.memory.expired())

    def was_freed(self) -> bool:
        """Whether the memory is gone in which the elements were known to be 0: ``parameter.data`` was replaced."""
        return self.memory is not None and self.memory.expired()

    def look(self, parameter: Tensor, found: bool | None = None) -> bool:
        """Whether the parameter is 0 outside the active blocks, by its values; what was found is remembered.

        Of a weight that is spread over ranks all of them must ask. Of another the caller may say what it has ``found``.
        """
        if self.timed:
            return True
        if not is_sharded(parameter) or gathered(parameter):
            return self.look_here(parameter, found)
        with unset_fake_temporarily():  # also while a graph is compiled
            found = bool(block_mean_square(parameter, self.grid)[~self.mask].any())
        if found:
            self.clean, self.dirty, self.clean_here = UNKNOWN, written_at(parameter), None
        else:
            self.note_clean(parameter)
        return not found

    def look_here(self, parameter: Tensor, found: bool | None = None) -> bool:
        """As :meth:`look`, at what this rank holds: no other takes part. What is found of a part says nothing of the
        whole, whose ranks must know the same of it."""
        if self.unwritten:
            self._write_index()
        if self.timed:
            return True
        with unset_fake_temporarily():
            local, part = local_part(parameter.detach())
            if found is None:
                outside = part.of(self.grid.expand(~self._mask_on(local.device)))
                found = not self.is_dense and bool(((local != 0) & outside).any())
        if is_sharded(parameter):
            self.dirty, self.clean_here = (written_at(parameter), None) if found else (None, written_at(parameter))
        elif found:
            self.clean, self.dirty = UNKNOWN, written_at(parameter)
        elif not gathered(parameter):
            self.note_clean(parameter)
        return not found

    def holds_zeros(self, parameter: Tensor) -> bool:
        """Whether a compiled graph may take what this rank holds of the parameter to be 0 outside the active blocks;
        looks where nobody knows.

        What FSDP2 has gathered is known by what it was gathered from.
        """
        now = written_at(parameter)
        if is_sharded(parameter) and not gathered(parameter):
            known = self.is_dense or self.clean_here == now
        else:
            known = self.is_clean(parameter)
        if known or self.dirty == now:
            return known
        return (gathered(parameter) and self.clean != UNKNOWN) or self.look_here(parameter)

    def mask_gradient(self, gradient: Tensor) -> None:
        """Set a gradient to 0 outside the active blocks unless it is known to be."""
        mask_gradients([(self, gradient)])

    def __getstate__(self) -> dict[str, object]:
        # A copy's Parameter is another one, of which nothing is known, and its gradient too.
        nothing = dict.fromkeys(("dirty", "clean_here", "memory", "masked", "computed", "adding", "home", "driver"))
        new = {"clean": UNKNOWN, "version": UNKNOWN, "adopted": False, "ranges": (), "trained": False, "looks": 0}
        return self.__dict__ | nothing | new


def mask_gradients(gradients: Iterable[tuple[SparseWeight, Tensor]]) -> None:
    """Set gradients to 0 outside the active blocks of their weights unless they are known to be, all in one go."""
    unknown = [(weight, g) for weight, g in gradients if not weight.is_dense and not weight.is_masked(g)]
    zero_all_inactive_([(gradient, weight.grid, weight.mask, weight.index_of_whole) for weight, gradient in unknown])
    for weight, gradient in unknown:
        weight.note_masked(gradient)


def _backbone(grid: BlockGrid) -> Tensor:
    return wrapped_diagonal(grid.matrix.shape).repeat(grid.count, 1)
