"""Optimizers around others, and what is kept in odd places: slow copies, closures by hand, containers, numbers."""

from __future__ import annotations

import collections
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks
from torch import Tensor, nn
from training import batches, loss_of

from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.errors import MSTWarning
from mst_compile.state import optimizers

STEPS = 14
SCHEDULE = MixedSparsity(STEPS, 0.75, warmup=3, restoration=4, settle=2, interval=2, ramp_interval=1, growth="random")
FOREVER = Constant(0.6, interval=3, growth="random")


class Slow(torch.optim.Optimizer):
    """Lookahead as it is often written (arXiv 1907.08610): PyTorch's constructor is never called, so that no hook sees
    its steps, and the slow copies are written to weights through ``.data`` when the inner optimizer has stepped."""

    def __init__(self, inner: torch.optim.Optimizer, k: int = 2) -> None:
        self.inner, self.k, self.count = inner, k, 0
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.state: Any = collections.defaultdict(dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.detach().clone())
            if self.count % self.k == 0:
                slow += 0.5 * (p.data - slow)
                p.data.copy_(slow)


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware steps by hand, and an average of gradients: it moves weights there and back, and only the
    optimizer inside ever steps."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})
        self.inner = torch.optim.SGD(self.param_groups, 1e-2, momentum=0.9)

    @torch.no_grad()
    def there(self) -> None:
        for p in self._with_gradients():
            average = self.state[p].setdefault("average", torch.zeros_like(p))
            average.lerp_(p.grad, 0.1)
            self.state[p]["old"] = p.detach().clone()
            p.add_(average, alpha=0.05)

    @torch.no_grad()
    def back(self) -> None:
        for p in self._with_gradients():
            p.data = self.state[p].pop("old")
        self.inner.step()

    def _with_gradients(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


class Odd(torch.optim.Optimizer):
    """Momentum in a dict, old gradients in a deque, and numbers beside the parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["k"] = self.state.get("k", torch.tensor(0)) + 1  # type: ignore[index]
        self.state["n"] = 3  # type: ignore[index, assignment]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["by"] = {beta: torch.zeros_like(p) for beta in (0.0, 0.9)}
                state["queue"] = collections.deque()
            for beta, average in state["by"].items():
                average.mul_(beta).add_(p.grad)
                p.sub_(average, alpha=1e-2)
            state["queue"].append(p.grad.clone())
            if len(state["queue"]) > 3:
                p.sub_(state["queue"].popleft(), alpha=1e-2)


class Even(torch.optim.Optimizer):
    """What all elements of a row move by alike, divided by their own second moment: not 0 where gradients are."""

    def __init__(self, params: Any, wait: int = 0) -> None:
        super().__init__(params, {"lr": 1e-3, "wait": wait})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                own = state.setdefault("square", torch.zeros_like(p))
                update = p.grad if state["count"] <= group["wait"] else p.grad + p.grad.mean(-1, keepdim=True)
                own.lerp_(update.square(), 0.1)
                update = update / (own.sqrt() + 1e-8)
                p.sub_(update / update.norm(), alpha=0.1)


def plain(optimizer: Any, model: nn.Module, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    model.zero_grad()


def twice(optimizer: Any, model: nn.Module, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.there()
    model.zero_grad()
    loss_of(model, x).backward()
    optimizer.back()
    model.zero_grad()


Maker = Callable[[nn.Module], Any]
RUNS: dict[str, tuple[Maker, Any]] = {
    "slow": (lambda m: Slow(torch.optim.AdamW(m.parameters(), 1e-2)), plain),
    "sharp": (lambda m: Sharp(m.parameters()), twice),
    "odd": (lambda m: Odd(m.parameters(), {}), plain),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled by backend", MSTWarning)
        yield


def start(make: Maker, schedule: Any = SCHEDULE) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = sparsify(Blocks(), schedule, block=4)
    return model, make(model)


def kept(optimizer: Any, p: nn.Parameter) -> list[Tensor]:
    """All that is kept of a weight and has its shape, by the optimizer and the one inside."""
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.extend([value] if value.shape == p.shape else [])
        elif isinstance(value, dict):
            list(map(walk, value.values()))
        elif isinstance(value, collections.deque):
            list(map(walk, value))

    for one in (optimizer, getattr(optimizer, "inner", None)):
        walk({} if one is None else one.state.get(p, {}))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_all_that_is_kept_of_them_are_zero_outside_the_masks(name: str) -> None:
    make, step = RUNS[name]
    model, optimizer = start(make)
    masks = []
    for number, x in enumerate(batches(STEPS), 1):
        step(optimizer, model, x)
        assert sparsifier(model).step_count == number
        masks.append(sparsifier(model).masks)
        for n, mask in element_masks(model).items():
            p = model.get_parameter(n)
            assert not p.detach()[~mask].any()
            own = kept(optimizer, p)
            assert own
            assert not any(value[~mask].any() for value in own), number
    assert any(not bool(mask.all()) for mask in masks[5].values())
    assert sparsifier(model).density == 1.0


def test_a_block_that_grows_again_begins_without_what_was_kept_of_it() -> None:
    model, optimizer = start(RUNS["slow"][0], FOREVER)
    before = element_masks(model)
    for x in batches(3):
        plain(optimizer, model, x)
    for n, mask in element_masks(model).items():
        new = mask & ~before[n]
        assert bool(new.any())
        assert all(not value[new].any() for value in kept(optimizer, model.get_parameter(n)))


@pytest.mark.parametrize("at", [4, 6])
@pytest.mark.parametrize("name", ["odd", "even"])
def test_a_run_resumes_bit_for_bit(name: str, at: int) -> None:
    """Also where state is not 0 outside the active blocks: it comes back as it was."""
    make: Maker = RUNS["odd"][0] if name == "odd" else lambda m: Even(m.parameters())
    data = list(batches(STEPS))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*square, not 0 where weight and gradient are", MSTWarning)
        model, optimizer = start(make, FOREVER)
        for x in data[:at]:
            plain(optimizer, model, x)
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        again, other = start(make, FOREVER)
        again.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        assert sparsifier(again).step_count == at
        for x in data[at:]:
            plain(optimizer, model, x)
            plain(other, again, x)
    for (n, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), n


def test_state_beside_parameters_goes_through_a_state_dict() -> None:
    model, optimizer = start(RUNS["odd"][0], FOREVER)
    plain(optimizer, model, next(iter(batches(1))))
    state = optimizer.state_dict()["state"]
    assert int(state["k"]) == 1
    assert state["n"] == 3
    assert "mst_topology" in state[next(i for i, p in enumerate(model.parameters()) if p.dim() == 2)]
    assert "mst_topology" not in optimizer.state[next(p for p in model.parameters() if p.dim() == 2)]


def test_what_fills_state_after_many_steps_is_said() -> None:
    """An eighth step, say: who looked at the first ones alone would have seen zeros."""
    model, optimizer = start(lambda m: Even(m.parameters(), wait=6), FOREVER)
    data = list(batches(STEPS))

    def go_on(steps: list[Tensor]) -> None:
        for x in steps:
            plain(optimizer, model, x)

    go_on(data[:6])
    with pytest.warns(MSTWarning, match="square, not 0 where weight and gradient are"):
        go_on(data[6:])


def test_state_by_tensors_is_named_by_their_shape() -> None:
    model, optimizer = start(RUNS["odd"][0], FOREVER)
    p = next(q for q in model.parameters() if q.dim() == 2)
    optimizer.state["reference"] = {p: torch.zeros(7, 5)}
    assert optimizers.survey(optimizer).foreign == {
        f"a tensor of shape {tuple(p.shape)}": f"a tensor of shape {tuple(p.shape)} of shape (7, 5)"
    }


def test_optimizers_of_other_models_are_left_alone() -> None:
    other = nn.Linear(32, 64)
    apart = Odd(other.parameters(), {})
    other(torch.ones(2, 32)).sum().backward()
    apart.step()
    before = [value.clone() for value in kept(apart, other.weight)]
    model, optimizer = start(RUNS["odd"][0], FOREVER)
    for x in batches(4):
        plain(optimizer, model, x)
    assert all(torch.equal(a, b) for a, b in zip(before, kept(apart, other.weight), strict=True))


def test_what_is_added_behind_a_step_is_cut_and_its_share_said_however_small() -> None:
    """As some sharpness-aware optimizers do: two digits of a percentage would say that nothing was cut."""
    model, optimizer = start(lambda m: torch.optim.SGD(m.parameters(), 1e-2), Constant(0.6, growth="none"))
    data = list(batches(2))
    plain(optimizer, model, data[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-6)
    with pytest.warns(MSTWarning, match=r"steps: less than 0\.01% of its squared magnitude"):
        plain(optimizer, model, data[1])
    assert all(not model.get_parameter(n).detach()[~mask].any() for n, mask in element_masks(model).items())
