"""Whole training steps of a plain PyTorch GPT: forward, backward, clipping, fused AdamW, under bfloat16 autocast."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mst_compile
from mst_compile.graph.backend import mst

from ..ledger import interleave, medians
from . import breakdown
from .plan import ModelCell, verdict
from .report import Run

BENCHMARK = "gpu_train_step"
COMPILE = "gpu_compile"
KERNELS = "gpu_step_kernels"
BACKENDS: dict[str, Callable | str] = {"inductor": "inductor", "mst": mst}  # "mst" as a name needs an installation
SPARSITY = 0.9
_WARMUP = 3


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 without dropout; ``forward`` returns the loss of predicting each next token. The head is tied."""

    def __init__(self, cell: ModelCell) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(cell.vocab, cell.width), nn.Embedding(cell.context, cell.width)
        self.blocks = nn.ModuleList(Block(cell.width, cell.heads) for _ in range(cell.layers))
        self.norm = nn.LayerNorm(cell.width)
        self.head = nn.Linear(cell.width, cell.vocab, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids[:, :-1]) + self.places.weight[: ids.shape[1] - 1]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclass
class Side:
    """One model ready to train.

    Attributes:
        peak: the most GPU memory that it holds during a step, in bytes.
        cold: seconds of its first step, which compiles, with empty caches; warm: with what that has left on disk.
    """

    model: nn.Module
    step: Callable[[], Tensor]
    cold: float = 0.0
    warm: float = 0.0
    peak: int = 0


def _autocast(run: Run) -> torch.autocast:
    return torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.dtype == torch.bfloat16)


def _stepper(model: nn.Module, backend: Callable | str, ids: Tensor, run: Run) -> Callable[..., Tensor]:
    """A training step, of as many backward passes as it is told."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def loss_of(ids: Tensor) -> Tensor:
        return model(ids)

    compiled = torch.compile(loss_of, backend=backend, dynamic=False)

    def step(passes: int = 1) -> Tensor:
        for _ in range(passes):
            with _autocast(run):
                loss = compiled(ids)
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()

    return step


def _prepare(cell: ModelCell, run: Run, ids: Tensor, backend: str, block: int) -> Side:
    """Build, check the compiled loss against eager mode, warm up, and take the peak memory of one more step."""
    on_gpu = run.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    run.stage("mst")  # each side has the time of a cell: it compiles a whole model
    torch.manual_seed(0)
    model = GPT(cell).to(run.device)
    if backend == "mst":
        mst_compile.sparsify(model, mst_compile.Constant(SPARSITY, growth="none"), block=block)
    with torch.no_grad(), _autocast(run):
        eager = float(model(ids))
    side = Side(model, _stepper(model, BACKENDS[backend], ids, run))
    start = time.perf_counter()
    loss = float(side.step())
    side.cold = time.perf_counter() - start
    if not abs(loss - eager) <= 0.02 * abs(eager):
        raise ArithmeticError(f"wrong result: loss {loss} compiled, {eager} in eager mode")
    for _ in range(_WARMUP):
        side.step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        side.step()
        side.peak = torch.cuda.max_memory_allocated() - before
    return side


def measure(cell: ModelCell, run: Run, block: int) -> None:
    """Time training steps of the dense and the sparse model in turn, and record both."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, cell.vocab, (cell.batch, cell.context + 1), generator=generator).to(run.device)
    sides = {backend: _prepare(cell, run, ids, backend, block) for backend in BACKENDS}
    median = medians(interleave({name: side.step for name, side in sides.items()}, run.runs, warmup=1))
    sparsifier = mst_compile.sparsifier(sides["mst"].model)
    weights = sparsifier.weights.values()
    blocks = "/".join(map(str, sorted({w.grid.block for w in weights}, reverse=True)))
    served = f"{sum(w.uses.served for w in weights)} of {len(weights)} weights in sparse kernels"
    case = f"{cell.case} B={blocks} d={sparsifier.density:.3f}"
    tokens = cell.batch * cell.context
    judged = ""
    for name, side in sides.items():
        ratio = median["inductor"] / median[name]
        parts = [f"{tokens / median[name]:.0f} tokens/s"]
        parts += [f"peak memory {side.peak / 2**20:.0f} MiB"] if side.peak else []
        if name == "mst":
            judged = verdict(cell.goal, ratio)
            parts += [served, *([judged] if judged else [])]
        note = "; ".join(parts)
        run.record(BENCHMARK, case, name, median[name], ratio, note)
        print(f"{case}: {name} {median[name] * 1e3:.1f} ms a step, {ratio:.2f}x, {note}", flush=True)
    _break_down(case, run, sides, median)
    _compile_again(case, run, sides)
    figures = *(f"{median[n] * 1e3:.3f}" for n in sides), f"{median['inductor'] / median['mst']:.2f}x"
    run.rows.append((cell.case, f"{sparsifier.density:.3f}", "step", "mst", *figures, judged))


def _break_down(case: str, run: Run, sides: dict[str, Side], median: dict[str, float]) -> None:
    """Record where the time of a step goes, of each side, on a GPU."""
    if run.device.type != "cuda":
        return
    for name, side in sides.items():
        for kind, seconds in breakdown.seconds_by_kind(side.step).items():
            share = seconds / median[name]
            run.record(KERNELS, f"{case} {kind}", name, seconds, share, "kernels; ratio is their share of the step")
            print(f"{case}: {name} {seconds * 1e3:.2f} ms, {share:.0%} of the step, in {kind}", flush=True)


def _compile_again(case: str, run: Run, sides: dict[str, Side]) -> None:
    """Record how long a first step takes: what was measured cold, and now with what compilation has left on disk."""
    for name, side in sides.items():
        run.stage("mst")
        torch._dynamo.reset()
        start = time.perf_counter()
        side.step()
        side.warm = time.perf_counter() - start
        for how in ("cold", "warm"):
            seconds, base = getattr(side, how), getattr(sides["inductor"], how)
            run.record(COMPILE, f"{case} {how}", name, seconds, base / seconds, "a first step, which compiles")
        print(f"{case}: {name} first step {side.cold:.1f} s, {side.warm:.1f} s with warm caches", flush=True)
