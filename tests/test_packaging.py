"""What pyproject.toml lists is what a wheel holds: all packages, and all files that they read."""

from __future__ import annotations

import tomllib
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
