"""What the site's build does to pages, so that the same text reads right on GitHub.

The README is the home page. A link to a file outside docs/ leads to a copy of it in the site: Python sources become
pages, other files go there as they are. So nothing of the text is written twice, and every link works without network.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
HOME = "index.md"
COPIES = "repository"  # folder of the site
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^ *(```|~~~)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README as the home page, and a copy of every file of the repository that a page links to."""
    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text()))
    for page in list(files.documentation_pages()):
        for target, _ in _LINK.findall(page.content_string):
            path = _in_repository(page.src_uri, target)
            if path.startswith("docs/") or path == "README.md" or files.get_file_from_path(_copy(path)):
                continue
            source = ROOT / path
            if not source.is_file() or ROOT not in source.resolve().parents:
                raise PluginError(f"{page.src_uri} links to {target}, which is no file of the repository")
            if source.suffix == ".py":
                text = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n````python\n{source.read_text()}````\n"
                files.append(File.generated(config, _copy(path), content=text))
            else:
                files.append(File.generated(config, _copy(path), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the site, and lists as Python-Markdown reads them."""
    here = page.file.src_uri
    if here.startswith(f"{COPIES}/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        path = _in_repository(here, match[1])
        there = HOME if path == "README.md" else path.removeprefix("docs/") if path.startswith("docs/") else _copy(path)
        return posixpath.relpath(there, posixpath.dirname(here)) + (match[2] or "")

    return _LINK.sub(moved, _indented(markdown))


def _in_repository(page: str, target: str) -> str:
    """Path from the repository's root of what ``target`` means on the page at ``page`` of the site."""
    folder = "" if page == HOME else posixpath.dirname(f"docs/{page}")
    return posixpath.normpath(posixpath.join(folder, target))


def _copy(path: str) -> str:
    return f"{COPIES}/{path.removesuffix('.py')}.md" if path.endswith(".py") else f"{COPIES}/{path}"


def _indented(markdown: str) -> str:
    """Text within an item of a list, which GitHub lets begin after 2 or 3 spaces, moved to where Python-Markdown wants
    it, after 4."""
    lines, by, fenced = [], 0, False
    for line in markdown.splitlines():
        if not fenced:
            indent = len(line) - len(line.lstrip(" "))
            by = 4 - indent if indent in (2, 3) else 0
        lines.append(" " * by + line if line.strip() else line)
        fenced ^= bool(_FENCE.match(line))
    return "\n".join(lines)
