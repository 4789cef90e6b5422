"""Tiles that the autotuner chooses from, by kernel, block and precision.

Every one of them is cross-compiled for sm_90 by the test suite and must not spill, must fit shared memory, and must
get the pipelining depth that it asks for. What is taken where nothing is tuned is in table.py.

Those in half precision were chosen from fifteen to forty each on an H100 (``python -m benchmarks.gpu.sweep``,
docs/gpu.md). At low densities a program has few steps, so that two of them on a multiprocessor, with three stages each,
hide each other's first loads and last stores; at high ones the largest tile wins, which with blocks of 128 is a chain
of two that loads through descriptors. With narrower blocks chains and descriptors lose to asynchronous copies, and so
do descriptors in grad-weight. Warps of their own for loading were wrong on the card (Triton 3.6) and slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from mst_compile.blocks.grid import UNION_WIDTH

_BARRIERS = 1024  # bytes, more than all that a kernel with descriptors waits at


@dataclass(frozen=True)
class GemmTile:
    """``rows`` tokens by one line of blocks (by a union of lines if ``union``), ``depth`` elements a step.

    Attributes:
        chain: row tiles that a program does one after the other in one loop.
        tma: loads are the Tensor Memory Accelerator's, through descriptors of whole matrices.
    """

    rows: int
    depth: int
    warps: int
    stages: int
    union: bool = False
    chain: int = 1
    tma: bool = False

    def width(self, block: int) -> int:
        """Columns."""
        return UNION_WIDTH if self.union else block

    def wide(self, block: int) -> bool:
        """Whether accumulators fill half the register file, so that only light epilogues can be fused."""
        return self.rows * self.width(block) > 128 * 128

    def shared(self, block: int, itemsize: int) -> int:
        """Bytes of shared memory that are enough: the buffers, and a result that waits beside them to be stored."""
        width = self.width(block)
        buffers = self.stages * (self.rows + width) * self.depth * itemsize
        beside = self.rows * width * itemsize if self.chain > 1 else 0
        return buffers + beside + (_BARRIERS if self.tma else 0)


@dataclass(frozen=True)
class GradWeightTile:
    """``gather`` blocks of a line by one block, ``tokens`` a step."""

    gather: int
    tokens: int
    warps: int
    stages: int

    def shared(self, block: int, itemsize: int) -> int:
        """Bytes of shared memory that are enough: the buffers, or the float32 result that follows them."""
        buffers = self.stages * (self.gather + 1) * block * self.tokens * itemsize
        return max(buffers, 4 * self.gather * block**2)

    def registers(self, block: int) -> int:
        """About how many registers a thread has: the accumulators and what addresses take."""
        return self.gather * block**2 // (32 * self.warps) + 48


# Keys are (block, kind); kind "half" is bfloat16 and float16, "tf32" and "ieee" are float32 by torch's setting.
# IEEE float32 has no tensor cores: operands live in registers, so its tiles are small.
GEMM = {
    (128, "half"): [
        GemmTile(128, 64, 8, 3), GemmTile(256, 64, 8, 3, chain=2, tma=True), GemmTile(64, 64, 4, 3),
        GemmTile(256, 64, 8, 4),
    ],
    (64, "half"): [
        GemmTile(128, 64, 4, 3), GemmTile(256, 32, 8, 4), GemmTile(64, 64, 4, 3), GemmTile(128, 64, 8, 3, union=True),
    ],
    (32, "half"): [
        GemmTile(256, 32, 4, 4), GemmTile(256, 32, 8, 4), GemmTile(128, 32, 4, 4), GemmTile(128, 64, 8, 3, union=True),
    ],
    (128, "tf32"): [GemmTile(128, 32, 8, 4), GemmTile(64, 32, 4, 4)],
    (64, "tf32"): [GemmTile(128, 32, 4, 4), GemmTile(128, 32, 8, 4, union=True)],
    (32, "tf32"): [GemmTile(128, 32, 4, 4), GemmTile(128, 32, 8, 4, union=True)],
    (128, "ieee"): [GemmTile(64, 32, 8, 3), GemmTile(64, 16, 8, 3)],
    (64, "ieee"): [GemmTile(64, 32, 8, 3), GemmTile(64, 16, 4, 3)],
    (32, "ieee"): [GemmTile(64, 32, 4, 3), GemmTile(64, 32, 8, 3, union=True)],
}  # fmt: skip

GRAD_WEIGHT = {
    (128, "half"): [
        GradWeightTile(1, 64, 4, 3), GradWeightTile(1, 64, 8, 3), GradWeightTile(1, 64, 4, 4),
        GradWeightTile(2, 32, 8, 4),
    ],
    (64, "half"): [GradWeightTile(2, 64, 4, 3), GradWeightTile(4, 64, 8, 4), GradWeightTile(1, 64, 4, 4)],
    (32, "half"): [
        GradWeightTile(8, 64, 4, 2), GradWeightTile(8, 32, 4, 3), GradWeightTile(16, 32, 8, 2),
        GradWeightTile(4, 128, 4, 3),
    ],
    (128, "tf32"): [GradWeightTile(1, 32, 8, 3)],
    (64, "tf32"): [GradWeightTile(2, 32, 8, 3), GradWeightTile(1, 32, 4, 3)],
    (32, "tf32"): [GradWeightTile(4, 32, 8, 3), GradWeightTile(2, 32, 4, 3)],
    (128, "ieee"): [GradWeightTile(1, 16, 8, 3)],
    (64, "ieee"): [GradWeightTile(1, 16, 8, 3), GradWeightTile(1, 32, 8, 3)],
    (32, "ieee"): [GradWeightTile(2, 16, 4, 3), GradWeightTile(4, 16, 8, 3)],
}  # fmt: skip

# Of stacks of matrices (grouped.py), of which no card has timed any: what was the fastest with single ones, without
# chains, whose tiles need not be of one group, and a smaller one for groups of few rows. Each list has one that fits
# the shared memory of every GPU that is supported.
GROUPED_GEMM = {
    (128, "half"): [GemmTile(128, 64, 8, 3), GemmTile(64, 64, 4, 3)],
    (64, "half"): [GemmTile(128, 64, 4, 3), GemmTile(256, 32, 8, 4), GemmTile(64, 64, 4, 3)],
    (32, "half"): [GemmTile(256, 32, 4, 4), GemmTile(128, 32, 4, 4)],
    (128, "tf32"): [GemmTile(128, 32, 8, 4), GemmTile(64, 32, 4, 4)],
    (64, "tf32"): [GemmTile(128, 32, 4, 4)],
    (32, "tf32"): [GemmTile(128, 32, 4, 4)],
    (128, "ieee"): [GemmTile(64, 16, 8, 3)],  # at a depth of 32 a GELU spills with Triton 3.6
    (64, "ieee"): [GemmTile(64, 32, 8, 3)],
    (32, "ieee"): [GemmTile(64, 32, 4, 3)],
}

GROUPED_GRAD_WEIGHT = {
    (128, "half"): [GradWeightTile(1, 64, 4, 3)],
    (64, "half"): [GradWeightTile(2, 64, 4, 3), GradWeightTile(4, 64, 8, 4)],
    (32, "half"): [GradWeightTile(8, 64, 4, 2)],
    (128, "tf32"): [GradWeightTile(1, 32, 8, 3)],
    (64, "tf32"): [GradWeightTile(2, 32, 8, 3)],
    (32, "tf32"): [GradWeightTile(4, 32, 8, 3)],
    (128, "ieee"): [GradWeightTile(1, 16, 8, 3)],
    (64, "ieee"): [GradWeightTile(1, 16, 8, 3)],
    (32, "ieee"): [GradWeightTile(2, 16, 4, 3)],
}
