"""Interpreters that are started in other ways: what a user sets for a process changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mst_compile.kernels
import mst_compile.lowering
import pytest
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import folder

import mst_compile

PROGRAM = """
import torch, mst_compile

def train():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    mst_compile.sparsify(model, mst_compile.Constant(0.7, interval=3, growth="random"), masks="random")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run = torch.compile(model, backend="mst", options={"mst.inner": "aot_eager", "mst.dense_threshold": 1.0})
    for _ in range(5):
        x = torch.randn(32, 64, generator=generator)
        loss = (run(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert mst_compile.sparsifier(model).step_count == 5
    kernels = {row.kernel for row in mst_compile.explain(model)}
    if kernels != {"block-sparse"}:
        raise SystemExit(str(mst_compile.explain(model)))
    print("loss", loss.item())

train()
"""
IN_ONE_PROCESS = """
import asyncio, importlib, os, sys

asyncio.run(asyncio.to_thread(train))
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
train()
sys.settrace(lambda *_: None)
train()
sys.settrace(None)
for name in ("mst_compile.state.binding", "mst_compile.api", "mst_compile"):
    importlib.reload(sys.modules[name])
train()
"""

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")


def losses(program: str, *options: str, without: tuple[str, ...] = (), **variables: str) -> list[str]:
    """What it prints in an interpreter of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in without} | variables
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *options, "-c", program], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")
    return [line for line in done.stdout.decode().splitlines() if line.startswith("loss")]


def test_other_interpreters_train_alike(tmp_path: Path) -> None:
    """Without asserts and docstrings, in an ASCII locale, without a home, with a folder of temporary files that is not
    there and a cache whose path nobody has quoted; in threads, on a processor fewer, traced, and after a reload."""
    (usual,) = set(losses(PROGRAM + IN_ONE_PROCESS))
    cache = tmp_path / "a b'c\"d$e;ü"
    shutil.copytree(folder.cache_dir(), cache, ignore=shutil.ignore_patterns("building-*", "*.lock", "rate-*"))
    told = {"LC_ALL": "C", "TMPDIR": str(tmp_path / "nowhere"), "MST_COMPILE_CACHE_DIR": str(cache)}
    assert losses(PROGRAM, "-OO", "-X", "frozen_modules=off", without=("HOME", "PYTHONUTF8"), **told) == [usual]


def test_an_archive_is_refused(tmp_path: Path) -> None:
    """Compilers read no files in it."""
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for module in (mst_compile, mst_compile.kernels, mst_compile.lowering):
            (root,) = module.__path__
            for source in Path(root).rglob("*.py"):
                file.write(source, Path(*module.__name__.split("."), source.relative_to(root)))
    program = f"import sys; sys.path.insert(0, {str(archive)!r}); import mst_compile"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=tmp_path)
    assert done.returncode != 0
    assert b"mst_compile lies in an archive" in done.stderr, done.stderr.decode()
