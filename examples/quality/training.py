"""One run: train a model under a configuration, and measure everything the study reports."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import lzma
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mst_compile
from mst_compile.report.clock import Clock
from mst_compile.report.machine import processor_name
from mst_compile.rules.laws import graphcore

from .config import Config, learning_rate, lengthened, overrides_of, schedule_of
from .configurations import KNOWN
from .guards import Guard
from .model import (
    GPT,
    Shape,
    active_weights,
    dead_units,
    hidden_weights,
    matching_shape,
    narrowed,
    nonzero_share,
)
from .sizes import Study

LAST = 50  # steps whose mean training loss is recorded


@dataclass(frozen=True)
class Text:
    """Training and validation text as bytes, uint8."""

    train: Tensor
    validation: Tensor

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this text from any other: packages that a corpus is made of change."""
        both = hashlib.sha256(self.train.numpy())
        both.update(self.validation.numpy())
        return f"c{both.hexdigest()[:8]}"  # never a number

    @classmethod
    def load(cls, train: Path, validation: Path) -> Text:
        """Read both files, unpacking those that end with ``.xz``."""
        found = (lzma.decompress(f.read_bytes()) if f.suffix == ".xz" else f.read_bytes() for f in (train, validation))
        return cls(*(torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in found))


def repeated(text: Tensor, unique: int | None, pieces: int = 64) -> Tensor:
    """What is left of a training text of which ``unique`` bytes are to be repeated: pieces of equal size, spread
    evenly, so that it is about the same things as the whole."""
    if unique is None:
        return text
    size = max(1, unique // pieces)
    return torch.cat([text[i * (len(text) // pieces) :][:size] for i in range(pieces)])


def training_batch(text: Tensor, study: Study, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Random windows, a pure function of seed and step: every configuration sees the same data in the same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(text) - study.context, (study.batch,), generator=generator)
    rows = torch.stack([text[s : s + study.context + 1] for s in starts.tolist()]).long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def validation_batches(text: Tensor, study: Study) -> list[tuple[Tensor, Tensor]]:
    """The same windows for every run and seed, spread evenly over the validation text."""
    wanted = study.batch * study.validation_batches
    windows = len(text) // (study.context + 1)
    rows = text[: windows * (study.context + 1)].view(windows, -1)[torch.arange(wanted) * windows // wanted].long()
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(study.batch)]


def planned_flops(config: Config, study: Study) -> float:
    """Training FLOPs of a whole run of the study's steps (or so many times them as the configuration says), found by
    walking its schedule without training."""
    study, shape = lengthened(config, study), _shape_of(config, study)
    schedule = schedule_of(config, study)
    if schedule is None:
        return study.steps * shape.dense_flops(study.tokens)
    model = GPT(shape)
    make_sparse(model, config, study, 0)
    sparsifier = mst_compile.sparsifier(model)
    total = 0.0
    for _ in range(study.steps):
        total += shape.step_flops(study.tokens, *active_weights(model, sparsifier.weights))
        sparsifier.step()
    return total


def make_sparse(model: GPT, config: Config, study: Study, seed: int) -> None:
    """``sparsify`` as the configuration says, for a run of ``study.steps``; the head stays dense."""
    schedule = schedule_of(config, study)
    assert schedule is not None
    mst_compile.sparsify(
        model,
        schedule,
        block=config.block,
        exclude="head",
        overrides=overrides_of(config),
        guard="backbone" if config.backbone else "none",
        rescale=config.rescale,
        seed=seed,
    )


def _shape_of(config: Config, study: Study) -> Shape:
    return narrowed(study.shape, config.width) if isinstance(config.width, int) else study.shape


def size_of(config: Config, study: Study) -> tuple[Shape, int]:
    """Shape and number of steps of a configuration; matched ones get the training FLOPs of the study's ``base``.

    How many FLOPs a step of a schedule has on average hardly depends on how long it is: a matched sparse run has as
    many steps as that average, over a run of the study's steps, says.
    """
    shape, steps = _shape_of(config, study), lengthened(config, study).steps
    if "match" in (config.width, config.length):
        budget = config.budget * planned_flops(KNOWN[study.base], study)
        if config.width == "match":
            shape = matching_shape(shape, study.tokens, budget / steps)
        else:
            steps = max(1, round(budget / (planned_flops(config, study) / steps)))
    return shape, steps


def optimizer_for(model: GPT, study: Study, beta2: float) -> torch.optim.Optimizer:
    """AdamW: a group for each hidden matrix, called by its name; the other matrices; the vectors, not decayed."""
    hidden = {name for name, _ in hidden_weights(model)}
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [named[name]], "name": name} for name in sorted(hidden)]
    rest = [p for name, p in named.items() if name not in hidden]
    groups.append({"params": [p for p in rest if p.dim() == 2], "name": ""})
    groups.append({"params": [p for p in rest if p.dim() < 2], "name": "", "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups, lr=study.learning_rate, betas=(0.9, beta2), weight_decay=study.weight_decay, fused=True
    )


def rate_factor(config: Config, study: Study, shape: Shape, density: float) -> float:
    """Factor on the learning rate of a hidden weight; the fewer inputs an output sums over, the larger the steps."""
    if config.rate_law == "graphcore":
        return config.hidden_rate * graphcore(shape.width * density / study.width)
    return config.hidden_rate * (study.width / (shape.width * density)) ** config.input_rate


def scale(group: dict[str, Any], config: Config, study: Study, factor: float) -> None:
    """Let a hidden weight's group step ``factor`` times as fast, and decay as the configuration says."""
    group["lr"] *= factor
    if config.decay_law == "independent":
        group["weight_decay"] = study.weight_decay / (factor / config.hidden_rate)


def _autocast(study: Study, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=study.dtype == "bfloat16")


def evaluate(model: GPT, batches: list[tuple[Tensor, Tensor]], study: Study) -> float:
    """Mean loss over the validation batches, by the plain model in eager mode."""
    device = model.head.weight.device
    with torch.no_grad(), _autocast(study, device):
        return sum(model(x.to(device), y.to(device)).item() for x, y in batches) / len(batches)


def train(
    config: Config,
    seed: int,
    study: Study,
    text: Text,
    look: Callable[[int, GPT], None] | None = None,
    stop: int | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
) -> dict[str, Any]:
    """Train one run from its seed; returns its record, losses of all steps included.

    Args:
        look: called with the number of steps taken and the model, before the first step and after each.
        stop: end after so many steps, with the schedules of the whole run.
        device: where to train.
    """
    shape, steps = size_of(config, study)
    own = replace(study, steps=steps)
    torch._dynamo.reset()
    torch.manual_seed(seed)  # equal shapes start from equal weights
    model = GPT(shape).to(device)
    sparse: dict[str, mst_compile.SparseWeight] = {}
    schedule = schedule_of(config, own)
    if schedule is not None:
        make_sparse(model, config, own, seed)
        sparse = mst_compile.sparsifier(model).weights
    backend = "inductor" if schedule is None else "mst"
    compiled = torch.compile(model, backend=backend, dynamic=False) if study.compile else model
    optimizer, clock, guard = optimizer_for(model, study, config.beta2), Clock(), Guard(model, config.guard)
    losses, densities, flops = [], [], 0.0
    written, unseen = repeated(text.train, study.unique), validation_batches(text.validation, study)
    checked = {round(steps * (i + 1) / (study.checks + 1)) for i in range(study.checks)}
    checks: list[tuple[int, float]] = []
    if look is not None:
        look(0, model)
    for step in range(steps if stop is None else min(steps, stop)):
        x, y = (t.to(device) for t in training_batch(written, study, seed, step))
        active, in_gradient = active_weights(model, sparse)
        flops += shape.step_flops(study.tokens, active, in_gradient)
        densities.append(active / shape.hidden_size)
        rate = learning_rate(config, study, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
            if group["name"]:
                density = sparse[group["name"]].density if group["name"] in sparse else 1.0
                scale(group, config, study, rate_factor(config, study, shape, density))
        clock.start()
        with _autocast(study, device):
            loss = compiled(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        guard.before_step()
        optimizer.step()
        guard.after_step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.stop()
        losses.append(loss.item())
        if step + 1 in checked:
            checks.append((step + 1, round(evaluate(model, unseen, study), 5)))
        if look is not None:
            look(step + 1, model)
    dead, dead_values = dead_units(model)
    return {
        "name": config.name,
        "seed": seed,
        "settings": config.settings(),
        "study": asdict(study),
        "text": text.fingerprint,
        "width": shape.width,
        "steps": len(losses),
        "blocks": sorted({w.grid.block for w in sparse.values()}),
        "val_loss": evaluate(model, unseen, study),
        "train_loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "flops": flops,
        "flops_relative": flops / (study.steps * study.shape.dense_flops(study.tokens)),
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "compile_seconds": clock.compile_seconds,
        "density_min": min(densities),
        "density": active_weights(model, sparse)[0] / shape.hidden_size,
        "nonzero": nonzero_share(model),
        "dead_hidden": dead,
        "dead_values": dead_values,
        "events": [] if schedule is None else [s for s in range(1, steps) if schedule.is_topology_event(s)],
        "torch": torch.__version__,
        "cpu": processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "checks": checks,
        "losses": [round(v, 4) for v in losses],
    }
