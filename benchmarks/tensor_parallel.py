"""A training step of a wide model on one process and, tensor-parallel, on two: dense under Inductor against mst.

Each process has one thread. Both models live in the same processes and step in turn. The rows named "all-reduce" are
the collectives of a step alone: the results of each block forward and the gradients of its inputs backward. No gradient
of a weight moves between tensor-parallel ranks.

python -m benchmarks.tensor_parallel
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import mst_compile

from .ledger import interleave, medians, print_table, record

WIDTH, LAYERS, TOKENS, BLOCK, DENSITY = 1024, 2, 512, 8, 0.2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def _step(backend: str, ranks: int) -> Callable[[], object]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(Block() for _ in range(LAYERS)))
    if ranks > 1:
        plan: dict[str, ParallelStyle] = {}
        for layer in range(LAYERS):
            plan |= {f"{layer}.up": ColwiseParallel(), f"{layer}.down": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan)
    if backend == "mst":
        mst_compile.sparsify(model, mst_compile.Constant(1 - DENSITY, growth="none"), block=BLOCK)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    x = torch.randn(TOKENS, WIDTH)

    def step() -> None:
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _collectives() -> None:
    moved = torch.ones(TOKENS, WIDTH)
    for _ in range(2 * LAYERS):  # forward and backward
        dist.all_reduce(moved)
        moved.fill_(1.0)


def _measure(rank: int, ranks: int, runs: int, folder: str, write: bool) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=ranks)
    sides: dict[str, Callable[[], object]] = {side: _step(side, ranks) for side in ("inductor", "mst")}
    if ranks > 1:
        sides["all-reduce"] = _collectives
    seconds = medians(interleave(sides, runs, warmup=3))
    if rank == 0:
        case = f"width={WIDTH} L={LAYERS} M={TOKENS} B={BLOCK} d={DENSITY} ranks={ranks}"
        rows = []
        for side, median in seconds.items():
            ratio, note = seconds["inductor"] / median, ""
            if side == "all-reduce":
                ratio, note = median / seconds["mst"], "ratio: share of a step of mst"
            rows.append([case, side, f"{median * 1e3:.1f} ms", f"{ratio:.3f}", note])
            if write:
                record("tensor_parallel", case, side, median, ratio, runs, "float32", note)
        print_table(("case", "side", "median", "ratio", "note"), rows)
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dry", action="store_true", help="print, and write nothing into the ledger")
    options = parser.parse_args()
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            given = (ranks, options.runs, folder, not options.dry)
            torch.multiprocessing.spawn(_measure, given, nprocs=ranks)


if __name__ == "__main__":
    main()
