"""Docstrings are written for ``help()``, with a few roles of reStructuredText; this makes Markdown of them."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
_LITERAL = re.compile(r"::$", re.M)  # an indented block of code follows
_SECTION = re.compile(r"(\w+):$")
_TOGETHER = re.compile(r"(    )((?:\w+, )+)(\w+)(: .*)$")


def markdown(text: str) -> str:
    """A docstring with names in roles as code, no second colon before literal blocks, and an entry a parameter."""
    return apart(_LITERAL.sub(":", _ROLE.sub(r"`\1`", text)))


def apart(text: str) -> str:
    """Parameters that are described together get entries of their own, so that each is checked and has its type."""
    lines, section = [], ""
    for line in text.splitlines():
        if header := _SECTION.match(line):
            section = header[1]
        if section in ("Args", "Attributes") and (found := _TOGETHER.match(line)):
            indent, others, last, rest = found.groups()
            lines += [f"{indent}{name}: see `{last}`." for name in others.rstrip(", ").split(", ")]
            line = f"{indent}{last}{rest}"
        lines.append(line)
    return "\n".join(lines)


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
