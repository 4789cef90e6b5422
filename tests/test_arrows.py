"""The rooms of the repository: imports run one way, and docs/design.md names what is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import arrows
import pretend_gpu
import pytest
from arrows import Arrow

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
ORDER = (
    "errors", "rules", "blocks", "ops", "kernels", "lowering", "state", "parallel", "graph", "api", "cost", "export",
    "report", "tryout", "doctor", "integrations", "package",
)  # fmt: skip
DOORS = ("schedule", "flops", "communication", "recipes", "__main__")  # the package's own: public names, commands
PRETEND = ("compat", "device", "codegen", "machine", "interpreter", "host", "package")


@pytest.fixture(scope="module")
def package() -> list[Arrow]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = settings["tool"]["setuptools"]["package-dir"]
    return arrows.arrows(arrows.sources({name: ROOT / folder for name, folder in folders.items()}))


@pytest.fixture(scope="module")
def pretended() -> list[Arrow]:
    return arrows.arrows(arrows.sources({"pretend_gpu": TESTS / "pretend_gpu"}))


def said(found: list[Arrow]) -> str:
    return "\n".join(str(arrow) for arrow in found)


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_no_arrow_of_the_package_runs_up(package: list[Arrow]) -> None:
    assert len(package) > 100
    wrong = arrows.against(ORDER, "mst_compile", package, DOORS)
    assert not wrong, said(wrong)


def test_operators_know_neither_kernels_nor_lowerings(package: list[Arrow]) -> None:
    below = ("mst_compile.kernels.", "mst_compile.lowering.")
    wrong = [a for a in package if a.source.startswith("mst_compile.ops.") and a.target.startswith(below)]
    assert not wrong, said(wrong)


def test_integrations_are_imported_by_users_alone(package: list[Arrow]) -> None:
    room = "mst_compile.integrations."
    inside = [a for a in package if a.source.startswith(room)]
    assert any(a.target == "transformers" for a in inside)
    wrong = [a for a in package if a.target.startswith(room) and a not in inside]
    assert not wrong, said(wrong)


def test_no_modules_import_each_other(package: list[Arrow], pretended: list[Arrow]) -> None:
    assert not arrows.cycles(package)
    assert not arrows.cycles(pretended)


def test_the_package_imports_nothing_that_is_not_installed_with_it(package: list[Arrow]) -> None:
    """The two halves at the top of the repository go by their installed names, and by those alone."""
    beside = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - {"mst_compile"}
    assert {"benchmarks", "examples", "tests", "lowering", "kernels"} <= beside
    wrong = [a for a in package if a.target.split(".")[0] in beside]
    assert not wrong, said(wrong)


def test_the_pretended_gpu_stands_alone(pretended: list[Arrow]) -> None:
    wrong = arrows.against(PRETEND, "pretend_gpu", pretended)
    assert not wrong, said(wrong)
    mine = {file.stem for file in TESTS.iterdir()} - {"pretend_gpu"} | {"mst_compile"}
    assert {"helpers", "conftest"} <= mine
    wrong = [a for a in pretended if a.target.split(".")[0] in mine]
    assert not wrong, said(wrong)
    for file in (TESTS / "pretend_gpu").rglob("*.py"):
        assert "mst_compile" not in file.read_text(), file.name
    assert set(pretend_gpu.__all__) <= set(dir(pretend_gpu))


# -- docs/design.md ----------------------------------------------------------------------------------------------------
# Its section "Where things live" is a table: rooms in the first column (`mst_compile/rules/`), what they hold in the
# second (`density.py`, files of the room that is named last).


def rows() -> list[tuple[str, list[str]]]:
    """Room and files of each row; the room of the row above where a row names none."""
    text = (ROOT / "docs" / "design.md").read_text()
    section = text.split("## Where things live", 1)[1].split("\n## ", 1)[0]
    found: list[tuple[str, list[str]]] = []
    for line in section.splitlines():
        if line.startswith("|") and "`" in line:
            first, second = line.split("|")[1:3]
            (name,) = re.findall(r"`([^`]+)/`", first) or [found[-1][0]]
            found.append((name, re.findall(r"`([\w/]+\.(?:py|cpp|h|jinja))`", second)))
    return found


def test_the_rooms_that_the_design_names_exist() -> None:
    names = {name for name, _ in rows()}
    assert names
    assert not {name for name in names if not (ROOT / name).is_dir()}


def test_the_design_names_every_room_and_only_files_that_exist() -> None:
    missing = [f"{name}/{file}" for name, files in rows() for file in files if not (ROOT / name / file).exists()]
    assert not missing
    here = {str(f.parent.relative_to(ROOT)) for top in ("mst_compile", "lowering") for f in (ROOT / top).rglob("*.py")}
    assert here <= {name for name, _ in rows()}


# -- the reader itself -------------------------------------------------------------------------------------------------

MODULES = {
    "house.__init__": "from .attic import roof",
    "house.cellar.__init__": "",
    "house.cellar.wine": "",
    "house.hall.__init__": "",
    "house.hall.door": "from house.cellar.wine import bottle",
    "house.attic.__init__": "",
    "house.attic.roof": "from . import tiles",
    "house.attic.tiles": "import torch\nfrom ..hall import door",
}
HOUSE = ("cellar", "hall", "attic", "package")
UP = {
    "absolute": "import house.hall.door",
    "a name of a module": "from house.hall.door import handle",
    "a module of a package": "from house.hall import door",
    "relative": "from ..hall.door import handle",
    "relative module": "from ..hall import door",
    "another name": "from ..hall import door as window",
    "in a function": "def pour():\n    from house.hall import door\n",
    "in a method, relative": "class Cask:\n    def pour(self):\n        from ..hall import door\n",
    "for types alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.hall.door import handle\n",
    "where it may be missing": "try:\n    from house.hall import door\nexcept ImportError:\n    pass\n",
    "by its name": "import importlib\ndoor = importlib.import_module('house.hall.door')",
}


def test_a_house_in_order() -> None:
    found = arrows.arrows(MODULES)
    assert [(a.source, a.target) for a in found] == [
        ("house.__init__", "house.attic.roof"),
        ("house.hall.door", "house.cellar.wine"),
        ("house.attic.roof", "house.attic.tiles"),
        ("house.attic.tiles", "torch"),
        ("house.attic.tiles", "house.hall.door"),
    ]
    assert not arrows.against(HOUSE, "house", found)
    assert not arrows.cycles(found)


@pytest.mark.parametrize("how", UP)
def test_an_arrow_that_runs_up_is_found(how: str) -> None:
    found = arrows.arrows(MODULES | {"house.cellar.wine": UP[how]})
    (wrong,) = arrows.against(HOUSE, "house", found)
    assert (wrong.source, wrong.target) == ("house.cellar.wine", "house.hall.door")
    assert arrows.cycles(found) == [["house.cellar.wine", "house.hall.door"]]


@pytest.mark.parametrize("text", ["import house", "from house import roof", "from .. import roof", "from ... import x"])
def test_nobody_imports_the_package_itself(text: str) -> None:
    found = arrows.arrows(MODULES | {"house.hall.deep.door": text, "house.hall.deep.__init__": ""})
    expected = 0 if text.startswith("from .. ") else 1  # two dots from there lead to the hall
    assert len(arrows.against(HOUSE, "house", found)) == expected


def test_the_package_of_a_room_counts_as_the_room() -> None:
    found = arrows.arrows(MODULES | {"house.cellar.__init__": "from ..hall import *\nfrom . import wine"})
    assert arrows.against(HOUSE, "house", found) == [Arrow("house.cellar.__init__", "house.hall.__init__", 1)]


def test_doors_belong_to_the_package() -> None:
    found = arrows.arrows(MODULES | {"house.gate": "from .attic import roof", "house.hall.door": "import house.gate"})
    assert arrows.against(HOUSE, "house", found, ["gate"]) == [Arrow("house.hall.door", "house.gate", 1)]


def test_a_room_without_a_place_is_refused() -> None:
    with pytest.raises(LookupError, match=r"house\.shed\.rake: shed has no place in the order of rooms cellar, hall"):
        arrows.against(HOUSE, "house", arrows.arrows(MODULES | {"house.shed.rake": "from house.hall import door"}))


def test_cycles() -> None:
    ring = {f"house.hall.{a}": f"def f():\n    from . import {b}" for a, b in ("xy", "yz", "zx", "aa", "bx")}
    assert arrows.cycles(arrows.arrows(ring)) == [
        ["house.hall.a"],
        ["house.hall.x", "house.hall.y", "house.hall.z"],
    ]
