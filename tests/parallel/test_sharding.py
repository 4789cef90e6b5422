"""FSDP2: block operations on shards, training is that of one process, compiled too; FSDP1 is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import compiled
from mask_cases import element_masks
from oracles import assert_same_course, assert_within, block_sums, of_rounding
from ranks import SCHEDULES, STEPS, assert_same_on_all_ranks, batches, mean_over_ranks, mine, net, results_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.blocks.bulk import block_mean_abs, block_mean_square, zero_blocks_, zero_inactive_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.shards import check_placement, local_part, stored
from mst_compile.errors import MaskError, ParallelismError, RankMismatchError
from mst_compile.parallel.ranks import check_ranks
from mst_compile.rules.schedule import Schedule
from mst_compile.state import binding

mse = nn.functional.mse_loss


pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time


def shard(model: nn.Module, **options: Any) -> nn.Module:
    fully_shard(model.first, **options)
    fully_shard(model.second, **options)
    return fully_shard(model, **options)


def sharded_net(
    schedule: Schedule, dtype: torch.dtype = torch.float64, *, before: bool, recompute: bool = False, **options: Any
) -> nn.Module:
    """A sparse model on shards, made sparse before or after it was sharded."""
    model = net(dtype, recompute=recompute)
    if before:
        return shard(sparsify(model, schedule), **options)
    return sparsify(shard(model, **options), schedule)


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def assert_zero_outside(model: nn.Module, optimizer: torch.optim.Optimizer, *, gradients: bool = False) -> None:
    """Every rank looks at its own part of weights, moments and gradients."""
    masks = element_masks(model)
    for name, parameter in model.named_parameters():
        if name in masks:
            state = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
            assert len(state) == 2
            assert parameter.grad is not None or not gradients
            for tensor in [parameter.detach(), *state, *([parameter.grad] if gradients else [])]:
                assert isinstance(tensor, DTensor)
                local, part = local_part(tensor)
                assert not local[~part.of(masks[name])].any(), name


def assert_ranks_agree(model: nn.Module) -> None:
    check_ranks(model)
    assert_same_on_all_ranks(*map(whole, model.parameters()), *sparsifier(model).masks.values())


def assert_same_run(model: nn.Module, alone: nn.Module) -> None:
    """Same masks; weights up to rounding."""
    for (name, mask), other in zip(sparsifier(model).masks.items(), sparsifier(alone).masks.values(), strict=True):
        assert torch.equal(mask, other), name
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_course(whole(p), q.detach(), 10**8)


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def layouts() -> Iterator[tuple[DeviceMesh, list[Any]]]:
    yield init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)]
    yield init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(1)]
    yield init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()]
    if dist.get_world_size() == 4:
        for placements in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Shard(1)]):
            yield init_device_mesh("cpu", (2, 2)), placements


def block_operations() -> None:
    """On shards as on the whole tensor; shards cut through blocks, and some are empty."""
    generator = torch.Generator().manual_seed(0)
    for mesh, placements in layouts():
        for rows, cols, block in (
            (64, 32, 8),
            (52, 30, 8),
            (5, 30, 4),
            (3, 7, 1),
            (1, 9, 4),
            (100, 20, 32),
            (33, 16, 16),
        ):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                grid = BlockGrid(rows, cols, block)
                plain = torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)
                mask = torch.rand(grid.shape, generator=generator) < 0.5
                where = f"{rows}x{cols}, block {block}, {dtype}, {placements}"
                spread = distribute_tensor(plain, mesh, placements)
                for measure, measured in (
                    (block_mean_square, plain.double().square()),
                    (block_mean_abs, plain.double().abs()),
                ):
                    scores = measure(spread, grid)
                    assert scores.dtype == torch.float32
                    exact = block_sums(measured, block) / block_sums(torch.ones(rows, cols), block)
                    assert_within(scores, exact, of_rounding(torch.float32) * exact)
                    assert_same_on_all_ranks(scores)
                assert torch.equal(whole(spread), plain), where
                for operation in (lambda t, g=grid, m=mask: zero_inactive_(t, g, m, None),
                                  lambda t, g=grid, m=mask: zero_blocks_(t, g, m)):  # fmt: skip
                    expected, actual = plain.clone(), distribute_tensor(plain, mesh, placements)
                    operation(expected)
                    operation(actual)
                    assert torch.equal(whole(actual), expected), where
        for bad in (float("nan"), float("inf")):
            plain = torch.ones(52, 30)
            plain[51, 29] = bad  # the last rank's
            scores = block_mean_square(distribute_tensor(plain, mesh, placements), BlockGrid(52, 30, 8))
            assert scores.isfinite().logical_not().nonzero().tolist() == [[6, 3]]


def is_one_process() -> None:
    """Shards train as one process does: made sparse before or after, recomputing, accumulating."""
    cases = [(False, True, SCHEDULES[1], 1)]
    if dist.get_world_size() == 2:
        cases.append((True, False, SCHEDULES[0], 2))
    for before, recompute, schedule, parts in cases:
        alone = sparsify(net(), schedule)
        model = sharded_net(schedule, before=before, recompute=recompute)
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
        for step, (x, y) in enumerate(batches(), 1):
            total = mse(alone(x), y)
            total.backward()
            losses = []
            for part, (a, b) in enumerate(zip(mine(x).chunk(parts), mine(y).chunk(parts), strict=True), 1):
                model.set_requires_gradient_sync(part == parts)
                losses.append(mse(model(a), b) / parts)
                losses[-1].backward()
            optimizers[0].step()
            optimizers[1].step()
            if step % 5 < 2:  # after topology events, and a step later
                assert mean_over_ranks(torch.stack(losses).sum()) == pytest.approx(float(total.detach()), rel=1e-6)
                assert_zero_outside(model, optimizers[1], gradients=True)
            for optimizer in optimizers:
                optimizer.zero_grad()
            if step % 20 == 0:
                assert_same_run(model, alone)
        assert_ranks_agree(model)


def masks_gradients_before_events_alone() -> None:
    """Gradients arrive masked at the shards, except where growth needs them whole."""
    schedule = SCHEDULES[0]
    for before in (True, False):
        model = sharded_net(schedule, before=before)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for step, (x, y) in enumerate(batches(20), 1):
            mse(model(mine(x)), mine(y)).backward()
            for name, mask in element_masks(model).items():
                if mask.all():
                    continue
                outside = whole(dict(model.named_parameters())[name].grad)[~mask]
                assert bool(outside.any()) == schedule.is_topology_event(step), (step, name)
            optimizer.step()
            optimizer.zero_grad()


def compiles() -> None:
    """torch.compile on top of FSDP2, and below it: the blocks run with sparse kernels."""

    def on_top(model: nn.Module, inner: str) -> nn.Module:
        return compiled(model, inner)

    def below(model: nn.Module, inner: str) -> nn.Module:
        for block in (model.first, model.second):
            block.compile(backend="mst", options={"mst.inner": inner})
        return model

    ways: list[tuple[Callable[[nn.Module, str], nn.Module], str, bool, bool, Schedule, int]] = [
        (on_top, "aot_eager", True, True, SCHEDULES[1], 40),
        (below, "aot_eager", False, False, SCHEDULES[0], 20),
        (on_top, "inductor", False, True, SCHEDULES[0], STEPS),
    ]
    for wrap, inner, before, recompute, schedule, steps in ways:
        torch._dynamo.reset()
        alone = sparsify(net(torch.float32), schedule)
        model = sharded_net(schedule, torch.float32, before=before, recompute=recompute)
        fast = wrap(model, inner)
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (alone, model)]
        for step, (x, y) in enumerate(batches(steps, torch.float32)):
            loss = mse(fast(mine(x)), mine(y))
            loss.backward()
            optimizers[1].step()
            if step % 5 < 2:
                assert_zero_outside(model, optimizers[1], gradients=True)
            optimizers[1].zero_grad()
            if step < 10:
                expected = mse(alone(x), y)
                expected.backward()
                optimizers[0].step()
                optimizers[0].zero_grad()
                assert mean_over_ranks(loss) == pytest.approx(float(expected.detach()), rel=1e-4), (wrap, inner, step)
        assert_ranks_agree(model)
        for name, weight in sparsifier(model).weights.items():
            if not name.startswith("head"):
                assert weight.uses.served, (wrap.__name__, inner, name, weight.uses)


def mixed_precision_and_replicas() -> None:
    """bfloat16 on shards of float32; on 2 ranks columns; on 4 ranks, shards over 2 that are replicated twice."""
    options: list[dict[str, Any]] = [{"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}]
    if dist.get_world_size() == 4:
        options.append({"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))})
    else:
        options.append({"shard_placement_fn": lambda p: Shard(p.dim() - 1)})  # which must divide evenly
    for chosen in options:
        model = sharded_net(SCHEDULES[0], torch.float32, before=True, **chosen)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                check_placement(name, parameter)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for x, y in batches(50, torch.float32):
            mse(model(mine(x)).float(), mine(y)).backward()  # of two dtypes torch 2.11 has no gradient
            optimizer.step()
            assert_zero_outside(model, optimizer, gradients=True)
            optimizer.zero_grad()
        assert_ranks_agree(model)


def resumes() -> None:
    """State dicts of model, optimizer and sparsifier continue a run on shards, bit for bit."""
    schedule, data = SCHEDULES[1], list(batches(36))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: slice) -> None:
        for x, y in data[steps]:
            mse(model(mine(x)), mine(y)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = sharded_net(schedule, before=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    train(model, optimizer, slice(18))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsifier(model).state_dict()))
    train(model, optimizer, slice(18, None))
    for assign in (False, True):
        again = shard(sparsify(net(), schedule, seed=9))
        again.load_state_dict(copy.deepcopy(saved[0]), assign=assign)
        other = torch.optim.AdamW(again.parameters(), 0.01)
        other.load_state_dict(copy.deepcopy(saved[1]))
        sparsifier(again).load_state_dict(saved[2])
        train(again, other, slice(18, None))
        assert_zero_outside(again, other)
        assert_ranks_agree(again)
        for p, q in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))


def young_blocks_on_shards() -> None:
    """Blocks that count steps of their own, and are warmed up, do on shards what they do in one process, and resume."""
    schedule, data = Constant(0.6, interval=3, regrown="own steps", regrown_warmup=4), list(batches(16))
    runs = [sparsify(net(), schedule), sharded_net(schedule, before=True)]
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in runs]
    for step, (x, y) in enumerate(data):
        mse(runs[0](x), y).backward()
        mse(runs[1](mine(x)), mine(y)).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_zero_outside(runs[1], optimizers[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        if step == 7:
            saved = copy.deepcopy((runs[1].state_dict(), optimizers[1].state_dict()))
            assert any(w.young is not None for w in sparsifier(runs[1]).weights.values())
    assert_same_run(runs[1], runs[0])
    assert_ranks_agree(runs[1])
    again = shard(sparsify(net(), schedule, seed=9))
    other = torch.optim.AdamW(again.parameters(), 0.01)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for x, y in data[8:]:
        mse(again(mine(x)), mine(y)).backward()
        other.step()
        other.zero_grad()
    assert all(torch.equal(whole(p), whole(q)) for p, q in zip(runs[1].parameters(), again.parameters(), strict=True))


def follows_parameters() -> None:
    """The state of a weight is on whatever Parameter stands for it, and leaves it with densify."""
    model = sharded_net(SCHEDULES[0], before=True)
    sharded = model.head.weight
    weight = binding.of(sharded)
    assert weight is sparsifier(model).weights["head.weight"]
    x, y = next(batches())
    with torch.no_grad():
        model(mine(x))
    standing_in = model.head.weight  # the root stays unsharded after forward
    assert standing_in is not sharded
    assert not isinstance(standing_in, DTensor)
    assert binding.of(standing_in) is weight
    assert stored(standing_in) is sharded
    assert stored(sharded) is sharded
    # What is zeroed in the shards is zeroed in the copy that the next forward pass uses.
    blocks = torch.ones_like(weight.mask)
    zero_blocks_(sharded, weight.grid, blocks)
    assert not whole(sharded).any()
    assert not standing_in.any()
    sparsifier(model).release()
    mse(model(mine(x)), mine(y)).backward()
    assert binding.of(model.head.weight) is None
    model.unshard()
    assert binding.of(model.head.weight) is None
    model.reshard()
    plain = net()
    assert stored(plain.head.weight) is plain.head.weight
    check_placement("head.weight", plain.head.weight)


def flattened_parameters_are_refused() -> None:
    """FSDP1, with both of its ways to hold Parameters."""
    for original in (True, False):
        model = FullyShardedDataParallel(
            sparsify(net(torch.float32), SCHEDULES[0]), device_id=torch.device("cpu"), use_orig_params=original
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model(torch.ones(4, 30)).sum().backward()
        with pytest.raises(ParallelismError, match="FSDP1"):
            optimizer.step()


def compares_at_the_first_step() -> None:
    """Ranks that were given other options raise before anything has changed; over all ranks of shards and replicas."""
    ranks, last = dist.get_world_size(), dist.get_rank() == dist.get_world_size() - 1
    meshes = [None, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))] if ranks == 4 else [None]
    for mesh in meshes:
        for before in (False, True):
            model = net()
            options = {} if mesh is None else {"mesh": mesh}
            if not before:
                shard(model, **options)
            sparsify(model, SCHEDULES[0], seed=int(last))
            if before:
                shard(model, **options)
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
            weights_before = [whole(p).clone() for p in model.parameters()]
            x, y = next(batches(1))
            mse(model(mine(x)), mine(y)).backward()
            with pytest.raises(RankMismatchError, match=rf"ranks \d and {ranks - 1} .* seed 0 and 1"):
                optimizer.step()
            assert all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), weights_before, strict=True))


def first_masks_are_those_of_one_process() -> None:
    """By magnitude, asked for or chosen because the weights are not fresh, and given, of weights that are sharded."""

    def model(grown: bool) -> nn.Module:
        found = net()
        with torch.no_grad():
            for p in found.parameters() if grown else ():
                if p.dim() == 2:  # rows of other lengths than an initialiser draws
                    p *= torch.linspace(0.2, 2, len(p), dtype=p.dtype)[:, None]
        return found

    schedule = Constant(0.7, growth="none")
    shape = sparsifier(sparsify(net(), schedule)).masks["first.up.weight"].shape
    given = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    for grown, masks in ((False, None), (True, None), (False, "magnitude"), (True, {"first.up.weight": given})):
        alone = sparsify(model(grown), schedule, masks=masks)  # type: ignore[arg-type]
        spread = sparsify(shard(model(grown)), schedule, masks=masks)  # type: ignore[arg-type]
        assert ("by magnitude" in sparsifier(spread).first_masks) == (grown or masks == "magnitude")
        assert sparsifier(spread).first_masks == sparsifier(alone).first_masks
        assert_same_run(spread, alone)
        assert_ranks_agree(spread)
    with pytest.raises(MaskError, match=r"first\.up\.weight"):
        sparsify(shard(net()), schedule, masks={"first.up.weight": given[1:]})


TWO = [
    block_operations,
    is_one_process,
    first_masks_are_those_of_one_process,
    masks_gradients_before_events_alone,
    follows_parameters,
    resumes,
    young_blocks_on_shards,
    flattened_parameters_are_refused,
    compares_at_the_first_step,
    mixed_precision_and_replicas,
    compiles,
]
FOUR = [
    block_operations,
    is_one_process,
    first_masks_are_those_of_one_process,
    compares_at_the_first_step,
    mixed_precision_and_replicas,
    young_blocks_on_shards,
]


two = results_of(TWO, 2)
four = results_of(FOUR, 4)


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


@pytest.mark.parametrize("scenario", [s.__name__ for s in FOUR])
def test_four_ranks(four: dict[str, str], scenario: str) -> None:
    assert not four[scenario], four[scenario]
