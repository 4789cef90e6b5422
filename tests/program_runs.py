"""A run of a drawn program: a sparse model beside its simulation, compared after every operation."""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from typing import Any

import safetensors.torch
import torch
from expert_cases import BY_VALUE
from hypothesis import reject
from net_cases import loss_of
from oracles import assert_all_as_good_as, assert_same_bits
from program_cases import Batch, Program
from program_pair import Sparse
from program_steps import Steps
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mst_compile
from mst_compile import export
from mst_compile.errors import BlockSizeError, WeightError


class Run(Steps):
    """All that may happen to a program's sparse model beside its steps."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.average: tuple[AveragedModel, AveragedModel] | None = None
        self.moving: tuple[AveragedModel, ...] | None = None
        self.turned = False
        self.packages: list[tuple[Any, Batch, tuple[Tensor, ...]]] = []

    def evaluate(self, batch: Batch, how: str) -> None:
        """Outputs in evaluation mode."""
        real, plain = self.sparse.model.eval(), self.simulation.model.eval()
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[how]():
            self._same_outputs(real, plain, batch)
        real.train(), plain.train()

    def freeze(self, which: int, forget: bool) -> None:
        """Freeze a parameter, or train it again."""
        if self._runs_closures:
            return  # it moves frozen Parameters, too
        names = [n for n, _ in self.sparse.model.named_parameters()]
        self._freeze({names[which % len(names)]} - self.held_back, forget)

    def rest(self) -> None:
        """Freeze all sparse weights, or train them again."""
        if self._runs_closures:
            return
        sparse = {id(p) for p in self.simulation.parameters.values()}
        names = {n for n, p in self.simulation.model.named_parameters() if id(p) in sparse} - self.held_back
        self._freeze(names & self.frozen if self.frozen >= names else names - self.frozen, True)

    def _freeze(self, names: set[str], forget: bool) -> None:
        self.frozen ^= names
        for model in self._models:
            for name in names:
                p = model.get_parameter(name)
                p.requires_grad_(name not in self.frozen)
                if forget:
                    p.grad = None

    def join(self) -> None:
        """Parameters that were held back join the optimizer, and are trained from now on."""
        if self.joined or not self.held_back:
            return
        self.joined, names = True, self.held_back
        self.held_back = set()
        self._freeze(names, False)
        (optimizer,), (part,) = self.sparse.optimizers, self.simulation.parts
        optimizer.add_param_group(self._late(self.sparse.model))
        part.optimizer.add_param_group(self._late(self.simulation.model))
        part.laws.append(None)

    def turn(self) -> None:
        """Experts change places."""
        self.turned = not self.turned
        for model in self._models:
            model.turn()  # type: ignore[operator]

    def write(self) -> None:
        """A program writes to all parameters."""
        for model in self._models:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01)

    def bring(self, seed: int, share: float, batch: Batch) -> None:
        """A checkpoint brings values alone: of sparse weights ``share`` of the blocks, wherever they are, hold any."""
        simulation = self.simulation
        if not simulation.sparse:
            return
        generator = torch.Generator().manual_seed(seed)
        values = {n: v.detach().clone() for n, v in simulation.model.state_dict().items()}
        for name, fact in simulation.weights.items():
            value = torch.randn(fact.dims, generator=generator, dtype=torch.float64) / fact.cols**0.5
            drawn = torch.rand(len(simulation.masks[name]), fact.shape[1], generator=generator) < share
            for same in self._names_of(name):
                values[same].copy_(value * fact.expand(drawn))
        self.sparse.model.load_state_dict(values)
        simulation.bring(values)
        with torch.no_grad():
            self._same_outputs(*self._models, batch)

    def _names_of(self, name: str) -> list[str]:
        """All names of a Parameter."""
        plain = self.simulation.model
        mine = plain.get_parameter(name)
        return [n for n, p in plain.named_parameters(remove_duplicate=False) if p is mine]

    def mask(self, batch: Batch, which: int) -> None:
        """After a step a program says which blocks of a weight are active: in every matrix of a stack another share."""
        simulation = self.simulation
        if not simulation.sparse or not self._trains():
            return
        self.step((batch,), "", "none")
        name = sorted(simulation.weights)[which % len(simulation.weights)]
        if name in simulation.brought:
            return  # it is frozen: which of both is newer, values or mask, would be said by nobody
        fact = simulation.weights[name]
        least = fact.backbone() if fact.guard == "backbone" else torch.zeros(fact.shape, dtype=torch.bool)
        least[0, 0] = True
        generator = torch.Generator().manual_seed(batch[0])
        drawn = []
        for _ in range(fact.count):
            share = 0.2 + 0.7 * torch.rand((), generator=generator)
            drawn.append((torch.rand(fact.shape, generator=generator) < share) | least)
        mst_compile.sparsifier(self.sparse.model).apply_mask(name, torch.cat(drawn))
        simulation.change(name, torch.cat(drawn))

    def resume(self, order: tuple[str, ...], weights_apart: bool) -> None:
        """Save all, and load it into what another process would make."""
        if not self.simulation.sparse or self._written():
            return
        self._zero(True)
        new, state = self._make(), self._saved(weights_apart)
        self._refit(new)
        self._load(new, state, order)
        self.sparse, self.average = new, None
        self._reload()

    def start_optimizer_anew(self, weights_apart: bool) -> None:
        """Resume without the optimizer's state: the sparsifier's has the masks."""
        simulation = self.simulation
        if self._written() or not simulation.sparse or self.program.course.regrown == "own steps":
            return
        if self.program.rates != "none" or self._runs_closures:
            return
        self._zero(True)
        new, state = self._make(), self._saved(weights_apart)
        self._refit(new)
        self._load(new, state, ("model", "sparsifier"))
        self.sparse, self.average = new, None
        for part in simulation.parts:
            members = [p for group in part.optimizer.param_groups for p in group["params"]]
            part.optimizer.state.clear()
            part.optimizer.state.update(part.make(members).state)  # Adagrad has some from the start
            part.met = False

    def roll_back(self, batch: Batch, bad: bool, order: tuple[str, ...]) -> None:
        """Save all, take a step, which may be of a loss that is NaN, and load it all back."""
        if not self.simulation.sparse or self._written() or not self._trains():
            return
        self._zero(True)
        state, real = self._saved(False), self.sparse

        def compute() -> Tensor:
            real.model.zero_grad()
            loss = loss_of(self._call(real.model, batch)) * (torch.nan if bad else 1.0)
            loss.backward()
            return loss

        if not self._runs_closures:
            compute()
        for optimizer in real.optimizers:
            optimizer.step(*([compute] if self._runs_closures else []))
        for scheduler in real.schedulers:
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        for optimizer in real.optimizers:
            optimizer.zero_grad()
        self._load(real, state, order)
        self._reload()

    def _saved(self, weights_apart: bool) -> dict[str, Any]:
        """All that a checkpoint holds, through files in memory; weights in one of their own, if so, by safetensors."""
        sparse, buffer = self.sparse, io.BytesIO()
        saved = {
            "model": sparse.model.state_dict(),
            "optimizer": [o.state_dict() for o in sparse.optimizers],
            "sparsifier": mst_compile.sparsifier(sparse.model).state_dict(),
            "schedulers": [s.state_dict() for s in sparse.schedulers],
        }
        if weights_apart:
            saved["model"] = {n: t.clone().contiguous() for n, t in saved["model"].items()}
            saved["model"] = safetensors.torch.load(safetensors.torch.save(saved["model"]))
        torch.save(saved, buffer)
        return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)

    def _load(self, new: Sparse, state: dict[str, Any], order: tuple[str, ...]) -> None:
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

    def _reload(self) -> None:
        """Loading is PyTorch's own affair, too: NAdam's product of momenta comes back in the Parameter's dtype."""
        for part in self.simulation.parts:
            part.optimizer.load_state_dict(part.optimizer.state_dict())

    def _written(self) -> bool:
        """Whether values stand outside the masks: where these are loaded, masks follow them, see :meth:`bring`."""
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

    def copy(self, pickled: bool) -> None:
        """Go on with a copy of the model and its optimizers; PyTorch copies no gradients of Parameters."""
        if self._runs_closures:
            return  # PyTorch's copy of LBFGS has lost its Parameters
        self._zero(True)
        old = self.sparse
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in old.optimizers]
        groups, states = copy.deepcopy((groups, [s.state_dict() for s in old.schedulers]))
        if pickled:
            buffer = io.BytesIO()
            torch.save((old.model, old.optimizers), buffer)
            model, optimizers = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        else:
            model, optimizers = copy.deepcopy((old.model, old.optimizers))
        self.sparse = Sparse(model, optimizers, self._schedulers(optimizers))
        for scheduler, state in zip(self.sparse.schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for optimizer, of_groups in zip(optimizers, groups, strict=True):
            for group, values in zip(optimizer.param_groups, of_groups, strict=True):
                group.update(values)

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

    def swap(self, batch: Batch, how: str) -> None:
        """Put a moving average in the place of the weights, compute with it, and take it out again, or go on from it.

        Of weights that are written, in place or by exchanging what Parameters hold; then gradients are recorded as they
        were before, as where that changes the backend looks at all values.
        """
        if self.moving is None:
            mean = get_ema_multi_avg_fn(0.5)
            self.moving = tuple(AveragedModel(m, multi_avg_fn=mean) for m in self._models)
        kept = []
        for average, model in zip(self.moving, self._models, strict=True):
            average.update_parameters(model)
            kept.append([p.detach().clone() for p in model.parameters()])
            self._put(model, [p.detach().clone() for p in average.module.parameters()], how)
        with torch.set_grad_enabled(how == "exchange"):
            self._same_outputs(*self._models, batch)
        for model, values in zip(self._models, kept, strict=True):
            if how != "stay":
                self._put(model, values, how)

    def _put(self, model: nn.Module, values: list[Tensor], how: str) -> None:
        with torch.no_grad():
            for p, value in zip(model.parameters(), values, strict=True):
                if how == "exchange":
                    p.data = value
                else:
                    p.copy_(value)

    def cast(self, batch: Batch, dtype: torch.dtype) -> None:
        """Compute in another dtype for once, and come back: what is rounded stays so."""
        if self.program.course.pattern != "full":
            return  # each is a graph of its own, of which Dynamo makes a few
        if self.wide is not None and dtype == torch.bfloat16 and {*self.net.pieces} & {*BY_VALUE}:
            return  # tokens would go elsewhere in float64
        for model in self._models:
            model.to(dtype)
        with torch.no_grad():
            self._same_outputs(*self._models, batch, dtype)
        for model in self._models:
            model.to(self.net.dtype)

    def package(self, batch: Batch, packed: bool) -> None:
        """AOTInductor compiles the model as it is; what it makes is asked again when all else has happened."""
        simulation = self.simulation
        if self.packages or self.program.course.pattern != "full":
            return  # one takes long; and an exported program has no pattern
        if not simulation.sparse or self._written():
            packed = False  # which is refused
        inputs = tuple(self._inputs(batch, None))
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            try:
                torch.export.export(copy.deepcopy(simulation.model).eval(), inputs)
            except Exception:
                return  # a model that PyTorch does not export, sparse or not
            copied = self._packed() if packed else export.plain(self.sparse.model).eval()
            with self._context():
                program = torch.export.export(copied, inputs)
                path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
                made = torch._inductor.aoti_load_package(path)
                usual = simulation.model.eval()(*inputs)
            simulation.model.train()
            exact, _ = self._exactly(simulation.model, batch)
            self.packages.append((made, batch, (*usual, *exact)))
        self.end()

    def _packed(self) -> nn.Module:
        try:
            return export.packed(self.sparse.model)
        except WeightError:  # no layer of it can be
            return export.plain(self.sparse.model).eval()

    def end(self) -> None:
        """What was packaged computes what the model did then, whatever has been trained since."""
        for made, batch, values in self.packages:
            with torch.no_grad():
                got, half = made(*self._inputs(batch, None)), len(values) // 2
            named = [{f"output {i}": t for i, t in enumerate(ts)} for ts in (got, values[:half], values[half:])]
            assert_all_as_good_as(*named, self.precision)

    def densify(self) -> None:
        """End sparse training early."""
        if self.simulation.sparse:
            mst_compile.densify(self.sparse.model)
            self.simulation.densify()


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
        run.end()
