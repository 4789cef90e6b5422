"""Every form of a linear layer is matched, near misses stay dense, and all equal the eager model."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import check_model, compiled, static, statuses
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from mst_compile import MSTWarning, explain, sparsify
from mst_compile.graph.fx import before_swap

BF16 = torch.bfloat16
X = (2, 8, 32)


class Free(nn.Module):
    """A bare weight, used by ``form``; ``[out, in]`` or, for products, ``[in, out]``."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int = 96, cols: int = 32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(rows, cols) / 8)
        self.b = nn.Parameter(torch.randn(max(rows, cols)))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.w, self.b)


OUT_IN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "F.linear": lambda x, w, b: F.linear(x, w),
    "F.linear bias": lambda x, w, b: F.linear(x, w, b),
    "F.linear keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "@ t()": lambda x, w, b: x @ w.t(),
    "@ T": lambda x, w, b: x @ w.T,
    "@ mT": lambda x, w, b: x @ w.mT,
    "@ H": lambda x, w, b: x @ w.H,
    "@ mH": lambda x, w, b: x @ w.mH,
    "adjoint": lambda x, w, b: x @ w.adjoint(),
    "torch.adjoint": lambda x, w, b: x @ torch.adjoint(w),
    "operators": lambda x, w, b: x @ torch.ops.aten.mT(torch.ops.aten.numpy_T.default(torch.ops.aten.t(w))),
    "torch.t": lambda x, w, b: x @ torch.t(w),
    "transpose": lambda x, w, b: torch.matmul(x, w.transpose(0, 1)),
    "transpose negative": lambda x, w, b: x.matmul(w.transpose(-1, -2)),
    "torch.transpose": lambda x, w, b: torch.matmul(x, torch.transpose(w, 1, 0)),
    "permute": lambda x, w, b: torch.matmul(x, w.permute(1, 0)),
    "permute tuple": lambda x, w, b: x @ torch.permute(w, (1, 0)),
    "swapaxes": lambda x, w, b: x @ w.swapaxes(0, 1),
    "twice transposed": lambda x, w, b: F.linear(x, w.t().t()),
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()),
    "method mm": lambda x, w, b: x.flatten(0, 1).mm(w.t()),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()),
    "addmm 2-D": lambda x, w, b: torch.addmm(b[None] * torch.ones(16, 1), x.flatten(0, 1), w.t()),
    "addmm keywords": lambda x, w, b: torch.addmm(input=b, mat1=x.flatten(0, 1), mat2=w.t(), beta=1.0, alpha=1),
    "method addmm": lambda x, w, b: b.addmm(x.flatten(0, 1), w.t()),
    "inner": lambda x, w, b: torch.inner(x, w),
    "method inner": lambda x, w, b: x.inner(w),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([2], [-1])),
    "einsum": lambda x, w, b: torch.einsum("btk,nk->btn", x, w),
    "einsum without a result": lambda x, w, b: torch.einsum("btk,zk", x, w),
    "einsum dots": lambda x, w, b: torch.einsum("...k,nk->...n", x, w),
    "from the left": lambda x, w, b: (w @ x.mT).mT,
    "from the left, viewed": lambda x, w, b: (w @ x.mT).view(2, -1).view(2, 96, 8).mT,
    "from the left, mm": lambda x, w, b: torch.mm(w, x.flatten(0, 1).t()).view(96, 16).t(),
    "from the left, a vector": lambda x, w, b: torch.stack([w @ row for row in x.flatten(0, 1)[:1]]),
    "einsum from the left": lambda x, w, b: torch.einsum("nk,btk->btn", w, x),
    "einsum dots without a result": lambda x, w, b: torch.einsum("...k,zk", x, w),
    "einsum dots on both sides": lambda x, w, b: torch.einsum("...k,...nk->...n", x, w),
    "einsum dots of no dimension": lambda x, w, b: torch.einsum("bt...k,n...k->bt...n", x, w),
    "einsum dots behind": lambda x, w, b: torch.einsum("bk...,nk->b...n", x.mT, w),
    "einsum, the result in another order": lambda x, w, b: torch.einsum("btk,ak", x, w).permute(1, 2, 0),
    "einsum, features in front": lambda x, w, b: torch.einsum("kbt,nk->bnt", x.permute(2, 0, 1), w).mT,
    "images": lambda x, w, b: F.linear(x.unflatten(1, (2, 4)), w, b).flatten(1, 2),
    "images, a bias that is added": lambda x, w, b: (x.unflatten(1, (2, 4)) @ w.t() + b).flatten(1, 2),
    "images from the left": lambda x, w, b: (w @ x.unflatten(1, (2, 4)).mT).mT.flatten(1, 2),
    "volumes": lambda x, w, b: F.linear(x.unflatten(1, (2, 2, 2)), w, b).flatten(1, 3),
    "cast": lambda x, w, b: F.linear(x.bfloat16(), w.to(BF16)).float(),
    "cast and back": lambda x, w, b: F.linear(x, w.double().type_as(x)),
    "copied": lambda x, w, b: F.linear(x, w.t().contiguous().clone().t()),
}
IN_OUT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "@": lambda x, w, b: x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w),
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w),
    "F.linear t()": lambda x, w, b: F.linear(x, w.t(), b),
    "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=[[-1], [0]]),
    "tensordot of one": lambda x, w, b: torch.tensordot(x, w, 1),
    "einsum": lambda x, w, b: torch.einsum("btk,kn->btn", x, w),
    "from the left": lambda x, w, b: torch.matmul(w.t(), x.transpose(1, 2)).transpose(1, 2),
    "einsum from the left": lambda x, w, b: torch.einsum("kn,...k->...n", w, x),
}


