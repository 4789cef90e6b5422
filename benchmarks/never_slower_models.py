"""Whole models at every density against the dense model, with default options: is a step, or a call, ever slower?

    python -m benchmarks.never_slower_models                                   # every model of benchmarks/models.py
    python -m benchmarks.never_slower_models --models gpt2,tiny --dtype bfloat16 --what train,evaluate,generate

``train``: forward, backward and fused AdamW. ``evaluate``: the loss without gradients. ``generate``: greedy, with a
static cache, one sequence. ``backend="mst"`` against ``backend="inductor"`` in turn; bfloat16 by autocast. Masks
change in place, so that every density runs what was compiled first.

Beside each ratio stands the one that the times of the model's products alone predict: from the dense step's time, less
what each product saves by itself. Where the measured one is far below it, something else of the step has become slower.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import mst_compile
from mst_compile.graph.dispatch import Dispatch
from mst_compile.graph.gain import SlotTimes
from mst_compile.state.first_masks import at_random
from mst_compile.state.weight import SparseWeight

from .ledger import interleave, medians, print_table, record
from .models import MODELS, Case, build

DENSITIES = "1,.5,.2,.05"
NEW_TOKENS = 16


class Saved:
    """What the products of the graphs that run save by themselves, as the backend was told when it chose."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._pays = Dispatch._pays

    def __enter__(self) -> Saved:
        def pays(dispatch: Dispatch, weights: list[SparseWeight], times: SlotTimes | None) -> bool:
            sparse = self._pays(dispatch, weights, times)
            every = [
                (t, weight.density)
                for weight, layers in zip(weights, times or [], strict=False)
                for layer in layers
                for t in layer.values()
            ]
            saved = sum(t.saved(density) for t, density in every if density < t.crossover)
            self.seconds[id(dispatch)] = saved - sum(t.call for t, _ in every) if sparse else 0.0
            return sparse

        Dispatch._pays = pays  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *_: object) -> None:
        Dispatch._pays = self._pays  # type: ignore[method-assign]


def set_density(model: torch.nn.Module, density: float) -> float:
    """Give every sparse weight a random mask of this density; returns the mean density then."""
    own = mst_compile.sparsifier(model)
    for name, weight in own.weights.items():
        own.apply_mask(name, at_random(weight, weight.blocks_at(density), seed=0))
    return own.density


def loss_of(case: Case, backend: str) -> Callable[..., Tensor]:
    """The compiled loss of a batch."""
    model = case.model

    def run(**batch: Tensor) -> Tensor:
        out = model(**batch)
        return out if isinstance(out, Tensor) else out.loss

    return torch.compile(run, backend=backend)


def trainer(case: Case, backend: str, dtype: str) -> Callable[[], None]:
    """A function that takes one training step."""
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-5, fused=True)
    compiled = loss_of(case, backend)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = compiled(**case.batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def evaluator(case: Case, backend: str, dtype: str) -> Callable[[], Tensor]:
    """A function that computes the loss without gradients."""
    compiled = loss_of(case, backend)

    def evaluate() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return compiled(**case.batch)

    return evaluate


def generator(case: Case, backend: str, dtype: str) -> Callable[[], Tensor]:
    """A function that generates some tokens."""
    model, prompt = case.model.eval(), case.prompt
    model.compile(backend=backend)

    def generate() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                do_sample=False, pad_token_id=0, disable_compile=True, cache_implementation="static",
            )  # fmt: skip

    return generate


_SIDES = {"train": trainer, "evaluate": evaluator, "generate": generator}


def cells(
    name: str, what: str, dtype: str, densities: list[float], runs: int
) -> Iterator[tuple[float, dict[str, float], float]]:
    """Density, seconds of both sides, and seconds that the products should save by themselves."""
    torch._dynamo.reset()
    dense, sparse = build(name), build(name)
    if what == "generate" and dense.prompt is None:
        return
    mst_compile.sparsify(sparse.model, mst_compile.Constant(0.5, growth="none"))
    make = functools.partial(_SIDES[what], dtype=dtype)
    sides = {"inductor": make(dense, "inductor"), "mst": make(sparse, "mst")}
    with Saved() as saved:
        for density in densities:
            real = set_density(sparse.model, density)
            saved.seconds.clear()
            median = medians(interleave(sides, runs))
            # Of text the prompt's graph runs once and that of a token often: their products are not added up.
            yield real, median, sum(saved.seconds.values()) if what != "generate" else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--what", default="train,evaluate,generate")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--densities", default=DENSITIES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="print alone, write nothing to the ledger")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    densities, rows = [float(d) for d in args.densities.split(",")], []
    for name in args.models.split(","):
        for dtype in args.dtype.split(","):
            for what in args.what.split(","):
                for density, median, saved in cells(name, what, dtype, densities, args.runs):
                    dense, ours = median["inductor"], median["mst"]
                    expected = dense / (dense - saved) if saved < dense else float("inf")
                    case = f"{name} {what} d={density:.3f}"
                    if not args.dry:
                        note = "" if math.isnan(saved) else f"by its products alone: {expected:.3f}"
                        record("models", case, "mst", ours, dense / ours, args.runs, dtype, note)
                    rows.append((f"{dense / ours:.2f}", f"{expected:.2f}", f"{dense * 1e3:.2f}", f"{ours * 1e3:.2f}",
                                 case, dtype))  # fmt: skip
                    print(*rows[-1], flush=True)
    rows.sort(key=lambda row: float(row[0]))
    below = sum(float(row[0]) < 0.95 for row in rows)
    print(f"\n{len(rows)} cells, {below} below 0.95; the slowest:")
    print_table(("ratio", "by products", "dense ms", "mst ms", "cell", "dtype"), rows[:12])


if __name__ == "__main__":
    main()
