"""Anything that a training program does, in any order: compiled mode equals eager mode at every call, zeros are kept,
the density is the schedule's, and steps are counted as they were taken."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from helpers import compiled
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mask_cases import element_masks
from oracles import assert_reordered
from torch import Tensor, nn

from mst_compile import Constant, MixedSparsity, densify, sparsifier, sparsify
from mst_compile.rules.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(0.6, interval=3),
    "gradients": Constant(0.6, interval=2, growth="gradient"),
    "young": Constant(0.6, interval=3, growth="random", regrown="own steps", regrown_warmup=3),
    "mixed": MixedSparsity.published(16, 0.7, warmup=4, restoration=4, settle=2, interval=2, ramp_interval=1),
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
}
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))


class Tiny(nn.Module):
    """Two weights of 4 x 2 and 2 x 4 blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def loss_of(run: Any) -> Tensor:
    return (run(X) - X.roll(1, 1)).square().mean()


class Stop(Exception):
    """What a program raises in the middle of a step."""


class Training(RuleBasedStateMachine):
    """``settled``: whether weights and state must be 0 outside, as an optimizer has stepped since anybody wrote."""

    @initialize(schedule=st.sampled_from(sorted(SCHEDULES)), optimizer=st.sampled_from(sorted(OPTIMIZERS)))
    def begin(self, schedule: str, optimizer: str) -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        self.schedule, self.kind = SCHEDULES[schedule], optimizer
        self.model = sparsify(Tiny(), self.schedule, block=4)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.count, self.settled, self.sparse = 0, False, True
        self.saved: dict[str, Any] = {}
        self.expect()
        self.trained: set[str] = set()

    # -- what should be --

    def expect(self) -> None:
        """The numbers of active blocks that the schedule asks for now."""
        own = sparsifier(self.model)
        densities = own.densities(self.schedule.sparsity_at(self.count))
        blocks = {w.name: w.blocks_at(d) for w, d in zip(own.weights.values(), densities, strict=True)}
        self.active = blocks

    def counted(self) -> None:
        """A training step was taken."""
        self.settled = True
        if not self.sparse:
            return
        self.count += 1
        names = {n for n, p in self.model.named_parameters() if p.grad is not None}
        self.trained |= names & self.active.keys()
        if self.schedule.is_topology_event(self.count):
            before = dict(self.active)
            self.expect()
            for name, parameter in self.model.named_parameters():
                if name in before and (not parameter.requires_grad or (self.trained and name not in self.trained)):
                    self.active[name] = before[name]
            self.trained = set()

    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.model.parameters())

    def frozen(self) -> bool:
        return any(not p.requires_grad for p in self.model.parameters())

    # -- steps --

    @rule(mode=st.booleans(), times=st.integers(1, 2))
    def backward(self, mode: bool, times: int) -> None:
        run = compiled(self.model) if mode else self.model
        for _ in range(times):
            loss_of(run).backward()

    @rule()
    def backward_by_hand(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for p, g in zip(parameters, torch.autograd.grad(loss_of(self.model), parameters), strict=True):
            p.grad = g

    @precondition(lambda self: self.has_gradients())
    @rule(how=st.sampled_from(["noise", "clip", "double"]))
    def write_gradients(self, how: str) -> None:
        for p in self.model.parameters():
            if p.grad is not None and how == "noise":
                p.grad.add_(0.01)
            elif p.grad is not None and how == "double":
                p.grad = p.grad * 2
        if how == "clip":
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    @precondition(lambda self: self.has_gradients())
    @rule(zero=st.booleans())
    def step(self, zero: bool) -> None:
        self.optimizer.step()
        self.counted()
        if zero:
            self.optimizer.zero_grad()

    @rule(mode=st.booleans())
    def step_with_closure(self, mode: bool) -> None:
        run = compiled(self.model) if mode else self.model

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(run)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.counted()

    @precondition(lambda self: self.has_gradients())
    @rule(noise=st.booleans())
    def step_with_hook(self, noise: bool) -> None:
        """A hook that runs after ours writes to the gradients; nothing else follows."""

        def write(*_: Any) -> None:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad.add_(0.01 * noise)

        handle = self.optimizer.register_step_pre_hook(write)
        self.optimizer.step()
        handle.remove()
        self.counted()
        self.optimizer.zero_grad()

    @rule(where=st.sampled_from(["closure", "before", "after"]), error=st.sampled_from([Stop, KeyboardInterrupt]))
    def step_that_fails(self, where: str, error: type[BaseException]) -> None:
        def fail(*_: Any) -> None:
            raise error

        # A step that has raised was one if it has moved sparse weights.
        moves = where == "after" and any(layer.weight.grad is not None for layer in (self.model.up, self.model.down))
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if where == "closure":
            with pytest.raises(error):
                self.optimizer.step(fail)
        else:
            hook = self.optimizer.register_step_pre_hook if where == "before" else (
                self.optimizer.register_step_post_hook
            )  # fmt: skip
            handle = hook(fail)
            with pytest.raises(error):
                self.optimizer.step()
            handle.remove()
        assert [group["lr"] for group in self.optimizer.param_groups] == rates
        if moves:
            self.counted()

    @precondition(lambda self: self.has_gradients())
    @rule()
    def step_that_is_skipped(self) -> None:
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.fill_(torch.inf)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()

    @rule()
    def another_model_trains(self) -> None:
        other = sparsify(Tiny(), SCHEDULES["constant"], block=4)
        optimizer = torch.optim.SGD(other.parameters(), 0.1)
        for _ in range(3):
            loss_of(other).backward()
            optimizer.step()
        assert sparsifier(other).step_count == 3

    # -- writes, copies, checkpoints --

    @rule(how=st.sampled_from(["copy", "data", "vector", "reset"]))
    def write(self, how: str) -> None:
        self.settled = False
        if how == "vector":
            vector = nn.utils.parameters_to_vector(self.model.parameters()).detach()
            nn.utils.vector_to_parameters(vector + 0.01, self.model.parameters())
        elif how == "reset":
            for layer in (self.model.up, self.model.down):
                layer.reset_parameters()
        else:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.copy_(p + 0.01) if how == "copy" else p.data.add_(0.01)
        if how == "data":  # leaves no trace: seen where training and evaluation change places
            compiled(self.model)(X)

    @rule(with_optimizer=st.booleans())
    def deepcopy(self, with_optimizer: bool) -> None:
        if with_optimizer:
            self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))
        else:
            self.model = copy.deepcopy(self.model)
            self.optimizer, self.settled = OPTIMIZERS[self.kind](self.model.parameters()), False

    @precondition(lambda self: self.sparse)
    @rule()
    def save(self) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "sparsifier": sparsifier(self.model)}
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        state = buffer.getvalue()
        self.saved = {"state": state, "count": self.count, "active": dict(self.active), "trained": set(self.trained),
                      "kind": self.kind}  # fmt: skip

    @precondition(lambda self: self.saved and self.sparse and self.saved["kind"] == self.kind)
    @rule(parts=st.permutations(["model", "optimizer", "sparsifier"]), round_trip=st.booleans())
    def load(self, parts: list[str], round_trip: bool) -> None:
        state = torch.load(io.BytesIO(self.saved["state"]), weights_only=True)
        for part in parts:
            target = {"model": self.model, "optimizer": self.optimizer, "sparsifier": sparsifier(self.model)}[part]
            if round_trip and part == "optimizer":
                self.optimizer.load_state_dict(self.optimizer.state_dict())
            target.load_state_dict(state[part])  # type: ignore[attr-defined]
        self.count, self.active = self.saved["count"], dict(self.saved["active"])
        self.trained, self.settled = set(self.saved["trained"]), False
        for name, p in self.model.named_parameters():
            assert torch.equal(p, state["model"][name]), "nothing is cut by loading"
        for name, mask in state["sparsifier"]["masks"].items():
            assert torch.equal(sparsifier(self.model).masks[name], mask)

    @precondition(lambda self: self.saved and self.sparse)
    @rule()
    def load_the_weights_alone(self) -> None:
        self.model.load_state_dict(torch.load(io.BytesIO(self.saved["state"]), weights_only=True)["model"])
        self.settled = False

    @rule(name=st.sampled_from(["up.weight", "down.weight"]), frozen=st.booleans())
    def freeze(self, name: str, frozen: bool) -> None:
        parameter = self.model.get_parameter(name)
        parameter.requires_grad_(not frozen)
        parameter.grad = None
        self.settled &= frozen  # what was written to a frozen weight is settled once it is trained again

    @rule(make=st.sampled_from(sorted(OPTIMIZERS)))
    def another_optimizer(self, make: str) -> None:
        self.kind, self.optimizer, self.settled = make, OPTIMIZERS[make](self.model.parameters()), False

    @precondition(lambda self: self.sparse)
    @rule()
    def end_sparse_training(self) -> None:
        densify(self.model)
        self.sparse, self.saved = False, {}

    @precondition(lambda self: not self.sparse)
    @rule(schedule=st.sampled_from(sorted(SCHEDULES)))
    def sparsify_again(self, schedule: str) -> None:
        self.schedule = SCHEDULES[schedule]
        sparsify(self.model, self.schedule, block=4, include="*.weight", rescale=False)
        self.sparse, self.count, self.trained, self.settled = True, 0, set(), False
        self.expect()

    # -- what holds after each of them --

    @invariant()
    def compiled_equals_eager(self) -> None:
        with torch.no_grad():
            assert_reordered(compiled(self.model)(X), self.model(X), 64)

    @invariant()
    def zeros_are_kept(self) -> None:
        if not (self.sparse and self.settled):
            return
        parameters = dict(self.model.named_parameters())
        for name, mask in element_masks(self.model).items():
            p = parameters[name]
            if not p.requires_grad:
                continue  # keeps what was written to it
            assert not p.detach()[~mask].any(), name
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    assert not value[~mask].any(), f"{key} of {name}"

    @invariant()
    def the_count_and_the_density_are_right(self) -> None:
        if not self.sparse:
            return
        own = sparsifier(self.model)
        assert own.step_count == self.count
        for name, weight in own.weights.items():
            active, wanted, (rows, cols) = int(weight.mask.sum()), self.active[name], weight.grid.shape
            # A guard keeps every row and column alive, which may take more blocks than are wanted.
            assert active == wanted or max(rows, cols, wanted) <= active < rows + cols, name


Training.TestCase.settings = settings(max_examples=500, stateful_step_count=30)
TestTraining = Training.TestCase
TestTraining.pytestmark = [pytest.mark.xdist_group("state machine")]  # groups are begun first, and this takes longest
