"""Two layers whose gradients are looked at: which of them have been written zeros to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import compiled, static
from mask_cases import element_masks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mst_compile import sparsify
from mst_compile.state import weight as weights

X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Two layers; ``more`` is one more use of the first one's weight in the graph."""

    def __init__(self, more: Callable[[Tensor], Tensor] | None = None, again: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.more, self.again = more, again

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x, use_reentrant=False) if self.again else self.first(x)
        y = self.second(torch.relu(x)).square().mean()
        return y if self.more is None else y + self.more(self.first.weight)


class Zeroed:
    """How many gradients have been written zeros to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = weights.zero_all_inactive_

        def zero(whole: Any) -> None:
            self.count += len(whole)
            original(whole)

        monkeypatch.setattr(weights, "zero_all_inactive_", zero)

    def by(self, run: Callable[[], object]) -> int:
        before = self.count
        run()
        return self.count - before


def trained(more: Callable[[Tensor], Tensor] | None = None, schedule: Any = None, **kwargs: Any) -> tuple[Layers, Any]:
    torch.manual_seed(0)
    model = sparsify(Layers(more, **kwargs), schedule or static(0.6), block=8)
    return model, compiled(model)


def assert_zero_outside(model: nn.Module) -> None:
    for name, mask in element_masks(model).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert not gradient[~mask].any(), name
        assert gradient[mask].all(), name


def noise(gradient: Tensor) -> Tensor:
    return gradient + 1.0


def noise_in_place(gradient: Tensor) -> None:
    gradient.add_(1.0)


def noise_without_a_trace(gradient: Tensor) -> None:
    gradient.data.add_(1.0)
