"""What AOTInductor makes of a packed copy of a model in the middle of its training. (Of plain copies, which are any
model's, random programs make packages where they are explored under Inductor.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from helpers import compiled
from oracles import assert_as_good_as
from torch import nn
from transformers.pytorch_utils import Conv1D

import mst_compile
from mst_compile import export

BATCH = torch.export.Dim("batch", min=2, max=64)
LOADS = """
import sys
import mst_compile, torch
given = torch.load(sys.argv[2], weights_only=True)
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(x) for x in given], sys.argv[3])
"""


def test_a_package_has_the_values_of_its_moment(tmp_path: Path) -> None:
    """Whatever is trained after it was made, for other batches than it was made with, in a process of its own, which
    has to import mst_compile and nothing else."""
    torch.manual_seed(0)
    schedule = mst_compile.Constant(0.7, interval=2, growth="gradient", drop_fraction=0.4)
    model = mst_compile.sparsify(nn.Sequential(nn.Linear(24, 40), nn.GELU(), Conv1D(16, 40)), schedule, block=4)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 1e-2)
    run = compiled(model)

    def train(steps: int) -> None:
        for _ in range(steps):
            run(torch.randn(8, 24)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(3)
    program = torch.export.export(export.packed(model), (torch.randn(6, 24),), dynamic_shapes=({0: BATCH},))
    with torch.no_grad(), torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    inputs = [torch.randn(n, 24) for n in (3, 17)]
    with torch.no_grad():
        usual = [model(x) for x in inputs]
        exact = [export.plain(model).double()(x.double()) for x in inputs]
    train(3)
    assert not torch.equal(model(inputs[0]), usual[0])
    torch.save(inputs, tmp_path / "inputs")
    command = [sys.executable, "-c", LOADS, path, str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for got, *wanted in zip(torch.load(tmp_path / "outputs"), usual, exact, strict=True):
        assert_as_good_as(got, *wanted, torch.float32)
