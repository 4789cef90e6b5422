"""Attention in all the forms that it is written in, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_backend import (
    SHAPE,
    Attention,
    Backend,
    T,
    assert_close,
    causal_mask,
    check_form,
    compiled,
    tensors,
)
from attention_models import HEADS, cases, first_tensor
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1)


def late_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In-place statements whose results are not used."""
    att = scores(q, k)
    att.div_(8**0.5)
    att.masked_fill_(~causal_mask(), -1e9)
    return F.softmax(att, dim=3) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    att = torch.matmul(q, k.transpose(3, 2))
    att /= 8**0.5
    att += torch.zeros(T, T).masked_fill(~causal_mask(), -torch.inf)
    return torch.matmul(torch.softmax(att, -1), v)


def written_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that is built by writing into it."""
    mask = torch.full((T, T), -torch.inf)
    mask.triu_(1)
    return (scores(q, k) * 0.3 + mask).softmax(-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    mask = torch.zeros(T, T).masked_fill(~causal_mask(), -torch.inf)
    att = torch.baddbmm(mask.expand(6, T, T), q, k.transpose(1, 2), beta=1.0, alpha=0.3)
    return torch.bmm(F.softmax(att, dim=-1), v).unflatten(0, (2, 3))


def half_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    att = torch.where(causal_mask(), scores(q, k) * 0.25, torch.finfo(torch.float32).min)
    return F.dropout(F.softmax(att, dim=-1, dtype=torch.float32).to(q.dtype), 0.5, training=False) @ v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :1].repeat_interleave(3, dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The result is viewed as its layout in memory allows it, which is another than the operator's."""
    att = scores(q, k).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v
    return att.view(2, 3 * T, 8).view(SHAPE)


