"""Attention whose values are narrower or wider than its queries, and heads of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_backend import SPARSE, Attention, Backend, assert_same_training, compiled
from attention_models import BATCH, LENGTH, VOCABULARY, Case, right_padding
from attention_parts import COMBINATIONS, combine
from helpers import DEBUG, static
from mst_compile.lowering import device
from oracles import assert_all_as_good_as
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import mst_compile
from mst_compile import Constant
from mst_compile.cost.flops import CompiledFlopCounter, attention_saving
from mst_compile.rules.patterns import FULL, Parts, allowed

F32, BF16 = torch.float32, torch.bfloat16
T = 20
SIZES = [(24, 16), (16, 24), (192, 128), (30, 7)]


def tensors(size: int, value_size: int, dtype: torch.dtype, key_heads: int = 4) -> list[Tensor]:
    shapes = (4, size), (key_heads, size), (key_heads, value_size)
    return [torch.randn(2, heads, T, n).to(dtype).requires_grad_() for heads, n in shapes]


def hinted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, scale=0.3)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril())


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores + torch.full((q.shape[-2], q.shape[-2]), -torch.inf).triu(1)
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def side_by_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads in one dimension, as older models have them, then apart."""
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = scores + torch.full((q.shape[-2], q.shape[-2]), -torch.inf).triu(1)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v.flatten(0, 1)).unflatten(0, v.shape[:2])


FORMS = {f.__name__: f for f in (hinted, scaled, masked, grouped, written_out, side_by_side)}


def results(run: Attention, operands: list[Tensor]) -> dict[str, Tensor]:
    out = run(*operands)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    found = out.detach(), *torch.autograd.grad((out * weights).sum(), operands)
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))


def seeing(parts: Parts, form: Attention) -> Attention:
    """Attention with a dense mask."""
    scale = 0.3 if form is scaled else None
    heads = slice(2 if form is grouped else None)
    mask = allowed(parts, T)
    return lambda q, k, v: sdpa(q, k[:, heads], v[:, heads], attn_mask=mask, scale=scale, enable_gqa=form is grouped)


