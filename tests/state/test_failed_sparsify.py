"""A ``sparsify`` that fails leaves nothing behind; one that succeeds draws masks that depend on nothing global."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Blocks, unchanged
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_compile import Constant, MixedSparsity, Schedule, explain, sparsifier, sparsify
from mst_compile.errors import MSTError, NotSparseError, ScheduleError, WeightError

SPARSE = Constant(0.7, growth="none")


class Three(nn.Module):
    """Of three layers the last has another weight."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        del self.layers[2].weight
        self.layers[2]._parameters["weight"] = weight


def parameter(change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    return lambda: nn.Parameter(change(torch.randn(32, 32)), requires_grad=False)


def under(context: Callable[[], Any]) -> Callable[[], Any]:
    def make() -> Any:
        with context():
            return nn.Parameter(torch.ones(32, 32))

    return make


WEIGHTS: dict[str, tuple[Callable[[], Any], str]] = {
    "row expanded": (parameter(lambda x: x[:1].expand(32, 32)), "share memory"),
    "column expanded": (parameter(lambda x: x[:, :1].expand(32, 32)), "share memory"),
    "number expanded": (parameter(lambda x: x[0, 0].expand(32, 32)), "share memory"),
    "sliding windows": (parameter(lambda x: x.flatten().unfold(0, 32, 1)[:32]), "share memory"),
    "coo": (parameter(lambda x: x.to_sparse()), "sparse_coo"),
    "csr": (parameter(lambda x: x.to_sparse_csr()), "sparse_csr"),
    "mkldnn": (parameter(lambda x: x.to_mkldnn()), "mkldnn"),
    "quantised": (parameter(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), "qint8"),
    "integer": (parameter(lambda x: x.int()), "int32"),
    "bool": (parameter(lambda x: x > 0), "bool"),
    "complex": (parameter(lambda x: x.to(torch.complex64)), "complex64"),
    "float8": (parameter(lambda x: x.to(torch.float8_e5m2)), "float8"),
    "meta": (parameter(lambda x: x.to("meta")), "meta device"),
    "fake": (under(FakeTensorMode), "fake"),
    "inference": (under(torch.inference_mode), "inference_mode"),
    "computed": (lambda: nn.Parameter(torch.ones(32, 32)) * 2, "no leaf"),
}


def nothing_left(model: nn.Module) -> None:
    with pytest.raises(NotSparseError):
        sparsifier(model)
    assert not any(hasattr(p, "_mst_weight") for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:.*quantiz.*")
@pytest.mark.parametrize("name", WEIGHTS)
def test_one_weight_that_cannot_be_sparse_leaves_all_as_they_were(name: str) -> None:
    make, word = WEIGHTS[name]
    model = Three(make())
    with unchanged(model.layers[0], model.layers[1]), pytest.raises(WeightError, match=word) as caught:
        sparsify(model, SPARSE, include="*")  # a frozen weight, which some of them must be, is left out unless named
    assert "layers.2.weight" in str(caught.value)
    nothing_left(model)
    assert set(vars(model.layers[0])) == set(vars(nn.Linear(2, 2)))
    sparsify(model, SPARSE, exclude="layers.2")  # as the message says
    assert len(sparsifier(model).weights) == 2


def test_scripted_modules() -> None:
    model = nn.Sequential(nn.Linear(32, 32), torch.jit.script(nn.Linear(32, 32)))
    with unchanged(model[0]), pytest.raises(WeightError, match=r"1\.weight belongs to a ScriptModule"):
        sparsify(model, SPARSE, include="*weight")
    with pytest.raises(MSTError, match="scripted"):
        sparsify(torch.jit.script(nn.Linear(32, 32)), SPARSE)
    nothing_left(model)


@pytest.mark.parametrize(
    "change", [lambda x: x.t(), lambda x: torch.randn(64, 64)[::2, ::2], lambda x: x.double(), lambda x: x.half()]
)
def test_weights_of_odd_forms_that_can_be_sparse(change: Callable[[Tensor], Tensor]) -> None:
    model = Three(nn.Parameter(change(torch.randn(32, 32))))
    assert len(sparsifier(sparsify(model, SPARSE)).weights) == 3


def columns(first: slice, second: slice) -> nn.Module:
    """Two layers whose weights are columns of one matrix."""
    matrix, model = torch.randn(32, 64), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].weight, model[1].weight = nn.Parameter(matrix[:, first]), nn.Parameter(matrix[:, second])
    return model


def tied_by_data() -> nn.Module:
    model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32))
    model[1].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize("make", [lambda: columns(slice(0, 32), slice(16, 48)), tied_by_data])
def test_parameters_that_share_memory(make: Callable[[], nn.Module]) -> None:
    model = make()
    with unchanged(model), pytest.raises(WeightError, match=r"\d\.weight shares memory with \d\.weight"):
        sparsify(model, SPARSE)
    nothing_left(model)
    apart = columns(slice(0, 32), slice(32, 64))
    assert len(sparsifier(sparsify(apart, SPARSE)).weights) == 2


def test_a_weight_that_shares_memory_with_one_of_another_module() -> None:
    one, other = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))
    other[0].weight.data = one[0].weight.data
    sparsify(one, SPARSE)
    with unchanged(one, other), pytest.raises(WeightError, match="shares memory"):
        sparsify(other, SPARSE)
    nothing_left(other)


