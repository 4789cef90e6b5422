"""Hybrid sparse attention over time: which pattern attention runs with now (arXiv 2408.11746, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mst_compile.rules.patterns import FULL, Parts
from mst_compile.rules.schedule import Schedule, attention_of


@dataclass
class AttentionState:
    """What the backend needs to know at every call; the sparsifier moves ``pattern`` as the schedule says.

    Attributes:
        pattern: name of the pattern of now, ``"full"`` or the schedule's sparse one.
        sparse: name of the sparse pattern that will come, was there, or never comes (``"full"``).
        parts: what queries see under the sparse pattern; what a variant with it is compiled for.
        queries: while someone counts, shape of the queries, and then the size of a value, of each attention that
            trained with the pattern; else None.
        reasons: for attentions that the graph pass saw, what became of them; where -> what.
    """

    pattern: str = "full"
    sparse: str = "full"
    parts: Parts = FULL
    queries: list[tuple[int, ...]] | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    warned: bool = False

    @classmethod
    def create(cls, schedule: Schedule) -> AttentionState:
        """The state before the first step."""
        value = schedule.attention_value
        return cls(attention_of(schedule, 0), value.name, value.parts)
