"""What pyproject.toml lists is what a wheel holds: all packages, and all files that they read."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETTINGS["package-dir"]


def packages(root: Path) -> dict[str, Path]:
    """Name -> folder of every package that stands in the repository."""
    return {
        ".".join([name, *file.parent.relative_to(root / folder).parts]): file.parent
        for name, folder in FOLDERS.items()
        for file in (root / folder).rglob("__init__.py")
    }


def left_out(root: Path, patterns: dict[str, list[str]]) -> set[Path]:
    """Files besides Python's own that no pattern of their package takes, relative to the root."""
    here = packages(root)
    taken = {file for name, found in patterns.items() for pattern in found for file in here[name].glob(pattern)}
    every = {file for folder in FOLDERS.values() for file in (root / folder).rglob("*") if file.is_file()}
    data = {file for file in every if file.suffix != ".py" and "__pycache__" not in file.parts}
    return {file.relative_to(root) for file in data - taken}


def test_every_package_is_listed() -> None:
    assert sorted(SETTINGS["packages"]) == sorted(packages(ROOT))


def test_every_module_stands_in_a_package() -> None:
    modules = {file.parent for folder in FOLDERS.values() for file in (ROOT / folder).rglob("*.py")}
    assert modules == set(packages(ROOT).values())


def test_every_data_file_is_taken() -> None:
    assert not left_out(ROOT, SETTINGS["package-data"])


def test_every_pattern_takes_something() -> None:
    here = packages(ROOT)
    for name, patterns in SETTINGS["package-data"].items():
        for pattern in patterns:
            assert list(here[name].glob(pattern)), f"{name}: {pattern}"


@pytest.mark.parametrize("end", ["py.typed", ".h", ".cpp"])
def test_a_file_that_no_pattern_takes_is_found(end: str) -> None:
    fewer = {p: [x for x in found if not x.endswith(end)] for p, found in SETTINGS["package-data"].items()}
    found = left_out(ROOT, fewer)
    assert found
    assert all(file.name.endswith(end) for file in found)


def test_folders_of_data_belong_to_the_package_above(tmp_path: Path) -> None:
    for folder in FOLDERS.values():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    template = tmp_path / "kernels" / "templates" / "product.jinja"
    template.parent.mkdir()
    template.touch()
    assert left_out(tmp_path, {}) == left_out(tmp_path, {"mst_compile.kernels": ["*.jinja"]}) != set()
    assert not left_out(tmp_path, {"mst_compile.kernels": ["templates/*.jinja"]})
    assert not left_out(tmp_path, {"mst_compile.kernels": ["**/*.jinja"]})


# -- a name that is another package's, too -----------------------------------------------------------------------------


def in_the_root(program: str, path: Path) -> list[str]:
    """What a program prints that is run in the repository's root, ``path`` standing for installed packages."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split()


def test_kernels_makes_way_for_the_package_of_that_name(tmp_path: Path) -> None:
    """With submodules that import one another."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.hub import get_kernel\n__version__ = '0.18.2'\n")
    (package / "hub.py").write_text("import kernels.layer\ndef get_kernel(): pass\n")
    (package / "layer.py").write_text("")
    program = """
import kernels
from kernels import get_kernel
import kernels.layer
print(kernels.__version__, kernels.__file__, kernels.layer.__file__)
"""
    assert in_the_root(program, tmp_path) == ["0.18.2", str(package / "__init__.py"), str(package / "layer.py")]


@pytest.mark.skipif("kernels" in packages_distributions(), reason="the package is there")
@pytest.mark.parametrize("folder", [False, True])
def test_kernels_is_no_version_of_a_package_that_is_not_there(folder: bool, tmp_path: Path) -> None:
    """A folder of the name, which Python takes for a package without files of its own, is none either."""
    if folder:
        (tmp_path / "kernels").mkdir()
    assert in_the_root("import kernels; print(kernels.__version__)", tmp_path) == ["0"]


def test_transformers_sees_no_package_of_that_name_in_the_root(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    asked = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert in_the_root(asked, tmp_path) == [str("kernels" in packages_distributions())]
