"""Random training programs on two ranks: a model that is spread over them, beside its simulation in one process.

Every rank trains its part of each batch, as the layout has it, and the simulation the whole batch. Gradients are held
against each other up to the order of sums, and are then the run's in both; so weights and optimizer state are the same
up to the last roundings after every step, and masks by what their events may do. In mid-run all is saved by
``torch.distributed.checkpoint`` and loaded into another layout, or into one process.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from oracles import of_rounding, of_sum
from parallel_cases import tensor_parallel, whole
from program_cases import OPTIMIZERS, Op, schedule_of
from ranks import assert_same_on_all_ranks, mine, net
from simulated_rules import Course, Fact
from simulation import Part, Scaler, Simulation
from torch import Tensor, nn, optim
from torch.distributed.checkpoint import state_dict as dsd
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import mst_compile
from mst_compile.communication import check_ranks, reduce_active_blocks

LAYOUTS = ["alone", "ddp", "ddp active blocks", "fsdp", "fsdp gathered", "tensor parallel"]
MIXED = "fsdp bfloat16"  # of weights in float32
# Without foreach, which takes no mixture of spread and whole Parameters.
MAKERS = ["sgd", "adamw", "adam amsgrad", "nadam", "radam", "adamax", "adagrad", "rmsprop"]
ROWS = 8
SCALE, GROWTH = 16.0, 2  # of losses under GradScaler, and after how many steps it doubles
WHOLE = ("alone", "tensor parallel")  # layouts in which each rank takes all of a batch


@dataclass(frozen=True)
class RankProgram:
    """What is trained, in which layout it begins, and what happens in turn.

    Attributes:
        before: whether a model is made sparse before it is spread.
        laws: whether rates follow the density.
        experts: whether the model has stacks of matrices.
        ops: names of :class:`RankRun`'s methods and their arguments.
    """

    seed: int
    course: Course
    layout: str
    dtype: torch.dtype
    before: bool
    block: int
    guard: str
    first: str
    optimizer: str
    laws: bool
    recompute: bool
    experts: bool
    ops: tuple[Op, ...]


def draw(seed: int) -> RankProgram:
    """The same on every rank."""
    r = random.Random(seed)
    kind, interval = r.choice(["constant", "constant", "mixed", "pruning"]), r.randint(1, 3)
    common: dict[str, Any] = {
        "sparsity": r.choice([0.5, 0.7, 0.85]), "interval": interval, "drop": r.choice([0.2, 0.4]),
        "growth": r.choice(["mixed", "gradient", "random"]), "gradient_steps": r.randint(1, interval),
        "distribution": r.choice(["erdos-renyi", "uniform"]), "magnitude": r.choice(["l2", "l1"]),
        "regrown": r.choice(["first estimate", "own steps"]), "regrown_warmup": r.choice([0, 3]),
        "total": r.randint(8, 14),
    }  # fmt: skip
    if kind == "mixed":
        common |= {"warmup": r.randint(0, 2), "restoration": r.randint(0, 3), "settle": r.randint(0, 2)}
    elif kind == "pruning":
        first = r.randint(0, 2)
        common |= {"first": first, "last": first + r.randint(1, 4), "initial": r.choice([0.0, 0.4])}
    dtype = r.choice([torch.float64, torch.float64, torch.float32])
    layouts = LAYOUTS if dtype == torch.float64 else [*LAYOUTS, MIXED, MIXED]
    ops: list[Op] = []
    for _ in range(r.randint(6, 12)):
        name = r.choice(["step"] * 6 + ["move"] * 2 + ["burst", "evaluate", "skip", "round_trip", "bring", "scaled"])
        arguments: tuple[Any, ...] = ()
        if name == "step":
            arguments = r.randint(1, 3), r.choice(["", "value", "norm"])
        elif name == "move":
            arguments = (r.choice(layouts), r.random() < 0.5)
        elif name == "burst":
            arguments = (r.randint(0, 9),)
        elif name == "bring":
            arguments = r.randint(0, 99), r.choice([0.2, 0.5, 1.0])
        elif name == "scaled":
            arguments = (r.random() < 0.5,)
        ops.append((name, *arguments))
    return RankProgram(
        seed, Course(kind, **common), r.choice(layouts[1:]), dtype, r.random() < 0.5, r.choice([1, 4, 4, 8]),
        r.choice(["coverage", "coverage", "backbone", "none"]), r.choice(["random", "magnitude"]), r.choice(MAKERS),
        r.random() < 0.3, r.random() < 0.3, r.random() < 0.5, tuple(ops),
    )  # fmt: skip


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    out = model(batch[0])
    return nn.functional.mse_loss(out.to(batch[1].dtype), batch[1])


class RankRun:
    """A program's model as this rank has it, and the simulation of all of it."""

    def __init__(self, program: RankProgram, folder: Path) -> None:
        self.program, self.folder = program, folder
        self.layout, self.seed, self.saves = program.layout, 1000 * program.seed, 0
        self.model, self.called, self.optimizer = self._make(program.layout, program.before)
        plain = net(program.dtype, experts=program.experts)
        own = mst_compile.sparsifier(self.model)
        facts = {
            n: Fact.of(plain.get_parameter(n).shape, w.grid.block, None, program.guard) for n, w in own.weights.items()
        }
        make = OPTIMIZERS[program.optimizer]
        groups: Any = list(plain.parameters())
        laws: list[Any] = [None]
        if program.laws:  # the grouping is the library's, the law is not
            names = {id(p): n for n, p in self.model.named_parameters()}
            there = dict(plain.named_parameters())
            groups, laws = [], []
            for group in mst_compile.param_groups(self.model, weight_decay=0.05):
                members = [there[names[id(p)]] for p in group["params"]]
                groups.append({"params": members, "weight_decay": group["weight_decay"]})
                laws.append((1.0, "independent") if "density_rate" in group else None)
        self.part = Part(make(groups), make, laws)
        self.simulation = Simulation(plain, program.course, facts, [self.part])
        if program.course.sparsity_at(0) > 0:
            self.simulation.begin(own.masks, program.first == "random")
        self.scaler, self.scale = torch.amp.GradScaler("cpu", SCALE, growth_interval=GROWTH), Scaler(SCALE, GROWTH)
        self.compare("at first")

    def _make(self, layout: str, before: bool) -> tuple[nn.Module, nn.Module, optim.Optimizer]:
        """The model, what is called, and its optimizer."""
        p = self.program
        model = net(p.dtype, recompute=p.recompute, experts=p.experts)
        if not before:
            model = self._spread(model, layout)
        mst_compile.sparsify(
            model, schedule_of(p.course), block=p.block, guard=p.guard,  # type: ignore[arg-type]
            masks=p.first if p.course.sparsity_at(0) > 0 else None,  # type: ignore[arg-type]
        )  # fmt: skip
        if before:
            model = self._spread(model, layout)
        called = DistributedDataParallel(model) if layout.startswith("ddp") else model
        if layout == "ddp active blocks":
            reduce_active_blocks(called)
        groups = mst_compile.param_groups(model, weight_decay=0.05) if p.laws else list(model.parameters())
        return model, called, OPTIMIZERS[p.optimizer](groups)

    def _spread(self, model: nn.Module, layout: str) -> nn.Module:
        if layout == "tensor parallel":
            return tensor_parallel(model)
        if not layout.startswith("fsdp"):
            return model
        options: dict[str, Any] = {"reshard_after_forward": layout != "fsdp gathered"}
        if layout == MIXED:
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        experts = (model.zeroth,) if self.program.experts else ()
        for module in (*experts, model.first, model.second, model):
            fully_shard(module, **options)  # type: ignore[arg-type]
        return model

    def _batch(self) -> tuple[Tensor, Tensor]:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((ROWS, 30), (ROWS, 5))
        x, y = (torch.randn(s, generator=generator, dtype=torch.float64).to(self.program.dtype) for s in shapes)
        return x, y

    def _mine(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch if self.layout in WHOLE else (mine(batch[0]), mine(batch[1]))

    # -- operations --

    def step(self, parts: int, clip: str) -> None:
        """Accumulate, exchanging gradients with the last part, clip, and step."""
        self._backward(parts)
        if clip == "norm" and self.layout != "tensor parallel":  # where PyTorch refuses to add norms of both kinds up
            for model in (self.model, self.simulation.model):
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            self._adopt()  # the norm is a sum in another order, and decay may cancel what it scales
        elif clip:
            for model in (self.model, self.simulation.model):
                nn.utils.clip_grad_value_(model.parameters(), 0.01, foreach=False)
        self._step()

    def _backward(self, parts: int, scale: float = 1.0) -> None:
        for i in range(parts):
            batch = self._batch()
            with self._apart(i < parts - 1):
                (_loss(self.called, self._mine(batch)) * scale / parts).backward()
            (_loss(self.simulation.model, batch) * scale / parts).backward()
        self.simulation.mask_gradients()
        self._adopt()

    @contextlib.contextmanager
    def _apart(self, apart: bool) -> Iterator[None]:
        """Gradients stay this rank's own."""
        if isinstance(self.called, FSDPModule):
            self.called.set_requires_gradient_sync(not apart)
        with (
            self.called.no_sync()
            if apart and isinstance(self.called, DistributedDataParallel)
            else contextlib.nullcontext()
        ):
            yield

    def _step(self) -> None:
        with self._following():
            self.optimizer.step()
        self._stepped()

    def _stepped(self) -> None:
        self.simulation.step(self.part)
        self.simulation.complete(mst_compile.sparsifier(self.model).masks)
        self._zero()

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """What masks have followed values to is seen when the optimizer begins to step: an event may change it then."""

        def look(*_: Any) -> None:
            if self.simulation.brought:
                self.simulation.following.update(mst_compile.sparsifier(self.model).masks)

        handle = self.optimizer.register_step_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def scaled(self, bad: bool) -> None:
        """A step as ``GradScaler`` takes it; with ``bad`` one element of a gradient, on one rank, is not finite."""
        if self.layout == "tensor parallel":
            return self.step(1, "")  # PyTorch's check of gradients takes no mixture of spread and whole ones
        self._backward(1, self.scale.scale)
        if bad:
            name = sorted(self.simulation.weights)[-1]
            self._put_inf(name, (~self.simulation.outside(name)).nonzero()[-1].tolist())
        self.scaler.scale(torch.ones(()))  # it makes its own scale at the first loss
        finite = self.scale.unscale(self.part.optimizer)
        assert finite != bad
        with self._following():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scale.update(finite)
        assert self.scaler.get_scale() == self.scale.scale
        if finite:
            self._stepped()
        else:
            self._zero()

    def bring(self, seed: int, share: float) -> None:
        """A checkpoint of one process brings values alone: of sparse weights ``share`` of the blocks hold any."""
        simulation = self.simulation
        generator = torch.Generator().manual_seed(seed)
        values = {n: v.detach().clone() for n, v in simulation.model.state_dict().items()}
        for name, fact in simulation.weights.items():
            value = torch.randn(fact.dims, generator=generator, dtype=torch.float64) / fact.cols**0.5
            drawn = torch.rand(len(simulation.masks[name]), fact.shape[1], generator=generator) < share
            values[name].copy_(value * fact.expand(drawn))
        options = dsd.StateDictOptions(full_state_dict=True)
        dsd.set_model_state_dict(self.model, {n: v.clone() for n, v in values.items()}, options=options)
        simulation.bring(values)

    def _written(self) -> bool:
        """Whether values stand outside the masks: where these are loaded, masks follow them, see :meth:`bring`."""
        own = self.simulation
        return any(bool(p[own.outside(n)].any()) for n, p in own.parameters.items())

    def _zero(self) -> None:
        self.optimizer.zero_grad()
        self.part.optimizer.zero_grad()

    def burst(self, which: int) -> None:
        """A step in which the gradient of a weight is infinite where the weight is 0."""
        self._backward(1)
        name = sorted(self.simulation.weights)[which % len(self.simulation.weights)]
        for place in self.simulation.outside(name).nonzero()[-1:].tolist():
            self._put_inf(name, place)
        self._step()

    def _put_inf(self, name: str, place: list[int]) -> None:
        p, plain = self.model.get_parameter(name), self.simulation.parameters[name]
        assert p.grad is not None and plain.grad is not None  # noqa: PT018
        plain.grad[tuple(place)] = torch.inf
        if isinstance(p.grad, DTensor):
            p.grad = distribute_tensor(plain.grad.clone(), p.grad.device_mesh, p.grad.placements)
        else:
            p.grad[tuple(place)] = torch.inf

    def skip(self) -> None:
        """One rank's loss is NaN, so that all leave the step out."""
        loss = _loss(self.called, self._mine(self._batch()))
        (loss * (torch.nan if dist.get_rank() == 0 else 1.0)).backward()
        self._zero()

    def evaluate(self) -> None:
        batch = self._batch()
        with torch.no_grad():
            got, want = self.called(self._mine(batch)[0]), self.simulation.model(self._mine(batch)[0])
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # gathered weights stand for those of the optimizer after a forward pass
        self._near("outputs", got.to(want.dtype), want, self._terms)

    def round_trip(self) -> None:
        """Load what was just saved."""
        if self._written():
            return
        self.optimizer.load_state_dict(self.optimizer.state_dict())
        self.model.load_state_dict(self.model.state_dict())
        self._reload()

    def _reload(self) -> None:
        self.part.optimizer.load_state_dict(self.part.optimizer.state_dict())

    def move(self, layout: str, before: bool) -> None:
        """Save all, and load it into another layout; into one process each, or from it.

        Of an optimizer that has not stepped PyTorch makes the state by a step of its own, which would count in it.
        """
        if self.simulation.count == 0 or self._written():
            return
        self.saves += 1
        path = self.folder / f"{self.program.seed}.{self.saves}"
        state = self._state()
        if self.layout != "alone":
            dcp.save(state, checkpoint_id=path)
        elif dist.get_rank() == 0:
            dcp.save(state, checkpoint_id=path, no_dist=True)
        dist.barrier()
        self.model, self.called, self.optimizer = self._make(layout, before)
        self.layout = layout
        state = self._state()
        dcp.load(state, checkpoint_id=path, no_dist=layout == "alone")
        dsd.set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path)
        self._reload()

    def _state(self) -> dict[str, Any]:
        model, optimizer = dsd.get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    # -- comparing --

    @property
    def _terms(self) -> float:
        """Roundings of a gradient or an output, relative to the largest."""
        if self.layout == MIXED:
            return of_rounding(torch.bfloat16, times=16)
        return of_sum(256, dtype=self.program.dtype)

    def _near(self, what: str, got: Tensor, want: Tensor, relative: float, size: float = 0.0) -> None:
        size = max(size, float(want.abs().max()) if want.numel() else 0.0)
        finite = want.isfinite() & got.isfinite()
        assert torch.equal(got[~finite], want[~finite]), what
        off = float((got - want).abs()[finite].max()) if finite.any() else 0.0
        assert off <= relative * size, f"{what}: off by {off:.2e}, allowed {relative * size:.2e}"

    def _adopt(self) -> None:
        """Hold gradients against those of the whole batch, and let the simulation go on from the run's."""
        pairs = list(zip(self.model.named_parameters(), self.simulation.model.parameters(), strict=True))
        largest = max(float(p.grad.abs().max()) for _, p in pairs if p.grad is not None)
        for (name, mine_), its in pairs:
            assert mine_.grad is not None and its.grad is not None, name  # noqa: PT018
            got = whole(mine_.grad)
            self._near(f"gradient of {name}", got, its.grad, self._terms, largest)
            if name in self.simulation.weights and not self.simulation.dense:
                assert not got[self.simulation.outside(name)].any(), f"gradient of {name} outside its blocks"
            its.grad.copy_(got)
        self.simulation.mask_gradients()

    def compare(self, what: str) -> None:
        """Weights and all optimizer state are the simulation's, and the same on all ranks."""
        simulation = self.simulation
        own = mst_compile.sparsifier(self.model)
        assert own.step_count == simulation.count, f"{what}: {own.step_count} steps, taken {simulation.count}"
        for name, mask in own.masks.items():
            assert torch.equal(mask, simulation.masks[name]), f"{what}: mask of {name}"
        check_ranks(self.model)
        found = []
        for (name, mine_), its in zip(self.model.named_parameters(), simulation.model.parameters(), strict=True):
            a, b = self.optimizer.state.get(mine_, {}), self.part.optimizer.state.get(its, {})
            assert a.keys() == b.keys(), f"{what}: state of {name}"
            pairs = {"": (whole(mine_), its.detach())}
            pairs |= {k: (whole(a[k]), b[k]) for k in b if isinstance(b[k], Tensor)}
            found += [got.double().flatten() for got, _ in pairs.values()]
            for key, (got, want) in pairs.items():
                self._compare(f"{what}: {key or 'value'} of {name}", name, key, got, want)
        assert_same_on_all_ranks(torch.cat(found))
        simulation.near = {}
        groups = [
            {frozenset(id(p) for p in g["params"]): g for g in o.param_groups}
            for o in (self.optimizer, self.part.optimizer)
        ]
        rates = [sorted((len(k), g["lr"], g["weight_decay"]) for k, g in of.items()) for of in groups]
        assert rates[0] == rates[1], what

    def _compare(self, what: str, name: str, key: str, got: Tensor, want: Tensor) -> None:
        """Up to the last roundings, as shards' ends are computed one by one; what is 0 is 0."""
        near = self.simulation.near.get(name)
        truth, allowed = want.double(), torch.zeros(want.shape, dtype=torch.float64)
        if near is not None and key in near.exact:
            where = near.where & (want != 0)
            truth = torch.where(where, near.exact[key], truth)
            allowed = torch.where(where, near.allowed[key], allowed)
        if key == "exp_inf":  # Adamax adds its eps to all gradients: what is next takes that for nothing
            truth = torch.where((got <= 1e-8) & (want <= 1e-8), got.double(), truth)
        elif name in self.simulation.weights and got.shape == want.shape and want.dim() >= 2:
            nothing = self.simulation.outside(name) & (want == 0)  # Adagrad's sums begin above 0
            assert not got[nothing].any(), f"{what} outside its blocks"
        off = (got.double() - truth).abs()
        coarse = got.dtype if got.element_size() < want.element_size() else want.dtype
        if key == "mu_product":  # in float32 until it is loaded, and again where a checkpoint is read into a new one
            coarse = torch.float32
        floor = of_rounding(coarse, times=16) * float(truth.abs().max()) if truth.numel() else 0.0
        wrong = ~(off <= allowed + floor)
        assert not wrong.any(), f"{what}: {int(wrong.sum())} elements, off by up to {float(off.max()):.2e}"
        want.copy_(got)


def check(program: RankProgram, folder: Path) -> None:
    """Run a program, and compare after each of its operations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = RankRun(program, folder)
            for i, (name, *args) in enumerate(program.ops):
                getattr(run, name)(*args)
                run.compare(f"after {name}, operation {i}, {run.layout}")
        except Exception as error:
            raise AssertionError(f"{program}: {error}") from error
