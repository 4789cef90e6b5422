"""Gradients that are added up over several backward passes: the sum of two that hold zeros outside the active blocks
holds zeros, and nothing is written to it; wherever anything else may have come in, it is masked."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gradient_cases import (
    Layers,
    X,
    Zeroed,
    assert_zero_outside,
    noise,
    noise_in_place,
    noise_without_a_trace,
    trained,
)
from helpers import compiled
from mask_cases import element_masks
from oracles import assert_reordered
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mst_compile import Constant, sparsifier
from mst_compile.state import binding
from mst_compile.state.weight import SparseWeight

ROUNDS = 3


@pytest.fixture
def zeroed(monkeypatch: pytest.MonkeyPatch) -> Zeroed:
    return Zeroed(monkeypatch)


def state(parameter: Tensor) -> SparseWeight:
    weight = binding.of(parameter)
    assert weight is not None
    return weight


@pytest.mark.parametrize("again", [False, True], ids=["plain", "activation checkpoint"])
def test_nothing_is_written_to_a_sum(again: bool, zeroed: Zeroed) -> None:
    model, run = trained(again=again)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        for i in range(ROUNDS):
            held = model.first.weight.grad
            assert zeroed.by(lambda: run(X).backward()) == 0
            assert (held is None) is (i == 0)
            assert held is None or model.first.weight.grad is held
            assert_zero_outside(model)
        assert zeroed.by(optimizer.step) == 0
    assert not model.first.weight[~element_masks(model)["first.weight"]].any()


def test_a_sum_is_what_it_is_in_eager_mode() -> None:
    found = []
    for mode in (False, True):
        model, run = trained()
        for i in range(ROUNDS):
            (run if mode else model)(X + i).backward()
        found.append([p.grad for p in model.parameters()])
    for eager, graph in zip(*found, strict=True):
        assert_reordered(graph, eager, terms=32)


def test_a_first_gradient_that_was_masked(zeroed: Zeroed) -> None:
    """Eager mode computes it on all blocks; what a graph adds to it holds zeros."""
    model, run = trained()
    assert zeroed.by(lambda: model(X).backward()) == 2
    assert zeroed.by(lambda: run(X).backward()) == 0
    assert zeroed.by(lambda: model(X).backward()) == 2
    assert_zero_outside(model)


def _add(model: Layers) -> None:
    model.first.weight.grad.add_(1.0)  # type: ignore[union-attr]


def _take_anothers_place(model: Layers) -> None:
    model.first.weight.grad = torch.ones(32, 32)


def _take_anothers_memory(model: Layers) -> None:
    model.first.weight.grad.data = torch.ones(32, 32)  # type: ignore[union-attr]


def _scale(model: Layers) -> None:
    nn.utils.clip_grad_norm_([model.first.weight], 1e-3)


@pytest.mark.parametrize("between", [_add, _take_anothers_place, _take_anothers_memory, _scale])
def test_what_is_written_between_two(between: Callable[[Layers], None], zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()
    between(model)
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert_zero_outside(model)
    assert zeroed.by(lambda: run(X).backward()) == 0


def test_gradients_that_were_set_to_zero(zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()
    model.zero_grad(set_to_none=False)
    assert zeroed.by(lambda: run(X).backward()) == 2
    assert_zero_outside(model)


def _turned(gradient: Tensor) -> Tensor:
    return gradient.t()


HOOKS = [noise, noise_in_place, noise_without_a_trace, _turned]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("once", [False, True], ids=["stays", "goes"])
def test_a_hook_on_the_gradient(hook: Callable[[Tensor], Any], once: bool, zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()

    def changed(gradient: Tensor) -> Any:
        if once:
            handle.remove()
        return hook(gradient)

    handle = model.first.weight.register_hook(changed)
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert_zero_outside(model)


def _node(parameter: Tensor) -> Any:
    """What adds up the gradients of a parameter, as long as somebody holds it."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_on_the_node_that_adds(hook: Callable[[Tensor], Any], zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()
    node = _node(model.first.weight)

    def changed(gradients: tuple[Tensor]) -> Any:
        result = hook(*gradients)
        return None if result is None else (result,)

    node.register_prehook(changed)
    for _ in range(2):
        assert zeroed.by(lambda: run(X).backward()) == 1
        assert_zero_outside(model)