@pytest.mark.parametrize("form", OUT_IN)
def test_forms_out_in(form: str) -> None:
    precision = BF16 if form == "cast" else torch.float32
    model = check_model(lambda: Free(OUT_IN[form]), torch.randn(X), include="w", precision=precision)
    assert statuses(model)["w"].startswith("matched (1 use)")
    assert "dense" not in statuses(model)["w"]


@pytest.mark.parametrize("form", IN_OUT)
def test_forms_in_out(form: str) -> None:
    model = check_model(lambda: Free(IN_OUT[form], 32, 96), torch.randn(X), include="w")
    assert statuses(model)["w"].startswith("matched (1 use)")
    assert "dense" not in statuses(model)["w"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_an_adjoint_is_an_exchange_of_real_numbers_alone(dtype: torch.dtype) -> None:
    graph = fx.Graph()
    source = graph.placeholder("w")
    source.meta["example_value"] = torch.zeros(2, 3, dtype=dtype)
    exchange, adjoint = graph.call_function(getattr, (source, "mT")), graph.call_method("adjoint", (source,))
    assert before_swap(exchange) is source
    assert (before_swap(adjoint) is source) == (not dtype.is_complex)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_all_forms_in_one_graph(inner: str) -> None:
    together = [f for n, f in OUT_IN.items() if n not in ("cast", "addmm 2-D")]
    model = check_model(
        lambda: Free(lambda x, w, b: sum(f(x, w, b).reshape(-1, 96) * (i + 1) for i, f in enumerate(together))),  # type: ignore[arg-type,return-value]
        torch.randn(X), include="w", inner=inner,
    )  # fmt: skip
    assert f"matched ({len(together)} uses)" in statuses(model)["w"]
    assert counters["stats"]["unique_graphs"] == 1


# -- near misses -----------------------------------------------------------------------------------------------------


def changed_copy(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    copied = w.clone()
    copied.mul_(2.0)
    return F.linear(x, copied)


NEAR_MISSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "every other row": (lambda x, w, b: F.linear(x, w[::2]), "used by getitem"),
    "scaled": (lambda x, w, b: F.linear(x, w * 0.5), "used by mul"),
    "addmm, weighed": (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=0.5), "used by t"),
    "tensordot over tokens": (lambda x, w, b: torch.tensordot(x.mT, w, ([1], [1])), "used by tensordot"),
    "einsum over rows": (lambda x, w, b: torch.einsum("btk,nk->bn", x, w), "used by einsum"),
    "einsum diagonal": (lambda x, w, b: torch.einsum("btk,nk->btnk", x, w), "used by einsum"),
    "norm": (lambda x, w, b: x * w.square().mean(), "used by square"),
    "tanh": (lambda x, w, b: F.linear(x, torch.tanh(w)), "used by tanh"),
    "rounded": (lambda x, w, b: F.linear(x, w.bfloat16().to(x.dtype)), "rounded by bfloat16"),
    "rounded twice": (lambda x, w, b: x @ w.t().half().bfloat16().to(x.dtype), "rounded by half"),
    "changed copy": (changed_copy, "used by clone"),
}


@pytest.mark.parametrize("form", NEAR_MISSES)
def test_near_misses_stay_dense_and_are_reported(form: str) -> None:
    function, reason = NEAR_MISSES[form]
    model = check_model(lambda: Free(function), torch.randn(X), include="w")
    assert statuses(model)["w"].startswith("not matched: ")
    assert reason in statuses(model)["w"]
    assert next(iter(explain(model))).kernel == "dense"


def test_near_misses_warn_once() -> None:
    model = sparsify(Free(NEAR_MISSES["every other row"][0]), static(), include="w")
    fast = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (2, 3, 4):  # compiled twice: the batch becomes dynamic
            fast(torch.randn(batch, 8, 32))
    (message,) = [str(w.message) for w in caught if w.category is MSTWarning]
    assert "w: used by getitem" in message
