"""Optimizer checkpoints as they happen: let the topology ride in what people save and load anyway.

PyTorch has hooks for ``state_dict`` and ``load_state_dict`` on single optimizers alone, and an optimizer that is about
to be resumed has not stepped, so nobody knows it yet: those two methods of ``torch.optim.Optimizer`` are wrapped, once;
``load_state_dict`` on import, as it may be called first, and also where a class has one of its own, as 8-bit optimizers
do, which may never call the one that it overrides.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from mst_compile.blocks.by_tensor import ByTensor
from mst_compile.errors import CheckpointError, MSTWarning

from .learning_rates import pack_laws, unpack_laws
from .packing import KEYS, MASTERS, PROGRESS
from .steps import end_left


class CheckpointWatcher(Protocol):
    """Something that wants to know of optimizer checkpoints. ``entries`` maps the id of a Parameter to what belongs to
    it."""

    def save_into(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...
    def owned(self, optimizer: Optimizer) -> set[int]: ...
    def check_loaded(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...
    def after_load(self, optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None: ...


_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_unclaimed = ByTensor()  # Parameter that was not sparse -> its topology
_registered = False
_TELLS = "_mst_tells"


@dataclass(eq=False)
class _Load:
    """A load that is under way: our part of the state dict, and whether the watchers were told of it."""

    entries: dict[int, dict[str, Any]]
    told: bool = False


class _Loading(threading.local):
    def __init__(self) -> None:
        self.loads: list[_Load] = []  # of this thread, outermost first


_loading = _Loading()


def watch_checkpoints(watcher: CheckpointWatcher) -> None:
    """Call ``watcher`` whenever an optimizer's state is saved or loaded, for as long as it lives."""
    global _registered
    if not _registered:
        _registered = True
        _wrap_state_dict()
    _watchers.add(watcher)


