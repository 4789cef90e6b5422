"""The backend on layers, models and loops of many kinds: all equal the eager model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEBUG, check_model, compiled, loss_and_grads, static, statuses
from oracles import assert_reordered
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from mst_compile import MSTWarning, densify, sparsifier, sparsify

BF16 = torch.bfloat16
X = (2, 8, 32)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (5, 32), X, (2, 1, 3, 32)])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(32, 67), lambda: Conv1D(67, 32), lambda: nn.Linear(32, 64, False)])
def test_layers(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = check_model(layer, torch.randn(shape))
    assert "matched" in statuses(model)["weight"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.fc = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        return self.head(self.fc(self.fc(x)))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_tied_head_and_a_layer_used_twice(inner: str) -> None:
    model = check_model(Tied, torch.randint(0, 50, (2, 7)), inner=inner)
    assert "matched (1 use); dense: used by embedding" in statuses(model)["wte.weight"]
    assert statuses(model)["fc.weight"].startswith("matched (2 uses)")


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_autocast_outside_and_inside(inner: str) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=BF16):
                x = F.gelu(self.a(x))
            return self.b(x.to(self.b.weight.dtype))

    def autocast() -> Any:
        return torch.autocast("cpu", dtype=BF16)

    check_model(lambda: nn.Linear(32, 64), torch.randn(X), precision=BF16, context=autocast, inner=inner)
    torch._dynamo.reset()
    model = check_model(Inside, torch.randn(X), precision=BF16, inner=inner)
    assert all("matched" in s for s in statuses(model).values())


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_models_of_other_dtypes(dtype: torch.dtype, inner: str) -> None:
    model = check_model(
        lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(dtype),
        torch.randn(X).to(dtype), precision=dtype, inner=inner,
    )  # fmt: skip
    expected = "matched" if dtype == BF16 else f"not matched: no CPU kernel for block 4, input {dtype}"
    assert all(s.startswith(expected) for s in statuses(model).values())


def test_functional_call() -> None:
    def call(model: nn.Module) -> Callable[..., Any]:
        parameters = dict(model.named_parameters())
        return lambda x: functional_call(model, parameters, (x,))

    model = check_model(lambda: nn.Linear(32, 64), torch.randn(X), call=call)
    assert "matched" in statuses(model)["weight"]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_activation_checkpointing(inner: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda y: self.b(F.gelu(self.a(y))), self.c(x), use_reentrant=False)  # type: ignore[assignment]
            return self.c(x)

    model = check_model(Checkpointed, torch.randn(X), inner=inner)
    assert {n: s.split(")")[0] for n, s in statuses(model).items()} == {
        "a.weight": "matched (1 use", "b.weight": "matched (1 use", "c.weight": "matched (2 uses",
    }  # fmt: skip


def test_graph_breaks() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            torch._dynamo.graph_break()
            return self.b(x)

    model = check_model(Broken, torch.randn(X))
    assert counters["stats"]["unique_graphs"] == 2
    assert all("matched" in s for s in statuses(model).values())


def test_uses_are_those_of_the_model_however_often_it_is_compiled() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(self.a(x)))
            torch._dynamo.graph_break()
            for _ in range(2):
                x = self.a(x)
            return x

    model = sparsify(Twice(), static())
    fast = compiled(model)
    for size in (2, 3, 4):
        fast(torch.randn(size, 8, 32)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 4, "the batch becomes dynamic in both graphs"
    torch._dynamo.reset()
    compiled(model.eval())(torch.randn(5, 8, 32))
    shown = statuses(model)
    assert shown["a.weight"].startswith("matched (4 uses)")
    assert shown["b.weight"].startswith("matched (1 use)")


class Region(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.fc(x))


def test_regional_compilation_shares_a_graph() -> None:
    model = sparsify(nn.Sequential(*(Region() for _ in range(4))), static(), exclude="3.*")
    x = torch.randn(X)
    expected = loss_and_grads(model, model, (x,))
    for region in model:
        region.compile(backend="mst", options=DEBUG)
    torch.testing.assert_close(loss_and_grads(model, model, (x,)), expected)
    assert counters["stats"]["unique_graphs"] <= 2
    shown = statuses(model)
    assert all("matched" in shown[f"{i}.fc.weight"] for i in range(3))
    assert shown["3.fc.weight"].startswith("skipped")


def test_layers_on_other_grids_may_share_a_graph() -> None:
    """A graph compiled for one block size must not read the index of another."""
    models = [sparsify(Region(64), static(0.5), block=block) for block in (4, 8, 16, 1, 4)]
    x = torch.randn(2, 8, 64)
    expected = [loss_and_grads(model, model, (x,)) for model in models]
    for model in models:
        model.compile(backend="mst", options=DEBUG)
    for _ in range(2):
        for model, right in zip(models, expected, strict=True):
            torch.testing.assert_close(loss_and_grads(model, model, (x,)), right)
    assert [sparsifier(m).weights["fc.weight"].grid.block for m in models] == [4, 8, 16, 1, 4]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dynamic_shapes(inner: str) -> None:
    """The batch becomes symbolic; later the model becomes dense under the same graph."""
    model = sparsify(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), static())
    fast = compiled(model, inner)
    for i, size in enumerate([(2, 8), (3, 8), (4, 8), (4, 9), (5, 11), (7, 13), (1, 1)]):
        x = torch.randn(*size, 32)
        torch.testing.assert_close(fast(x), model(x))
        fast(x).square().sum().backward()
        actual = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
        model.zero_grad()
        model(x).square().sum().backward()
        for g, p in zip(actual, model.parameters(), strict=True):
            assert_reordered(g, p.grad, 16)
        model.zero_grad()
        if i == 4:
            densify(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_inference(mode: Callable[[], contextlib.AbstractContextManager[None]], inner: str) -> None:
    model = sparsify(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), static()).eval()
    fast = compiled(model, inner)
    with mode():
        x = torch.randn(X)
        torch.testing.assert_close(fast(x), model(x))
        assert not fast(x).requires_grad
    torch.testing.assert_close(fast(torch.ones(X)), model(torch.ones(X)))


def test_frozen_weights() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        model[0].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False)
        return model

    model = sparsify(build(), static(), include="*")
    assert len(sparsifier(model).weights) == 2
    x = torch.randn(X)
    compiled(model)(x).sum().backward()
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(actual) == {"0.bias", "2.weight"}
    model.zero_grad()
    model(x).sum().backward()
    for name, grad in actual.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_double_backward_is_right_or_an_error(inner: str) -> None:
    model = sparsify(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), static())
    x = torch.randn(X, requires_grad=True)

    def penalty(run: Callable[..., Any]) -> list[Any]:
        model.zero_grad()
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]

    if inner == "aot_eager":
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            penalty(compiled(model, inner))
        return
    for got, expected in zip(penalty(compiled(model, inner)), penalty(model), strict=True):
        assert_reordered(got, expected, 512)


@pytest.mark.filterwarnings("ignore:sparse weights of this graph")
def test_transforms_within_a_graph_leave_it_dense() -> None:
    model = sparsify(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0), nn.Linear(32, 32)), static())
    x = torch.randn(3, *X)
    forms = [lambda x: torch.func.vmap(model)(x), lambda x: torch.func.grad(lambda x: model(x).square().sum())(x[0])]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for form in forms:
            assert_reordered(compiled(form)(x).detach(), form(x).detach(), 512)
    assert statuses(model)["1.weight"].startswith("not matched")


def test_multihead_attention_is_written_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    model = check_model(Attention, torch.randn(X))
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "fc.weight"):
        assert statuses(model)[name].startswith("matched (1 use)")


def test_multihead_attention_that_returns_its_weights_stays_dense() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x)

    model = sparsify(Attention(), static(), block=8)
    with pytest.warns(MSTWarning, match="multi_head_attention_forward"):
        compiled(model)(torch.randn(X))
    assert "not matched: used by multi_head_attention_forward" in statuses(model)["attention.out_proj.weight"]


@pytest.mark.parametrize("block", [1, 2])
def test_the_finest_blocks_have_kernels(block: int) -> None:
    model = check_model(lambda: nn.Linear(32, 64), torch.randn(X), block=block)
    assert statuses(model)["weight"] == "matched (1 use)"


def test_not_seen_yet() -> None:
    model = sparsify(nn.Linear(32, 64), static())
    assert "not seen" in statuses(model)["weight"]
    assert sparsifier(model).density < 0.4