def test_a_hook_that_turns_a_first_gradient_about(zeroed: Zeroed) -> None:
    model, run = trained()
    node = _node(model.first.weight)
    node.register_prehook(lambda gradients: (gradients[0].t(),))
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert not model.first.weight.grad[~element_masks(model)["first.weight"]].any()  # type: ignore[index]


def test_a_hook_behind(zeroed: Zeroed) -> None:
    """One that was there before the model was made sparse sees the sum first."""
    model, run = trained()
    binding._remove_hook(model.first.weight)
    added: list[float] = []

    def add(parameter: Tensor) -> None:
        for value in added:
            parameter.grad.add_(value)  # type: ignore[union-attr]

    model.first.weight.register_post_accumulate_grad_hook(add)
    binding.bind(model.first.weight, state(model.first.weight))
    assert zeroed.by(lambda: run(X).backward()) == 0
    added.append(1.0)
    assert zeroed.by(lambda: run(X).backward()) == 1
    assert_zero_outside(model)


@pytest.mark.parametrize("first", [True, False])
def test_another_term_outside_of_the_graph(first: bool, zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()

    def backward() -> None:
        own = model.first.weight.sum()
        (own + run(X) if first else run(X) + own).backward()

    assert zeroed.by(backward) == 1
    assert_zero_outside(model)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs keep what a second backward pass needs."""
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", False)


@pytest.mark.usefixtures("kept")
def test_another_term_alone(zeroed: Zeroed) -> None:
    """A record of what the graph has computed, which never arrived, is not taken for what has."""
    model, run = trained()
    run(X).backward()
    loss = run(X)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert zeroed.by(lambda: (model.first.weight.sum() + model.second.weight.sum()).backward()) == 2
    assert_zero_outside(model)
    assert zeroed.by(lambda: loss.backward(retain_graph=True)) == 0
    assert zeroed.by(loss.backward) == 0
    assert_zero_outside(model)


def test_a_gradient_of_indices_is_added(zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()
    rows = nn.functional.embedding(torch.arange(32), model.first.weight, sparse=True)
    assert zeroed.by(lambda: rows.sum().backward()) == 1
    assert_zero_outside(model)
    assert zeroed.by(lambda: run(X).backward()) == 0


def test_a_graph_that_runs_twice(zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()
    assert zeroed.by(lambda: (run(X) + run(X)).backward()) == 2
    assert_zero_outside(model)


@pytest.mark.usefixtures("kept")
def test_a_sum_that_takes_the_place_of_its_terms(zeroed: Zeroed) -> None:
    """With ``create_graph`` the sum is another tensor."""
    model, run = trained()
    run(X).backward()
    assert zeroed.by(lambda: run(X).backward(create_graph=True)) == 2
    assert_zero_outside(model)


def test_a_mask_that_changed_between_two(zeroed: Zeroed) -> None:
    model, run = trained()
    run(X).backward()
    sparsifier(model).apply_mask("first.weight", sparsifier(model).masks["first.weight"].roll(1, 0))
    assert zeroed.by(lambda: run(X).backward()) == 1
    outside = ~element_masks(model)["first.weight"]
    assert not model.first.weight.grad[outside].any()  # type: ignore[index]


def test_gradients_on_all_blocks(zeroed: Zeroed) -> None:
    model, run = trained(schedule=Constant(0.6, growth="gradient", interval=2, drop_fraction=0.5))
    optimizer, dense = torch.optim.SGD(model.parameters(), 0.1), 0
    for _ in range(6):
        for _ in range(ROUNDS):
            run(X).backward()
            wanted = state(model.first.weight).dense_grad
            outside = ~element_masks(model)["first.weight"]
            assert bool(model.first.weight.grad[outside].any()) is wanted  # type: ignore[index]
            dense += wanted
        optimizer.step()
        optimizer.zero_grad()
    assert dense == 3 * ROUNDS


def test_another_backward_pass_between_what_is_seen_and_what_is_added(zeroed: Zeroed) -> None:
    """Passes of two threads: the one that has looked is not the one whose gradient is added first."""
    model, run = trained()
    run(X).backward()
    weight = state(model.first.weight)
    original, armed = weight.note_adding, [True]

    def note_adding(gradient: Tensor, held: Tensor) -> None:
        original(gradient, held)
        if armed.pop() if armed else False:
            other = threading.Thread(target=lambda: model.first.weight.sum().backward())
            other.start()
            other.join()
            assert not model.first.weight.grad[~element_masks(model)["first.weight"]].any()  # type: ignore[index]

    weight.note_adding = note_adding  # type: ignore[method-assign]
    run(X).backward()
    assert_zero_outside(model)


@pytest.mark.usefixtures("kept")
def test_looking_leaves_nothing_behind() -> None:
    model, run = trained()
    node = _node(model.first.weight)
    handle = node.register_prehook(lambda _: None)
    for _ in range(ROUNDS):
        run(X).backward()
        assert len(handle.hooks_dict_ref()) == 1
    loss = run(X)
    for _ in range(ROUNDS):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert len(handle.hooks_dict_ref()) == 2


def test_a_copy_knows_nothing_of_what_arrives() -> None:
    model, run = trained()
    run(X).backward()
    other = copy.deepcopy(model)
    assert state(other.first.weight).masked is None
    compiled(other)(X).backward()
    assert_zero_outside(other)


# -- over ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """One rank, alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("views", [False, True], ids=["gradients", "parts of buckets"])
def test_data_parallelism(views: bool, zeroed: Zeroed) -> None:
    """Of gradients that are parts of one bucket each bears the version of all: what is known of one is not of it alone,
    so that they may be masked again."""
    model, _ = trained()
    ddp = DistributedDataParallel(compiled(model), gradient_as_bucket_view=views)
    optimizer = torch.optim.AdamW(model.parameters())
    ddp(X).backward()
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        with ddp.no_sync():
            for _ in range(ROUNDS):
                written = zeroed.by(lambda: ddp(X).backward())
                assert views or written == 0
                assert_zero_outside(model)
        ddp(X).backward()
        assert_zero_outside(model)
    assert not model.first.weight[~element_masks(model)["first.weight"]].any()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("views", [False, True], ids=["gradients", "parts of buckets"])
def test_what_ranks_tell_each_other_is_not_trusted(views: bool) -> None:
    model, _ = trained()
    ddp = DistributedDataParallel(compiled(model), gradient_as_bucket_view=views)

    def with_noise(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer() + 1.0)
        return future

    with_noise.__annotations__ = {
        "bucket": dist.GradBucket,
        "return": torch.futures.Future[Tensor],
    }  # DDP compares them
    ddp.register_comm_hook(None, with_noise)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    outside = ~element_masks(model)["first.weight"]
    for _ in range(3):
        for _ in range(ROUNDS):
            ddp(X).backward()
            assert model.first.weight.grad[outside].all()  # type: ignore[index]
        with ddp.no_sync():
            ddp(X).backward()
        assert_zero_outside(model)
        optimizer.step()
        assert not model.first.weight[outside].any()
        optimizer.zero_grad()


@pytest.mark.usefixtures("group")
def test_shards(zeroed: Zeroed) -> None:
    model, run = trained()
    fully_shard(model)
    for synchronised in (True, False, True):
        model.set_requires_gradient_sync(synchronised)  # type: ignore[operator]
        run(X).backward()
    for name, mask in element_masks(model).items():
        gradient = model.get_parameter(name).grad
        assert isinstance(gradient, DTensor)
        assert not gradient.full_tensor()[~mask].any()
        assert gradient.full_tensor()[mask].all()
