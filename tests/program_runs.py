"""A run of a drawn program: a sparse model beside its simulation, compared after every operation."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import compiled
from hypothesis import reject
from net_cases import Experts, Model, loss_of
from oracles import assert_all_as_good_as, assert_same_bits, assert_within
from program_cases import LAWS, OPTIMIZERS, Batch, Maker, Program, schedule_of
from simulated_rules import Fact, Law
from simulation import Near, Part, Simulation
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

import mst_compile
from mst_compile.errors import BlockSizeError


@dataclass
class Sparse:
    """What is made of the library's side: anew where a run resumes."""

    model: Model
    optimizers: list[optim.Optimizer]
    schedulers: list[LambdaLR] = field(default_factory=list)


class Run:
    """A program's sparse model, and the simulation of it."""

    def __init__(self, program: Program) -> None:
        self.program, self.net = program, program.net
        self.sparse = self._make()
        plain = self.net.build()
        own = mst_compile.sparsifier(self.sparse.model)
        special = self._special(list(own.weights))
        facts = {
            n: Fact(w.grid.rows, w.grid.cols, w.grid.block, special.get(n), program.guard)
            for n, w in own.weights.items()
        }
        parts = [Part(o, self._maker(), laws) for o, laws in self._optimizers(plain, laws=True)]
        self.simulation = Simulation(plain, program.course, facts, parts)
        if program.course.sparsity_at(0) > 0:
            rescales = program.rescale and program.first == "random"
            self.simulation.begin(own.masks, rescales)
        self.schedulers = self._schedulers([part.optimizer for part in parts])
        self.wide = copy.deepcopy(plain).double() if program.mode != "plain" else None
        self.average: tuple[AveragedModel, AveragedModel] | None = None
        self.turned, self.frozen = False, set[str]()
        self.compare("at first")

    # -- making --

    def _special(self, names: list[str]) -> dict[str, float]:
        own = self.program.own
        return {} if own is None or own[0] is None else {n: own[0] for n in names if n.startswith("pieces.0.")}

    def _make(self) -> Sparse:
        p = self.program
        model = self.net.build()
        own = {} if p.own is None else {"pieces.0.*": mst_compile.Override(*p.own)}
        mst_compile.sparsify(
            model, schedule_of(p.course), block=p.block, include=self.net.include(), overrides=own or None,
            guard=p.guard, masks=p.first if p.course.sparsity_at(0) > 0 else None, rescale=p.rescale,  # type: ignore[arg-type]
        )  # fmt: skip
        optimizers = [optimizer for optimizer, _ in self._optimizers(model, laws=False)]
        return Sparse(model, optimizers, self._schedulers(optimizers))

    def _maker(self) -> Maker:
        return OPTIMIZERS[self.program.optimizer]

    def _optimizers(
        self, model: nn.Module, *, laws: bool
    ) -> Iterator[tuple[optim.Optimizer, list[tuple[Law, Law] | None]]]:
        """The optimizers of the program on ``model``: with the laws in their groups, or beside them."""
        make, layout = self._maker(), self.program.layout
        parameters = list(model.parameters())
        if layout == "two optimizers":
            for members in (parameters[::2], parameters[1::2]):
                if members:
                    optimizer = make(members)
                    yield optimizer, [None]
            return
        groups: list[dict[str, Any]] = [{"params": parameters}]
        found: list[tuple[Law, Law] | None] = [None]
        if layout == "param_groups":
            source = model if not laws else self.sparse.model
            groups = mst_compile.param_groups(source, weight_decay=0.05)
            found = [("density_rate" in g or None) and (1.0, "independent") for g in groups]
            if laws:  # the grouping is the library's, the law is not
                names = {id(p): n for n, p in source.named_parameters()}
                there = dict(model.named_parameters())
                groups = [
                    {"params": [there[names[id(p)]] for p in g["params"]], "weight_decay": g["weight_decay"]}
                    for g in groups
                ]
        elif layout.startswith("halves"):
            groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.02}]
            groups = [g for g in groups if g["params"]]
            found = [None] * len(groups)
            if ":" in layout:
                law = LAWS[layout.partition(": ")[2]]
                found[0] = law
                if not laws:
                    groups[0] |= {"density_rate": law[0], "density_decay": law[1]}
        yield make(groups), found

    def _schedulers(self, optimizers: list[optim.Optimizer]) -> list[LambdaLR]:
        if not self.program.warm:
            return []
        return [LambdaLR(o, lambda step: min(1.0, (step + 1) / 4) * 0.9**step) for o in optimizers]

    # -- computing --

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.net.autocast)

    def _call(self, model: nn.Module, batch: Batch, *, plain: bool = False) -> tuple[Tensor, ...]:
        run = model if plain or self.program.mode == "plain" else compiled(model, self.program.mode)
        torch.default_generator.manual_seed(batch[0])  # torch.manual_seed takes milliseconds
        with self._context():
            return run(*self.net.batch(*batch))

    @property
    def precision(self) -> torch.dtype:
        return torch.bfloat16 if self.net.autocast else self.net.dtype

    def _exactly(self, source: nn.Module, batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Outputs and gradients of a plain model in float64."""
        assert self.wide is not None
        with torch.no_grad():
            for wide, p in zip(self.wide.parameters(), source.parameters(), strict=True):
                wide.copy_(p.detach())
                wide.requires_grad_(p.requires_grad)
        for mine, its in zip(self.wide.modules(), source.modules(), strict=True):
            if isinstance(mine, Experts):
                mine.flag = its.flag  # type: ignore[assignment]
        x, more = self.net.batch(*batch)
        outputs = self.wide(x.double() if x.is_floating_point() else x, more.double())
        if not torch.is_grad_enabled():
            return outputs, {}
        named = {n: p for n, p in self.wide.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss_of(outputs), list(named.values()), allow_unused=True)
        return outputs, {n: g for n, g in zip(named, found, strict=True) if g is not None}

    def _backward(self, batch: Batch, scale: float = 1.0) -> Tensor:
        simulation = self.simulation
        real, plain = self.sparse.model, simulation.model
        if not any(p.requires_grad for p in real.parameters()):
            return torch.zeros(())
        before = {n: p.grad.detach().clone() for n, p in real.named_parameters() if p.grad is not None}
        got, want = self._call(real, batch), self._call(plain, batch, plain=True)
        loss, other = loss_of(got) * scale, loss_of(want) * scale
        loss.backward()
        other.backward()
        simulation.mask_gradients()
        if self.wide is None:
            assert_same_bits(loss.detach(), other.detach())
        else:
            self._adopt(got, want, before, batch, scale)
        return loss

    def _adopt(self, got: Any, want: Any, before: dict[str, Tensor], batch: Batch, scale: float) -> None:
        """Hold compiled outputs and gradients against float64, and let the simulation go on from these gradients."""
        plain = self.simulation.model
        exact, new = self._exactly(plain, batch)
        real = {n: p.grad for n, p in self.sparse.model.named_parameters() if p.grad is not None}
        usual = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
        assert real.keys() == usual.keys(), "gradients of the same parameters"
        truth = {n: before[n].double() if n in before else torch.zeros_like(g).double() for n, g in usual.items()}
        for name, gradient in new.items():
            truth[name] = truth[name] + scale * gradient
        outside = {}
        if self.simulation.sparse and not self.simulation.dense:
            names = {id(p): n for n, p in plain.named_parameters()}
            outside = {names[id(p)]: self.simulation.outside(n) for n, p in self.simulation.parameters.items()}
        for name, mask in outside.items():
            if name in truth:
                truth[name] = truth[name].masked_fill(mask, 0.0)
                if name in new:
                    assert not real[name][mask].any(), f"gradient of {name} outside its blocks"
        size = max([float(g.abs().max()) for g in truth.values()], default=0.0)
        outputs = [{f"output {i}": t.detach() for i, t in enumerate(outs)} for outs in (got, want, exact)]
        assert_all_as_good_as(*outputs, self.precision)
        assert_all_as_good_as(real, usual, truth, self.precision, dict.fromkeys(truth, size))
        for name, gradient in usual.items():
            if not torch.equal(gradient, real[name]):
                gradient.copy_(real[name])

    # -- operations --

    def step(self, batches: tuple[Batch, ...], clip: str, after: str) -> None:
        """Accumulate, clip, step, and forget the gradients or not."""
        for batch in batches:
            self._backward(batch, 1 / len(batches))
        for model in (self.sparse.model, self.simulation.model):
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            elif clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
        self._step()
        if after != "keep":
            self._zero(after == "none")

    def _step(self) -> None:
        if not any(p.grad is not None for p in self.sparse.model.parameters()):
            return
        for optimizer, part in zip(self.sparse.optimizers, self.simulation.parts, strict=True):
            optimizer.step()
            self.simulation.step(part)
        self._complete()

    def _complete(self) -> None:
        for scheduler in [*self.sparse.schedulers, *self.schedulers]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()
        self.simulation.complete(mst_compile.sparsifier(self.sparse.model).masks if self.simulation.sparse else {})

    def _zero(self, to_none: bool) -> None:
        for optimizer in [*self.sparse.optimizers, *(part.optimizer for part in self.simulation.parts)]:
            optimizer.zero_grad(set_to_none=to_none)

    def closure(self, batch: Batch) -> None:
        """One optimizer computes its gradients within its step."""
        if len(self.sparse.optimizers) > 1 or self.frozen:
            return self.step((batch,), "", "none")
        (optimizer,), (part,) = self.sparse.optimizers, self.simulation.parts
        self.simulation.settle(part)

        def compute() -> Tensor:
            self._zero(True)
            return self._backward(batch)

        optimizer.step(compute)
        self.simulation.step(part)
        self._complete()
        self._zero(True)

    def skip(self, batch: Batch) -> None:
        """A loss that is NaN is not stepped."""
        self._zero(True)
        for model in (self.sparse.model, self.simulation.model):
            outputs = self._call(model, batch, plain=model is self.simulation.model)
            if any(p.requires_grad for p in model.parameters()):
                (loss_of(outputs) * torch.nan).backward()
        self._zero(True)

    def evaluate(self, batch: Batch, grad: bool) -> None:
        """Outputs in evaluation mode."""
        real, plain = self.sparse.model.eval(), self.simulation.model.eval()
        with torch.set_grad_enabled(grad):
            self._same_outputs(real, plain, batch)
        real.train(), plain.train()

    def _same_outputs(self, real: nn.Module, plain: nn.Module, batch: Batch) -> None:
        got, want = self._call(real, batch), self._call(plain, batch, plain=True)
        if self.wide is None:
            for mine, its in zip(got, want, strict=True):
                assert_same_bits(mine.detach(), its.detach())
            return
        with torch.no_grad():
            exact, _ = self._exactly(plain, batch)
        outputs = [{f"output {i}": t.detach() for i, t in enumerate(outs)} for outs in (got, want, exact)]
        assert_all_as_good_as(*outputs, self.precision)

    def freeze(self, which: int, forget: bool) -> None:
        """Freeze a parameter, or train it again."""
        names = [n for n, _ in self.sparse.model.named_parameters()]
        self._freeze({names[which % len(names)]}, forget)

    def rest(self) -> None:
        """Freeze all sparse weights, or train them again."""
        sparse = {id(p) for p in self.simulation.parameters.values()}
        names = {n for n, p in self.simulation.model.named_parameters() if id(p) in sparse}
        self._freeze(names & self.frozen if self.frozen >= names else names - self.frozen, True)

    def _freeze(self, names: set[str], forget: bool) -> None:
        self.frozen ^= names
        for model in (self.sparse.model, self.simulation.model):
            for name in names:
                p = model.get_parameter(name)
                p.requires_grad_(name not in self.frozen)
                if forget:
                    p.grad = None

    def turn(self) -> None:
        """Experts change places."""
        self.turned = not self.turned
        for model in (self.sparse.model, self.simulation.model):
            model.turn()  # type: ignore[operator]

    def write(self) -> None:
        """A program writes to all parameters."""
        for model in (self.sparse.model, self.simulation.model):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01)

    def resume(self, order: tuple[str, ...]) -> None:
        """Save all, and load it into what another process would make."""
        if not self.simulation.sparse or self._written():
            return
        self._zero(True)
        old, new = self.sparse, self._make()
        self._refit(new)
        buffer = io.BytesIO()
        saved = {
            "model": old.model.state_dict(),
            "optimizer": [o.state_dict() for o in old.optimizers],
            "sparsifier": mst_compile.sparsifier(old.model).state_dict(),
            "schedulers": [s.state_dict() for s in old.schedulers],
        }
        torch.save(saved, buffer)
        state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        for scheduler, its in zip(new.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(its)
        for part in order:
            if part == "model":
                new.model.load_state_dict(state["model"])
            elif part == "optimizer":
                for optimizer, its in zip(new.optimizers, state["optimizer"], strict=True):
                    optimizer.load_state_dict(its)
            else:
                mst_compile.sparsifier(new.model).load_state_dict(state["sparsifier"])
        self.sparse = new
        self.average = None
        self._reload()

    def _reload(self) -> None:
        """Loading is PyTorch's own affair, too: NAdam's product of momenta comes back in the Parameter's dtype."""
        for part in self.simulation.parts:
            part.optimizer.load_state_dict(part.optimizer.state_dict())

    def _written(self) -> bool:
        """Whether values stand outside the masks: where these are loaded, masks follow them, which is not simulated."""
        own = self.simulation
        return own.sparse and any(bool(p[own.outside(n)].any()) for n, p in own.parameters.items())

    def _refit(self, new: Sparse) -> None:
        for name in self.frozen:
            new.model.get_parameter(name).requires_grad_(False)
        if self.turned:
            new.model.turn()

    def round_trip(self) -> None:
        """Load what was just saved."""
        if self._written():
            return
        for optimizer in self.sparse.optimizers:
            optimizer.load_state_dict(optimizer.state_dict())
        self.sparse.model.load_state_dict(self.sparse.model.state_dict())
        self._reload()

    def copy(self) -> None:
        """Go on with a copy of the model and its optimizers; PyTorch copies no gradients of Parameters."""
        self._zero(True)
        rates = [[g["lr"] for g in o.param_groups] for o in self.sparse.optimizers]
        states = [s.state_dict() for s in self.sparse.schedulers]
        model, optimizers = copy.deepcopy((self.sparse.model, self.sparse.optimizers))
        self.sparse = Sparse(model, optimizers, self._schedulers(optimizers))
        for scheduler, state in zip(self.sparse.schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for optimizer, of_groups in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, of_groups, strict=True):
                group["lr"] = rate

    def averaged(self, batch: Batch) -> None:
        """Average the weights over the run, and compute with the average."""
        if self.average is None:
            self.average = AveragedModel(self.sparse.model), AveragedModel(self.simulation.model)
        for average, model in zip(self.average, (self.sparse.model, self.simulation.model), strict=True):
            average.update_parameters(model)
        mine, its = (average.module.eval() for average in self.average)
        for a, b in zip(mine.parameters(), its.parameters(), strict=True):
            assert_same_bits(a.detach(), b.detach())
        with torch.no_grad():
            self._same_outputs(mine, its, batch)

    def densify(self) -> None:
        """End sparse training early."""
        if self.simulation.sparse:
            mst_compile.densify(self.sparse.model)
            self.simulation.densify()

    # -- comparing --

    def compare(self, what: str) -> None:
        """Weights, gradients and all optimizer state are the simulation's."""
        simulation, real = self.simulation, self.sparse.model
        if simulation.sparse:
            own = mst_compile.sparsifier(real)
            assert own.step_count == simulation.count, f"{what}: {own.step_count} steps, taken {simulation.count}"
            for name, mask in own.masks.items():
                assert torch.equal(mask, simulation.masks[name]), f"{what}: mask of {name}"
        names = {id(p): n for n, p in simulation.parameters.items()}
        for (name, mine), its in zip(real.named_parameters(), simulation.model.parameters(), strict=True):
            near = simulation.near.get(names.get(id(its), ""))
            pairs = {"": (mine, its)}
            if mine.grad is not None or its.grad is not None:
                assert mine.grad is not None and its.grad is not None, f"{what}: grad of {name}"  # noqa: PT018
                pairs["grad"] = mine.grad, its.grad
            for optimizer, part in zip(self.sparse.optimizers, simulation.parts, strict=True):
                a, b = optimizer.state.get(mine, {}), part.optimizer.state.get(its, {})
                assert a.keys() == b.keys(), f"{what}: state of {name}"
                pairs |= {k: (a[k], b[k]) for k in b if isinstance(b[k], Tensor)}
            for key, (got, want) in pairs.items():
                if key == "exp_inf":  # Adamax adds its eps to all gradients: what is next takes that for nothing
                    nothing = (got <= 1e-8) & (want <= 1e-8)
                    want[nothing] = got[nothing]
                self._same(f"{what}: {key or 'value'} of {name}", key, got.detach(), want.detach(), near)
        simulation.near = {}
        for optimizer, part in zip(self.sparse.optimizers, simulation.parts, strict=True):
            for mine_, its_ in zip(optimizer.param_groups, part.optimizer.param_groups, strict=True):
                assert mine_["lr"] == its_["lr"], what
                assert mine_["weight_decay"] == its_["weight_decay"], what

    def _same(self, what: str, key: str, got: Tensor, want: Tensor, near: Near | None) -> None:
        try:
            if near is not None and key in near.exact:
                where = near.where & (want != 0)
                assert_within(got[where], near.exact[key][where], near.allowed[key][where], what)
                want.data[where] = got[where]
            if not torch.equal(got, want):  # which is much quicker
                assert_same_bits(got, want)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error


def check_program(program: Program) -> None:
    """Run a program, and compare after each of its operations."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = Run(program)
        except BlockSizeError:  # no weight has a whole block
            reject()
        for i, (name, *args) in enumerate(program.ops):
            getattr(run, name)(*args)
            run.compare(f"after {name}, operation {i}")