def _positions(groups: list[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


def _wrap_state_dict() -> None:
    original = Optimizer.state_dict

    @functools.wraps(original)
    def state_dict(self: Optimizer, *args: Any, **kwargs: Any) -> dict[str, Any]:
        end_left()
        found = original(self, *args, **kwargs)
        pack_laws(found.get("param_groups", []))
        entries: dict[int, dict[str, Any]] = {}
        for watcher in list(_watchers):
            watcher.save_into(self, entries)
        if entries:
            keys = dict(zip(map(id, _positions(self.param_groups)), _positions(found["param_groups"]), strict=True))
            extra = {keys[i]: entry for i, entry in entries.items()}
            first = next(iter(extra.values()))
            if not found["state"] and PROGRESS in first:
                # torch.distributed.checkpoint takes state for no parameter, or for all of them.
                progress = {PROGRESS: first[PROGRESS]}
                extra = {key: extra.get(key, progress) for key in keys.values()}
            # Copies: the entries of the state dict are the optimizer's own, and it would step over ours.
            # What some optimizers keep beside the parameters, such as a number of steps, is no dict.
            found["state"] = found["state"] | {k: {**found["state"].get(k, {}), **own} for k, own in extra.items()}
        return found

    Optimizer.state_dict = state_dict  # type: ignore[method-assign]


def _telling_of_loads(original: Callable[..., None]) -> Callable[..., None]:
    """A ``load_state_dict`` that keeps our part from the optimizer and tells the watchers of it.

    A class's own one may call PyTorch's, of itself or of an optimizer inside, or do it all alone: the innermost tells,
    when it is done, and knows of our part from those around it.
    """

    @functools.wraps(original)
    def load_state_dict(self: Optimizer, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        entries = _take_entries(self, state_dict)
        mine = {id(parameter) for parameter in _positions(self.param_groups)}
        for around in reversed(_loading.loads):
            entries = {i: entry for i, entry in around.entries.items() if i in mine} | entries
        if "param_groups" in state_dict:
            _check_groups(self, state_dict["param_groups"], ours=bool(entries))
            groups = unpack_laws(self.param_groups, state_dict["param_groups"], set(entries))
            state_dict = {**state_dict, "param_groups": groups}
        if entries:
            for watcher in list(_watchers):
                watcher.check_loaded(self, entries)
            state = {
                key: {k: v for k, v in entry.items() if k not in KEYS} if isinstance(entry, dict) else entry
                for key, entry in state_dict["state"].items()
            }
            state_dict = {**state_dict, "state": {key: entry for key, entry in state.items() if entry != {}}}
        load = _Load(entries)
        _loading.loads.append(load)
        try:
            original(self, state_dict, *args, **kwargs)
        finally:
            _loading.loads.remove(load)
        if not load.told:
            for around in _loading.loads:
                around.told = True
            _tell(self, entries)

    setattr(load_state_dict, _TELLS, True)
    return load_state_dict


def _check_groups(optimizer: Optimizer, saved: list[dict[str, Any]], ours: bool) -> None:
    """Raise if a state dict of other parameter groups is loaded where there is sparsity on either side: state goes to
    Parameters by their places in the groups.

    Args:
        ours: whether the state dict holds something of ours.

    Raises:
        CheckpointError: they differ in number or size; PyTorch would say that, and not why.
    """
    there, here = ([len(group["params"]) for group in groups] for groups in (saved, optimizer.param_groups))
    if there != here and (ours or any(watcher.owned(optimizer) for watcher in list(_watchers))):
        raise CheckpointError(
            f"the state dict is of an optimizer whose parameter groups hold {there} Parameters, and here they hold "
            f"{here}. mst_compile.param_groups and MSTTrainer give sparse weights groups of their own: make the model "
            "sparse, or not, and the optimizer as they were when the checkpoint was written; or load the weights alone"
        )


def _tell(optimizer: Optimizer, entries: dict[int, dict[str, Any]]) -> None:
    lost = False
    owned: set[int] = set().union(*(watcher.owned(optimizer) for watcher in list(_watchers)))
    for parameter in _positions(optimizer.param_groups):
        if id(parameter) in entries and id(parameter) not in owned:
            _unclaimed[parameter] = entries[id(parameter)]
            lost |= MASTERS in entries[id(parameter)]
    if lost:
        warnings.warn(
            "the checkpoint holds the masks of a sparse run, and no copies of sparse weights are trained here: call "
            "sparsify(model, ...) before the checkpoint is loaded",
            MSTWarning,
            stacklevel=5,
        )
    for watcher in list(_watchers):
        watcher.after_load(optimizer, entries)


def _wrap_load_state_dict() -> None:
    """Of PyTorch's class, of those that are derived from it, and of those that will be, once one is made."""
    classes: list[type] = [Optimizer]
    for cls in classes:
        classes += cls.__subclasses__()
        _wrap_own(cls)
    original = Optimizer._patch_step_function

    @functools.wraps(original)
    def patch(self: Optimizer) -> None:
        original(self)
        for cls in type(self).__mro__:
            if issubclass(cls, Optimizer):
                _wrap_own(cls)

    Optimizer._patch_step_function = patch  # type: ignore[method-assign]


def _wrap_own(cls: type) -> None:
    own = vars(cls).get("load_state_dict")
    if own is not None and not getattr(own, _TELLS, False):
        cls.load_state_dict = _telling_of_loads(own)  # type: ignore[attr-defined]


def take_unclaimed(parameter: Tensor) -> dict[str, Any]:
    """The topology of a Parameter that an optimizer was loaded with before the Parameter was sparse, if any; no longer
    kept then."""
    return _unclaimed.pop(parameter, {})


def _take_entries(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Our part of an optimizer's state dict, by the id of the Parameter that it belongs to."""
    state, saved = state_dict.get("state", {}), _positions(state_dict.get("param_groups", []))
    found = {}
    for parameter, key in zip(_positions(optimizer.param_groups), saved, strict=False):
        entry = state.get(key)
        if isinstance(entry, dict) and any(name in entry for name in KEYS):
            found[id(parameter)] = {name: entry[name] for name in KEYS if name in entry}
    return found


# From the start: an optimizer may be loaded before anything is sparse.
_wrap_load_state_dict()
