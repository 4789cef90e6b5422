"""Training of the small GPT, dense or sparse, and what it writes afterwards."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mst_compile.api import sparsify
from mst_compile.report import files
from mst_compile.report.clock import compilations
from mst_compile.report.recorder import FILES, Recorder
from mst_compile.rules.mixed_sparsity import MixedSparsity
from mst_compile.state.learning_rates import param_groups

from .model import GPT, Shape
from .text import training_batch, validation_batches

WARM_UP = 20  # steps in which the learning rate rises; fixed, so that a run may begin before its length is known
SETTLE = 0.15  # share of the steps in which the model is dense again, and the learning rate falls
UNKNOWN = 10**9  # steps of a run whose length will be said later
TIMED = 8  # steps whose times say how long a run takes
_WEIGHTS, _SHAPE = "model.pt", "shape.json"
_VALIDATIONS = 8
_PAUSE = 4.0  # seconds between lines of progress
_TOP = 40


@dataclass(frozen=True)
class Setup:
    """What both runs have in common."""

    shape: Shape
    batch: int
    train: Tensor
    validation: Tensor
    rate: float = 1e-3
    seed: int = 0
    compile: bool = True

    @property
    def tokens(self) -> int:
        return self.batch * self.shape.context


def learning_rate(peak: float, step: int, steps: int) -> float:
    """Of step ``step``, from 0, of ``steps``: rises, stays, and falls to 0 while the model is dense."""
    falling = max(1, round(SETTLE * steps))
    return peak * min(1.0, (step + 1) / WARM_UP, (steps - step) / falling)


class Run:
    """One model in training; what happens is recorded in ``folder``."""

    def __init__(self, name: str, setup: Setup, steps: int, folder: Path, schedule: MixedSparsity | None) -> None:
        self.name, self.setup, self.steps, self.folder = name, setup, steps, folder
        torch.manual_seed(setup.seed)  # both start from the same weights
        self.model = GPT(setup.shape)
        if schedule is not None:
            sparsify(self.model, schedule, exclude="head", seed=setup.seed)
        backend = "inductor" if schedule is None else "mst"
        self.compiled = torch.compile(self.model, backend=backend, dynamic=False) if setup.compile else self.model
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, weight_decay=0.1), lr=setup.rate, betas=(0.9, 0.95), fused=True
        )
        self._unseen = validation_batches(setup.validation, 8, setup.shape.context, 4)
        shape, tokens = setup.shape, setup.tokens
        hidden = 0 if schedule is not None else shape.hidden_size
        rest = shape.step_flops(tokens, hidden, hidden)  # the head, which stays dense, and attention
        self.recorder = Recorder(
            self.model, folder, tokens_per_step=tokens, rest=rest, label=name, overwrite=True,
            notes={"layers": shape.layers, "width": shape.width, "context": f"{shape.context} bytes"},
        )  # fmt: skip
        self.step, self._said, self._said_so = 0, time.perf_counter(), False
        self.row: dict[str, Any] = {}
        self.times: list[float] = []  # seconds of each step

    def train(self, until: int) -> None:
        """Train up to so many steps."""
        while self.step < min(until, self.steps):
            compiled = self.row.get("compile_seconds", 0.0)
            self._said_so = False
            with compilations(self._compiling):
                self._train_step()
            compiled = self.row["compile_seconds"] - compiled
            # A step that was compiled in is given back the time of a usual one afterwards.
            if compiled > 1:
                print(f"{self.name}: compiled in {compiled:.0f} s (step {self.step})", flush=True)
            known = self.steps < UNKNOWN
            due = time.perf_counter() - self._said > _PAUSE and compiled <= 1  # else it says nothing of the rest
            if known and (due or self.step == self.steps):
                self._said = time.perf_counter()
                print(self._progress(), flush=True)

    def _compiling(self) -> None:
        """Say so before it is waited for, once a step."""
        if not self._said_so:
            self._said_so = True
            what = "" if self.step == 0 else " for other products"  # dense ones, of weights that are no longer sparse
            print(f"{self.name}: compiling{what}, which happens once ...", flush=True)

    def _train_step(self) -> None:
        setup, model = self.setup, self.model
        x, y = training_batch(setup.train, setup.batch, setup.shape.context, setup.seed, self.step)
        rate = learning_rate(setup.rate, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.recorder.start()
        loss = self.compiled(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        due = self.step == self.steps or self.step % max(1, self.steps // _VALIDATIONS) == 0
        self.recorder.stop()
        row = self.recorder.log(loss=loss, lr=rate, val_loss=self.evaluate() if due else None)
        assert row is not None
        self.row = row
        self.times.append(self.setup.tokens / row["tokens_per_s"])

    def evaluate(self) -> float:
        """Mean loss over validation text, by the plain model in eager mode."""
        with torch.no_grad():
            return sum(self.model(x, y).item() for x, y in self._unseen) / len(self._unseen)

    def _progress(self) -> str:
        row, left = self.row, self.steps - self.step
        phase = f"{row['phase']:<12}" if row["phase"] else ""
        usual = self.setup.tokens / row["tokens_per_s"]
        return (
            f"{self.name}: step {self.step:>4} of {self.steps}  {phase} loss {row['loss']:.3f}  density "
            f"{row['density']:.2f}  {row['tokens_per_s']:6.0f} bytes/s, {left * usual:.0f} s left"
        )

    def seconds_per_step(self) -> float:
        """Median over the steps so far, of which the first was compiled in."""
        return statistics.median(self.times[1:])

    def abandon(self) -> None:
        """Leave nothing of the run, nor of an earlier one that it replaces."""
        self.recorder.close()
        for name in (*FILES, _WEIGHTS, _SHAPE):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is something else in it
            self.folder.rmdir()

    def finish(self, prompt: str, length: int) -> str:
        """Close the records, keep the weights, and let the model write."""
        text = sample(self.model, prompt, length, self.setup.seed) if length else ""
        if text:
            self.recorder.sample(text)
        self.recorder.close()
        weights = io.BytesIO()
        torch.save(self.model.state_dict(), weights)
        files.replace(self.folder / _WEIGHTS, weights.getvalue())
        files.replace(self.folder / _SHAPE, json.dumps(asdict(self.setup.shape)) + "\n")
        return text


def schedule_of(steps: int) -> MixedSparsity:
    """The library's default schedule; its dense end covers the fall of the learning rate."""
    return MixedSparsity(steps, settle=SETTLE, ramp_interval=max(1, steps // 60))


@torch.no_grad()
def sample(model: GPT, prompt: str, length: int, seed: int) -> str:
    """``length`` bytes that a model writes after a prompt, which is a part of the text."""
    generator = torch.Generator().manual_seed(seed)
    written = list(prompt.encode(errors="surrogateescape")) or [10]  # bytes of the command line that were no text
    context = model.cos.shape[0]
    for _ in range(length):
        scores, likely = model.logits(torch.tensor([written[-context:]]))[0, -1].topk(_TOP)
        chosen = torch.multinomial((scores / 0.7).softmax(-1), 1, generator=generator)
        written.append(int(likely[chosen]))
    return bytes(written).decode("utf-8", errors="replace")
