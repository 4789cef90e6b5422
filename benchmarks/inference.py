"""A trained sparse model at work: one linear layer without gradients, and text generated with a KV cache.

    python -m benchmarks.inference --threads 2                      # layers, 1 to 512 tokens
    python -m benchmarks.inference --what calls --threads 2         # what of a layer's time its product is
    python -m benchmarks.inference --what generation --threads 2    # GPT-2, tokens a second

A sparse model under ``backend="mst"``, and packed (``mst_compile.export.packed``) under ``backend="inductor"``, against
the dense one under ``backend="inductor"``, in turn. ``--copies`` layers of a shape are compiled as one graph, and
a row's time is that of one of them: a model's layers share what a call of compiled code costs, which is as much as the
product of a small layer with one token, and most models do not fit the cache, in which a layer that is called again
and again is found. ``--copies 1`` shows both: calls then follow each other, and weights that fit the cache stay there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._inductor.select_algorithm import extern_kernels
from transformers import GPT2Config, GPT2LMHeadModel

import mst_compile
from mst_compile import export

from .layers import _sparse_layer
from .ledger import interleave, medians, print_table, record
from .train_step import CONFIGS

SHAPES = "768x3072,3072x768,4096x4096"
TOKENS = "1,4,16,64,128,512"


class _Side(nn.Module):
    """Layers that take the same input: one graph, so that what a call of compiled code costs is shared."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def _server(layers: Sequence[nn.Module], backend: str, x: torch.Tensor, calls: int) -> Callable[[], None]:
    compiled = torch.compile(_Side(layers), backend=backend, dynamic=False)

    def serve() -> None:
        with torch.no_grad():
            for _ in range(calls):
                compiled(x)

    return serve


def layers(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Rows of one linear layer under ``no_grad``."""
    rows = []
    for shape, block, density in itertools.product(args.shapes, args.blocks, args.densities):
        inputs, outputs = shape
        torch.manual_seed(0)
        dense = [nn.Linear(inputs, outputs, dtype=dtype) for _ in range(args.copies)]
        sparse = [_sparse_layer(shape, dtype, block, density) for _ in range(args.copies)]
        packed, real = [export.packed(layer) for layer, _ in sparse], sparse[0][1]
        for tokens in args.tokens:
            torch._dynamo.reset()  # one code for so many shapes would soon be left to eager mode
            x = torch.randn(tokens, inputs, dtype=dtype)
            calls = max(1, 12 // args.copies)  # more would find the weights in the cache, which the other side swept
            sides = {
                "inductor": _server(dense, "inductor", x, calls),
                "mst": _server([layer for layer, _ in sparse], "mst", x, calls),
                "packed": _server(packed, "inductor", x, calls),
            }
            median = {
                side: seconds / calls / args.copies for side, seconds in medians(interleave(sides, args.runs)).items()
            }
            case = f"{inputs}->{outputs} M={tokens} B={real.grid.block} d={real.density:.3f}"
            for side in ("mst", "packed"):
                ratio = median["inductor"] / median[side]
                note = f"copies: {args.copies}; of 1/density: {ratio * real.density:.2f}"
                record("inference", case, side, median[side], ratio, args.runs, args.dtype, note)
                rows.append((f"{inputs}->{outputs}", real.grid.block, f"{real.density:.3f}", tokens, side,
                             f"{median['inductor'] * 1e6:.0f}", f"{median[side] * 1e6:.0f}", f"{ratio:.2f}x",
                             f"{ratio * real.density:.2f}"))  # fmt: skip
                print(*rows[-1], flush=True)
    print()
    head = ("layer", "block", "density", "tokens", "side", "inductor us", "us", "speed-up", "of 1/density")
    print_table(head, rows)


@contextlib.contextmanager
def _products() -> Iterator[list[float]]:
    """Seconds of each product that compiled code calls, dense and packed ones, in turn."""
    real: dict[str, Any] = {name: getattr(extern_kernels, name) for name in ("addmm", "mst_packed_linear_out")}
    seconds: list[float] = []

    def timed(product: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = product(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    for name, product in real.items():
        setattr(extern_kernels, name, timed(product))
    try:
        yield seconds
    finally:
        for name, product in real.items():
            setattr(extern_kernels, name, product)


def calls(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Rows of what of a compiled layer's time is its product, and what is beside it: guards, arguments, results."""
    rows = []
    for (inputs, outputs), block, density in itertools.product(args.shapes, args.blocks, args.densities):
        torch.manual_seed(0)
        dense = [nn.Linear(inputs, outputs, dtype=dtype) for _ in range(args.copies)]
        packed = [export.packed(_sparse_layer((inputs, outputs), dtype, block, density)[0]) for _ in range(args.copies)]
        for tokens in args.tokens:
            torch._dynamo.reset()
            x = torch.randn(tokens, inputs, dtype=dtype)
            sides = {"inductor": _server(dense, "inductor", x, 1), "packed": _server(packed, "inductor", x, 1)}
            whole: dict[str, list[float]] = {side: [] for side in sides}
            inside: dict[str, list[float]] = {side: [] for side in sides}
            with _products() as products:
                for run, (side, serve) in itertools.product(range(-2, args.runs), sides.items()):
                    products.clear()
                    start = time.perf_counter()
                    serve()
                    seconds = time.perf_counter() - start
                    if run >= 0:  # the first ones compile
                        whole[side].append(seconds / args.copies)
                        inside[side].append(sum(products) / args.copies)
            total = {side: statistics.median(times) for side, times in whole.items()}
            for side in sides:
                product = statistics.median(inside[side])
                note = (
                    f"copies: {args.copies}; product: {product * 1e6:.0f} us; beside it: "
                    f"{(total[side] - product) * 1e6:.0f} us"
                )
                case = f"calls {inputs}->{outputs} M={tokens} B={block} d={density:.3f}"
                record(
                    "inference", case, side, total[side], total["inductor"] / total[side], args.runs, args.dtype, note
                )
                rows.append((case, side, f"{total[side] * 1e6:.0f}", note))
                print(*rows[-1], flush=True)
    print()
    print_table(("calls", "side", "us", "of it"), rows)


def _model(args: argparse.Namespace, dtype: torch.dtype) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    length = args.prompt + args.new
    config = GPT2Config(**CONFIGS[args.config], n_positions=length, bos_token_id=0, eos_token_id=None)
    return GPT2LMHeadModel(config).to(dtype).eval()


def _generator(
    model: GPT2LMHeadModel, backend: str, args: argparse.Namespace, prompt: torch.Tensor
) -> Callable[[], torch.Tensor]:
    model.compile(backend=backend)
    options = {"cache_implementation": "static"} if args.cache == "static" else {}

    def generate() -> torch.Tensor:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.new, min_new_tokens=args.new,
            do_sample=False, pad_token_id=0, disable_compile=True, **options,
        )  # fmt: skip

    return generate


