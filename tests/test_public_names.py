"""What README and guide tell users to import is there, under the names that they tell."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mst_compile

ROOT = Path(__file__).resolve().parents[1]
DOORS = ("schedule", "recipes", "flops", "communication", "export", "report")
TOLD = sorted(
    {
        name.rstrip(".")
        for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "tasks").glob("*.md"))
        for name in re.findall(r"\bmst_compile(?:\.[A-Za-z_]\w*)+", file.read_text())
    }
)


def resolve(name: str) -> Any:
    """What a dotted name stands for: modules as far as there are any, attributes after that."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", TOLD)
def test_what_the_documents_name_is_there(name: str) -> None:
    resolve(name)


def test_users_reach_them_after_importing_the_package_alone() -> None:
    """In a fresh process, where nothing else has imported the modules that they are in."""
    names = [name for name in TOLD if name.split(".")[1] in DOORS]
    assert {name.split(".")[1] for name in names} >= set(DOORS) - {"recipes"}
    program = "import functools, mst_compile\n" + "".join(
        f"functools.reduce(getattr, {name.split('.')[1:]}, mst_compile)\n" for name in names
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=300)


def test_all_is_there_and_names_no_module() -> None:
    assert {"sparsify", "sparsifier", "densify", "explain", "forecast", "param_groups"} <= set(mst_compile.__all__)
    assert len(TOLD) > 10
    for name in mst_compile.__all__:
        assert not isinstance(getattr(mst_compile, name), type(mst_compile)), f"{name} is shadowed by a module"


@pytest.mark.parametrize("door", ["schedule", "recipes", "flops", "communication"])
def test_doors_lead_into_the_rooms(door: str) -> None:
    module = importlib.import_module(f"mst_compile.{door}")
    assert module.__all__ == sorted(module.__all__, key=lambda n: (not n.isupper(), n))
    assert all(hasattr(module, name) for name in module.__all__)
