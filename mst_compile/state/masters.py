"""Copies of sparse weights that an optimizer trains in their place: masters, in a wider dtype or spread over ranks.

A *master* is a tensor that an optimizer knows as a Parameter. It holds the elements of one weight or of many, row by
row, or those of them that are this rank's: a run that may begin and end within a row, or nothing. A *keeper* is what
made the copies: it steps that optimizer, and writes what has become of them back into the model. Nothing here knows
whose keepers there are; who does lets their steps be watched (:func:`mst_compile.state.steps.watched`).

What holds of a weight holds of its master: outside the active blocks it is 0, and so are its gradient and the
optimizer's state of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.blocks.bulk import block_means, block_sums
from mst_compile.errors import OptimizerError

from .binding import of
from .optimizers import state_like, survey
from .weight import SparseWeight

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True)
class Piece:
    """The elements of one Parameter of the model that a master holds on this rank.

    Attributes:
        parameter: of the model.
        master: what the optimizer trains.
        at: number of the first of them in the master.
        first: number of that element in the Parameter, row by row.
        count: how many there are, one after the other; 0 where none is this rank's.
        ranks: those that hold the others; None if all are here.
    """

    parameter: Tensor
    master: Tensor
    at: int
    first: int
    count: int
    ranks: dist.ProcessGroup | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of the master, or of a tensor of its shape: a view, ``[count]``."""
        return tensor.detach().view(-1)[self.at : self.at + self.count]


class Keeper(Protocol):
    """What keeps copies of a model's Parameters and steps an optimizer that trains them."""

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that trains the copies."""

    def pieces(self) -> Sequence[Piece]:
        """One for each Parameter that is trained, in an order that is the same on all ranks."""

    def beside(self, master: Tensor) -> Sequence[Tensor]:
        """The Parameters of the model whose copies are in the parameter group that ``master`` belongs to."""

    def check(self) -> None:
        """Raise :class:`ParallelismError` where its steps cannot be followed."""

    def team(self) -> Sequence[int]:
        """The ranks that train the model together."""


@dataclass(frozen=True)
class Held:
    """A sparse weight, the Parameter of the model, and what of it is where."""

    weight: SparseWeight
    parameter: nn.Parameter
    piece: Piece


_finders: list[Callable[[Optimizer], Keeper | None]] = []


def find_by(finder: Callable[[Optimizer], Keeper | None]) -> None:
    """Let ``finder`` say who steps an optimizer that trains copies."""
    _finders.append(finder)


def keeper_of(optimizer: Optimizer) -> Keeper | None:
    """Who steps ``optimizer``, if it trains copies."""
    found = (finder(optimizer) for finder in _finders)
    return next((keeper for keeper in found if keeper is not None), None)


def held_by(
    keeper: Keeper, weights: Iterable[tuple[SparseWeight, nn.Parameter]], masters: Collection[int] | None = None
) -> list[Held]:
    """Those of the weights that ``keeper`` has copies of, in its order: in all masters, or in those with these ids."""
    own = {id(parameter): (weight, parameter) for weight, parameter in weights}
    found = []
    for piece in keeper.pieces():
        if id(piece.parameter) in own and (masters is None or id(piece.master) in masters):
            found.append(Held(*own[id(piece.parameter)], piece))
    return found


def members(keeper: Keeper, master: object) -> list[SparseWeight]:
    """The sparse weights, of whatever run, in the parameter group of ``master``."""
    parameters = keeper.beside(master) if isinstance(master, Tensor) else ()
    return [weight for parameter in parameters if (weight := of(parameter)) is not None]


# -- elements of this rank ---------------------------------------------------------------------------------------------

_outside: weakref.WeakKeyDictionary[SparseWeight, tuple[tuple[Any, ...], Tensor]] = weakref.WeakKeyDictionary()


def outside(held: Held) -> Tensor:
    """Which of this rank's elements lie outside the active blocks: bool ``[count]``, on the master's device."""
    weight, piece = held.weight, held.piece
    key = (weight.changes, piece.first, piece.count, piece.master.device)
    known = _outside.get(weight)
    if known is None or known[0] != key:
        known = _outside[weight] = key, _elements(held, ~weight.mask)
    return known[1]


def _elements(held: Held, blocks: Tensor) -> Tensor:
    """Which of this rank's elements lie in ``blocks``, bool ``[R, C]``."""
    first, count = held.piece.first, held.piece.count
    wide: Tensor = held.weight.grid.expand(blocks.to(held.piece.master.device))
    return wide.reshape(-1)[first : first + count].clone()


