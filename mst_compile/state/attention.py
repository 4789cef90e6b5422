"""Hybrid sparse attention over time: which pattern attention runs with now (arXiv 2408.11746, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mst_compile.rules.schedule import Schedule


@dataclass
class AttentionState:
    """What the backend needs to know at every call; the sparsifier moves ``pattern`` as the schedule says.

    Attributes:
        pattern: the pattern of now, ``"full"`` or the schedule's sparse one.
        sparse: the sparse pattern that will come, was there, or never comes (``"full"``).
        window, stride: positions, see :mod:`mst_compile.rules.patterns`.
        queries: while someone counts, shape of the queries in each attention that trained with the pattern; else None.
        reasons: for attentions that the graph pass saw, what became of them; where -> what.
    """

    pattern: str = "full"
    sparse: str = "full"
    window: int = 128
    stride: int = 128
    queries: list[tuple[int, ...]] | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    warned: bool = False

    @classmethod
    def create(cls, schedule: Schedule) -> AttentionState:
        """The state before the first step."""
        value = schedule.attention_value
        return cls(schedule.attention_at(0), value.pattern, value.positions, value.stride)

    @property
    def settings(self) -> tuple[str, int, int]:
        """What a compiled variant with the sparse pattern was compiled for."""
        return self.sparse, self.window, self.stride
