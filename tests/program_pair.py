"""A sparse model and its simulation: made alike, called alike, compared."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from expert_cases import GAP, StackedExperts, Turning
from helpers import compiled
from hypothesis import reject
from net_cases import Model, loss_of
from oracles import assert_all_as_good_as, assert_same_bits, assert_within
from program_cases import LATE, LAWS, OPTIMIZERS, SCHEDULERS, Batch, Maker, Program, Scheduler, schedule_of
from simulated_rules import Fact, Law
from simulation import Near, Part, Simulation
from torch import Tensor, nn, optim

import mst_compile


@dataclass
class Sparse:
    """What is made of the library's side: anew where a run resumes."""

    model: Model
    optimizers: list[optim.Optimizer]
    schedulers: list[Scheduler] = field(default_factory=list)


class Pair:
    """A program's sparse model, and the simulation of it."""

    def __init__(self, program: Program) -> None:
        self.program, self.net = program, program.net
        self.joined = False
        self.sparse = self._make()
        plain = self.net.build()
        own = mst_compile.sparsifier(self.sparse.model)
        special = self._special(list(own.weights))
        facts = {
            n: Fact.of(plain.get_parameter(n).shape, w.grid.block, special.get(n), program.guard)
            for n, w in own.weights.items()
        }
        parts = [Part(*found) for found in self._optimizers(plain, laws=True)]
        self.simulation = Simulation(plain, program.course, facts, parts)
        if program.course.sparsity_at(0) > 0:
            rescales = program.rescale and program.first == "random"
            self.simulation.begin(own.masks, rescales)
        self.schedulers = self._schedulers([part.optimizer for part in parts])
        self.wide = copy.deepcopy(plain).double() if program.mode != "plain" else None
        late = {id(p) for p in self._late(plain)["params"]} if program.layout == LATE else set[int]()
        self.held_back = {n for n, p in plain.named_parameters() if id(p) in late}
        self.frozen = set(self.held_back)
        for model in (plain, self.sparse.model):
            for name in self.frozen:
                model.get_parameter(name).requires_grad_(False)
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
        optimizers = [optimizer for optimizer, _, _ in self._optimizers(model, laws=False)]
        return Sparse(model, optimizers, self._schedulers(optimizers))

    def _optimizers(
        self, model: nn.Module, *, laws: bool
    ) -> Iterator[tuple[optim.Optimizer, Maker, list[tuple[Law, Law] | None]]]:
        """The optimizers of the program on ``model``, and what makes others of their kind: with the laws in their
        groups, or beside them."""
        make, layout = OPTIMIZERS[self.program.optimizer], self.program.layout
        parameters = list(model.parameters())
        if layout in ("two optimizers", "by shape"):
            second, others = (
                (lambda i, p: p.dim() != 2, "adamw") if layout == "by shape" else (lambda i, p: i % 2, None)
            )
            for number in (False, True):
                members = [p for i, p in enumerate(parameters) if bool(second(i, p)) == number]
                own = OPTIMIZERS[others] if others and number else make
                if members:
                    yield own(members), own, [None]
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
        elif layout == LATE:
            late = self._late(model)
            groups = [{"params": [p for p in parameters if all(p is not q for q in late["params"])]}]
            groups += [late] if self.joined else []
            found = [None] * len(groups)
        elif layout.startswith("halves"):
            groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.02}]
            groups = [g for g in groups if g["params"]]
            found = [None] * len(groups)
            if ":" in layout:
                law = LAWS[layout.partition(": ")[2]]
                found[0] = law
                if not laws:
                    groups[0] |= {"density_rate": law[0], "density_decay": law[1]}
        yield make(groups), make, found

    def _late(self, model: nn.Module) -> dict[str, Any]:
        """The group that joins an optimizer in mid-run: by pairs, which are a weight and its bias in most layers."""
        return {"params": [p for i, p in enumerate(model.parameters()) if i // 2 % 2], "weight_decay": 0.02}

    def _schedulers(self, optimizers: list[optim.Optimizer]) -> list[Scheduler]:
        return [SCHEDULERS[self.program.rates](o) for o in optimizers if self.program.rates != "none"]

    # -- computing --

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.net.autocast)

    def _inputs(self, batch: Batch, dtype: torch.dtype | None) -> list[Tensor]:
        return [x.to(dtype) if dtype and x.is_floating_point() else x for x in self.net.batch(*batch)]

    def _call(
        self, model: nn.Module, batch: Batch, *, plain: bool = False, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        run = model if plain or self.program.mode == "plain" else compiled(model, self.program.mode)
        if plain and self.program.mode != "plain":  # in eager mode attention stays full
            self._see(model)
        torch.default_generator.manual_seed(batch[0])  # torch.manual_seed takes milliseconds
        with self._context():
            return run(*self._inputs(batch, dtype))

    def _see(self, plain: nn.Module) -> None:
        simulation = self.simulation
        plain.see(self.program.course.seen_after(simulation.count) if simulation.sparse else None)  # type: ignore[operator]

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
            if isinstance(mine, Turning):
                mine.flag = its.flag  # type: ignore[assignment]
        self._see(self.wide)
        outputs = self.wide(*self._inputs(batch, torch.float64))
        if any(isinstance(m, StackedExperts) and m.gap < GAP for m in self.wide.modules()):
            reject()  # which expert a token goes to may depend on roundings
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

    def _zero(self, to_none: bool) -> None:
        for optimizer in [*self.sparse.optimizers, *(part.optimizer for part in self.simulation.parts)]:
            optimizer.zero_grad(set_to_none=to_none)

    def _same_outputs(self, real: nn.Module, plain: nn.Module, batch: Batch, dtype: torch.dtype | None = None) -> None:
        got, want = self._call(real, batch, dtype=dtype), self._call(plain, batch, plain=True, dtype=dtype)
        if self.wide is None:
            for mine, its in zip(got, want, strict=True):
                assert_same_bits(mine.detach(), its.detach())
            return
        with torch.no_grad():
            exact, _ = self._exactly(plain, batch)
        outputs = [{f"output {i}": t.detach() for i, t in enumerate(outs)} for outs in (got, want, exact)]
        assert_all_as_good_as(*outputs, torch.bfloat16 if self.net.autocast else dtype or self.net.dtype)

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
                assert mine_.get("weight_decay") == its_.get("weight_decay"), what

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
