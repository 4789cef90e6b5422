"""Runs each CPU kernel with memory for 0, 1, 2, ... allocations until it succeeds, in a process of its own.

Prints a line for each: how often it reported that memory ran out. Anything else is an assertion that fails, a crash or
a hang, which the test that starts this sees.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from mst_compile.kernels.cpu import attention, attention_backward, build
from mst_compile.kernels.cpu.library import Library
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, read_mask, write_index
from mst_compile.blocks.packed import pack
from mst_compile.rules.patterns import Parts


def failing_library(folder: Path) -> Library:
    """The kernels beside an allocator that fails, compiled with little optimisation."""
    sources = folder / "sources"
    sources.mkdir()
    for file in (*build.HERE.glob("*.cpp"), *build.HERE.glob("*.h"), Path(__file__).with_name("failing_memory.cpp")):
        shutil.copy(file, sources)
    build.HERE = sources
    build.FLAGS = build.FLAGS.replace("-O3", "-O1") + " -Wl,-Bsymbolic"
    os.environ["MST_COMPILE_CACHE_DIR"] = str(folder / "cache")
    return Library("baseline")


class Kernels:
    """A call of every kernel that allocates, with its results."""

    def __init__(self, library: Library) -> None:
        self.library = library
        grid = BlockGrid(200, 330, 8)
        self.index = new_index(grid)
        write_index(self.index, grid, torch.rand(grid.shape) < 0.3)
        self.w, self.x, self.dy = torch.randn(200, 330), torch.randn(300, 330), torch.randn(300, 200)
        self.q, self.k, self.v, self.grad = (torch.randn(1, 2, 100, 32) for _ in range(4))

    def forward(self) -> list[Tensor]:
        y = torch.empty(300, 200)
        self.library.spmm(self.x, self.w, torch.ones(200), self.index, 8, True, y)
        return [y]

    def in_pieces(self) -> list[Tensor]:
        """A weight whose later pieces wait for all threads to be through with the earlier ones."""
        grid = BlockGrid(2100, 1100, 64)
        index, y = new_index(grid), torch.empty(300, 2100)
        write_index(index, grid, torch.ones(grid.shape, dtype=torch.bool))
        self.library.spmm(
            self.x[:, :1].expand(300, 1100).contiguous(), torch.ones(2100, 1100), None, index, 64, True, y
        )
        return [y]

    def grad_input(self) -> list[Tensor]:
        dx = torch.empty(300, 330)
        self.library.spmm(self.dy, self.w, None, self.index, 8, False, dx)
        return [dx]

    def few_tokens(self) -> list[Tensor]:
        """Both orientations."""
        y, dx = torch.empty(5, 200), torch.empty(5, 330)
        self.library.spmm(self.x[:5], self.w, torch.ones(200), self.index, 8, True, y)
        self.library.spmm(self.dy[:5], self.w, None, self.index, 8, False, dx)
        return [y, dx]

    def packed(self) -> list[Tensor]:
        """Few tokens and many."""
        grid = BlockGrid(200, 330, 8)
        values, index = pack(self.w, grid, read_mask(self.index, grid))
        few, many = torch.empty(3, 200), torch.empty(300, 200)
        self.library.packed(self.x[:3], values, index, torch.ones(200), 8, few)
        self.library.packed(self.x, values, index, None, 8, many)
        return [few, many]

    def grad_weight(self) -> list[Tensor]:
        dw, db = torch.empty(200, 330), torch.empty(200)
        self.library.grad_weight(self.dy, self.x, self.index, 8, dw, db, True)
        return [dw, db]

    def attention(self) -> list[Tensor]:
        out, lse = torch.empty_like(self.q), torch.empty(1, 2, 100)
        parts = Parts(window=20, first=32, step=16).numbers
        attention(self.q, self.k, self.v, None, parts, 0.2, out=out, lse=lse, library=self.library)
        return [out, lse]

    def attention_backward(self) -> list[Tensor]:
        lse = torch.full((1, 2, 100), 3.0)
        grads = [torch.empty_like(self.q) for _ in range(3)]
        operands = (self.grad, self.q, self.k, self.v, self.q, lse, None, Parts(chunk=16, summary=16).numbers, 0.2)
        attention_backward(*operands, dq=grads[0], dk=grads[1], dv=grads[2], library=self.library)
        return grads


def in_fresh_thread(call: Callable[[], list[Tensor]], threads: int) -> list[Tensor] | Exception:
    """Results, or what was raised. What a thread keeps between calls is not there yet, nor with its OpenMP team."""
    got: list[list[Tensor] | Exception] = []

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            got.append(call())
        except RuntimeError as error:
            got.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return got[0]


def exhaust(library: Library, call: Callable[[], list[Tensor]], threads: int) -> int:
    """How many allocations the call needs, all of which failed once."""
    grant, refused = library._dll.grant_allocations, library._dll.refused_allocations
    grant.argtypes, refused.restype = (ctypes.c_long,), ctypes.c_long
    grant(-1)
    want = in_fresh_thread(call, threads)
    assert isinstance(want, list), want
    for n in range(10_000):
        grant(n)
        got = in_fresh_thread(call, threads)
        if not refused():
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            return n
        assert isinstance(got, RuntimeError), f"{n} allocations are too few, and nobody knows"
        assert str(got) == "CPU kernel: out of memory", got
    raise AssertionError("never enough memory")


def main() -> None:
    torch.manual_seed(0)
    library = failing_library(Path(sys.argv[1]))
    kernels = Kernels(library)
    for call in (
        kernels.forward,
        kernels.in_pieces,
        kernels.grad_input,
        kernels.few_tokens,
        kernels.packed,
        kernels.grad_weight,
        kernels.attention,
        kernels.attention_backward,
    ):
        for threads in (1, 3):
            print(call.__name__, threads, exhaust(library, call, threads), flush=True)


if __name__ == "__main__":
    main()
