"""Triton kernels, as templates that Inductor completes: it adds epilogues, picks tiles and generates the launch."""

from functools import partial
from pathlib import Path

from torch._inductor.utils import load_template

load = partial(load_template, template_dir=Path(__file__).parent / "templates")
