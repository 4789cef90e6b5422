"""docs/models.md says what is measured, of a few types that are quite different."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from benchmarks import model_coverage  # noqa: E402
from benchmarks.zoo import shrink  # noqa: E402
from benchmarks.zoo.build import build  # noqa: E402
from benchmarks.zoo.measure import Found, measure  # noqa: E402

TYPES = ["bert", "gpt2", "llama", "mamba", "mixtral", "t5", "vit", "whisper"]
PAGE = model_coverage.PAGE.read_text()


def row_of(name: str) -> list[str]:
    """The cells of the row that names a type."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if "| " in line]
    return next(row for row in rows if name in re.split(r"[, ]+", row[0]))


@pytest.mark.skipif(f"transformers {transformers.__version__} " not in PAGE, reason="the page is of another version")
@pytest.mark.parametrize("name", TYPES)
def test_the_page_says_what_is_measured(name: str) -> None:
    found = measure(name)
    _, sparse, attention, dense = row_of(name)
    assert (attention, dense) == model_coverage.cells(found)
    low, high = (int(n) for n in (re.findall(r"\d+", sparse) * 2)[:2])
    assert low <= model_coverage.percent(found.share) <= high


def test_products_are_counted_by_what_they_multiply() -> None:
    """Of a mixture of experts all FLOPs, worked out by hand from the sizes of its configuration."""
    built = build("mixtral")
    assert not isinstance(built, str)
    config, tokens = built.model.config, built.inputs["input_ids"].numel()  # type: ignore[union-attr]
    width, hidden = config.hidden_size, config.intermediate_size
    size = width // config.num_attention_heads
    attention = width * size * 2 * (config.num_attention_heads + config.num_key_value_heads)
    experts = config.num_hidden_layers * config.num_experts_per_tok * 3 * width * hidden
    sparse = config.num_hidden_layers * attention + width * config.vocab_size + experts
    router = config.num_hidden_layers * width * config.num_local_experts
    assert tokens == 2 * shrink.LENGTH
    found, total = measure("mixtral"), sparse + router
    assert found.share == pytest.approx(sparse / total)
    assert found.dense == {"a Parameter of the model's own, which `include` can name": pytest.approx(router / total)}


def test_alike_types_share_a_row() -> None:
    whole = [Found(name, "", 1.0, {"replaced": 2}) for name in ("b", "a")]
    parts = [Found("c", "", 0.5, {}, {"narrow": 0.5}), Found("d", "", 0.999, {}, {"narrow": 0.001})]
    lines = model_coverage.table([*whole, *parts, Found("e", "stays too large: 9")]).splitlines()[2:]
    assert lines == ["| a, b (2) | 100 % | replaced | nothing |", "| c, d (2) | 50 to 99 % | none found | narrow |"]


def test_a_model_is_small_and_has_no_dropout() -> None:
    built = build("gpt2")
    assert not isinstance(built, str)
    assert max(p.numel() for p in built.model.parameters()) <= 4 * shrink.WIDTH**2
    assert {m.p for m in built.model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert torch.equal(built.model(**built.inputs).logits, built.model(**built.inputs).logits)
