"""A default device that a program sets, as for a GPU, is for its tensors: ours say where they live."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compiled, static
from oracles import assert_reordered
from torch import Tensor, nn
from training import batches, fresh, loss_of

import mst_compile
from mst_compile import MixedSparsity, explain, export, report, sparsifier, sparsify

ROOT = Path(__file__).resolve().parent.parent
MAKE = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm",
    "scalar_tensor", "tensor", "zeros", "Generator",
}  # fmt: skip
PROGRAMS = ("tryout", "doctor")  # run in processes of their own


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors are made on another device unless it is said where."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def test_every_tensor_of_ours_says_where_it_lives() -> None:
    files = [file for room in ("mst_compile", "lowering", "kernels") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    found = []
    for file in files:
        if file.parent.name in PROGRAMS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            made = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKE
            if made and ast.unparse(node.func.value) == "torch":  # type: ignore[attr-defined]
                said = any(keyword.arg == "device" for keyword in node.keywords)  # type: ignore[attr-defined]
                said |= node.func.attr == "Generator" and bool(node.args)  # type: ignore[attr-defined]
                if not said:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert found == []


@pytest.mark.usefixtures("elsewhere")
def test_a_run_under_another_default(tmp_path: Path) -> None:
    with torch.device("cpu"):
        model = fresh(MixedSparsity.published(12, 0.8, interval=2, growth="mixed", regrown="own steps"))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        data = list(batches(14))
        loss_of(model, data[0]).backward()
        optimizer.step()  # makes its state, where PyTorch has it
    run = compiled(model)
    with report.Recorder(model, tmp_path / "run", tokens_per_step=16) as recorder:
        for x in data[1:]:
            loss = loss_of(run, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.log(loss=loss)
    with report.Recorder(model, tmp_path / "run", tokens_per_step=16, step=sparsifier(model).step_count) as recorder:
        assert recorder.step == 14
    optimizer.load_state_dict(optimizer.state_dict())
    sparsifier(model).load_state_dict(sparsifier(model).state_dict())
    assert "block" in str(explain(model))
    assert mst_compile.forecast(model, tokens=1600, tokens_per_step=16).flops > 0
    assert len(report.history.read(tmp_path / "run").snapshots) > 1


@pytest.mark.usefixtures("elsewhere")
def test_an_export_under_another_default(tmp_path: Path) -> None:
    with torch.device("cpu"):
        model = fresh(static())
        other, x = fresh(None), next(batches(1))
    export.save(model, tmp_path / "model.safetensors")
    export.load(other, tmp_path / "model.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert_reordered(export.packed(model)(x), model(x), 64 + 32)


class Masked(nn.Module):
    """Attention with a causal mask of its own, added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("mask", torch.full((16, 16), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.mT / 32**0.5 + self.mask, -1) @ v)


@pytest.mark.usefixtures("elsewhere")
def test_masks_are_understood_under_another_default() -> None:
    with torch.device("cpu"):
        schedule: Any = mst_compile.Constant(0.5, growth="none", attention="sparse", stride=4)
        model, x = sparsify(Masked(), schedule), torch.randn(2, 16, 32)
    compiled(model)(x)
    assert sparsifier(model).attention.reasons == {"": "sparse (manual)"}
