"""Values that a program writes outside the masks of weights that are spread over ranks, with a trace and without: each
rank finds those in its own part, at one step or within as many as it takes to look at all rows, and no rank waits for
another because of it. And gradients and state that lie in memory otherwise than their weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from oracles import assert_same_course
from parallel_cases import ROUNDINGS, assert_zero_outside, mse, tensor_parallel
from ranks import batches, mine, net, results_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mst_compile import Constant, MSTWarning, sparsifier, sparsify
from mst_compile.parallel.ranks import check_ranks
from mst_compile.state import lookout

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time


def sharded(model: nn.Module) -> nn.Module:
    for block in (model.first, model.second):
        fully_shard(block)
    return fully_shard(model)


def both(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    tensor_parallel(model, mesh["tp"])
    return fully_shard(model, mesh=mesh["dp"])


LAYOUTS: list[Callable[[nn.Module], nn.Module]] = [sharded, tensor_parallel, both]


class Trained:
    """A sparse model on ranks, and the steps that it takes."""

    def __init__(self, layout: Callable[[nn.Module], nn.Module], interval: int = 10**6) -> None:
        self.model = layout(sparsify(net(), Constant(0.6, interval=interval, growth="gradient", gradient_steps=2)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self._data = batches()
        self._cut = (lambda x: x) if layout is tensor_parallel or layout is both else mine

    def step(self, write: Callable[[nn.Module], None] | None = None) -> list[str]:
        """One step, with ``write`` after the gradients have come; what was said."""
        x, y = next(self._data)
        mse(self.model(self._cut(x)), self._cut(y)).backward()
        if write is not None:
            write(self.model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return [str(w.message) for w in said if issubclass(w.category, MSTWarning)]

    def steps_to_see(self) -> int:
        return sum(lookout._steps_of(w.grid) for w in sparsifier(self.model)._run.weights)

    def steps(self, count: int) -> list[str]:
        return [text for _ in range(count) for text in self.step()]


def weights(model: nn.Module) -> list[DTensor]:
    return [p for _, p in sparsifier(model).parameters()]  # type: ignore[misc]


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def without_a_trace() -> None:
    """By all ranks everywhere, and by one in a single row of a single weight."""
    for layout in LAYOUTS:
        run = Trained(layout)
        run.steps(2)
        for p in weights(run.model):
            p.to_local().detach().data.add_(0.1)
        said = run.steps(run.steps_to_see())
        assert any("without a trace" in text for text in said), (layout, said)
        assert_zero_outside(run.model, run.optimizer)
        run = Trained(layout)
        run.steps(2)
        if dist.get_rank() == 1:
            weights(run.model)[2].to_local().detach().data[-1].fill_(0.1)
        said = run.steps(run.steps_to_see())
        assert any("without a trace" in text for text in said) == (dist.get_rank() == 1), (layout, said)
        assert_zero_outside(run.model, run.optimizer)
        check_ranks(run.model)


def every_row_in_turn() -> None:
    """A few at each step, of parts that begin within blocks."""
    before, lookout._ELEMENTS = lookout._ELEMENTS, 100
    try:
        for layout in LAYOUTS[:2]:
            run = Trained(layout)
            run.steps(2)
            needed = run.steps_to_see()
            assert needed > 8
            for row in (0, 3, -1):
                local = weights(run.model)[0].to_local().detach()
                local.data[row] = 1.0
                said = run.steps(needed)
                assert any("outside the active blocks of" in text for text in said), (layout, row)
                assert_zero_outside(run.model, run.optimizer)
    finally:
        lookout._ELEMENTS = before


def with_a_trace() -> None:
    """At the next step, by whoever has written."""
    for layout in LAYOUTS:
        run = Trained(layout)
        run.steps(2)
        if dist.get_rank() == 0:
            with torch.no_grad():
                weights(run.model)[1].to_local().add_(0.1)
        said = run.step()
        assert any("set to 0" in text and "trace" not in text for text in said) == (dist.get_rank() == 0), (
            layout,
            said,
        )
        assert_zero_outside(run.model, run.optimizer)


def gradients_through_events() -> None:
    """One rank writes to its gradients, again and again: from the second time on it looks at every step, and scores are
    still read by all ranks together."""

    def write(model: nn.Module) -> None:
        if dist.get_rank() == 0:
            for p in weights(model):
                p.grad.to_local().detach().data.add_(1.0)  # type: ignore[union-attr]

    for layout in LAYOUTS[:2]:
        run = Trained(layout, interval=4)
        run.steps(2)
        for step in range(20):
            run.step(write)
            if step > 12:
                assert_zero_outside(run.model, run.optimizer)
        check_ranks(run.model)
        assert sparsifier(run.model).weights["first.up.weight"].changes > 3


def closures_after_a_write() -> None:
    """A closure runs twice on a step whose gradients growth reads: what one rank has found does not part the ranks."""
    run = Trained(sharded, interval=3)
    x, y = next(batches(1))

    def closure() -> torch.Tensor:
        loss = mse(run.model(mine(x)), mine(y))
        loss.backward()
        return loss

    for _ in range(9):
        if dist.get_rank() == 1:
            for p in weights(run.model):
                p.to_local().detach().data.add_(0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.optimizer.step(closure)
    check_ranks(run.model)
    assert_zero_outside(run.model, run.optimizer)


def turned(tensor: DTensor) -> DTensor:
    """The same values, lying in memory by columns on each rank."""
    local = tensor.to_local().t().contiguous().t()
    told = tensor.device_mesh, tensor.placements
    return DTensor.from_local(local, *told, run_check=False, shape=tensor.shape, stride=(1, tensor.shape[0]))


def strides_of_gradients_and_state() -> None:
    """Fused optimizers that know DTensors (Adam, AdamW; PyTorch refuses SGD and Adagrad) look at no strides."""
    for layout in LAYOUTS:
        for kind in (torch.optim.Adam, torch.optim.AdamW):
            ends = []
            for fused, turn in ((True, True), (False, False)):
                run = Trained(layout, interval=3)
                run.optimizer = kind(weights(run.model), 0.01, fused=fused)  # PyTorch takes no plain ones beside

                def write(model: nn.Module, turn: bool = turn) -> None:
                    for p in weights(model) if turn else ():
                        p.grad = turned(p.grad)

                for step in range(4):
                    run.step(write)
                    if step == 1 and turn:
                        state = run.optimizer.state_dict()
                        for entry in state["state"].values():
                            entry |= {k: turned(v) for k, v in entry.items() if isinstance(v, DTensor) and v.dim() == 2}
                        run.optimizer.load_state_dict(state)
                assert_zero_outside(run.model, run.optimizer)
                ends.append([p.detach().full_tensor() for p in weights(run.model)])
            for one, other in zip(*ends, strict=True):
                assert_same_course(one, other, ROUNDINGS)


SCENARIOS = [
    without_a_trace, every_row_in_turn, with_a_trace, gradients_through_events, closures_after_a_write,
    strides_of_gradients_and_state,
]  # fmt: skip
found = results_of(SCENARIOS, 2)


@pytest.mark.parametrize("name", [s.__name__ for s in SCENARIOS])
def test_writes_on_two_ranks(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]
