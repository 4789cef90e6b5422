"""Masked training in plain PyTorch, written from the documentation: what a sparse run must come to, step by step.

A :class:`Simulation` trains an ordinary dense model with PyTorch's own optimizers and multiplies by masks where
docs/guide.md says that something is 0. It imports nothing of the library: no masks, grids, schedules, laws, hooks,
state or operators of it. Schedules, densities over layers, what an event may do, the beginning of second moments, steps
of blocks of their own and the laws of rate and decay are written down here once more, the plainest way. From the run
that it is held against it takes what the documentation leaves open: the edge of each weight's blocks, and the masks
themselves, each of which is checked against the rules before it is taken over.

Both do the same arithmetic in the same dtype, so they are the same bit for bit, with one exception: values of blocks
that have just regrown, for which the library has arithmetic of its own. These are :class:`Near`: computed here in
float64, compared by a bound, and then taken over, so that all that follows is exact again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from oracles import of_rounding, of_sum
from simulated_rules import Course, Event, Fact, Interval, Law, check_event, check_following, factor
from torch import Tensor, nn, optim

SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
OWN_COUNTS = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax)
MASKED_AFTER = (optim.ASGD, optim.LBFGS, optim.Adafactor, optim.Muon)  # no list of the library's has them
WARMED = (optim.Adafactor, optim.Muon)  # of these; they keep nothing but moments
NORMALISED = (optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta, optim.RMSprop)


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass
class Near:
    """Elements of a weight and of its state that are known by a bound: exact values, and how far others may be off."""

    where: Tensor
    exact: dict[str, Tensor] = field(default_factory=dict)
    allowed: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Block:
    """A block that has regrown, as a Parameter of its own."""

    parameter: nn.Parameter
    optimizer: optim.Optimizer | None
    steps: int = 0


@dataclass
class Part:
    """An optimizer of the run: PyTorch's own on the plain model, what makes another, and the laws of its groups.

    Attributes:
        met: whether it has stepped since it was made.
    """

    optimizer: optim.Optimizer
    make: Callable[[list[nn.Parameter]], optim.Optimizer]
    laws: list[tuple[Law, Law] | None]
    met: bool = False

    def group_of(self, parameter: Tensor) -> dict[str, Any]:
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))


@dataclass
class Scaler:
    """What ``GradScaler`` does: gradients come of a scaled loss, and a step whose gradients are not finite is left out.

    Attributes:
        scale: a power of 2, so that scaling rounds nothing.
        interval: steps after one another that are taken before it doubles.
    """

    scale: float
    interval: int
    taken: int = 0

    def unscale(self, optimizer: optim.Optimizer) -> bool:
        """Whether all gradients are finite."""
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for gradient in found:
            gradient.mul_(1 / self.scale)
        return all(bool(gradient.isfinite().all()) for gradient in found)

    def update(self, finite: bool) -> None:
        self.taken = self.taken + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.taken == self.interval:
            self.scale, self.taken = self.scale * 2, 0


class Simulation:
    """Trains ``model``, a plain one, as a sparse model of the same values must train.

    Attributes:
        near: what the last step has left that is known by a bound, by weight.
        brought: weights to which a checkpoint has brought values, whose masks follow these when they are settled.
        following: the masks that the run's have come to thereby, by weight, as far as they were seen.
    """

    def __init__(self, model: nn.Module, course: Course, weights: dict[str, Fact], parts: list[Part]) -> None:
        self.model, self.course, self.weights, self.parts = model, course, weights, parts
        named = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {name: named[name] for name in weights}
        self.masks = {name: w.full() for name, w in weights.items()}
        self.count, self.sparse = 0, True
        self.grown: dict[str, Tensor] = {}
        self.blocks: dict[str, dict[tuple[int, int], Block]] = {name: {} for name in weights}
        self.scores: dict[str, Tensor] = {}
        self.trained: set[str] = set()
        self.near: dict[str, Near] = {}
        self.brought: set[str] = set()
        self.following: dict[str, Tensor] = {}
        self.dense = course.dense_after(0)
        self._masked: dict[str, tuple[Tensor, int]] = {}

    # -- masks --

    def outside(self, name: str) -> Tensor:
        return self.weights[name].expand(~self.masks[name])

    def begin(self, masks: Mapping[str, Tensor], rescale: bool) -> None:
        """The first masks; with ``rescale`` what stays grows by the square root of the density's inverse."""
        densities = self.course.densities(0, self.weights)
        for name, mask in masks.items():
            fact = self.weights[name]
            active = {int(part.sum()) for part in fact.split(mask)}
            assert active <= fact.counts(densities[name]), f"{name}: blocks of the first mask"
            self.masks[name] = mask
            p = self.parameters[name]
            with torch.no_grad():
                p.masked_fill_(self.outside(name), 0.0)
                if rescale:
                    p.mul_(self.density([name]) ** -0.5)

    def density(self, names: Iterable[str]) -> float:
        inside = [(int((~self.outside(n)).sum()), self.outside(n).numel()) for n in names]
        return sum(a for a, _ in inside) / sum(b for _, b in inside)

    def mask_gradients(self) -> None:
        """After a backward pass."""
        for name, p in self.parameters.items():
            if self.sparse and not self.dense and p.grad is not None:
                self._mask(name, p)

    def _mask(self, name: str, p: nn.Parameter) -> None:
        assert p.grad is not None
        p.grad.masked_fill_(self.outside(name), 0.0)
        self._masked[name] = p.grad, p.grad._version

    def _clean(self, tensors: Iterable[Tensor], name: str) -> None:
        for tensor in tensors:
            if tensor.shape == self.parameters[name].shape:
                tensor.detach().masked_fill_(self.outside(name), 0.0)

    def _state(self, name: str) -> list[Tensor]:
        p = self.parameters[name]
        return [t for part in self.parts for t in part.optimizer.state.get(p, {}).values() if isinstance(t, Tensor)]

    # -- steps --

    def own(self, part: Part) -> list[str]:
        """The sparse weights of one optimizer: its steps are counted if it has any."""
        known = {id(p) for group in part.optimizer.param_groups for p in group["params"]}
        return [n for n, p in self.parameters.items() if id(p) in known] if self.sparse else []

    def settle(self, part: Part) -> None:
        """An optimizer begins to step: what was written outside the masks is cut, and what it remembers there."""
        for name in self.own(part):
            if self.parameters[name].requires_grad:
                self._follow(name)
                self._clean([self.parameters[name]], name)
            self._clean(self._state(name), name)
            if not part.met and name in self.grown:  # state that the run did not see grow
                for tensor in self._state(name):
                    if tensor.shape == self.parameters[name].shape:
                        tensor.masked_fill_(self.weights[name].expand(self.grown[name]), 0.0)
        part.met = True

    def bring(self, values: Mapping[str, Tensor]) -> None:
        """A checkpoint brings these values, without the masks that they were trained with."""
        self.model.load_state_dict(values)
        self.brought |= {n for n, p in self.parameters.items() if bool(p[self.outside(n)].any())}

    def _follow(self, name: str) -> None:
        """Of values that were brought as many blocks stay as are active, the largest; what has grown and is not among
        them has not grown."""
        p = self.parameters[name]
        if name not in self.brought:
            return
        self.brought.discard(name)
        if not p[self.outside(name)].any():
            return
        new = self.following.pop(name)
        check_following(self.weights[name], self.masks[name], new, p.detach())
        self.masks[name] = new
        if name in self.grown:
            self.grown[name] = self.grown[name] & new
        self.blocks[name] = {place: b for place, b in self.blocks[name].items() if new[place]}

    def step(self, part: Part, closure: Callable[[], Tensor] | None = None) -> None:
        """One optimizer's step; ``closure`` computes gradients anew, which count as the last that it has computed."""
        self.settle(part)
        own, scores = self.own(part), dict(self.scores)
        self.near = {n: near for n, near in self.near.items() if n not in own}
        before = {name: self.parameters[name].detach().clone() for name in own}

        def compute() -> Tensor:
            assert closure is not None
            loss = closure()
            self.scores = dict(scores)
            self._prepare_all(part, own)
            return loss

        if closure is None:
            self._prepare_all(part, own)
        scaled = self._scaled(part)
        old = [{key: g[key] for key in s} for g, s in zip(part.optimizer.param_groups, scaled, strict=True)]
        for group, new in zip(part.optimizer.param_groups, scaled, strict=True):
            group.update(new)
        part.optimizer.step(None if closure is None else compute)  # type: ignore[arg-type]
        for name in own:
            self._finish(part, name, before[name])
        for group, values in zip(part.optimizer.param_groups, old, strict=True):
            group.update(values)

    def leave_out(self, part: Part) -> None:
        """A step that ``GradScaler`` skips. A fused optimizer is called all the same, and may make its state."""
        if part.optimizer.defaults.get("fused"):
            part.optimizer.grad_scale, part.optimizer.found_inf = None, torch.ones(())  # type: ignore[attr-defined]
            part.optimizer.step()
            del part.optimizer.grad_scale, part.optimizer.found_inf

    def _scaled(self, part: Part) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for group, laws in zip(part.optimizer.param_groups, part.laws, strict=True):
            inside = [n for n, p in self.parameters.items() if any(p is q for q in group["params"])]
            if not self.sparse or laws is None or not inside:
                found.append({})
                continue
            density = self.density(inside)
            rate = factor(laws[0], density)
            by_rate = group.get("decoupled_weight_decay")
            if by_rate is None:
                by_rate = not isinstance(part.optimizer, NORMALISED)
            decay = (1 / rate if by_rate else 1.0) if laws[1] == "independent" else factor(laws[1], density)
            found.append({"lr": group["lr"] * rate, "weight_decay": group["weight_decay"] * decay})
        return found

    def _prepare_all(self, part: Part, own: list[str]) -> None:
        for name in own:
            self._prepare(part, name)

    def _prepare(self, part: Part, name: str) -> None:
        """Before the update: growth reads the gradient, which is then masked; regrown blocks' moments begin."""
        p, fact = self.parameters[name], self.weights[name]
        if p.grad is None:
            return
        known = self._masked.get(name)
        if self.dense and not (known is not None and known[0] is p.grad and known[1] == p.grad._version):
            score = fact.means(p.grad.double().square())
            self.scores[name] = self.scores.get(name, 0) + score  # type: ignore[operator]
        self._mask(name, p)
        if name not in self.grown or (self.course.regrown == "own steps" and type(part.optimizer) in OWN_COUNTS):
            return
        square = p.grad.double().square()
        grown = self.grown[name]
        means = fact.means(square)
        if fact.block < 4:
            means = torch.full_like(means, float(means[grown].mean()))
        state, where, group = part.optimizer.state.get(p, {}), fact.expand(grown), part.group_of(p)
        if isinstance(part.optimizer, optim.Adagrad) and "sum" in state:
            state["sum"].masked_fill_(where, group["initial_accumulator_value"])
        for key in SECOND_MOMENTS:
            if key in state:
                share = 1 - float(group["betas"][1]) ** (float(state["step"]) + 1) if "betas" in group else 1.0
                begun = torch.maximum(square, fact.expand(means)) * share
                state[key].copy_(torch.where(where, begun, state[key].double()))
                self.near.setdefault(name, Near(where)).exact[key] = torch.empty(0)

    def _finish(self, part: Part, name: str, before: Tensor) -> None:
        """After the update: what regrown blocks have come to."""
        p, fact = self.parameters[name], self.weights[name]
        if p.grad is None and not isinstance(part.optimizer, optim.LBFGS):  # which moves whatever it has moved before
            return
        self.trained.add(name)
        if isinstance(part.optimizer, MASKED_AFTER):
            self._clean([p], name)
        if isinstance(part.optimizer, MASKED_AFTER) and not isinstance(part.optimizer, WARMED):
            self.grown.pop(name, None)  # no moment of theirs can begin, and no block of theirs is young
            return
        if name in self.near:
            self._bound_second_moments(part, name, before)
        for place in self.grown.pop(name, torch.zeros(0, 2)).nonzero().tolist():
            own = self.course.regrown == "own steps" and type(part.optimizer) in OWN_COUNTS
            mine = nn.Parameter(fact.at(before, place).double().clone())
            self.blocks[name][place[0], place[1]] = Block(mine, part.make([mine]) if own else None)
        self.grown.pop(name, None)
        for place, block in self.blocks[name].items():
            self._step_block(part, name, place, block, before)

    def _bound_second_moments(self, part: Part, name: str, before: Tensor) -> None:
        p, near, fact = self.parameters[name], self.near[name], self.weights[name]
        terms = fact.block**2 if fact.block >= 4 else p.numel()
        relative = of_sum(terms, beside=8) + of_rounding(p.dtype, times=4)
        state = part.optimizer.state[p]
        near.exact = {
            k: state[k].double() for k in [*near.exact, "max_exp_avg_sq", "acc_delta", "momentum_buffer"] if k in state
        }
        near.allowed = {k: v.abs() * relative for k, v in near.exact.items()}
        near.exact[""] = p.detach().double()
        moved = (near.exact[""] - before.double()).abs()
        near.allowed[""] = moved * relative + of_rounding(p.dtype, times=4) * (near.exact[""].abs() + moved)

    def _step_block(self, part: Part, name: str, place: tuple[int, int], block: Block, before: Tensor) -> None:
        p, fact, length = self.parameters[name], self.weights[name], self.course.regrown_warmup
        block.steps += 1
        old, assumed = fact.at(before, place).double(), fact.at(p.detach(), place).double()
        rate, coarse = part.group_of(p)["lr"], {p.dtype}
        if isinstance(rate, Tensor):
            coarse.add(rate.dtype)
        if isinstance(part.optimizer, optim.NAdam):
            coarse.add(torch.float32)  # of its product of momenta
        rounded = of_rounding(*coarse, times=16 * block.steps + 16)
        if block.optimizer is not None:
            assert p.grad is not None
            group = {k: v for k, v in part.group_of(p).items() if k != "params"}
            block.optimizer.param_groups[0].update(group, lr=float(rate))
            block.parameter.data.copy_(old)
            block.parameter.grad = fact.at(p.grad, place).double().clone()
            block.optimizer.step()
            assumed = block.parameter.detach().clone()
        warms = length > 1 and block.steps < length
        if block.optimizer is None and not warms:
            return
        size = float((assumed - old).abs().max()) + float(old.abs().max())
        new = old + (block.steps / length if warms else 1.0) * (assumed - old)
        near = self.near.setdefault(name, Near(torch.zeros(p.shape, dtype=torch.bool)))
        if "" not in near.exact:
            near.exact[""], near.allowed[""] = p.detach().double(), torch.zeros(p.shape, dtype=torch.float64)
        known = fact.at(near.allowed[""], place) if block.optimizer is None else 0.0
        near.where = near.where.clone()
        fact.at(near.where, place)[:] = True
        fact.at(near.exact[""], place)[:] = new
        fact.at(near.allowed[""], place)[:] = known + rounded * (size + 1e-6)
        fact.at(p.data, place)[:] = new.to(p.dtype)

    # -- a training step is complete --

    def complete(self, masks: Mapping[str, Tensor]) -> None:
        """All optimizers have stepped; ``masks`` are the run's now."""
        self.trained |= {n for n, p in self.parameters.items() if p.grad is not None}
        if not self.sparse:
            return
        self.count += 1
        event = self.course.is_event(self.count)
        densities = self.course.densities(self.count, self.weights)
        moving = [n for n in self.weights if event and not self._rests(n)]
        skipped = any(self._not_finite(n, densities[n]) for n in moving)
        for name in self.weights:
            if name not in moving or skipped:
                assert torch.equal(masks[name], self.masks[name]), f"{name}: masks stay at step {self.count}"
                continue
            self._clean([self.parameters[name]], name)
            try:
                self._check(name, densities[name], masks[name])
            except AssertionError as error:
                raise AssertionError(f"{name}, event at step {self.count}: {error}") from error
            self.change(name, masks[name].clone())
        if event:
            self.scores, self.trained = {}, set()
        self.dense = self.course.dense_after(self.count)

    def _rests(self, name: str) -> bool:
        """A weight that is frozen, or idle while others have trained."""
        return not self.parameters[name].requires_grad or (bool(self.trained) and name not in self.trained)

    def _not_finite(self, name: str, density: float) -> bool:
        """Whether what a weight would grow by is not finite, where anything moves and a choice is left."""
        score, fact = self.scores.get(name), self.weights[name]
        active = {int(part.sum()) for part in fact.split(self.masks[name])}
        stays = self.course.drop_at(self.count) == 0 and active <= fact.counts(density)
        return density < 1 and not stays and score is not None and not bool(score.isfinite().all())

    def _check(self, name: str, density: float, new: Tensor) -> None:
        fact, p = self.weights[name], self.parameters[name]
        near = self.near.get(name)
        a = torch.zeros(p.shape, dtype=torch.float64)
        if near is not None and "" in near.allowed:
            a = torch.where(near.where, near.allowed[""], a)
        x = p.detach().double().abs()
        l1 = self.course.magnitude == "l1"
        scores, off = (x, a) if l1 else (x.square(), 2 * x * a + a.square())
        mean, error = fact.means(scores), fact.means(off) + fact.error * fact.means(scores)
        gradient = self.scores.get(name)
        magnitudes = Interval(mean - error, mean + error)
        scores_ = None if gradient is None else Interval(gradient * (1 - fact.error), gradient * (1 + fact.error))
        check_event(fact, self.course, Event(self.count, density, self.masks[name], new, magnitudes, scores_))

    def change(self, name: str, new: Tensor) -> None:
        """Other blocks are active: what is not is 0, and what was not begins at 0."""
        old, p = self.masks[name], self.parameters[name]
        grown = (new & ~old) | (self.grown.get(name, torch.zeros_like(new)) & new)
        self.masks[name] = new
        if grown.any():
            self.grown[name] = grown
        self.blocks[name] = {place: b for place, b in self.blocks[name].items() if new[place]}
        if not torch.equal(old, new):
            self._clean([p, *([] if p.grad is None else [p.grad]), *self._state(name)], name)

    def densify(self) -> None:
        """The model is an ordinary one from now on."""
        self.sparse, self.dense, self.near, self.brought = False, False, {}, set()