# -- schedules that fail in the middle ---------------------------------------------------------------------------------


class Failing(Schedule):
    """A schedule whose calls are counted; from the ``last`` on each raises, or returns nonsense."""

    max_sparsity = 0.7
    growth = "mixed"

    def __init__(self, last: int, nonsense: list[Any]) -> None:
        self.left, self.nonsense = last, nonsense

    def _count(self, answer: Any) -> Any:
        self.left -= 1
        if self.left >= 0:
            return answer
        if self.nonsense:
            return self.nonsense[0]
        raise RuntimeError("the schedule's own error")

    def sparsity_at(self, step: int) -> float:
        return self._count(0.7)

    def is_topology_event(self, step: int) -> bool:
        return self._count(step == 4)

    def attention_at(self, step: int) -> str:
        return self._count("full")

    def drop_fraction_at(self, step: int) -> float:
        return self._count(0.1)


def calls() -> int:
    """Number of calls of a ``sparsify`` that succeeds."""
    schedule = Failing(1000, [])
    sparsify(Blocks(), schedule)
    return 1000 - schedule.left


@pytest.mark.parametrize("at", range(calls()))
def test_a_schedule_that_raises_at_any_of_its_calls(at: int) -> None:
    model = Blocks()
    with unchanged(model), pytest.raises(RuntimeError, match="own error"):
        sparsify(model, Failing(at, []))
    nothing_left(model)
    sparsify(model, SPARSE)


@pytest.mark.parametrize("value", [float("nan"), -1.0, 1.0, None, "much"])
def test_a_schedule_that_returns_nonsense(value: Any) -> None:
    """Whatever call it begins at: the error is ours, and nothing has changed; or no call was left to go wrong."""
    for at in range(calls()):
        model = Blocks()
        schedule = Failing(at, [value])
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        try:
            sparsify(model, schedule)
        except ScheduleError:
            assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
            nothing_left(model)
    with unchanged(model := Blocks()), pytest.raises(ScheduleError):
        sparsify(model, Failing(0, [value]))


class WrongLater(Schedule):
    """A schedule one of whose methods returns ``value`` at step 2, which has a topology event."""

    max_sparsity, growth = 0.7, "random"

    def __init__(self, method: str, value: Any) -> None:
        self.wrong = {method: value}

    def sparsity_at(self, step: int) -> float:
        return self.wrong.get("sparsity_at", 0.6) if step == 2 else 0.7

    def is_topology_event(self, step: int) -> bool:
        return step == 2

    def drop_fraction_at(self, step: int) -> float:
        return self.wrong.get("drop_fraction_at", 0.1) if step == 2 else 0.1


@pytest.mark.parametrize("method", ["sparsity_at", "drop_fraction_at"])
@pytest.mark.parametrize("value", [float("nan"), -0.5, 1.5, None, "much"])
def test_a_schedule_that_goes_wrong_later(method: str, value: Any) -> None:
    """The optimizer's step was one, and counts once; masks stay; another module's schedule goes on."""
    model = nn.Sequential(Blocks(), Blocks())
    sparsify(model[0], WrongLater(method, value))
    sparsify(model[1], SPARSE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks = sparsifier(model[0]).masks
    for step in range(1, 5):
        model(torch.randn(4, 32)).square().mean().backward()
        wrong = pytest.raises(ScheduleError, match=method) if step == 2 else contextlib.nullcontext()
        with wrong:
            optimizer.step()
        optimizer.zero_grad()
        assert [sparsifier(part).step_count for part in model] == [step, step]
    assert all(torch.equal(masks[n], m) for n, m in sparsifier(model[0]).masks.items())


def test_an_interrupt_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mst_compile.state.run.plan_first_masks", interrupt)
    model = Blocks()
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        sparsify(model, SPARSE)
    nothing_left(model)


# -- nothing global ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


GLOBAL: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "meta context": lambda: torch.device("meta"),
    "seed": lambda: seeded(7),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


def events(model: nn.Module, context: Callable[[], Any]) -> dict[str, Tensor]:
    """The masks after training in a context that surrounds the steps alone."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(5):
        x = torch.randn(4, 32, generator=generator)
        model(x).square().mean().backward()
        with context():
            optimizer.step()
            explain(model)
        optimizer.zero_grad()
    return sparsifier(model).masks


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("block", [1, 8])
def test_masks_depend_on_nothing_global(name: str, block: int) -> None:
    schedule = MixedSparsity.published(40, 0.7, warmup=0, interval=2, growth="mixed")
    torch.manual_seed(0)
    one, other = Blocks(), Blocks()
    other.load_state_dict(one.state_dict())
    sparsify(one, schedule, block=block)
    with GLOBAL[name]():
        before = torch.random.get_rng_state()
        sparsify(other, schedule, block=block)
        assert torch.equal(torch.random.get_rng_state(), before)
    for first, second in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)
    masks = sparsifier(other).masks
    assert all(torch.equal(m, masks[n]) for n, m in sparsifier(one).masks.items())
    if name != "inference":
        expected, found = events(one, contextlib.nullcontext), events(other, GLOBAL[name])
        assert all(torch.equal(m, found[n]) for n, m in expected.items())
        assert not all(torch.equal(m, masks[n]) for n, m in expected.items())