@torch.no_grad()
def mask_(held: Held, tensor: Tensor) -> None:
    """Set a master, or a tensor of its shape, to 0 outside the active blocks of one weight."""
    if held.piece.count and not held.weight.is_dense:
        held.piece.of(tensor).masked_fill_(outside(held), 0)


@torch.no_grad()
def clear_state_(held: Held, optimizer: Optimizer, new: Tensor | None = None) -> None:
    """Set what an optimizer keeps of a weight's master to 0 outside the active blocks, and in the blocks ``new``.

    Raises:
        OptimizerError: it keeps codes, or tensors that are no plain ones: their groups and scales reach over weights.
    """
    if not isinstance(optimizer.state.get(held.piece.master, {}), dict):
        return
    codes = survey(optimizer).codes
    for key, value in state_like(optimizer, held.piece.master):
        if type(value) not in (Tensor, nn.Parameter) or codes:
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps {next(iter(codes), key)} of the copy of {held.weight.name} in "
                f"{'codes' if codes else type(value).__name__}, which cannot be cleaned of dropped blocks there. Use "
                "an optimizer with state in plain tensors"
            )
        if held.piece.count:
            mask_(held, value)
            if new is not None and bool(new.any()):
                held.piece.of(value).masked_fill_(_elements(held, new), 0)


@torch.no_grad()
def take_written_(piece: Piece) -> None:
    """Let a master be what the model holds, where that is not the master rounded: somebody has written to the model."""
    copy = piece.of(piece.master)
    now = piece.parameter.detach().reshape(-1)[piece.first : piece.first + piece.count].to(copy.device)
    copy.copy_(torch.where(copy.to(now.dtype) == now, copy, now.to(copy.dtype)))


@torch.no_grad()
def follow_(held: Held, optimizers: Iterable[Optimizer]) -> None:
    """:func:`take_written_`; outside the active blocks a master becomes 0, and so does the state of it, there and where
    blocks have just grown."""
    take_written_(held.piece)
    mask_(held, held.piece.master)
    for optimizer in optimizers:
        clear_state_(held, optimizer, held.weight.grown)


