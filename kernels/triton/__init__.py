"""Triton kernels, as templates that Inductor completes: it adds epilogues, picks tiles and generates the launch."""

from functools import partial
from pathlib import Path

from torch._inductor.utils import load_template

load = partial(load_template, template_dir=Path(__file__).parent / "templates")


def source(*names: str) -> str:
    """Several texts as one: templates cannot import, so that the macros that they share stand before each."""
    return "".join(map(load, names))
