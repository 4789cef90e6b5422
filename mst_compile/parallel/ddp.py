"""Data parallelism: move only the active blocks of gradients between ranks."""

# Annotations are evaluated here: DistributedDataParallel compares a communication hook's with its own types.

import hashlib
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mst_compile.blocks.bulk import elements_of
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.layout import as_matrix
from mst_compile.errors import ModelError, RankMismatchError
from mst_compile.parallel.description import digest
from mst_compile.rules.checks import check_instance, shown
from mst_compile.state import binding
from mst_compile.state.weight import SparseWeight


class ActiveBlocks:
    """State of a DistributedDataParallel communication hook that averages gradients as DDP does, but moves of each
    sparse weight only the active blocks: the rest is zero on every rank.

    The gradient of a weight on the step before a topology event, which is dense, and those of all other parameters
    move whole. With 2 ranks the result is that of plain DDP, bit for bit; with more up to the order of the sums.

    Before anything moves, once a backward pass, ranks compare what they are about to send, in a message of 8 bytes:
    where masks differ, all of them raise :class:`~mst_compile.errors.RankMismatchError`.

    Example::

        ddp = DistributedDataParallel(model)
        hook = reduce_active_blocks(ddp)
        # or: ddp.register_comm_hook(ActiveBlocks(), ActiveBlocks.reduce)

    Args:
        group: the process group that DDP reduces over; default the world.

    Attributes:
        bytes_moved: bytes handed to all-reduce so far, on this rank.
        bytes_dense: bytes that plain DDP would have handed to it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if group is not None:
            check_instance("group", group, dist.ProcessGroup, "a torch.distributed.ProcessGroup or None")
        self.group = group
        self.bytes_moved = 0
        self.bytes_dense = 0
        self._blocks: weakref.WeakKeyDictionary[SparseWeight, _Blocks] = weakref.WeakKeyDictionary()
        self._digests: weakref.WeakKeyDictionary[SparseWeight, tuple[int, str]] = weakref.WeakKeyDictionary()
        self._known: dict[Tensor, None] = {}  # parameters of buckets so far, in the same order on all ranks
        self._knows_all = False

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """The hook (``torch.nn.parallel.DistributedDataParallel.register_comm_hook``): average one bucket.

        Args:
            bucket: gradients of any dtype that the group can reduce, each of its parameter's shape.

        Returns:
            A future of the bucket's buffer, 1-D, reduced in place.
        """
        check_instance("bucket", bucket, dist.GradBucket, "a torch.distributed.GradBucket, as DDP passes it")
        buffer = bucket.buffer()
        group = self.group if self.group is not None else dist.group.WORLD
        assert group is not None
        self._check(bucket, group)
        pairs = [(g, self._blocks_of(p)) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)]
        whole = all(blocks is None for _, blocks in pairs)
        if whole:
            moved = buffer
        else:
            moved = torch.cat([g.reshape(-1) if blocks is None else blocks.read(g) for g, blocks in pairs])
        self.bytes_moved += moved.numel() * moved.element_size()
        self.bytes_dense += buffer.numel() * buffer.element_size()
        moved.mul_(1.0 / group.size())  # first, as plain DDP does it
        reduced = dist.all_reduce(moved, group=group, async_op=True).get_future()

        def finish(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            packed = future.value()[0]
            if whole:
                return packed
            lengths = [g.numel() if blocks is None else blocks.length for g, blocks in pairs]
            for (gradient, blocks), part in zip(pairs, packed.split(lengths), strict=True):
                if blocks is None:
                    gradient.copy_(part.view(gradient.shape))
                else:
                    blocks.write_(gradient, part)
            return buffer

        return reduced.then(finish)

    def _check(self, bucket: dist.GradBucket, group: dist.ProcessGroup) -> None:
        """Raise on all ranks where they would move different blocks; the messages would not fit together.

        The first bucket of a backward pass answers for all parameters, once all have been seen: masks do not change
        within one.
        """
        parameters = bucket.parameters()
        new = [p for p in parameters if p not in self._known]
        if self._knows_all and not new and bucket.index() > 0:
            return
        self._known.update(dict.fromkeys(new))
        self._knows_all = self._knows_all or bucket.is_last()
        moved = [self._digest(p) for p in (self._known if self._knows_all else parameters)]
        mine = hashlib.sha256("\n".join(moved).encode()).digest()[:8]
        buffer = bucket.buffer()
        number = torch.tensor([int.from_bytes(mine, "big", signed=True)], device=buffer.device)
        found = [torch.empty_like(number) for _ in range(group.size())]
        dist.all_gather(found, number, group=group)
        if len(set(torch.cat(found).tolist())) > 1:
            self._refuse(moved, group)

    def _digest(self, parameter: Tensor) -> str:
        """Name, mask, and whether the gradient moves whole; of a parameter that is not sparse nothing."""
        weight = binding.of(parameter)
        if weight is None:
            return "dense"
        changes, mask = self._digests.get(weight, (-1, ""))
        if changes != weight.changes:
            mask = digest(weight)
            self._digests[weight] = weight.changes, mask
        return f"{weight.name} {mask} {'whole' if weight.dense_grad else 'active'}"

    def _refuse(self, moved: list[str], group: dist.ProcessGroup) -> None:
        found: list[Any] = [None] * group.size()
        dist.all_gather_object(found, moved, group=group)
        rank, theirs = next((r, t) for r, t in enumerate(found) if t != found[0])
        pairs = [(a, b) for a, b in zip(found[0], theirs, strict=False) if a != b]
        name = pairs[0][0].split(" ")[0] if pairs else "the number of parameters"
        raise RankMismatchError(
            f"ranks 0 and {rank} of the group hold different masks ({name} differs; {len(pairs)} weights in all), so "
            "their gradients cannot be added up. Call sparsify with the same schedule, seed and options on all ranks, "
            "load the same checkpoint, and apply masks on all of them"
        )

    def _blocks_of(self, parameter: Tensor) -> "_Blocks | None":
        """The blocks to move of the gradient of ``parameter``, or None if it moves whole."""
        weight = binding.of(parameter)
        if weight is None or weight.is_dense or weight.dense_grad:
            return None
        blocks = self._blocks.get(weight)
        if blocks is None or blocks.changes != weight.changes or blocks.device != parameter.device:
            blocks = self._blocks[weight] = _Blocks(weight, parameter.device)
        return blocks if blocks.length < weight.numel else None


class _Blocks:
    """Where the active blocks of a weight are, on its device. Ragged blocks are moved padded by their own elements."""

    def __init__(self, weight: SparseWeight, device: torch.device) -> None:
        self.changes = weight.changes
        self.device = device
        self.grid: BlockGrid = weight.grid
        self.rows, self.cols = (i.to(device) for i in weight.mask.nonzero(as_tuple=True))
        self.length = self.rows.numel() * self.grid.block**2
        self.even = self.grid.edge == (self.grid.block, self.grid.block)

    @torch.no_grad()
    def read(self, gradient: Tensor) -> Tensor:
        if self.even and gradient.is_contiguous():
            return self._view(gradient)[self.rows, :, self.cols].flatten()
        return as_matrix(gradient)[elements_of(self.grid, self.rows, self.cols)].flatten()

    @torch.no_grad()
    def write_(self, gradient: Tensor, packed: Tensor) -> None:
        packed = packed.view(-1, self.grid.block, self.grid.block)
        if self.even and gradient.is_contiguous():
            self._view(gradient)[self.rows, :, self.cols] = packed
        else:
            as_matrix(gradient)[elements_of(self.grid, self.rows, self.cols)] = packed

    def _view(self, gradient: Tensor) -> Tensor:
        block, (rows, cols) = self.grid.block, self.grid.shape
        return gradient.view(rows, block, cols, block)


def reduce_active_blocks(model: DistributedDataParallel) -> ActiveBlocks:
    """Register :class:`ActiveBlocks` on a DDP model, over the group that the model reduces over.

    Returns:
        The hook's state, which counts bytes.

    Raises:
        ModelError: ``model`` is not wrapped in DistributedDataParallel.
        RuntimeError: of PyTorch, if a communication hook is registered already.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ModelError(
            f"reduce_active_blocks takes a DistributedDataParallel model, got {shown(model)}; call it on the wrapper "
            "itself, before torch.compile"
        )
    state = ActiveBlocks(model.process_group)
    model.register_comm_hook(state, ActiveBlocks.reduce)
    return state
