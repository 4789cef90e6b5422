"""Random small models, stacked of pieces that match, pieces that nearly match and pieces that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import check_model, statuses
from hypothesis import given, settings
from hypothesis import strategies as st
from net_cases import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D


class Weighted(nn.Module):
    """A bare weight ``[out, in]`` and a rule."""

    def __init__(self, rows: int, cols: int, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.rule = nn.Parameter(torch.randn(rows, cols) / cols**0.5), rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x, self.w)


class Residual(Mlp):
    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Recomputed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]


class Gated(nn.Module):
    """One input, two products, an epilogue."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, out), Conv1D(out, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.value(x)


class Transposed(nn.Module):
    """The batch as the last dimension: the input of the product is not contiguous."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(0, 1).contiguous().transpose(0, 1)).relu()


# (width, out) -> a module from [..., width] to [..., out]
PIECES: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda i, o: nn.Linear(i, o),
    "conv1d": lambda i, o: Conv1D(o, i),
    "gelu": lambda i, o: nn.Sequential(nn.GELU(), nn.Linear(i, o, bias=False)),
    "norm": lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, o)),
    "gated": lambda i, o: Gated(i, o),
    "transposed": lambda i, o: Transposed(i, o),
    "residual": lambda i, o: nn.Sequential(Residual(i), nn.Linear(i, o)),
    "recomputed": lambda i, o: nn.Sequential(Recomputed(i), nn.Linear(i, o)),
    "twice": lambda i, o: nn.Sequential(Twice(i), nn.Linear(i, o)),
    "product": lambda i, o: Weighted(o, i, lambda x, w: x @ w.mT),
    "einsum": lambda i, o: Weighted(o, i, lambda x, w: torch.einsum("...k,nk->...n", x, w)),
    "normalised weight": lambda i, o: Weighted(o, i, lambda x, w: F.linear(x, F.normalize(w, dim=1))),
    "halves": lambda i, o: Weighted(
        o, i, lambda x, w: torch.cat([F.linear(x, w[: len(w) // 2]), F.linear(x, w[len(w) // 2 :])], -1)
    ),
    "product and norm": lambda i, o: Weighted(o, i, lambda x, w: F.linear(x, w) * w.square().mean()),
}


@st.composite
def models(draw: st.DrawFn) -> tuple[Callable[[], nn.Module], int]:
    widths = draw(st.lists(st.sampled_from([16, 24, 32, 37]), min_size=2, max_size=4))
    names = [draw(st.sampled_from(sorted(PIECES))) for _ in widths[1:]]

    def build() -> nn.Module:
        torch.manual_seed(0)
        pairs = zip(names, widths, widths[1:], strict=False)
        return nn.Sequential(*(PIECES[n](i, o) for n, i, o in pairs))

    return build, widths[0]


def run(case: tuple[Callable[[], nn.Module], int], lead: tuple[int, ...], **options: Any) -> None:
    build, width = case
    torch._dynamo.reset()
    weights = [n for n, p in build().named_parameters() if p.dim() == 2]
    model = check_model(build, torch.randn(*lead, width), include=weights, **options)
    for status in statuses(model).values():
        assert status.startswith(("matched", "not matched", "skipped")), status


@settings(max_examples=20)
@given(models(), st.sampled_from([(3, 5), (1, 1), (7, 2)]), st.sampled_from([4, 8]), st.sampled_from([0.3, 0.6, 0.8]))
def test_random_models(
    case: tuple[Callable[[], nn.Module], int], lead: tuple[int, ...], block: int, sparsity: float
) -> None:
    run(case, lead, block=block, sparsity=sparsity)


@settings(max_examples=8)
@given(models())
def test_random_models_under_autocast(case: tuple[Callable[[], nn.Module], int]) -> None:
    run(case, (3, 5), precision=torch.bfloat16, context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_pieces_through_inductor(precision: torch.dtype) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        names = [n for n in PIECES if n not in ("normalised weight", "halves", "gelu", "norm", "twice")]
        return nn.Sequential(*(PIECES[n](24, 24) for n in names)).to(precision)

    weights = [n for n, p in build().named_parameters() if p.dim() == 2]
    x = torch.randn(3, 5, 24).to(precision)
    model = check_model(build, x, include=weights, precision=precision, inner="inductor")
    assert any(s.startswith("matched (1 use); dense: used by square") for s in statuses(model).values())
