"""The wheel: for every platform, all that is in the packages and nothing else, and a model trains from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
VERSION = PROJECT["project"]["version"]
TRAINS = """
    import sys
    from importlib import metadata
    from pathlib import Path

    import torch
    import mst_compile
    from mst_compile.kernels import cpu

    here = Path(sys.argv[1])
    assert here in Path(mst_compile.__file__).parents, mst_compile.__file__
    assert here in Path(cpu.__file__).parents, cpu.__file__
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    mst_compile.sparsify(model, mst_compile.Constant(0.8), block=8)
    # Found by its entry point; without Inductor products still run in the kernels, which come from the wheel's sources.
    compiled = torch.compile(model, backend="mst", options={"mst.inner": "eager", "mst.dense_threshold": 1.0})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
        losses.append((compiled(x) - x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert mst_compile.sparsifier(model).step_count == 2
    assert all(row.status.startswith("matched") for row in mst_compile.explain(model))
    assert cpu.why_unavailable() is None
    print("trained", metadata.version("mst_compile"))
"""


def in_packages() -> set[str]:
    """Every file that stands in a package of the repository, as the wheel calls it."""
    return {
        "/".join((*name.split("."), *file.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built of a copy, because setuptools writes beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, out], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def test_it_is_for_every_platform_and_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"mst_compile-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
        about = {name for name in names if name.startswith(f"mst_compile-{VERSION}.dist-info/")}
        entry_points = file.read(f"mst_compile-{VERSION}.dist-info/entry_points.txt").decode()
    assert names - about == in_packages()
    assert {name.rpartition("/")[2] for name in about} >= {"METADATA", "RECORD", "LICENSE"}
    assert "mst = mst_compile.graph.backend:mst" in entry_points
    for needed in ("py.typed", "report/page.html.jinja", "kernels/cpu/spmm.cpp", "kernels/cpu/vector.h"):
        assert f"mst_compile/{needed}" in names
    assert not any(name.startswith(("tests", "benchmarks", "examples", "kernels", "lowering")) for name in names)


def test_a_model_trains_from_it(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows what the package depends on."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (there,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, capture_output=True)
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (there / "borrowed.pth").write_text("\n".join(borrowed))  # after the environment's own
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAINS))
    done = subprocess.run([python, script, there], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"trained {VERSION}\n"
