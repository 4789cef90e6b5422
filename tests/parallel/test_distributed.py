"""DistributedDataParallel: ranks agree, training is that of one process, the hook moves only active blocks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import compiled
from oracles import assert_same_course
from ranks import (
    SCHEDULES,
    STEPS,
    assert_same_on_all_ranks,
    batches,
    check_gradients,
    exit_codes,
    mean_over_ranks,
    mine,
    net,
    results_of,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.communication import ActiveBlocks, check_ranks, reduce_active_blocks
from mst_compile.errors import NotSparseError, RankMismatchError
from mst_compile.parallel import first_step
from mst_compile.rules.schedule import Schedule

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

Run = Callable[..., torch.Tensor]
mse = nn.functional.mse_loss


def sparse_net(schedule: Schedule, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    return sparsify(net(dtype, **options), schedule)


def assert_ranks_agree(model: nn.Module) -> None:
    check_ranks(model)
    assert_same_on_all_ranks(*model.parameters(), *sparsifier(model).masks.values())


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def is_one_process() -> None:
    """Two ranks with half the batch each train as one process with the whole batch."""
    for schedule in SCHEDULES:
        alone, model = sparse_net(schedule), sparse_net(schedule)
        ddp = DDP(model)
        optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (alone, model)]
        check_gradients(model, optimizers[1])
        for x, y in batches():
            whole, part = mse(alone(x), y), mse(ddp(mine(x)), mine(y))
            assert mean_over_ranks(part) == pytest.approx(float(whole.detach()), rel=1e-9)
            whole.backward()
            part.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert_ranks_agree(model)
        assert sparsifier(model).step_count == STEPS
        changes = {n: w.changes for n, w in sparsifier(model).weights.items()}
        assert all(count > 20 for n, count in changes.items() if n != "head.weight"), changes
        for (name, mask), other in zip(sparsifier(model).masks.items(), sparsifier(alone).masks.values(), strict=True):
            assert torch.equal(mask, other), name
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            assert_same_course(p, q, 1000)


def accumulates_and_recomputes() -> None:
    """Gradient accumulation under no_sync and activation checkpointing change nothing."""
    schedule = SCHEDULES[0]
    alone, model = sparse_net(schedule), sparse_net(schedule, recompute=True)
    ddp = DDP(model)
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
    check_gradients(model, optimizers[1])
    for x, y in batches():
        mse(alone(x), y).backward()
        (x1, x2), (y1, y2) = mine(x).chunk(2), mine(y).chunk(2)
        with ddp.no_sync():
            (mse(ddp(x1), y1) / 2).backward()
        (mse(ddp(x2), y2) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_ranks_agree(model)
    for (name, mask), other in zip(sparsifier(model).masks.items(), sparsifier(alone).masks.values(), strict=True):
        assert torch.equal(mask, other), name
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_course(p, q, 10**5)


def compiles() -> None:
    """torch.compile outside and inside of DDP, with recomputation: sparse kernels run, ranks agree."""

    def outside(model: nn.Module, inner: str) -> Run:
        return compiled(DDP(model, bucket_cap_mb=0.004), inner)  # small, so that it splits the graph

    def inside(model: nn.Module, inner: str) -> Run:
        return DDP(compiled(model, inner))

    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096  # no cap may be below
    for wrap, inner, recompute, schedule, steps in (
        (outside, "inductor", False, SCHEDULES[1], STEPS),
        (inside, "aot_eager", True, SCHEDULES[0], 60),
        (outside, "inductor", True, SCHEDULES[0], 60),
    ):
        torch._dynamo.reset()
        eager, model = (sparse_net(schedule, torch.float32, recompute=recompute) for _ in range(2))
        runs = [wrap(model, inner), DDP(eager)]
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (model, eager)]
        check_gradients(model, optimizers[0])
        for step, (x, y) in enumerate(batches(steps, torch.float32)):
            losses = []
            for call, optimizer in zip(runs[: 2 if step < 10 else 1], optimizers, strict=False):
                loss = mse(call(mine(x)), mine(y))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[-1] == pytest.approx(losses[0], rel=1e-4), (wrap.__name__, inner, step)
        assert_ranks_agree(model)
        assert all(w.uses.served for w in sparsifier(model).weights.values()), (wrap.__name__, inner)


def moves_active_blocks() -> None:
    """The hook: what plain DDP computes, for fewer bytes, over several buckets; with unstructured masks too."""
    schedule, exact, steps = SCHEDULES[0], dist.get_world_size() == 2, 60
    for view in (False, True):
        plain, model = (sparsify(net(), schedule, block=1 if view else None) for _ in range(2))
        options = {"bucket_cap_mb": 0.01, "gradient_as_bucket_view": view}
        runs = [DDP(plain, **options), DDP(model, **options)]
        if view:
            state = reduce_active_blocks(runs[1])
        else:
            state = ActiveBlocks()
            runs[1].register_comm_hook(state, ActiveBlocks.reduce)
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (plain, model)]
        expected = 0
        weights = {id(p): w for w, p in sparsifier(model).parameters()}
        for step, (x, y) in enumerate(batches(steps)):
            for p in model.parameters():
                weight, size = weights.get(id(p)), p.numel()
                if weight is not None and not weight.dense_grad:
                    size = min(size, int(weight.mask.sum()) * weight.grid.block**2)
                expected += size * p.element_size()
            for call, optimizer in zip(runs, optimizers, strict=True):
                mse(call(mine(x)), mine(y)).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert state.bytes_moved == expected, step
        assert state.bytes_dense == steps * sum(p.numel() * p.element_size() for p in model.parameters())
        assert state.bytes_moved < 0.6 * state.bytes_dense
        assert_ranks_agree(model)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert_same_course(p, q, 0 if exact else 10**5)


def finds_other_masks() -> None:
    """check_ranks: different seeds and different numbers of steps, with the same message on all ranks."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model = sparse_net(SCHEDULES[0])
    check_ranks(model)
    other = sparsify(net(), SCHEDULES[0], seed=int(rank == last))
    with pytest.raises(RankMismatchError, match=rf"first\.up\.weight differs between ranks 0 and {last}"):
        check_ranks(other)
    coarse = sparsify(net(), SCHEDULES[0], block=4 if rank else 1)
    with pytest.raises(RankMismatchError, match=r"first\.up\.weight"):
        check_ranks(coarse)
    own = sparsifier(model)
    if rank == last:
        own.step()
    with pytest.raises(RankMismatchError, match="numbers of steps"):
        check_ranks(model)
    own.load_state_dict({**own.state_dict(), "step": 0})
    check_ranks(model)


