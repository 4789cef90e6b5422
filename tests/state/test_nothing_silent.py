"""What does not train, or trains on dense products, keeps what it has and is said."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import Blocks, compiled, static
from situations import X, same, train
from torch import Tensor, nn
from training import loss_of

from mst_compile import Constant, MSTWarning, densify, explain, sparsifier, sparsify
from mst_compile.errors import SelectionError, WeightError

# -- frozen and idle weights -------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two experts, of which the first alone sees tokens unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor, which: int = 0) -> Tensor:
        return x + self.experts[which](x)


@pytest.mark.parametrize("resumed", [False, True])
def test_idle_experts_and_frozen_weights_keep_everything(resumed: bool) -> None:
    torch.manual_seed(0)
    schedule = Constant(0.7, interval=3, growth="random")
    model = sparsify(Experts(), schedule)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    (model(X, 1).square().mean() + model(X, 0).square().mean()).backward()  # both: step 1
    optimizer.step()
    optimizer.zero_grad()
    for step in range(2, 12):
        if step == 5 and resumed:
            state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            model = sparsify(Experts(), schedule)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        if step == 4:  # the event of step 3 was the idle one's last
            idle = {
                "mask": sparsifier(model).masks["experts.1.weight"],
                "value": model.experts[1].weight.detach().clone(),
            }
        loss_of(model, X).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(sparsifier(model).masks["experts.1.weight"], idle["mask"])
    assert torch.equal(model.experts[1].weight, idle["value"])
    assert sparsifier(model).weights["experts.0.weight"].changes > 2
    model.experts[0].weight.requires_grad_(False)
    model.experts[0].weight.grad = None
    before = sparsifier(model).masks["experts.0.weight"], model.experts[0].weight.detach().clone()
    for _ in range(7):
        loss_of(model, X).backward()
        optimizer.step()
    assert torch.equal(sparsifier(model).masks["experts.0.weight"], before[0])
    assert torch.equal(model.experts[0].weight, before[1])


def test_a_schedule_that_stands_still_is_said() -> None:
    """An adapter on a frozen sparse base."""
    model = sparsify(Blocks(), static())
    for p in model.parameters():
        p.requires_grad_(False)
    model.adapter = nn.Linear(32, 32)
    optimizer = torch.optim.SGD(model.adapter.parameters(), 0.1)

    def step() -> None:
        model.adapter(model(X)).square().mean().backward()
        optimizer.step()

    for _ in range(9):
        step()
    with pytest.warns(MSTWarning, match=r"does not advance: SGD has stepped 10 times but trains other Parameters"):
        step()


@pytest.mark.parametrize("other", ["sparse", "dense"])
def test_a_model_whose_optimizer_is_yet_to_step_does_not_stand_still(other: str) -> None:
    """Two models that train in turn, each through the other: one takes all its steps first, while gradients, never set
    to 0, lie about in the one that waits. Only where no optimizer has its weights is there something to say."""

    def pair() -> tuple[nn.Module, nn.Module]:
        waits, trains = sparsify(Blocks(), Constant(0.5, growth="none")), Blocks()
        return waits, sparsify(trains, static()) if other == "sparse" else trains

    def steps(waits: nn.Module, trains: nn.Module, count: int) -> None:
        optimizer = torch.optim.SGD(trains.parameters(), 1e-3)
        for _ in range(count):
            trains(waits(X)).square().mean().backward()
            optimizer.step()

    waits, trains = pair()
    turns = torch.optim.SGD(waits.parameters(), 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled", MSTWarning)
        steps(waits, trains, 25)
        turns.step()
    assert sparsifier(waits).step_count == 1
    with pytest.warns(MSTWarning, match=r"does not advance: SGD has stepped 10 times but owns none of the sparse"):
        steps(*pair(), 11)


# -- nothing is dense in silence ---------------------------------------------------------------------------------------


def test_sparsify_after_the_first_compiled_call() -> None:
    model = Blocks()
    run = compiled(model)
    run(X)
    sparsify(model, static(0.3), block=8)
    run(X)
    assert all(row.kernel == "block-sparse" for row in explain(model))
    densify(model)
    sparsify(model, static(), block=4)  # another grid than compiled graphs know
    run(X)
    assert all(row.kernel == "block-sparse" for row in explain(model))


def test_weights_that_no_graph_takes_are_named() -> None:
    model = sparsify(Blocks(), static())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(
        MSTWarning, match=r"no graph compiled by backend=\"mst\" has taken layers\.0\.1\.weight, .*1 more"
    ):
        train(model, optimizer, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 20)
        other = sparsify(Blocks(), static())
        train(compiled(other), torch.optim.SGD(other.parameters(), 0.1), 12)


def test_explain_says_what_runs_now() -> None:
    model = sparsify(Blocks(), static())
    compiled(model)(X)
    assert {row.kernel for row in explain(model)} == {"block-sparse"}
    for name, weight in sparsifier(model).weights.items():
        sparsifier(model).apply_mask(name, torch.ones_like(weight.mask))
    compiled(model)(X)
    rows = explain(model)
    assert all(row.kernel == "dense" and "dense products at the present density" in row.status for row in rows)


def test_a_module_that_was_replaced() -> None:
    model = sparsify(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), static())
    model[0] = nn.Linear(32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_of(model, X).backward()
    with pytest.raises(WeightError, match=r"0\.weight is another Parameter than the one that was made sparse"):
        optimizer.step()


def test_a_sparse_model_after_its_dense_twin() -> None:
    """Dynamo lets them share a graph, whichever it was compiled for."""
    dense = Blocks()
    first = compiled(dense)
    first(X)
    model = sparsify(Blocks(), static())
    second = compiled(model)
    same(model, second)
    assert all(row.kernel == "block-sparse" for row in explain(model))
    same(dense, first)
    other = sparsify(Blocks(), static())
    same(other, compiled(other))
    assert all(row.kernel == "block-sparse" for row in explain(other))


@pytest.mark.parametrize("how", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_a_torch_compile_that_is_turned_off_is_named(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is compiled as it should be: to compile it would be no advice."""
    monkeypatch.setenv(how, "1")
    monkeypatch.setattr(torch._dynamo.config, "disable", how == "TORCH_COMPILE_DISABLE")  # read at its import
    model = sparsify(nn.Linear(32, 32), static())
    run = torch.compile(model, backend="mst")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def steps() -> None:
        for _ in range(12):
            run(torch.randn(4, 32)).sum().backward()
            optimizer.step()

    with pytest.warns(MSTWarning, match=r"no graph compiled.*torch.compile is turned off.*TORCHDYNAMO_DISABLE.*unset"):
        steps()


