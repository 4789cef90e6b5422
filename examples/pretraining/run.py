"""One pretraining run: an unmodified Hugging Face GPT-2, its optimizer, its clock, its scalars, its checkpoint.

The three lines that mst_compile asks for are in :meth:`Run.__init__`; everything else is an ordinary training loop.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mst_compile
from mst_compile.cost.flops import Meter, dense_linear_training
from mst_compile.report.clock import Clock

from .data import Corpus, training_batch
from .model import HEAD, Shape, build_model
from .options import Options

# Columns of the scalar files; seconds and flops are sums since step 0.
FIELDS = ("step", "loss", "val_loss", "lr", "density", "sparsity_target", "tokens_per_s")
FIELDS += ("seconds", "compile_seconds", "flops")


@dataclass(frozen=True)
class Spec:
    """What tells one run from another."""

    name: str
    label: str
    shape: Shape
    steps: int
    schedule: Any = None


def optimizer_for(
    model: nn.Module, lr: float, hidden_rate: float = 1.0, relative_width: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW as GPT-2 is usually trained, weight decay on matrices only; the rate of hidden weights suits their inputs.

    GPT-2's hidden weights begin small, and embeddings want larger steps than they do: theirs is ``hidden_rate * lr``.
    The fewer inputs an output sums over, the larger the learning rate of its weights should be: in a narrower model
    (muP, arXiv 2203.03466), and in a sparser one (SµPar, arXiv 2405.15743), which ``density_rate`` takes care of.
    Weight decay does not grow with the rate: learning rate times weight decay is the full dense model's.
    """
    hidden = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in hidden]
    groups = [
        {
            "params": [p for p in model.parameters() if id(p) in hidden],
            "weight_decay": 0.1 * relative_width,
            "rate": hidden_rate / relative_width,
            "density_rate": 1.0,
        },
        {"params": matrices, "weight_decay": 0.1, "rate": 1.0},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0, "rate": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class Run:
    """A model in training, and all that is written about it."""

    def __init__(self, spec: Spec, options: Options, corpus: Corpus, folder: Path) -> None:
        self.spec, self.options, self.corpus, self.folder = spec, options, corpus, folder
        self.device = torch.device(options.device)
        self.step = 0
        self.clock = Clock()
        self.rows: list[dict[str, Any]] = []
        self.snapshots: dict[str, dict[str, Tensor]] = {}
        self.sparsifier: Any = None
        self._written = 0

        torch.manual_seed(options.seed)  # equal shapes start from equal weights
        self.model = build_model(spec.shape).to(self.device)
        if spec.schedule is not None:
            exclude = None if options.sparse_head else HEAD
            mst_compile.sparsify(self.model, spec.schedule, block=options.block, exclude=exclude, seed=options.seed)
            self.sparsifier = mst_compile.sparsifier(self.model)
        rest = dense_linear_training(self.model) + spec.shape.attention_flops
        self.meter = Meter(self.model, options.tokens_per_step, options.tokens_per_step * rest)
        backend = "inductor" if spec.schedule is None else "mst"
        # All batches have one shape; without dynamic=False the second width in a process would compile as dynamic.
        self.compiled = torch.compile(self.model, backend=backend, dynamic=False) if options.compile else self.model
        relative_width = spec.shape.d_model / options.d_model
        self.optimizer = optimizer_for(self.model, options.lr, options.hidden_rate, relative_width)
        folder.mkdir(parents=True, exist_ok=True)

    # -- training ----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        return self.step >= self.spec.steps

    @property
    def flops(self) -> float:
        """Training FLOPs so far."""
        return self.meter.flops

    @property
    def density(self) -> float:
        return 1.0 if self.sparsifier is None else self.sparsifier.density

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns its row of scalars."""
        options = self.options
        batch = training_batch(self.corpus.train, options.batch, options.context, options.seed, self.step)
        batch = batch.to(self.device)
        lr = options.learning_rate(self.step, self.spec.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["rate"]
        density = self.density
        self.meter.step()
        self._synchronize()
        self.clock.start()
        with self._autocast():
            loss = self.compiled(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronize()
        elapsed = self.clock.stop()
        target = 0.0 if self.spec.schedule is None else self.spec.schedule.sparsity_at(self.step)
        self.step += 1
        row = {
            "step": self.step,
            "loss": loss.item(),
            "val_loss": None,
            "lr": lr,
            "density": density,
            "sparsity_target": target,
            "tokens_per_s": options.tokens_per_step / elapsed,
            "seconds": self.clock.seconds,
            "compile_seconds": self.clock.compile_seconds,
            "flops": self.flops,
        }
        self.rows.append(row)
        self._snapshot()
        return row

    def evaluate(self, batches: list[Tensor]) -> float:
        """Mean loss over ``batches``, by the plain model in eager mode, masks or not; noted in the last row."""
        self.model.eval()
        with torch.no_grad(), self._autocast():
            on_device = (batch.to(self.device) for batch in batches)
            losses = [self.model(input_ids=batch, labels=batch).loss.item() for batch in on_device]
        self.model.train()
        self.rows[-1]["val_loss"] = sum(losses) / len(losses)
        return self.rows[-1]["val_loss"]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.options.dtype))

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _snapshot(self) -> None:
        """Keep the masks at telling moments, for the figure."""
        if self.sparsifier is None:
            return
        moments = {self.spec.steps: "end"}
        if hasattr(self.spec.schedule, "restoration_start"):
            s = self.spec.schedule
            plateau = s.restoration_start - s.warmup_steps
            if s.warmup_steps:
                moments[max(1, s.warmup_steps // 3)] = "warm-up"
            moments |= {
                s.warmup_steps + max(1, plateau // 20): "plateau begins",
                s.restoration_start: "plateau ends",
                s.restoration_start + s.restoration_steps * 3 // 4: "restoration",
            }
        if self.step in moments:
            self.snapshots[f"{moments[self.step]}, step {self.step}"] = self.sparsifier.masks

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def checkpoint_file(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write checkpoint and scalars; an interrupted write leaves the old checkpoint intact."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else None,
            "rng": torch.get_rng_state(),
            "seconds": self.clock.seconds,
            "compile_seconds": self.clock.compile_seconds,
            "flops": self.flops,
            "rows": self.rows,
            "snapshots": self.snapshots,
        }
        temporary = self.checkpoint_file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint_file)
        self.write_scalars()

    def load(self) -> bool:
        """Continue from the checkpoint, if there is one."""
        if not self.checkpoint_file.exists():
            return False
        state = torch.load(self.checkpoint_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.meter.flops, self.rows = state["step"], state["flops"], state["rows"]
        self.clock.seconds, self.clock.compile_seconds = state["seconds"], state["compile_seconds"]
        self.snapshots = state["snapshots"]
        self._written = 0
        return True

    def write_scalars(self) -> None:
        """Append the new rows to ``scalars.csv`` and ``scalars.jsonl``; start both files afresh after start or load."""
        mode, new = "a" if self._written else "w", self.rows[self._written :]
        with open(self.folder / "scalars.csv", mode, newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if mode == "w":
                writer.writeheader()
            writer.writerows(new)
        with open(self.folder / "scalars.jsonl", mode) as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        self._written = len(self.rows)

    def export(self) -> dict[str, float]:
        """Write ``model.pt``, a state dict for the plain model, and ``config.json``; returns what is non-zero.

        A Mixed Sparsity run must have ended dense; that is checked here.
        """
        dense_again = hasattr(self.spec.schedule, "restoration_start")
        if dense_again:
            assert self.density == 1.0, f"the {self.spec.name} run ended at density {self.density}"
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and ".wpe." not in name]
        nonzero = sum(int(p.count_nonzero()) for p in matrices) / sum(p.numel() for p in matrices)
        torch.save(self.model.state_dict(), self.folder / "model.pt")
        self.model.config.save_pretrained(self.folder)
        return {"density": self.density, "nonzero": nonzero}