def check(form: Attention, parts: Parts, sizes: tuple[int, int], dtype: torch.dtype, inner: str = "eager") -> None:
    """Result and gradients are as near to float64 as PyTorch's with the pattern's dense mask."""
    operands, backend = tensors(*sizes, dtype), Backend(parts, inner)
    got = results(compiled(form, backend), operands)
    assert [site.replaced for site in backend.sites] == [True], backend.reasons()
    usual = results(seeing(parts, form), operands)
    wide = [t.detach().double().requires_grad_() for t in operands]
    assert_all_as_good_as(got, usual, results(seeing(parts, form), wide), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form(form: str, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        check(FORMS[form], SPARSE, sizes, dtype)


@pytest.mark.parametrize("what", COMBINATIONS)
def test_every_pattern(what: str) -> None:
    for dtype in (F32, BF16):
        check(hinted, combine(what, 6, 4, gap=1, times=2), (24, 16), dtype)


def test_generated_code() -> None:
    check(masked, SPARSE, (24, 16), F32, "inductor")
    check(written_out, FULL, (18, 33), BF16, "inductor")


def test_lengths_may_vary_and_nothing_is_compiled_again() -> None:
    def packed(x: Tensor) -> Tensor:
        return hinted(*x.split([24, 24, 16], -1))

    backend = Backend(SPARSE)
    run = compiled(packed, backend)
    for length in (T, 9, 33):
        x = torch.randn(2, 4, length, 64)
        torch._dynamo.mark_dynamic(x, 2)
        q, k, v = x.split([24, 24, 16], -1)
        torch.testing.assert_close(run(x), sdpa(q, k, v, attn_mask=allowed(SPARSE, length)))
    assert len(backend.graphs) == len(backend.operators()) == 1


def test_sizes_that_may_vary_stay() -> None:
    def doubled(x: Tensor) -> Tensor:
        return hinted(x, x, torch.cat([x, x], -1))

    backend, x = Backend(SPARSE), torch.randn(2, 4, T, 24)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 3)
    torch.testing.assert_close(torch.compile(doubled, backend=backend)(x), doubled(x))
    assert backend.reasons() == ["the size of its heads may differ from call to call"]


def test_padding_hides_keys() -> None:
    keep = torch.ones(2, T, dtype=torch.long)
    keep[1, -6:] = 0

    def padded(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        return sdpa(q, k, v, attn_mask=mask & keep.bool()[:, None, None, :])

    backend = Backend(SPARSE)
    q, k, v = tensors(24, 16, F32)
    got = compiled(padded, backend)(q, k, v, keep)
    assert len(backend.operators()) == 1
    want = sdpa(q, k, v, attn_mask=allowed(SPARSE, T) & keep.bool()[:, None, None, :])
    seen = keep.bool()[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[seen], want[seen])


REFUSED: dict[str, tuple[Attention, str]] = {
    "dropout": (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1, is_causal=True), "drop out"),
    "not causal": (lambda q, k, v: sdpa(q, k, v), "not causal"),
    "length": (lambda q, k, v: sdpa(q[:, :, 1:], k, v, is_causal=True), "length"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_stays(name: str) -> None:
    function, reason = REFUSED[name]
    backend = Backend(SPARSE)
    compiled(function, backend)(*tensors(24, 16, F32))
    assert not backend.operators()
    assert [reason in said for said in backend.reasons()] == [True]


# -- through the backend -----------------------------------------------------------------------------------------------


class Latent(nn.Module):
    """Attention with heads of 12 for queries and keys, and of 8 for values."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.v, self.out = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (t.unflatten(-1, (4, 12)).transpose(1, 2) for t in self.qk(x).chunk(2, -1))
        y = sdpa(q, k, self.v(x).unflatten(-1, (4, 8)).transpose(1, 2), is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of whether full attention pays; it does where the length is above 16."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")

    def pays(*shape: Any) -> bool:
        found.append(shape)
        return bool(shape[1] > 16)

    replaced: dict[str, Any] = {"attention_pays": pays, "times": lambda layers, _: [{}] * len(layers)}
    monkeypatch.setitem(device._records, "cpu", dataclasses.replace(device.of("cpu"), **replaced))
    return found


@pytest.mark.parametrize("length", [16, 24])
def test_full_attention_runs_where_it_was_measured_to_be_faster(length: int, asked: list[tuple[Any, ...]]) -> None:
    model, x = mst_compile.sparsify(Latent(), static(), block=8), torch.randn(2, length, 32)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="mst", options=DEBUG)
    torch.testing.assert_close(fast(x), model(x))
    assert asked == [(8, length, 12, 8, F32, True)]
    with torch.profiler.profile() as profile:
        fast(x)
    assert any(event.key == "mst::attention" for event in profile.key_averages()) == (length > 16)


def flops(run: Callable[[], Tensor]) -> int:
    with CompiledFlopCounter(display=False) as counter:
        run().sum().backward()
    return counter.get_total_flops()


def test_full_attention_counts_as_pytorchs_does(asked: list[tuple[Any, ...]]) -> None:
    """Queries and keys are multiplied at their size, values at theirs; the gradient computes the scores anew."""
    model, x = mst_compile.sparsify(Latent(), static(0.0), block=8), torch.randn(2, 24, 32)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="mst", options={"mst.inner": "aot_eager"})
    fast(x).sum().backward()
    q = torch.empty(2, 4, 24, 12, requires_grad=True)
    products = flops(lambda: model.out(model.v(x)).add(0)) + 2 * 2 * 48 * 32 * 96  # qk's input wants no gradient
    scores, values = 2 * 8 * 24 * 24 * 12, 2 * 8 * 24 * 24 * 8
    assert flops(lambda: fast(x)) == products + 4 * scores + 3 * values
    assert flops(lambda: sdpa(q, q, q[..., :8], is_causal=True)) == 3 * scores + 3 * values


def test_a_forecast_knows_both_sizes() -> None:
    model = mst_compile.sparsify(Latent(), Constant(0.5, growth="none", attention="local", stride=4))
    torch._dynamo.reset()
    run, x = torch.compile(model, backend="mst", options={"mst.inner": "eager"}), torch.randn(2, T, 32)
    found = mst_compile.forecast(model, tokens=400, tokens_per_step=40, loss=lambda: run(x).square().mean())
    left_out = 1 - int(allowed(Parts(window=4), T).sum()) / (T * (T + 1) / 2)
    assert found.attention_saved == pytest.approx(6 * 2 * 4 * T * T * (12 + 8) * left_out)
    assert found.attention_saved == pytest.approx(attention_saving((2, 4, T, 12), Parts(window=4), 8))
    assert attention_saving((2, 4, T, 12), Parts(4)) == attention_saving((2, 4, T, 12), Parts(4), 12)


# -- models ------------------------------------------------------------------------------------------------------------


def latent_models() -> dict[str, Callable[[str], nn.Module]]:
    """Models of transformers with latent attention, tiny and random: heads of 12 = 8 + 4, values of 6."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": LENGTH, "use_cache": False,
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "pad_token_id": 0,
    }  # fmt: skip
    experts = {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 2,
    }  # fmt: skip
    return {
        "deepseek_v2": lambda how: hf.DeepseekV2ForCausalLM(
            hf.DeepseekV2Config(**common, **experts, head_dim=4, attn_implementation=how)
        ),
        "deepseek_v3": lambda how: hf.DeepseekV3ForCausalLM(
            hf.DeepseekV3Config(**common, **experts, attn_implementation=how)
        ),
        "minicpm3": lambda how: hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**common, attn_implementation=how)),
    }


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_models_with_latent_attention(name: str, how: str, padded: bool) -> None:
    torch.manual_seed(0)
    model = latent_models()[name](how)
    kwargs: dict[str, Any] = {"input_ids": torch.randint(0, VOCABULARY, (BATCH, LENGTH))}
    if padded:
        kwargs["attention_mask"] = right_padding()
    compare = kwargs["attention_mask"].bool() if padded else None
    backend = Backend()
    assert_same_training(Case(name, how, model, (), kwargs, 2, compare=compare), backend)
    assert len(backend.operators()) == 2, backend.reasons()
    for node in backend.operators():
        assert [n.meta["example_value"].shape[-1] for n in node.args[:3]] == [12, 12, 6]  # type: ignore[union-attr]
        assert node.args[5] == pytest.approx(12**-0.5)