FORMS: dict[str, Attention] = {
    "sdpa, is_causal": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa, positional": lambda q, k, v: scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "sdpa, keywords": lambda q, k, v: scaled_dot_product_attention(
        value=v, key=k, query=q, attn_mask=causal_mask(), scale=0.2
    ),
    "sdpa, additive": lambda q, k, v: scaled_dot_product_attention(
        q, k, v, torch.zeros(T, T).masked_fill(~causal_mask(), -torch.inf)[None, None]
    ),
    "sdpa, enable_gqa": lambda q, k, v: scaled_dot_product_attention(
        q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True
    ),
    "sdpa, repeated": repeated,
    "sdpa, wider values": lambda q, k, v: scaled_dot_product_attention(q, k, torch.cat([v, v], -1), is_causal=True),
    "masked_fill": lambda q, k, v: (scores(q * 0.3, k).masked_fill(~causal_mask(), -torch.inf)).softmax(-1) @ v,
    "where, flipped": lambda q, k, v: torch.where(~causal_mask(), -torch.inf, scores(q, k) / 2.5).softmax(dim=-1) @ v,
    "half softmax": half_softmax,
    "in place": in_place,
    "statements": late_fill,
    "written mask": written_mask,
    "baddbmm": baddbmm,
    "viewed": viewed,
    "one head": lambda q, k, v: F.softmax(
        (q[:, 0] @ k[:, 0].mT).masked_fill(~causal_mask(), -torch.inf), dim=-1
    ).bmm(v[:, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_are_found_and_rewritten_exactly(name: str) -> None:
    backend = Backend()
    check_form(FORMS[name], backend)
    assert len(backend.operators()) == 1, backend.sites
    assert backend.sites[0].replaced
    left = {"softmax", "scaled_dot_product_attention"} & {
        getattr(n.target, "__name__", n.target) for n in backend.nodes()
    }
    assert not left


@pytest.mark.parametrize("name", ["sdpa, enable_gqa", "sdpa, repeated"])
def test_repeated_keys_are_handed_on_unrepeated(name: str) -> None:
    backend = Backend()
    compiled(FORMS[name], backend)(*tensors())
    (node,) = backend.operators()
    assert [n.meta["example_value"].shape[1] for n in node.args[:3]] == [3, 1, 1]  # type: ignore[union-attr]


def test_llama_hands_its_key_heads_on_unrepeated() -> None:
    for name in ("Llama-sdpa", "Llama-eager"):
        case, backend = cases()[name](), Backend()
        compiled(case.model, backend)(*case.args, **case.kwargs)
        heads = [[n.meta["example_value"].shape[1] for n in node.args[:3]] for node in backend.operators()]  # type: ignore[union-attr]
        assert heads == [[HEADS, 2, 2]] * 2


def test_keys_that_are_repeated_in_another_order_stay_repeated() -> None:
    """Head 0, 1, 0, 1 is not 0, 0, 1, 1."""

    def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.cat([q, q[:, :1]], 1)
        return scaled_dot_product_attention(q, k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1), is_causal=True)

    backend = Backend()
    check_form(tiled, backend)
    assert backend.operators()[0].args[1].meta["example_value"].shape[1] == 4  # type: ignore[union-attr]


def softmax_of(mask: Callable[[], Tensor], dim: int = -1) -> Attention:
    return lambda q, k, v: scores(q, k).masked_fill(~mask(), -torch.inf).softmax(dim) @ v


def with_weights(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = scores(q, k).masked_fill(~causal_mask(), -torch.inf).softmax(-1)
    return weights @ v, weights


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(scores(q, k)).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As ALiBi: causal, and closer keys count more."""
    position = torch.arange(T)
    bias = (position[None] - position[:, None]).masked_fill(~causal_mask(), -100000) * 0.1
    return (scores(q, k) + bias.masked_fill(~causal_mask(), -torch.inf)).softmax(-1) @ v


def soft_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that leaves hidden keys a little weight."""
    return scores(q, k).masked_fill(~causal_mask(), -30.0).softmax(-1) @ v


def reweighted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores(q, k).masked_fill(~causal_mask(), -torch.inf).softmax(-1)
    return (weights * torch.linspace(0, 1, T)) @ v


def across_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    att = scores(q, k).flip(1)
    return att.masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As Bloom: a bias of the distance enters with the product."""
    bias = torch.arange(T).float().expand(6, 1, T)
    att = bias.baddbmm(batch1=q.flatten(0, 1), batch2=k.flatten(0, 1).mT, beta=1.0, alpha=0.3).view(2, 3, T, T)
    return att.masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    att = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(~causal_mask(), -torch.inf)
    return torch.einsum("bhqk,bhkd->bhqd", att.softmax(-1), v)


NEAR_MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "not causal": (lambda q, k, v: scores(q, k).softmax(-1) @ v, "not causal"),
    "sdpa, not causal": (scaled_dot_product_attention, "not causal"),
    "anti-causal": (softmax_of(lambda: causal_mask().mT), "not causal"),
    "window": (softmax_of(lambda: causal_mask().triu(-4)), "fewer keys"),
    "shifted into the future": (softmax_of(lambda: torch.ones(T, T, dtype=torch.bool).tril(1)), "not causal"),
    "shifted into the past": (
        softmax_of(lambda: causal_mask().tril(-1) | (torch.arange(T)[:, None] + torch.arange(T) == 0)),
        "fewer keys",
    ),
    "wrong dimension": (softmax_of(causal_mask, dim=-2), "not over the keys"),
    "weights returned": (with_weights, "used elsewhere"),
    "softcap": (softcapped, "not just scaled"),
    **{
        f"capped at {most}": (
            lambda q, k, v, most=most: (
                scores(q, k).clamp(-most, most).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v
            ),
            "not just scaled",
        )
        for most in (9.0, 50.0, 3e4)
    },
    "capped from above": (
        lambda q, k, v: (
            torch.minimum(scores(q, k), torch.tensor(20.0)).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v
        ),
        "not just scaled",
    ),
    "softly capped far away": (
        lambda q, k, v: (torch.tanh(scores(q, k) / 5e3) * 5e3).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v,
        "not just scaled",
    ),
    "bias": (biased, "not just scaled"),
    "weak mask": (lambda q, k, v: scores(q, k).masked_fill(~causal_mask(), -1e4).softmax(-1) @ v, "not just scaled"),
    "bias in the product": (alibi, "not just scaled"),
    "einsum": (einsum, "einsums"),
    "soft mask": (soft_mask, "not just scaled"),
    "reweighted": (reweighted, "weights"),
    "heads exchanged": (across_heads, "flip"),
    "dropout": (
        lambda q, k, v: F.dropout(scores(q, k).masked_fill(~causal_mask(), -torch.inf).softmax(-1), 0.5) @ v,
        "drop out at a rate of 0.5",
    ),
    "sdpa, dropout": (
        lambda q, k, v: scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True),
        "drop out at a rate of 0.5",
    ),
    "fewer queries": (lambda q, k, v: scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=False), "length"),
    "fewer queries, is_causal": (
        lambda q, k, v: scaled_dot_product_attention(q[:, :, -4:], k, v, is_causal=True),
        "length",
    ),
    "three dimensions": (
        lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True),
        "3 dimensions",
    ),
    "another precision": (
        lambda q, k, v: (
            scores(q.double() * 1.1, k.double()).masked_fill(~causal_mask(), -torch.inf).softmax(-1).float() @ v
        ),
        "float64",
    ),
}


def unrecorded(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def scores_of_swapped(q: Tensor, k: Tensor) -> Tensor:
    return q @ unrecorded(lambda: k.mT)


# What gets no gradient, and whether the attention can be replaced all the same.
UNRECORDED: dict[str, tuple[Attention, bool]] = {
    "keys": (lambda q, k, v: scaled_dot_product_attention(q, unrecorded(k.clone), v, is_causal=True), True),
    "repeated keys": (
        lambda q, k, v: scaled_dot_product_attention(
            q,
            unrecorded(lambda: k[:, :1].repeat_interleave(3, 1)),
            v[:, :1].repeat_interleave(3, 1),
            is_causal=True,
        ),
        True,
    ),
    "swapped keys": (
        lambda q, k, v: scores_of_swapped(q, k * 1.0).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v,
        True,
    ),
    "swapped keys that are an input": (
        lambda q, k, v: scores_of_swapped(q, k).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v,
        True,
    ),
    "keys in another precision": (
        lambda q, k, v: (
            scores(q.double(), unrecorded(k.double)).masked_fill(~causal_mask(), -torch.inf).softmax(-1).float() @ v
        ),
        False,  # its scores stay in float64
    ),
    "scores": (
        lambda q, k, v: unrecorded(lambda: scores(q, k)).masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v,
        False,
    ),
    "weights": (
        lambda q, k, v: unrecorded(lambda: scores(q, k).masked_fill(~causal_mask(), -torch.inf).softmax(-1)) @ v,
        False,
    ),
    "all of it": (
        lambda q, k, v: unrecorded(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)) + v,
        True,
    ),
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_no_gradient_passes_what_was_not_recorded(name: str) -> None:
    function, replaced = UNRECORDED[name]

    def gradients(run: Attention) -> list[Tensor]:
        """0 where there is none."""
        out = run(*args)
        found = torch.autograd.grad(out.square().sum(), args, allow_unused=True)
        return [out.detach(), *(torch.zeros_like(a) if g is None else g for a, g in zip(args, found, strict=True))]

    args, backend = tensors(), Backend()
    for got, want in zip(gradients(compiled(function, backend)), gradients(function), strict=True):
        assert_close(got, want, terms=256)
    assert [site.replaced for site in backend.sites] == [replaced]


SCALES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "root of the length": (lambda q, k, v: masked_scores(q, k, q.shape[2] ** -0.5).softmax(-1) @ v, False),
    "length": (lambda q, k, v: masked_scores(q, k, q.shape[2]).softmax(-1) @ v, False),
    "number given": (lambda q, k, v, scale: masked_scores(q, k, scale).softmax(-1) @ v, False),
    "root of the length, in the product": (lambda q, k, v: product_with_mask(q, k, v, q.shape[2] ** -0.5), False),
    "root of the length, to PyTorch's function": (lambda q, k, v: of_pytorch(q, q.shape[2] ** -0.5), False),
    "root of the head size, to PyTorch's function": (lambda q, k, v: of_pytorch(q, q.shape[3] ** -0.5), True),
    "root of the head size": (lambda q, k, v: masked_scores(q, k, q.shape[3] ** -0.5).softmax(-1) @ v, True),
}


def causal_at(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


GUARDED = ("number given", "root of the length, to PyTorch's function")  # by Dynamo, as long as it is at work


def of_pytorch(x: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=scale)


def masked_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return (scores(q, k) * scale).masked_fill(~causal_at(q.shape[2]), -torch.inf)


def product_with_mask(q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    mask = torch.where(causal_at(q.shape[2]), 0.0, -torch.inf).expand(q.shape[0] * 3, -1, -1)
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.baddbmm(mask, q, k.mT, alpha=alpha).softmax(-1).bmm(v).unflatten(0, (-1, 3))


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_that_differs_from_call_to_call(name: str) -> None:
    """What it is at one call is no constant of a graph that serves all lengths, and all numbers."""
    function, replaced = SCALES[name]
    backend = Backend()
    run = compiled(function, backend)
    for length, scale in (T, 0.7), (T + 3, 1.9), (T - 5, 0.2):
        args = [torch.randn(2, 3, length, 8) for _ in range(3)]
        for t in args:
            torch._dynamo.mark_dynamic(t, 2)
        given = (scale,) if name == "number given" else ()
        assert_close(run(*args, *given), function(*args, *given))
    if name not in GUARDED:
        assert len(backend.graphs) == 1
        assert backend.sites[0].replaced is replaced


def test_queries_that_were_rounded_on_their_way_stay_so() -> None:
    """Scores in float32 of float16 operands are the operator's own habit, those of operands without their last bits
    are not."""

    def upcast(between: torch.dtype) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            att = scores(q.to(between).float(), k.to(between).float()).masked_fill(~causal_mask(), -torch.inf)
            return att.softmax(-1).to(v.dtype) @ v

        return attention

    halves = [t.detach().half() for t in tensors()]
    for between, replaced in (torch.float32, True), (torch.bfloat16, False):
        backend = Backend()
        got = compiled(upcast(between), backend)(*halves)
        torch.testing.assert_close(got, upcast(between)(*halves), rtol=0, atol=2**-9)
        assert [site.replaced for site in backend.sites] == [replaced]
    assert "scores are torch.float32" in backend.reasons()[0]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_untouched(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    backend = Backend()
    args = tensors()
    torch.manual_seed(1)
    want = function(*args)
    torch.manual_seed(1)
    got = compiled(function, backend)(*args)
    assert not backend.operators()
    assert len(backend.sites) == 1
    assert reason in backend.sites[0].reason
    assert backend.sites[0].causal is False
    assert torch.equal(first_tensor(got), first_tensor(want))


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (q.mean(2) @ k.mean(2).mT).softmax(-1),  # a router: nothing is summed with its weights
        lambda q, k, v: q.softmax(-1) * k + v,
    ],
)
def test_a_softmax_that_is_no_attention_is_not_reported(function: Attention) -> None:
    backend = Backend()
    compiled(function, backend)(*tensors())
    assert backend.sites == []


def test_a_mask_that_is_written_to_after_it_was_made_counts_as_it_is_read() -> None:
    """The same mask is causal for the first attention and not for the second."""

    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(T, T, dtype=torch.bool)
        mask.tril_()
        first = scaled_dot_product_attention(q, k, v, mask)
        mask[:, :3] = False
        mask.fill_diagonal_(True)
        return scaled_dot_product_attention(first, k, v, mask)

    backend = Backend()
    check_form(twice, backend)
    assert [site.replaced for site in backend.sites] == [True, False]
    full = Backend(None)
    check_form(twice, full)
    flags = [
        n.kwargs.get("is_causal", False) for n in full.nodes() if n.target is torch._C._nn.scaled_dot_product_attention
    ]
    assert flags == [True, False]
