"""Operators know references alone; devices implement them from below, for the operands that they want."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor

from mst_compile.ops.library import define, implement


def _halved(x: Tensor, times: int = 1) -> Tensor:
    return x / 2


def test_a_device_implements_an_operator_and_may_decline() -> None:
    define("test_halve(Tensor x, int times=1) -> Tensor", _halved)
    halve, x = torch.ops.mst.test_halve, torch.tensor([2.0, 4.0])
    assert halve(x).tolist() == [1, 2], "the reference, while there is nothing better"
    asked: list[tuple[torch.dtype, int]] = []

    def implementation(x: Tensor, times: int = 1) -> Tensor | None:
        asked.append((x.dtype, times))
        return x * 100 if x.dtype == torch.float32 else None

    implement("test_halve", "CPU", implementation)
    assert halve(x).tolist() == [200, 400]
    assert halve(x.double(), 3).tolist() == [1, 2], "declined"
    assert asked == [(torch.float32, 1), (torch.float64, 3)]
    assert halve(x.to("meta")).device.type == "meta", "another device still runs the reference"


def test_operators_know_no_kernel() -> None:
    """Importing them alone brings neither kernels nor lowerings in, and gives operators that compute."""
    code = """
import importlib, pkgutil, sys, types
import torch
package = types.ModuleType("mst_compile")  # without what its __init__ imports
package.__path__ = [path]
sys.modules["mst_compile"] = package
import mst_compile.ops.attention, mst_compile.ops.linear
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index
grid = BlockGrid(16, 16, 8)
index = new_index(grid)
write_index(index, grid, torch.eye(2, dtype=torch.bool))
y = torch.ops.mst.linear(torch.ones(1, 16), torch.ones(16, 16), None, index, 8, False)
print(y.unique().tolist(), [m for m in sys.modules if m.startswith(("mst_compile.kernels", "mst_compile.lowering"))])
"""
    import mst_compile

    code = f"path = {mst_compile.__path__[0]!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[8.0]", "[]"]