@torch.no_grad()
def block_means_of(held: Held, source: Tensor, magnitude: str = "l2") -> Tensor:
    """The mean square (or absolute value, ``"l1"``) of each block of a weight, by what all ranks hold of it in a master
    or a tensor of its shape: float32 ``[R, C]`` on the CPU, on all ranks the same. All must ask."""
    piece, grid = held.piece, held.weight.grid
    if piece.ranks is None:
        return next(block_means([(piece.of(source).view(held.weight.shape), grid)], magnitude))
    sums = torch.zeros(grid.shape, dtype=torch.float64, device=held.parameter.device)
    if piece.count:
        # Whole rows of blocks, filled up with zeros.
        first = piece.first // grid.cols // grid.block
        last = -(-(piece.first + piece.count) // (grid.cols * grid.block))
        rows = min(last * grid.block, grid.rows) - first * grid.block
        at = piece.first - first * grid.block * grid.cols
        wide = torch.zeros(rows * grid.cols, dtype=source.dtype, device=sums.device)
        wide[at : at + piece.count] = piece.of(source).to(sums.device)
        sums[first:last] = block_sums(wide.view(rows, grid.cols), replace(grid, rows=rows, matrices=0), magnitude)
    torch.distributed.all_reduce(sums, group=piece.ranks)
    return grid.mean_of_sums_(sums).float().cpu()


# -- whole weights -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A tensor of a weight's shape of what a master, or a tensor of its shape, holds on all ranks: itself, where all of
    it is here, else a copy."""

    tensor: Tensor
    _piece: Piece
    _source: Tensor

    def write(self) -> None:
        """Take over what has been written to a copy."""
        piece = self._piece
        if piece.ranks is not None and piece.count:
            piece.of(self._source).copy_(self.tensor.view(-1)[piece.first : piece.first + piece.count])


@torch.no_grad()
def whole(held: Held, source: Tensor) -> Whole:
    """What all ranks hold of a weight; all of them must ask. Exact: to each element one rank adds a number, and the
    others 0."""
    piece, shape = held.piece, held.weight.shape
    if piece.ranks is None:
        return Whole(piece.of(source).view(shape), piece, source)
    buffer = torch.zeros(held.weight.numel, dtype=source.dtype, device=held.parameter.device)
    buffer[piece.first : piece.first + piece.count] = piece.of(source).to(buffer.device)
    torch.distributed.all_reduce(buffer, group=piece.ranks)
    return Whole(buffer.view(shape), piece, source)


_ORIGINAL = "_mst_original"


def original_of(optimizer: Optimizer) -> Optimizer:
    """The optimizer that a :class:`Shadow`'s stands for; of another itself."""
    original: Optimizer = vars(optimizer).get(_ORIGINAL, optimizer)
    return original


class Shadow:
    """An optimizer of whole weights, in the place of one that trains masters: of its class, with its groups and with
    its state of them, for what reads and writes state of single weights.

    Args:
        keys: of the state that is needed, None: all; others are left out unless they are numbers.
        values: whether the weights are needed too, and not their gradients and state alone.
    """

    def __init__(
        self, optimizer: Optimizer, own: Sequence[Held], keys: Collection[str] | None, *, values: bool
    ) -> None:
        self._written: list[Whole] = []
        self.own: list[tuple[SparseWeight, nn.Parameter]] = []
        shadow: Optimizer = object.__new__(type(optimizer))
        shadow.__dict__.update({n: v for n, v in vars(optimizer).items() if n in ("defaults", "grad_scale")})
        shadow.__dict__[_ORIGINAL] = optimizer
        places: dict[int, list[nn.Parameter]] = {}
        state: dict[Tensor, dict[str, Any]] = {}
        for held in own:
            master = held.piece.master
            copy = self._whole(held, master) if values else master.new_empty(held.weight.shape)
            parameter = nn.Parameter(copy, requires_grad=False)
            if master.grad is not None:
                parameter.grad = whole(held, master.grad).tensor
            places.setdefault(id(master), []).append(parameter)
            state[parameter] = self._state_of(optimizer, held, keys)
            self.own.append((held.weight, parameter))
        groups = [
            {**group, "params": [one for p in group["params"] for one in places.get(id(p), ())]}
            for group in optimizer.param_groups
        ]
        shadow.__dict__.update(param_groups=groups, state=state)
        self.optimizer = shadow

    def _whole(self, held: Held, source: Tensor) -> Tensor:
        self._written.append(whole(held, source))
        return self._written[-1].tensor

    def _state_of(self, optimizer: Optimizer, held: Held, keys: Collection[str] | None) -> dict[str, Any]:
        known: dict[str, Any] = optimizer.state.get(held.piece.master, {})
        elements = dict(state_like(optimizer, held.piece.master))
        found = {k: v for k, v in known.items() if not isinstance(v, Tensor) or (v.numel() == 1 and k not in elements)}
        return found | {k: self._whole(held, v) for k, v in elements.items() if keys is None or k in keys}

    def write(self) -> None:
        """Take over what has been written to the weights and to their state."""
        for one in self._written:
            one.write()


# -- of a run ----------------------------------------------------------------------------------------------------------


class Masters:
    """The keepers of one run's weights, as far as they have been met."""

    def __init__(self) -> None:
        self._met: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
        self._sure: weakref.WeakSet[Any] = weakref.WeakSet()

    def __iter__(self) -> Iterator[Keeper]:
        return iter(list(self._met))

    def __bool__(self) -> bool:
        return bool(self._met)

    def meet(self, keeper: Keeper) -> None:
        """Know of ``keeper``. What others have of the weights is old: the model is not written by them any more."""
        self._met.setdefault(keeper, weakref.WeakSet()).add(keeper.optimizer)
        for other in self:
            if other is not keeper:
                del self._met[other]
                self._sure.discard(other)

    def is_sure(self, keeper: Keeper) -> bool:
        """Whether its copies are known to be as the model is, but for what is written to the model."""
        return keeper in self._sure

    def be_sure(self, keeper: Keeper) -> None:
        """They are now."""
        self._sure.add(keeper)

    def doubt(self) -> None:
        """Something has been loaded: nothing is known of any copies."""
        self._sure.clear()

    def forget(self) -> None:
        """The weights are trained themselves."""
        self._met.clear()
        self._sure.clear()

    def stepped(self, keeper: Keeper, optimizer: Optimizer) -> None:
        """``optimizer`` has been seen to step copies of ``keeper``."""
        self._met.setdefault(keeper, weakref.WeakSet()).add(optimizer)

    def optimizers(self, keeper: Keeper) -> list[Optimizer]:
        """Those that train copies of ``keeper``."""
        return list(self._met.get(keeper, ()))

    def team(self) -> Sequence[int]:
        """The ranks that train together; empty if no keeper is known."""
        return next((keeper.team() for keeper in self), ())

    def changed(self, own: Sequence[tuple[SparseWeight, nn.Parameter]], new: dict[str, Tensor]) -> None:
        """Masks have changed, and the model is 0 outside of them: so become masters and state, and state in the blocks
        ``new`` (by name), which have grown.

        Raises:
            OptimizerError: state cannot be written. All else has happened.
        """
        failed: OptimizerError | None = None
        for keeper in self if own else ():
            for held in held_by(keeper, own):
                mask_(held, held.piece.master)
                if held.piece.master.grad is not None:
                    mask_(held, held.piece.master.grad)
                for optimizer in self.optimizers(keeper):
                    try:
                        clear_state_(held, optimizer, new.get(held.weight.name))
                    except OptimizerError as error:
                        failed = failed or error
        if failed is not None:
            raise failed

    def measure(self, own: Sequence[tuple[SparseWeight, Tensor]], magnitude: str) -> Iterator[Tensor]:
        """:func:`block_means_of` each weight, in their order: by its copy, if there is one."""
        parameters = [(weight, parameter) for weight, parameter in own if isinstance(parameter, nn.Parameter)]
        copies = {held.weight.name: held for keeper in self for held in held_by(keeper, parameters)}
        plain = block_means([(p, weight.grid) for weight, p in own if weight.name not in copies], magnitude)
        for weight, _ in own:
            held = copies.get(weight.name)
            yield next(plain) if held is None else block_means_of(held, held.piece.master, magnitude)

    def follow(self, own: Sequence[tuple[SparseWeight, nn.Parameter]], *, all_of_it: bool = False) -> None:
        """Somebody has written to these weights of the model: :func:`follow_`.

        Args:
            all_of_it: and perhaps to the rest of it, that is not sparse.
        """
        for keeper in self if own else ():
            for piece in keeper.pieces() if all_of_it else ():
                take_written_(piece)
            for held in held_by(keeper, own):
                follow_(held, self.optimizers(keeper))
