"""Ranks that train one model are compared at its first training step, without being asked.

A rank with another seed, schedule, block or mask trains on for days, and wrongly. Who trains together is known of
DistributedDataParallel and FSDP2. Of gradients that a program reduces by itself it shows: they differ between ranks
when they arrive, and are the same, bit for bit, when the optimizer steps.

Everything goes through the key-value store of the process group, not through a collective: ranks that train different
models meet in none, and a rank that does not come is noticed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mst_compile.blocks.by_tensor import ByTensor
from mst_compile.blocks.memory import is_plain
from mst_compile.blocks.shards import FOR_DATA, is_sharded
from mst_compile.errors import ParallelismError, RankMismatchError
from mst_compile.parallel.description import describe, difference
from mst_compile.state import binding
from mst_compile.state.run import Run
from mst_compile.state.stepping import watch_runs
from mst_compile.state.weight import SparseWeight

if dist.is_available():
    from torch.nn.parallel import DistributedDataParallel

_PATIENCE = 120.0  # seconds; ranks that train together reach their first step at the same time
_PATIENCE_BY_HAND = 30.0  # seconds; whether they train together is not known then
_POLL_SECONDS = 0.005
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ddp_ranks = ByTensor()  # parameter -> ranks that average its gradient


class FirstStep:
    """Compares ranks: a :class:`mst_compile.state.stepping.RunWatcher`."""

    def __init__(self) -> None:
        self._met: Counter[str] = Counter()  # who -> number of runs that were compared
        self._by_hand: weakref.WeakKeyDictionary[Run, str] = weakref.WeakKeyDictionary()

    def first_gradient(self, run: Run, weight: SparseWeight, parameter: Tensor) -> None:
        """The first gradient of a run has arrived, before anybody can have reduced it."""
        store = _store()
        if store is None or _team(run) or parameter.grad is None or not is_plain(parameter.grad):
            return
        own = {"run": describe(run), "local": {weight.name: _fingerprint(parameter.grad)}}
        key = self._by_hand[run] = self._next("alone")
        store.set(f"{key}/run/{dist.get_rank()}", json.dumps(own))
        text = json.dumps(own["run"])
        if store.compare_set(f"{key}/first", "", text).decode() != text:
            store.set(f"{key}/different", "1")
            store.check([f"{key}/different"])  # answered once it is there: before this rank reduces anything

    def first_step(self, run: Run) -> None:
        """An optimizer is about to step the run's weights for the first time; raises RankMismatchError."""
        store = _store()
        if store is None:
            return
        team = _team(run)
        if team:
            self._compare(store, run, team)
        elif run in self._by_hand:
            self._compare_by_hand(store, run, self._by_hand[run])

    def _next(self, who: str) -> str:
        self._met[who] += 1
        return f"mst_compile/first_step/{who}/{self._met[who]}"

    def _compare(self, store: dist.Store, run: Run, team: Sequence[int]) -> None:
        """All ranks of the team come here at the same step, and all get to know whether one of them differs."""
        if len(team) == 1:
            return
        key = self._next(hashlib.sha256(repr(list(team)).encode()).hexdigest()[:16])
        own, rank = describe(run), dist.get_rank()
        first = json.loads(store.compare_set(f"{key}/first", "", json.dumps([rank, own])).decode())
        if first[1] != own:
            store.set(f"{key}/other", json.dumps([rank, own]))
        if store.add(f"{key}/count", 1) == len(team):  # after what this rank has to say
            store.set(f"{key}/all", "1")
        if not _wait(store, f"{key}/all", _PATIENCE):
            raise RankMismatchError(
                f"{store.add(f'{key}/count', 0)} of the ranks {list(team)} that train this model together have come to "
                f"their first step with sparse weights within {_PATIENCE:g} seconds. Call sparsify on all of them"
            )
        if store.check([f"{key}/other"]):
            _refuse(first, json.loads(store.get(f"{key}/other").decode()))

    def _compare_by_hand(self, store: dist.Store, run: Run, key: str) -> None:
        """Whoever reduced gradients with this rank has told about its run before, so nobody is waited for, unless there
        is a run that differs: then for the gradients that it steps with."""
        gradients = {w.name: _fingerprint(p.grad) for w, p in run.weights.parameters() if _has_gradient(p)}
        rank = dist.get_rank()
        self._met[key] += 1  # a program may go on after it was refused
        reduced = f"{key}/reduced/{self._met[key]}"
        store.set(f"{reduced}/{rank}", json.dumps(gradients))
        if not store.check([f"{key}/different"]):
            return
        own = json.loads(store.get(f"{key}/run/{rank}").decode())
        for other in range(dist.get_world_size()):
            if other == rank or not store.check([f"{key}/run/{other}"]):
                continue
            theirs = json.loads(store.get(f"{key}/run/{other}").decode())
            if theirs["run"] == own["run"] or theirs["local"] == own["local"]:
                continue
            if _wait(store, f"{reduced}/{other}", _PATIENCE_BY_HAND):
                found = json.loads(store.get(f"{reduced}/{other}").decode())
                if any(value and found.get(name) == value for name, value in gradients.items()):
                    _refuse([rank, own["run"]], [other, theirs["run"]])


def _refuse(*found: Any) -> None:
    one, other = sorted(found, key=lambda pair: pair[0])  # rank, description
    raise RankMismatchError(
        f"ranks {one[0]} and {other[0]} train one model but differ: {difference(one[1], other[1])}. Call sparsify with "
        "the same schedule, seed and options on all ranks, and load the same checkpoint"
    )


def _wait(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether ``key`` is there, or comes in time."""
    end = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _store() -> dist.Store | None:
    """The store of several processes, or None: one alone, or ranks that are pretended, have nobody to compare with."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "fake":
        return None
    store: dist.Store | None = dist.distributed_c10d._get_default_store()
    return store


def _team(run: Run) -> list[int]:
    """The ranks that DistributedDataParallel, FSDP2 or a keeper of copies has train the run's weights together; empty
    if none does."""
    team = run.masters.team()
    if team:
        return sorted(team)
    for _, parameter in run.weights.parameters():
        if is_sharded(parameter):
            return sorted(parameter.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
        ranks: list[int] | None = _ddp_ranks.get(parameter)
        if ranks is not None:
            return ranks
    return []


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and is_plain(parameter.grad)


def _fingerprint(gradient: Tensor | None) -> int:
    """The sum of all bits: the same wherever the gradient is, in any order of summation; 0 of zeros."""
    assert gradient is not None
    bits = gradient.detach().contiguous().view(_BITS[gradient.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _check_not_spread(module: object) -> None:
    for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
        if binding.of(parameter) is not None and is_sharded(parameter):
            raise ParallelismError(
                f"{name} is sparse and a DTensor, spread over the ranks of {parameter.device_mesh}; "  # type: ignore[attr-defined]
                f"DistributedDataParallel would train local tensors in its place. {FOR_DATA}"
            )


def _follow_ddp() -> None:
    """Note whose gradients are averaged by whom: DistributedDataParallel keeps no list of its instances. And refuse
    what it would take out of its modules, while it is there."""
    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def init(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        module = args[0] if args else kwargs.get("module")
        _check_not_spread(module)
        original(self, *args, **kwargs)
        ranks = sorted(dist.get_process_group_ranks(self.process_group))
        for parameter in self.module.parameters():
            _ddp_ranks[parameter] = ranks

    DistributedDataParallel.__init__ = init  # type: ignore[method-assign]


if dist.is_available():
    _follow_ddp()
    watch_runs(FirstStep())
