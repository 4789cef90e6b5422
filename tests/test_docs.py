"""The documentation holds together: the site's navigation, links and anchors, the API's names, generated tables, and
the first program that a reader runs. ``make docs`` builds the site itself, strictly; nothing here needs mkdocs."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import mst_compile
from benchmarks import tables
from mst_compile import errors
from mst_compile.graph import backend

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
HOME = "index.md"  # the README, put there when the site is built
SITE: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def files_in(nav: list[Any]) -> list[str]:
    """All files that a navigation names, in its order."""
    found: list[str] = []
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += files_in(value) if isinstance(value, list) else [value]
    return found


def anchors(text: str) -> set[str]:
    """What GitHub and the site call a page's headings. Where they differ a link would work on one of them alone."""
    headings = [re.sub(r"`", "", line) for line in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.M)]
    github = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    site = [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings]
    both = {a for a, b in zip(github, site, strict=True) if a == b}
    return {anchor for anchor in both if github.count(anchor) == 1}


def broken(page: Path, text: str) -> list[str]:
    """Links of ``text``, as it stands at ``page``, that lead nowhere."""
    found = []
    for link in LINK.findall(FENCED.sub("", text)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.is_file() and ROOT in target.parents
        if not there or (anchor and anchor not in anchors(text if target == page else target.read_text())):
            found.append(link)
    return found


def test_the_navigation_names_every_page_once_and_no_other() -> None:
    named = files_in(SITE["nav"])
    assert sorted(named) == sorted([HOME, *(str(page.relative_to(DOCS)) for page in PAGES[1:])])


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text()) == []


def test_broken_links_are_found() -> None:
    page, text = DOCS / "guide.md", "## Here & there\n\n## Twice\n\n## Twice\n"
    good = "[a](#guide) [b](design.md#on-a-gpu) [c](../benchmarks/ledger.csv) [d](https://example.org) ![e](when.svg)\n"
    assert broken(page, f"# Guide\n\n{good}") == []
    for link in ("gone.md", "design.md#gone", "#here--there", "#here-there", "#twice", "../../outside.md", "upstream"):
        assert broken(page, f"{text}[x]({link})\n") == [link]
    assert broken(page, "```\n[x](gone.md)\n```\n") == []


def levels(text: str) -> list[int]:
    """How deep each heading of a page is."""
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCED.sub("", text), re.M)]


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_a_page_has_one_title_and_its_headings_skip_no_level(page: Path) -> None:
    found = levels(page.read_text())
    assert found[0] == 1
    assert found.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(found))


def test_the_build_is_strict_and_the_site_loads_nothing_from_elsewhere() -> None:
    assert SITE["strict"] is True
    assert "mkdocs build --strict\n" in (ROOT / "Makefile").read_text(), "--quiet would hide warnings from --strict"
    assert SITE["theme"]["font"] is False
    assert SITE["validation"]["links"]["anchors"] == "warn", "which is an error in a strict build"
    loaded = SITE["extra"]["polyfills"] + SITE.get("extra_javascript", []) + SITE.get("extra_css", [])
    assert loaded
    assert all((DOCS / file).is_file() for file in loaded)
    assert any("iframe-worker" in file for file in loaded), "or the offline plugin loads it from a CDN"


def test_the_api_pages_hold_every_public_name_once() -> None:
    doors = ("schedule", "recipes", "flops", "communication", "report", "export")
    public: dict[int, str] = {}
    for door in ("mst_compile", *(f"mst_compile.{door}" for door in doors)):
        module = importlib.import_module(door)
        for name in module.__all__:  # under the shortest name that leads to it
            public.setdefault(id(getattr(module, name)), f"{door}.{name}")
    for name, value in vars(errors).items():
        if isinstance(value, type) and value.__module__ == errors.__name__:
            public.setdefault(id(value), f"mst_compile.errors.{name}")
    door = "mst_compile.integrations.transformers"
    wanted = [*public.values(), *(f"{door}.{name}" for name in ("MSTCallback", "MSTTrainer", "MSTTrainerMixin"))]
    shown = [
        n for page in sorted((DOCS / "api").glob("*.md")) for n in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert sorted(shown) == sorted(wanted)


@pytest.mark.parametrize("page", [tables.README, tables.PAGE], ids=names)
def test_tables_are_the_ledgers(page: Path) -> None:
    assert "<!-- ledger:" in page.read_text()
    assert page.read_text() == tables.filled(page, tables.read()), "python -m benchmarks.tables --write"


def test_the_quick_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._DEFAULTS, "mst.inner", "eager")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.S)
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(program, "quickstart.md", "exec"), scope)
    own = mst_compile.sparsifier(scope["model"])
    assert (own.step_count, own.density) == (scope["STEPS"], 1.0)
    assert all(row.status.startswith("matched") for row in mst_compile.explain(scope["model"]))
    assert "plateau, density 0.20" in out.getvalue()
    assert (tmp_path / "model.pt").exists()
