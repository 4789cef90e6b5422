"""How a drawn program steps: what comes between a batch and a training step that is complete."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import reject
from net_cases import loss_of
from program_cases import Batch, Program
from program_pair import Pair
from simulation import Part, Scaler
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import ReduceLROnPlateau

import mst_compile

SCALE, GROWTH = 16.0, 2  # of losses under GradScaler, and after how many steps it doubles


class Steps(Pair):
    """A pair that is trained."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.scaler, self.scale = torch.amp.GradScaler("cpu", SCALE, growth_interval=GROWTH), Scaler(SCALE, GROWTH)

    @property
    def _models(self) -> tuple[nn.Module, nn.Module]:
        return self.sparse.model, self.simulation.model

    @property
    def _runs_closures(self) -> bool:
        """Whether the optimizer takes no step without a closure."""
        return isinstance(self.sparse.optimizers[0], optim.LBFGS)

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.sparse.model.parameters())

    # -- operations --

    def step(self, batches: tuple[Batch, ...], clip: str, after: str) -> None:
        """Accumulate, clip, step, and forget the gradients or not."""
        if self._runs_closures:
            return self.closure(batches[0])
        for batch in batches:
            self._backward(batch, 1 / len(batches))
        self._clip(clip)
        self._step()
        self._forget(after)

    def _clip(self, clip: str) -> None:
        for model in self._models:
            if all(p.grad is None for p in model.parameters()):
                continue  # which clip_grad_value_ refuses
            if clip == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            elif clip == "value":
                nn.utils.clip_grad_value_(model.parameters(), 0.01)

    def _forget(self, after: str) -> None:
        if after != "keep":
            self._zero(after == "none")

    def gather(self, batch: Batch) -> None:
        """Gradients that a later step will use."""
        self._backward(batch, 0.5)

    def scaled(self, batches: tuple[Batch, ...], clips: bool, bad: bool, after: str) -> None:
        """Step as ``GradScaler`` does; in a ``bad`` step gradients are not finite."""
        if self._runs_closures or not self._trains() or self.simulation.brought:
            return
        for batch in batches:
            self._backward(batch, self.scale.scale / len(batches))
        if bad:
            self._spoil(batches[0], torch.inf)
        for model in self._models:
            if not any(p.grad is not None for p in model.parameters()):
                return
        self.scaler.scale(torch.ones(()))  # it makes its own scale at the first loss
        optimizers, parts = self._with_gradients()
        if clips:
            for optimizer in optimizers:
                self.scaler.unscale_(optimizer)
        finite = [self.scale.unscale(part.optimizer) for part in parts]
        if len(set(finite)) > 1:
            reject()  # which of several optimizers skips a step is up to each
        if clips:
            self._clip("norm")
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        for part in parts:
            (self.simulation.step if all(finite) else self.simulation.leave_out)(part)
        self.scaler.update()
        self.scale.update(all(finite))
        assert self.scaler.get_scale() == self.scale.scale
        if all(finite):
            self._complete(counts=any(self.simulation.own(part) for part in parts))
            self._forget(after)
        else:
            self._zero(True)

    def _with_gradients(self) -> tuple[list[optim.Optimizer], list[Part]]:
        """The optimizers that have any: GradScaler refuses others."""
        both = zip(self.sparse.optimizers, self.simulation.parts, strict=True)
        found = [(o, part) for o, part in both if any(p.grad is not None for g in o.param_groups for p in g["params"])]
        return [o for o, _ in found], [part for _, part in found]

    def burst(self, batch: Batch, which: int) -> None:
        """A step in which the gradient of a weight is infinite where the weight is 0."""
        if self._runs_closures:
            return
        self._backward(batch)
        found = [n for n, p in self.simulation.parameters.items() if p.grad is not None]
        if found and self.simulation.sparse:
            name = found[which % len(found)]
            for place in self.simulation.outside(name).nonzero()[:1].tolist():
                for model in self._models:
                    gradient = model.get_parameter(name).grad
                    assert gradient is not None
                    gradient[tuple(place)] = torch.inf
        self._step()
        self._zero(True)

    def lay(self, batch: Batch, after: str) -> None:
        """A step by gradients that the program has made of others: they lie in memory as their transposes would, and
        are not 0 anywhere."""
        if self._runs_closures or self.program.optimizer.endswith("fused"):
            return self.step((batch,), "", after)  # which take all to lie alike
        self._backward(batch)
        for model in self._models:
            for p in model.parameters():
                if p.grad is not None and p.dim() >= 2:
                    p.grad = (p.grad.mT.contiguous() + 0.01).mT
        self._step()
        self._forget(after)

    def _spoil(self, batch: Batch, by: float) -> None:
        """Gradients of a loss that is not finite."""
        for model in self._models:
            outputs = self._call(model, batch, plain=model is self.simulation.model)
            if any(p.requires_grad for p in model.parameters()):
                (loss_of(outputs) * by).backward()
        self.simulation.mask_gradients()

    def skip(self, batch: Batch) -> None:
        """A loss that is NaN is not stepped."""
        self._zero(True)
        self._spoil(batch, torch.nan)
        self._zero(True)

    def closure(self, batch: Batch) -> None:
        """One optimizer computes its gradients within its step."""
        if not self._runs_closures and (len(self.sparse.optimizers) > 1 or self.frozen):
            return self.step((batch,), "", "none")
        (optimizer,), (part,) = self.sparse.optimizers, self.simulation.parts
        if self.program.mode == "plain":
            with self._following():
                optimizer.step(self._closure(self.sparse.model, batch))
            self.simulation.step(part, self._closure(self.simulation.model, batch))
            self._complete()
            return self._zero(True)
        if self.simulation.brought:
            return self.step((batch,), "", "none")
        self.simulation.settle(part)

        def compute() -> Tensor:
            self._zero(True)
            return self._backward(batch)

        optimizer.step(compute)
        self.simulation.step(part)
        self._complete()
        self._zero(True)

    def _closure(self, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
        """Computes one side's gradients, as often as it is asked."""

        def compute() -> Tensor:
            model.zero_grad()
            loss = loss_of(self._call(model, batch))
            loss.backward()
            if model is self.simulation.model:
                self.simulation.mask_gradients()
            return loss

        return compute

    # -- a step --

    def _step(self) -> None:
        if not any(p.grad is not None for p in self.sparse.model.parameters()):
            return
        for optimizer, part in zip(self.sparse.optimizers, self.simulation.parts, strict=True):
            with self._following():
                optimizer.step()
            self.simulation.step(part)
        self._complete(counts=any(self.simulation.own(part) for part in self.simulation.parts))

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        """What masks have followed values to is seen when an optimizer begins to step: an event may change it then."""

        def look(*_: Any) -> None:
            if self.simulation.sparse:
                self.simulation.following.update(mst_compile.sparsifier(self.sparse.model).masks)

        looks = self.sparse.optimizers if self.simulation.brought else []
        handles = [optimizer.register_step_pre_hook(look) for optimizer in looks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _complete(self, *, counts: bool = True) -> None:
        for scheduler in [*self.sparse.schedulers, *self.schedulers]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        if counts:
            self.simulation.complete(mst_compile.sparsifier(self.sparse.model).masks if self.simulation.sparse else {})