# -- experts in one Parameter ------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Four experts as a stack of matrices, beside what only looks like one."""

    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, width, hidden) / 4)
        self.down = nn.Parameter(torch.randn(4, hidden, width) / 8)
        self.token = nn.Parameter(torch.randn(1, 8, width))  # one matrix is no stack
        self.kernel = nn.Conv1d(width, width, 5, padding=2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.kernel(x.mT).mT + self.token
        return self.out((torch.bmm(x.expand(4, -1, -1), self.up).relu() @ self.down).sum(0))


def test_experts_in_one_parameter_stay_dense_and_are_named() -> None:
    with pytest.warns(MSTWarning, match=r"8,192 elements are in stacks of matrices.* have 256, so that little"):
        model = sparsify(Stacked(), static(), block=4)
    found = explain(model)
    dense = {row.name: row for row in found if row.kernel == "dense" and row.status.startswith("skipped")}
    assert set(dense) == {"up", "down"}
    assert dense["up"].shape == (4, 16, 64)
    assert "a stack of matrices" in dense["up"].status
    assert "4x16x64" in str(found)
    assert found.summary().endswith("; without 2 stacks of matrices")
    assert {tuple(row["shape"]) for row in found.to_dict()["weights"]} == {(16, 16), (4, 16, 64), (4, 64, 16)}
    x = torch.randn(1, 8, 16)
    torch.testing.assert_close(compiled(model)(x), model(x))


def test_few_stacked_elements_need_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        model = sparsify(nn.Sequential(Stacked(16, 16), nn.Linear(64, 256)), static(), block=4)
    assert {row.name for row in explain(model) if "stack" in row.status} == {"0.up", "0.down"}


def test_patterns_that_name_no_matrix_are_refused() -> None:
    with pytest.raises(
        SelectionError, match=r"'kernel.weight' names no matrix, only kernel.weight of shape \(16, 16, 5\);"
    ):
        sparsify(Stacked(), static(), include=["out", "kernel.weight"])
    with pytest.raises(
        SelectionError, match=r"'\*.bias' names no matrix, only kernel.bias of shape \(16,\) and 1 more"
    ):
        sparsify(Stacked(), static(), include=["out", "*.bias"])
    own = sparsifier(sparsify(Stacked(), static(), include="*[tu]*"))
    assert (set(own.weights), set(own.skipped)) == ({"up", "out.weight"}, {"token", "kernel.weight"})
