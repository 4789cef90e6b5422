"""What code generation leaves: the text of each graph, what went in and came out, and the questions it asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class GraphCode:
    """One graph: Inductor's wrapper for it, and what went in and came out when it ran eagerly.

    Attributes:
        name: "forward" or "backward" (with a number if there are several).
        source: The text of the generated module.
        inputs: Tensors and integers as the graph got them, copied before it ran.
        outputs: What it returned: tensors, integers, None.
        inputs_after: The inputs after the run; they differ from `inputs` where the graph mutates them.
    """

    name: str
    source: str = field(repr=False)
    inputs: list[Any] = field(default_factory=list, repr=False)
    outputs: list[Any] = field(default_factory=list, repr=False)
    inputs_after: list[Any] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Question:
    """One autotuning question: its name, what could be chosen, and the index that was."""

    name: str
    choices: tuple[str, ...] = field(repr=False)
    picked: int


@dataclass
class Generated:
    """What `generate` returns.

    Attributes:
        graphs: Graph by name, in the order of compilation.
        questions: The autotuning questions in the order they were asked.
        result: What the function returned in the eager run; gradients are in the `.grad` of its arguments.
    """

    graphs: dict[str, GraphCode] = field(default_factory=dict)
    questions: list[Question] = field(default_factory=list)
    result: Any = field(default=None, repr=False)

    @property
    def forward(self) -> GraphCode:
        return self.graphs["forward"]

    @property
    def backward(self) -> GraphCode:
        """The backward graph; KeyError if there was none."""
        return self.graphs["backward"]


def snapshot(value: Any) -> Any:
    """A copy of a tensor with the same strides, also where elements overlap (a plain clone makes those contiguous)."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.numel() == 0:
        return value.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
    flat = value.as_strided((span,), (1,), value.storage_offset()).clone()
    return flat.as_strided(value.size(), value.stride())
