"""Pretrain a small GPT-2 dense and with Mixed Sparsity Training, side by side, and compare loss, FLOPs and time.

    python examples/pretrain_gpt.py                                   # a few minutes on two CPU cores
    python examples/pretrain_gpt.py --runs dense,mst --steps 2000 --data book1.txt book2.txt
    python examples/pretrain_gpt.py --device cuda --dtype bfloat16 --d-model 768 --layers 12 --heads 12 --context 1024

The model is ``transformers.GPT2LMHeadModel``, unmodified; what makes it sparse and fast is three lines
(``pretraining/run.py``)::

    mst_compile.sparsify(model, mst_compile.MixedSparsity(total_steps))
    model = torch.compile(model, backend="mst")

Runs (``--runs``), all on the same batches in the same order, starting from the same weights where shapes agree:

    dense    the model as it is, torch.compile with Inductor
    mst      Mixed Sparsity Training: 80 % sparse from the start, restored late; dense again at the end (--published:
             warm-up, 90 % sparse plateau with drop-and-grow, restoration)
    small    a narrower dense model of the same training FLOPs as mst
    static   80 % sparse from the first step to the last, masks never change
    short    the dense model, stopped (with its learning-rate schedule) after mst's training FLOPs

The LM head, which GPT-2 ties to its token embedding, stays dense in the sparse runs; ``--sparse-head`` changes that.

Needs the extra "examples": ``pip install -e .[examples]``. Everything is written to ``--out``.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from pretraining.data import Corpus, load_corpus, validation_batches
from pretraining.flops import matching_width, planned_flops
from pretraining.model import Shape
from pretraining.options import Options, parse
from pretraining.run import Run, Spec
from torch import Tensor
from tqdm import tqdm

from mst_compile.report.clock import compilations


def specs(options: Options, vocabulary: int) -> list[Spec]:
    """What each run trains; prints how ``small`` and ``short`` were matched to ``mst``."""
    shape = Shape(options.d_model, options.layers, options.heads, options.context, vocabulary)
    tokens, steps = options.tokens_per_step, options.steps
    budget = planned_flops(shape, tokens, steps, options.mixed_sparsity(), options.sparse_head, options.block)
    percent = f"{100 * options.mixed_sparsity().sparsity:g} %"
    found = []
    for name in options.runs:
        if name == "mst":
            found.append(Spec(name, f"MST {percent} sparse", shape, steps, options.mixed_sparsity()))
        elif name == "small":
            small = matching_width(shape, tokens, steps, budget)
            planned = planned_flops(small, tokens, steps)
            figures = f"{planned / 1e12:.2f} TFLOP planned, mst {budget / 1e12:.2f}"
            print(f"small: width {small.d_model}, {small.heads} heads; {figures}")
            found.append(Spec(name, f"dense, width {small.d_model}", small, steps))
        elif name == "short":
            fewer = max(1, round(steps * budget / planned_flops(shape, tokens, steps)))
            print(f"short: {fewer} of {steps} steps for mst's {budget / 1e12:.1f} TFLOP")
            found.append(Spec(name, f"dense, {fewer} steps", shape, fewer))
        elif name == "static":
            found.append(Spec(name, "static 80 % sparse", shape, steps, options.static_sparsity()))
        else:
            found.append(Spec(name, f"dense, width {shape.d_model}", shape, steps))
    return found


def prepare_folder(options: Options) -> None:
    """Record the options, or on ``--resume`` insist on the recorded ones."""
    file = options.out / "config.json"
    now = options.comparable()
    if options.resume:
        if not file.exists():
            raise SystemExit(f"--resume: there is no run in {options.out}")
        before = json.loads(file.read_text())
        different = sorted(k for k in now | before if now.get(k) != before.get(k))
        if different:
            values = ", ".join(f"{k}: {before.get(k)} then, {now.get(k)} now" for k in different)
            raise SystemExit(f"--resume: the run in {options.out} had other options ({values})")
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=2) + "\n")


class Progress:
    """One progress bar over the steps of all runs, which says so while one of them compiles, and a line of losses after
    each validation."""

    def __init__(self, runs: Sequence[Run], limit: int) -> None:
        total, done = sum(min(run.spec.steps, limit) for run in runs), sum(run.step for run in runs)
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", mininterval=20 if quiet else 0.2, smoothing=0.05)
        self._name, self._compiling = "", False

    def begin(self, run: Run) -> None:
        """A step begins."""
        self._name = run.spec.name

    def compiling(self) -> None:
        """It compiles, which takes longer than many steps: what the bar says until the step has ended."""
        if not self._compiling:
            self._compiling = True
            self.bar.set_postfix_str("", refresh=False)
            self.bar.set_description(f"{self._name:6} compiling")

    def step(self, run: Run, row: dict[str, Any]) -> None:
        text = f"loss {row['loss']:.3f}, density {row['density']:.2f}, {row['tokens_per_s']:.0f} tokens/s"
        self.bar.set_description(f"{run.spec.name:6}", refresh=False)
        self.bar.set_postfix_str(text, refresh=self._compiling)
        self._compiling = False
        self.bar.update()

    def validated(self, run: Run, val_loss: float) -> None:
        seconds = f"{run.clock.seconds:6.1f} s (+ {run.clock.compile_seconds:.0f} s compiling)"
        text = f"{run.spec.name:6}  step {run.step:5}  validation loss {val_loss:.3f}  {seconds}"
        self.bar.write(text, file=sys.stdout)


def train(runs: Sequence[Run], options: Options, val: list[Tensor]) -> None:
    """Let the runs take turns until all are at their end (or at ``--stop-at``)."""
    limit = options.stop_at or max(run.spec.steps for run in runs)
    longest = max(run.spec.steps for run in runs)
    progress = Progress(runs, limit)
    with compilations(progress.compiling):
        while waiting := [run for run in runs if run.step < min(limit, run.spec.steps)]:
            for run in waiting:
                share = max(1, round(options.chunk * run.spec.steps / longest))  # shorter runs take shorter turns
                for _ in range(min(share, run.spec.steps - run.step, limit - run.step)):
                    progress.begin(run)
                    progress.step(run, run.train_step())
                    between(run, options, val, progress)
                run.write_scalars()
    for run in runs:
        run.save()
    progress.bar.close()


def between(run: Run, options: Options, val: list[Tensor], progress: Progress) -> None:
    """What happens after a step outside the training time: validation and checkpoints."""
    every = options.eval_every or max(1, run.spec.steps // 10)
    if run.finished or run.step % every == 0:
        progress.validated(run, run.evaluate(val))
    if options.checkpoint_every and run.step % options.checkpoint_every == 0:
        run.save()


def conclude(runs: Sequence[Run], options: Options, corpus: Corpus) -> list[dict[str, Any]]:
    """Export the models, draw the figures, print and write the table and a sample."""
    from pretraining import report
    from pretraining.figures import draw

    results = []
    for run in runs:
        results.append(report.result(run) | run.export())
        if run.spec.name == "mst":
            nonzero = 100 * results[-1]["nonzero"]
            file = run.folder / "model.pt"
            print(f"\nmst ended dense: all blocks active, {nonzero:.1f} % of the weights non-zero -> {file}")
    report.add_ratios(results)
    print(f"\n{report.write(options.out, options, results)}\n")
    print("figures:", ", ".join(str(file) for file in draw(runs, options.out)))
    shown = next((run for run in runs if run.spec.name == "mst"), runs[0])
    text = report.sample(shown.folder, corpus, "In the beginning", 60, options.seed)
    print(f"\n{shown.spec.name}, loaded into plain transformers, writes:\n\n    " + text.replace("\n", "\n    "))
    return results


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the example; returns the rows of ``results.json`` (empty if paused by ``--stop-at``)."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    prepare_folder(options)
    started = time.perf_counter()
    corpus = load_corpus(options.data, options.tokenizer, options.vocabulary, options.seed, options.out)
    val = validation_batches(corpus.val, options.batch, options.context, options.eval_batches)
    print(
        f"text: {len(corpus.train) / 1e6:.2f} M training and {len(corpus.val) / 1e3:.1f} k validation tokens, "
        f"vocabulary {corpus.vocabulary}, {corpus.characters_per_token:.2f} characters per token"
    )
    runs = [Run(spec, options, corpus, options.out / spec.name) for spec in specs(options, corpus.vocabulary)]
    for run in runs:
        if options.resume and run.load():
            print(f"{run.spec.name}: continues at step {run.step}")
    width = shutil.get_terminal_size().columns
    print(f"{options.steps} steps of {options.tokens_per_step} tokens, runs take turns".center(width, "-").rstrip())
    train(runs, options, val)
    if not all(run.finished for run in runs):
        print(f"paused at step {options.stop_at}; continue with --resume")
        return []
    results = conclude(runs, options, corpus)
    print(f"\nall in all {time.perf_counter() - started:.0f} s")
    return results


if __name__ == "__main__":
    main()
