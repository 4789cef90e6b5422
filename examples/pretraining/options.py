"""The command line of ``pretrain_gpt.py`` as one typed object, and the schedules that follow from it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RUNS = ("dense", "mst", "small", "static", "short")
# Options that may differ between a run and its continuation: they change neither data nor arithmetic.
FREE = {"out", "resume", "checkpoint_every", "stop_at", "threads", "chunk"}


@dataclass(frozen=True)
class Options:
    """See ``--help`` for what each option means."""

    data: tuple[Path, ...] = ()
    tokenizer: str = "bpe"
    vocabulary: int = 2048
    runs: tuple[str, ...] = ("dense", "mst", "small")
    steps: int = 240
    d_model: int = 384
    layers: int = 4
    heads: int = 6
    context: int = 256
    batch: int = 4
    published: bool = False
    sparsity: float | None = None
    warmup: float | None = None
    restoration: float = 0.1
    settle: float = 0.15
    block: int | None = None
    sparse_head: bool = False
    lr: float = 1e-3
    hidden_rate: float = 0.2
    lr_schedule: str = "wsd"
    lr_warmup: float = 0.05
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    chunk: int = 20
    eval_every: int = 0
    eval_batches: int = 10
    checkpoint_every: int = 0
    stop_at: int = 0
    compile: bool = True
    resume: bool = False
    out: Path = Path("runs/pretrain_gpt")

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.context

    def comparable(self) -> dict[str, Any]:
        """What must be equal for a run to be continued, as plain JSON values."""
        return {k: _plain(v) for k, v in asdict(self).items() if k not in FREE}

    def learning_rate(self, step: int, steps: int) -> float:
        """Learning rate of step ``step`` (from 0) of ``steps``.

        ``wsd`` warms up, stays, and falls linearly to 0 over the last ``settle`` share: exactly the part in which the
        model is dense again, so that weights which came back train at the full rate first. ``cosine`` falls to 10 %.
        """
        warmup = max(1, round(self.lr_warmup * steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.lr_schedule == "cosine":
            return self.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        decay = max(1, round(self.settle * steps))
        return self.lr * min(1.0, (steps - step) / decay)

    def mixed_sparsity(self) -> Any:
        """The library's default schedule over this run, or the paper's."""
        import mst_compile

        given = {"sparsity": self.sparsity, "warmup": self.warmup}
        make = mst_compile.MixedSparsity.published if self.published else mst_compile.MixedSparsity
        return make(
            self.steps,
            restoration=self.restoration,
            settle=self.settle,
            # So few steps leave little time between events, and each costs about half a dense step: its growth reads
            # a dense gradient.
            interval=max(1, self.steps // 8),
            ramp_interval=max(1, self.steps // 60),
            **{name: value for name, value in given.items() if value is not None},
        )

    def static_sparsity(self) -> Any:
        """One random mask of 80 % sparsity from the first step to the last: the plainest sparse baseline."""
        import mst_compile

        return mst_compile.Constant(0.8, growth="none")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _run_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in RUNS]
    if unknown or not names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: give each of {', '.join(RUNS)} at most once")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line. Defaults suit 2 CPU cores and a few minutes."""
    d = Options()
    p = argparse.ArgumentParser(
        description="Pretrain a small GPT-2 dense and with Mixed Sparsity Training, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    g = p.add_argument_group("what to run")
    runs_help = (
        "some of dense, mst, static (80 %% sparse), small and short (dense; mst's FLOPs by fewer units or steps)"
    )
    g.add_argument("--runs", type=_run_names, default=",".join(d.runs), help=runs_help)
    g.add_argument("--steps", type=int, default=d.steps, help="optimizer steps of each run")
    g.add_argument("--out", type=Path, default=d.out, help="folder for scalars, checkpoints, figures and results")
    g.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    g.add_argument("--checkpoint-every", type=int, default=d.checkpoint_every, help="steps; 0: only at the end")
    g.add_argument("--stop-at", type=int, default=d.stop_at, help="pause at this step (then --resume); 0: never")
    g.add_argument("--eval-every", type=int, default=d.eval_every, help="steps between validations; 0: ten in all")
    g.add_argument("--eval-batches", type=int, default=d.eval_batches, help="batches of a validation")
    g.add_argument("--chunk", type=int, default=d.chunk, help="steps that a run takes before it is the next one's turn")
    g = p.add_argument_group("text")
    g.add_argument("--data", type=Path, nargs="+", default=(), help="text files; default: the World English Bible")
    g.add_argument(
        "--tokenizer", choices=("bpe", "bytes"), default=d.tokenizer, help="byte pairs trained on it, or bytes"
    )
    g.add_argument("--vocabulary", type=int, default=d.vocabulary, help="size of the byte-pair vocabulary")
    g = p.add_argument_group("model and optimizer")
    g.add_argument("--d-model", type=int, default=d.d_model)
    g.add_argument("--layers", type=int, default=d.layers)
    g.add_argument("--heads", type=int, default=d.heads)
    g.add_argument("--context", type=int, default=d.context, help="tokens per sequence")
    g.add_argument("--batch", type=int, default=d.batch, help="sequences per step")
    g.add_argument("--lr", type=float, default=d.lr, help="peak learning rate")
    g.add_argument("--hidden-rate", type=float, default=d.hidden_rate, help="of the layers' matrices, times --lr")
    g.add_argument("--lr-schedule", choices=("wsd", "cosine"), default=d.lr_schedule, help="wsd: warmup, stable, decay")
    g.add_argument("--lr-warmup", type=float, default=d.lr_warmup, help="share of the steps")
    g.add_argument("--seed", type=int, default=d.seed)
    g = p.add_argument_group("sparsity")
    g.add_argument("--published", action="store_true", help="mst by the paper: warm-up to 90 %%, drop-and-grow")
    g.add_argument(
        "--sparsity", type=float, default=d.sparsity, help="share of zeros on the plateau; default the library's"
    )
    g.add_argument("--warmup", type=float, default=d.warmup, help="share of the steps in which it rises")
    g.add_argument("--restoration", type=float, default=d.restoration, help="share in which sparsity falls to 0")
    g.add_argument("--settle", type=float, default=d.settle, help="dense share at the end, where wsd decays the rate")
    g.add_argument("--block", type=int, default=d.block, help="edge of a block; default: what suits the device")
    g.add_argument("--sparse-head", action="store_true", help="the LM head too, and so the embedding it is tied to")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default=d.device, help="cpu, cuda, ...")
    g.add_argument("--dtype", choices=("float32", "bfloat16"), default=d.dtype, help="bfloat16: by autocast")
    g.add_argument("--threads", type=int, default=d.threads, help="CPU threads; 0: PyTorch's choice")
    g.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly; nothing gets faster")
    return p


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line."""
    p = parser()
    values = vars(p.parse_args(argv))
    values["data"] = tuple(values["data"])
    options = Options(**{f.name: values[f.name] for f in fields(Options)})
    for name in ("steps", "d_model", "layers", "heads", "context", "batch", "chunk", "eval_batches"):
        if getattr(options, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.d_model % options.heads:
        p.error(f"--d-model {options.d_model} is not a multiple of --heads {options.heads}")
    return options