def reduce_by_hand(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def differing() -> Iterator[tuple[str, nn.Module]]:
    """What a message says, and a model that the last rank was given otherwise."""
    last = dist.get_rank() == dist.get_world_size() - 1
    yield "seed 0 and 1", sparsify(net(), SCHEDULES[0], seed=int(last))
    yield "interval 5 and 7", sparsify(net(), Constant(0.7, interval=7 if last else 5))
    yield r"sparsity 0\.7 and 0\.6", sparsify(net(), Constant(0.6 if last else 0.7, interval=5))
    yield "class 'Constant' and 'MixedSparsity'", sparsify(net(), SCHEDULES[int(last)])
    yield r"block of first\.up\.weight \(4 and 1\)", sparsify(net(), SCHEDULES[0], block=1 if last else 4)
    yield r"first\.up\.weight is sparse on one", sparsify(net(), SCHEDULES[0], exclude="first.up.*" if last else None)
    model = sparse_net(SCHEDULES[0])
    if last:
        masks = sparsifier(model).masks
        sparsifier(model).apply_mask("head.weight", ~masks["head.weight"])
    yield r"mask of head\.weight, one of 1 ", model
    model = sparse_net(SCHEDULES[0])
    if last:
        sparsifier(model).load_state_dict({**sparsifier(model).state_dict(), "step": 3})
    yield "steps taken 0 and 3", model


def compares_at_the_first_step() -> None:
    """Without being asked, on all ranks, before anything has changed; of DDP, and where gradients are reduced by hand.
    A model on which they agree is trained in between: ranks are still in step."""
    for by_hand in (False, True):
        for message, model in differing():
            run = model if by_hand else DDP(model)
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            steps = sparsifier(model).step_count
            for x, y in batches(2):  # refused again, if somebody goes on
                optimizer.zero_grad()
                mse(run(mine(x)), mine(y)).backward()
                if by_hand:
                    reduce_by_hand(model)
                with pytest.raises(RankMismatchError, match=message):
                    optimizer.step()
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
            assert sparsifier(model).step_count == steps
            assert not optimizer.state
        good = sparse_net(SCHEDULES[0])
        run, optimizer = good if by_hand else DDP(good), torch.optim.SGD(good.parameters(), 0.01)
        for x, y in batches(7):
            mse(run(mine(x)), mine(y)).backward()
            if by_hand:
                reduce_by_hand(good)
            optimizer.step()
            optimizer.zero_grad()
        assert_ranks_agree(good)


def other_models_are_left_alone() -> None:
    """Ranks that train models of their own, with other options, data, or not at all, wait for nobody."""
    rank = dist.get_rank()
    for options, data in ((True, False), (True, True), (False, True)):
        model = sparsify(net(), Constant(0.7, interval=5 + rank * options), seed=rank * options)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for x, y in batches(3 + rank):
            if rank == 0:
                time.sleep(0.05)
            mse(model(mine(x) if data else x), mine(y) if data else y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        assert sparsifier(model).step_count == 3 + rank
    if rank == 0:
        alone = sparse_net(SCHEDULES[0])
        mse(alone(torch.ones(4, 30).double()), torch.ones(4, 5).double()).backward()
        torch.optim.SGD(alone.parameters(), 0.01).step()
        assert sparsifier(alone).step_count == 1


def the_hook_refuses_other_masks() -> None:
    """All ranks raise within the backward pass, at the first one and at any later one."""
    last = dist.get_rank() == dist.get_world_size() - 1
    x, y = next(batches(1))
    for message, model in differing():
        if "mask" not in message and "seed" not in message and "block" not in message and "sparse on" not in message:
            continue
        ddp = DDP(model, bucket_cap_mb=0.01)
        reduce_active_blocks(ddp)
        with pytest.raises(RankMismatchError, match=r"hold different masks \((first|second|head)"):
            mse(ddp(mine(x)), mine(y)).backward()
    for change in (
        lambda own: own.apply_mask("first.up.weight", ~own.masks["first.up.weight"]),
        lambda own: own.step(),
    ):
        model = sparsify(net(), Constant(0.7, interval=4))
        ddp = DDP(model, bucket_cap_mb=0.01)
        reduce_active_blocks(ddp)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            mse(ddp(mine(x)), mine(y)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if last:
            change(sparsifier(model))
        with pytest.raises(RankMismatchError, match="hold different masks"):
            mse(ddp(mine(x)), mine(y)).backward()


def a_rank_that_is_not_sparse_is_missed() -> None:
    """The others wait for it, but not for ever."""
    model = net()
    if dist.get_rank():
        sparsify(model, SCHEDULES[0])
    first_step._PATIENCE = 0.5
    ddp, optimizer = DDP(model), torch.optim.SGD(model.parameters(), 0.01)
    x, y = next(batches(1))
    mse(ddp(mine(x)), mine(y)).backward()
    if dist.get_rank():
        with pytest.raises(RankMismatchError, match=r"1 of the ranks \[0, 1\] .* Call sparsify on all"):
            optimizer.step()


TWO = [
    is_one_process,
    accumulates_and_recomputes,
    compiles,
    moves_active_blocks,
    finds_other_masks,
    compares_at_the_first_step,
    other_models_are_left_alone,
    the_hook_refuses_other_masks,
    a_rank_that_is_not_sparse_is_missed,
]
FOUR = [is_one_process, moves_active_blocks, finds_other_masks, compares_at_the_first_step, other_models_are_left_alone]


two = results_of(TWO, 2)
four = results_of(FOUR, 4)


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


@pytest.mark.parametrize("scenario", [s.__name__ for s in FOUR])
def test_four_ranks(four: dict[str, str], scenario: str) -> None:
    assert not four[scenario], four[scenario]


def dies() -> None:
    """The last rank dies in the middle of training."""
    model = sparse_net(SCHEDULES[0])
    ddp = DDP(model)
    reduce_active_blocks(ddp)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step, (x, y) in enumerate(batches()):
        if step == 7 and dist.get_rank() == dist.get_world_size() - 1:
            os._exit(17)
        mse(ddp(mine(x)), mine(y)).backward()
        optimizer.step()
        optimizer.zero_grad()


def hangs() -> None:
    """The last rank stops taking part, without dying, until the others have had to give up."""
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(8)
        return
    check_ranks(sparse_net(SCHEDULES[0]))


@pytest.mark.parametrize(("work", "last"), [(dies, 17), (hangs, 0)])
def test_a_lost_rank_ends_the_others(work: Callable[[], None], last: int, tmp_path: Path) -> None:
    codes = exit_codes(work, 2, tmp_path, timeout=4)
    assert codes[0] not in (0, None), f"{codes}: a rank that waits for ever is killed and has no exit code"
    assert codes[1] == last


def test_mistakes_without_a_group() -> None:
    with pytest.raises(TypeError, match="got Net"):
        reduce_active_blocks(net())  # type: ignore[arg-type]
    with pytest.raises(NotSparseError):
        check_ranks(net())
    check_ranks(sparse_net(SCHEDULES[0]))  # nothing to compare with
