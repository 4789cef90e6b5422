"""Sparse attention, forward and backward, against PyTorch's causal ``scaled_dot_product_attention``.

python -m benchmarks.attention --threads 2 --lengths 1024,4096,8192
python -m benchmarks.attention --threads 1 --lengths 2048 --heads 2 --size 192 --value-size 128 --patterns full,sparse

The sides run eagerly and in turn, on the same operands. A row's ratio is PyTorch's median over ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mst_compile.ops import attention as attention_op  # noqa: F401  (registers the operator)
from mst_compile.rules.patterns import PATTERNS

from .ledger import interleave, medians, print_table, record


def _step(forward: Callable[[], Tensor], grad: Tensor, leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    return step


def _mst(q: Tensor, k: Tensor, v: Tensor, pattern: str, window: int, stride: int) -> Tensor:
    parts = PATTERNS[pattern].parts(window, stride)
    return torch.ops.mst.attention(q, k, v, None, parts.numbers, q.shape[-1] ** -0.5)[0]


def measure(args: argparse.Namespace, length: int, dtype: torch.dtype) -> list[tuple[str, ...]]:
    """Rows (length, pattern, milliseconds of PyTorch and ours, ratio) of one length."""
    torch.manual_seed(0)
    values = args.value_size or args.size
    shapes = [(args.batch, length, args.heads, size) for size in (args.size, args.size, values)]
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    grad = torch.randn(shapes[-1], dtype=dtype).transpose(1, 2)
    sides = {"torch": _step(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), grad, (q, k, v))}
    for pattern in args.patterns.split(","):
        sides[pattern] = _step(
            lambda pattern=pattern: _mst(q, k, v, pattern, args.window, args.stride), grad, (q, k, v)
        )
    median = medians(interleave(sides, args.runs, warmup=1))
    rows = []
    for pattern, seconds in median.items():
        if pattern == "torch":
            continue
        ratio = median["torch"] / seconds
        sizes = str(args.size) if values == args.size else f"{args.size}+{values}"
        case = f"T={length} heads={args.batch}x{args.heads}x{sizes} {pattern}"
        case += {"full": ""}.get(pattern, f" window={args.window} stride={args.stride}")
        if args.record:
            record("attention", case, "mst", seconds, ratio, args.runs, str(dtype).removeprefix("torch."))
        rows.append((str(length), pattern, f"{median['torch'] * 1e3:.1f}", f"{seconds * 1e3:.1f}", f"{ratio:.2f}x"))
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="1024,4096,8192")
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--value-size", type=int, help="of a value in a head, default --size")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-record", dest="record", action="store_false", help="leave the ledger alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for length in map(int, args.lengths.split(",")):
        rows += measure(args, length, getattr(torch, args.dtype))
    print()
    print_table(("length", "pattern", "torch ms", "mst ms", "speed-up"), rows)


if __name__ == "__main__":
    main()