def generation(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Rows of greedy generation by GPT-2 whose forward is compiled, cache included."""
    rows = []
    for block, density in itertools.product(args.blocks, args.densities):
        torch._dynamo.reset()
        dense, sparse = _model(args, dtype), _model(args, dtype)
        mst_compile.sparsify(sparse, mst_compile.Constant(1 - density, growth="none"), block=block)
        prompt = torch.randint(CONFIGS[args.config]["vocab_size"], (args.batch, args.prompt))
        forms = {"inductor": dense, "mst": sparse, "packed": export.packed(sparse)}
        sides = {
            side: _generator(model, "mst" if side == "mst" else "inductor", args, prompt)
            for side, model in forms.items()
        }
        median, size = medians(interleave(sides, args.runs)), {side: _mib(model) for side, model in forms.items()}
        new = args.batch * args.new
        case = f"gpt2-{args.config} batch={args.batch} {args.prompt}+{args.new} {args.cache} B={block} d={density:g}"
        for side in ("mst", "packed"):
            ratio = median["inductor"] / median[side]
            note = (
                f"tokens/s: {new / median[side]:.1f}, dense {new / median['inductor']:.1f}; "
                f"MiB: {size[side]:.0f}, dense {size['inductor']:.0f}"
            )
            record("inference", case, side, median[side], ratio, args.runs, args.dtype, note)
            rows.append((case, side, note, f"{ratio:.2f}x"))
            print(*rows[-1], flush=True)
    print()
    print_table(("generation", "side", "tokens, parameters and buffers", "speed-up"), rows)


def _mib(model: nn.Module) -> float:
    """Parameters and buffers, those that are shared once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    return sum(tensors.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("layers", "calls", "generation"), default="layers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--blocks", default="8,32")
    parser.add_argument("--densities", default=".2,.1")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--shapes", default=SHAPES, help="layers, calls: inputs x outputs")
    parser.add_argument("--tokens", default=TOKENS, help="layers, calls")
    parser.add_argument("--copies", type=int, default=12, help="layers, calls: so many in one graph")
    parser.add_argument("--config", choices=tuple(CONFIGS), default="small", help="generation")
    parser.add_argument("--cache", choices=("static", "dynamic"), default="static", help="generation")
    parser.add_argument("--batch", type=int, default=1, help="generation")
    parser.add_argument("--prompt", type=int, default=64, help="generation: tokens")
    parser.add_argument("--new", type=int, default=64, help="generation: tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.blocks, args.tokens = ([int(n) for n in text.split(",")] for text in (args.blocks, args.tokens))
    args.densities = [float(d) for d in args.densities.split(",")]
    args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    {"layers": layers, "calls": calls, "generation": generation}[args.what](args, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
