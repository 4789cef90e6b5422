"""Text generated with a KV cache by a sparse model, compiled in place."""

from __future__ import annotations

import pytest
import torch
from generation import generation
from helpers import DEBUG

import mst_compile


@pytest.mark.parametrize(("cache", "graphs"), [("static", 2), ("dynamic", 3)])
def test_generation_is_that_of_eager_mode(cache: str, graphs: int) -> None:
    """One graph for the prompt, one for a token, and one more for a cache that grows, however long it gets."""
    written = generation(cache)
    model = written.model
    torch._dynamo.utils.counters.clear()
    model.compile(backend="mst", options=DEBUG)
    written.check(model.generate(written.ids, **written.options))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    rows = [row for row in mst_compile.explain(model) if row.density < 1]
    assert rows
    assert all(row.status.startswith("matched") for row in rows)
