"""Tiles that the autotuner chooses from, by kernel, block and precision.

Every one of them is cross-compiled for sm_90 by the test suite and must not spill, must fit shared memory, and must
get the pipelining depth that it asks for.

Those in half precision were chosen from some fifteen each on an H100 (``python -m benchmarks.gpu.sweep``, docs/gpu.md).
At low densities a program has few steps, so that two of them on a multiprocessor, with three stages each, hide each
other's first loads and last stores; at high ones the largest tile wins.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmTile:
    """``rows`` tokens by one line of blocks (by a union of lines if ``union``), ``depth`` elements a step."""

    rows: int
    depth: int
    warps: int
    stages: int
    union: bool = False

    def wide(self, block: int) -> bool:
        """Whether accumulators fill half the register file, so that only light epilogues can be fused."""
        return self.rows * (128 if self.union else block) > 128 * 128


@dataclass(frozen=True)
class GradWeightTile:
    """``gather`` blocks of a line by one block, ``tokens`` a step."""

    gather: int
    tokens: int
    warps: int
    stages: int


# Keys are (block, kind); kind "half" is bfloat16 and float16, "tf32" and "ieee" are float32 by torch's setting.
# IEEE float32 has no tensor cores: operands live in registers, so its tiles are small.
GEMM = {
    (128, "half"): [GemmTile(128, 64, 8, 3), GemmTile(256, 64, 16, 4), GemmTile(64, 64, 4, 3)],
    (64, "half"): [GemmTile(256, 32, 8, 4), GemmTile(128, 64, 4, 3), GemmTile(128, 64, 8, 3, union=True)],
    (32, "half"): [
        GemmTile(256, 32, 8, 4), GemmTile(256, 32, 4, 4), GemmTile(128, 32, 4, 4), GemmTile(128, 64, 8, 3, union=True),
    ],
    (128, "tf32"): [GemmTile(128, 32, 8, 4), GemmTile(64, 32, 4, 4)],
    (64, "tf32"): [GemmTile(128, 32, 4, 4), GemmTile(128, 32, 8, 4, union=True)],
    (32, "tf32"): [GemmTile(128, 32, 4, 4), GemmTile(128, 32, 8, 4, union=True)],
    (128, "ieee"): [GemmTile(64, 32, 8, 3), GemmTile(64, 16, 8, 3)],
    (64, "ieee"): [GemmTile(64, 32, 8, 3), GemmTile(64, 16, 4, 3)],
    (32, "ieee"): [GemmTile(64, 32, 4, 3), GemmTile(64, 32, 8, 3, union=True)],
}  # fmt: skip

GRAD_WEIGHT = {
    (128, "half"): [GradWeightTile(1, 64, 8, 3), GradWeightTile(1, 64, 4, 4), GradWeightTile(2, 32, 8, 4)],
    (64, "half"): [GradWeightTile(2, 64, 4, 3), GradWeightTile(4, 64, 8, 4), GradWeightTile(1, 64, 4, 4)],
    (32, "half"): [GradWeightTile(4, 64, 4, 4), GradWeightTile(8, 64, 8, 4)],
    (128, "tf32"): [GradWeightTile(1, 32, 8, 3)],
    (64, "tf32"): [GradWeightTile(2, 32, 8, 3), GradWeightTile(1, 32, 4, 3)],
    (32, "tf32"): [GradWeightTile(4, 32, 8, 3), GradWeightTile(2, 32, 4, 3)],
    (128, "ieee"): [GradWeightTile(1, 16, 8, 3)],
    (64, "ieee"): [GradWeightTile(1, 16, 8, 3), GradWeightTile(1, 32, 8, 3)],
    (32, "ieee"): [GradWeightTile(2, 16, 4, 3), GradWeightTile(4, 16, 8, 3)],
}
