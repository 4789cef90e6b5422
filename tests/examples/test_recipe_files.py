"""The recipes of examples/recipes: each trains, through the backend, in a few lines more than the dense script."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mst_compile import explain, sparsifier
from mst_compile.graph import backend

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(file.stem for file in RECIPES.glob("*.py"))
MARK = "# +"
ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(RECIPES))


@pytest.fixture(autouse=True)
def _seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo and the passes without Inductor, on the CPU, quietly."""
    monkeypatch.setitem(backend._DEFAULTS, "mst.inner", "eager")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("lightning.pytorch", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def marked(name: str) -> list[str]:
    return [line for line in (RECIPES / f"{name}.py").read_text().splitlines() if MARK in line and "``" not in line]


def recipe(name: str) -> ModuleType:
    return importlib.import_module(name)


def assert_trained(model: nn.Module, steps: int) -> None:
    """To the end of the schedule, in graphs of the backend."""
    own = sparsifier(model)
    assert (own.step_count, own.density) == (steps, 1.0)
    rows = [row for row in explain(model) if row.block is not None]
    assert rows
    assert all(row.status.startswith("matched (") for row in rows), rows


def test_there_are_four() -> None:
    assert NAMES == ["accelerate_loop", "fsdp2_dcp", "hugging_face_trainer", "lightning_module"]


@pytest.mark.parametrize("name", NAMES)
def test_little_is_added_and_all_of_it_is_marked(name: str) -> None:
    assert 3 <= len(marked(name)) <= 10
    code = (RECIPES / f"{name}.py").read_text().split('"""', 2)[2].splitlines()
    assert not [line for line in code if ("mst" in line.lower()) and MARK not in line and "def main" not in line]


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_shows_it(name: str) -> None:
    assert f"(../examples/recipes/{name}.py)" in (ROOT / "docs" / "guide.md").read_text()


def test_hugging_face_trainer(tmp_path: Path) -> None:
    trainer = recipe("hugging_face_trainer").main(str(tmp_path))
    assert_trained(trainer.model, 20)
    assert (tmp_path / "checkpoint-20").is_dir()


def test_accelerate_loop(tmp_path: Path) -> None:
    assert_trained(recipe("accelerate_loop").main(str(tmp_path)), 20)
    assert (tmp_path / "optimizer.bin").exists()


def test_lightning_module(tmp_path: Path) -> None:
    lit = recipe("lightning_module").main(str(tmp_path))
    assert_trained(lit.model, 20)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert all(key.startswith("model.") and "_orig" not in key for key in torch.load(checkpoint)["state_dict"])


def test_fsdp2_dcp(tmp_path: Path) -> None:
    module = recipe("fsdp2_dcp")
    resumed = module.main(str(tmp_path))
    assert_trained(resumed, module.STEPS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    whole, optimizer = module.build()
    module.train(whole, optimizer, range(module.STEPS))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())  # type: ignore[attr-defined]
