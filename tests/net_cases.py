"""Small models to draw: pieces with linear layers in all spellings, and what stands around them in real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from expert_cases import BY_VALUE, EAGER, STACKS, Turning
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

VOCABULARY = 19
HEADS = 2


def _weight(rows: int, cols: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, cols) / cols**0.5)


class Bare(nn.Module):
    """A weight that belongs to no layer, ``[out, in]`` or ``[in, out]``, a bias, and a rule."""

    def __init__(self, width: int, out: int, rule: str) -> None:
        super().__init__()
        self.rule = rule
        self.w = _weight(width, out) if rule.endswith(" io") else _weight(out, width)
        self.b = nn.Parameter(torch.randn(out) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return RULES[self.rule](x, self.w, self.b)


def _halves(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    half = len(w) // 2
    return torch.cat([F.linear(x, w[:half]), F.linear(x, w[half:])], -1) + b


# x [batch, length, in], w, b -> [batch, length, out]
RULES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w, b: x @ w.mT + b,
    "matmul io": lambda x, w, b: torch.matmul(x, w) + b,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()).view(*x.shape[:2], -1) + b,
    "einsum": lambda x, w, b: torch.einsum("...k,nk->...n", x, w) + b,
    "einsum io": lambda x, w, b: torch.einsum("btk,kn->btn", x, w) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()).unflatten(0, x.shape[:2]),
    "addmm io": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w, beta=0.5, alpha=2).unflatten(0, x.shape[:2]),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.t().expand(len(x), -1, -1)),
    "baddbmm io": lambda x, w, b: torch.baddbmm(b, x, w.expand(len(x), -1, -1), beta=0.5, alpha=2),
    "bmm": lambda x, w, b: torch.bmm(x, w.mT.expand(len(x), -1, -1)) + b,
    "weight first": lambda x, w, b: (w @ x.mT).mT + b,
    "tensordot io": lambda x, w, b: torch.tensordot(x, w, dims=1) + b,
    "normalised weight": lambda x, w, b: F.linear(x, F.normalize(w, dim=1), b),
    "halves": _halves,
    "and its norm": lambda x, w, b: F.linear(x, w, b) * w.square().mean(),
    "and its sum": lambda x, w, b: F.linear(x, w, b) + w.sum(1),
    "twice in one": lambda x, w, b: F.linear(x, w, b) - torch.tanh(x.flip(1) @ w.mT),
    "detached too": lambda x, w, b: F.linear(x, w, b) + torch.sigmoid(F.linear(x, w.detach())),
}


class Transposed(nn.Module):
    """A weight whose storage is that of its transpose, and an input that is not contiguous either."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, out)
        self.fc.weight = nn.Parameter((torch.randn(width, out) / width**0.5).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.transpose(0, 1).contiguous().transpose(0, 1))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Recomputed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden, bias=False), Conv1D(hidden, width)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.value(x))


class Adapted(nn.Module):
    """A base with a low-rank adapter beside it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, out)
        self.lora_A, self.lora_B = nn.Linear(width, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


class Attention(nn.Module):
    """By PyTorch's operator or as a chain to and from a softmax, causal or not; projections of its own or in one.

    Attributes:
        seen: of a model that is to show what a pattern comes to, the keys that queries see, bool ``[length, length]``,
            given the length; None for all up to the query.
    """

    seen: Callable[[int], Tensor] | None = None

    def __init__(self, width: int, *, chain: bool, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), Conv1D(width, width)
        self.chain, self.causal = chain, causal

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        seen = None if self.seen is None or not self.causal else self.seen(length)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.chain:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            if self.causal:
                later = torch.ones(length, length, dtype=torch.bool).triu(1) if seen is None else ~seen
                scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, seen, is_causal=self.causal and seen is None)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Experts(Turning):
    """Two layers of which a flag of the program takes one: the other gets no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if self.flag else self.second(x)


class Twice(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


# (width, hidden) -> a module from [batch, length, width] to the same
PIECES: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp": Mlp,
    "conv1d": lambda w, h: nn.Sequential(Conv1D(h, w), nn.ReLU(), Conv1D(w, h)),
    "norms": lambda w, h: nn.Sequential(nn.LayerNorm(w), nn.Linear(w, h), nn.RMSNorm(h), nn.Linear(h, w)),
    "dropout of 0": lambda w, h: nn.Sequential(nn.Linear(w, h), nn.Dropout(0.0), nn.Linear(h, w)),
    "gated": Gated,
    "transposed": lambda w, h: nn.Sequential(Transposed(w, h), nn.Tanh(), Transposed(h, w)),
    "recomputed": Recomputed,
    "adapted": lambda w, h: nn.Sequential(Adapted(w, h), nn.ReLU(), Adapted(h, w)),
    "attention": lambda w, h: Attention(w, chain=False, causal=True),
    "full attention": lambda w, h: Attention(w, chain=False, causal=False),
    "softmax": lambda w, h: Attention(w, chain=True, causal=True),
    "full softmax": lambda w, h: Attention(w, chain=True, causal=False),
    "multihead": lambda w, h: Multihead(w),
    "experts": lambda w, h: Experts(w),
    "twice": lambda w, h: Twice(w),
    **{rule: lambda w, h, rule=rule: Bare(w, w, rule) for rule in RULES},  # type: ignore[misc]
    **STACKS,
}
TURNING = {"experts", *STACKS}  # what a program can let others work in
RANDOM = "dropout"  # not the same numbers in eager and compiled mode


@dataclass(frozen=True)
class Net:
    """A model to build.

    Attributes:
        pieces: names of :data:`PIECES`, ``"dropout"``, or ``"shared"``, one layer for all places that name it.
        tokens: whether the input is of tokens, else of features.
        head: ``"none"``, ``"linear"``, ``"tied"`` to the embedding, or ``"two"``, one behind the first piece.
        every: whether all matrices but embeddings shall become sparse, else what ``sparsify`` takes by default.
        autocast: whether products run in bfloat16, whatever ``dtype`` is.
    """

    pieces: tuple[str, ...]
    width: int = 8
    hidden: int = 16
    tokens: bool = False
    head: str = "none"
    every: bool = True
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    def build(self) -> Model:
        torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds
        return Model(self).to(self.dtype)

    def batch(self, seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Two inputs: tokens or features, and features to add to them."""
        generator = torch.Generator().manual_seed(seed)
        more = torch.randn(batch, length, self.width, generator=generator).to(self.dtype)
        if self.tokens:
            return torch.randint(VOCABULARY, (batch, length), generator=generator), more
        return torch.randn(batch, length, self.width, generator=generator).to(self.dtype), more

    def include(self) -> list[str] | None:
        """What ``sparsify`` is told."""
        if not self.every:
            return None
        model = self.build()
        embeddings = {id(model.embedding.weight)} if self.tokens else set()
        matrices = [n for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in embeddings]
        return [n for n in matrices if not n.endswith("bias")] + (["head.weight"] if self.head == "tied" else [])


class Model(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        if net.tokens:
            self.embedding = nn.Embedding(VOCABULARY, net.width)
        if "shared" in net.pieces:
            self.shared = nn.Linear(net.width, net.width)
        self.pieces = nn.ModuleList(self._piece(name) for name in net.pieces)
        if net.head != "none":
            self.head = nn.Linear(net.width, VOCABULARY, bias=False)
        if net.head == "tied":
            self.head.weight = self.embedding.weight
        if net.head == "two":
            self.early = nn.Linear(net.width, 5)

    def _piece(self, name: str) -> nn.Module:
        if name == "shared":
            return self.shared
        if name == RANDOM:
            width, hidden = self.net.width, self.net.hidden
            return nn.Sequential(nn.Linear(width, hidden), nn.Dropout(0.3), Conv1D(width, hidden))
        return PIECES[name](self.net.width, self.net.hidden)

    def forward(self, x: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        hidden = (self.embedding(x) if self.net.tokens else x) + 0.5 * more
        early: tuple[Tensor, ...] = ()
        for i, piece in enumerate(self.pieces):
            hidden = hidden + piece(hidden)
            if i == 0 and self.net.head == "two":
                early = (self.early(hidden),)
        return (hidden if self.net.head == "none" else self.head(hidden), *early)

    def see(self, seen: Callable[[int], Tensor] | None) -> None:
        """Let causal attention see these keys."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.seen = seen

    def turn(self) -> None:
        """Let experts change places."""
        for module in self.modules():
            if isinstance(module, Turning):
                module.flag = not module.flag


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    """Weighs every number otherwise, and squares, in the outputs' own precision or float32."""
    total: Any = 0.0
    for out in outputs:
        wide = out.double() if out.dtype == torch.float64 else out.float()
        weight = torch.linspace(-1, 1, wide.numel(), dtype=wide.dtype).view(wide.shape)
        total = total + (wide * weight).mean() + 0.5 * wide.square().mean()
    return total


@st.composite
def nets(draw: st.DrawFn, *, random: bool = True, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Net:
    names = [*sorted(PIECES.keys() - (set() if random else {EAGER})), "shared", *([RANDOM] if random else [])]
    pieces = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
    tokens = draw(st.booleans())
    heads = ["none", "linear", "two", *(["tied"] if tokens else [])]
    dtype = draw(st.sampled_from(dtypes))
    bare = {*RULES, "multihead"}
    autocast = dtype == torch.float32 and draw(st.integers(0, 4)) == 4
    if not random and (autocast or dtype == torch.bfloat16):  # another precision would send tokens elsewhere
        pieces = tuple("stacks, batched" if piece in BY_VALUE else piece for piece in pieces)
    return Net(
        pieces,
        draw(st.sampled_from([8, 12, 16, 20])),
        draw(st.sampled_from([16, 24, 36])),
        tokens,
        draw(st.sampled_from(heads)),
        draw(st.booleans()) or all(piece in bare for piece in pieces),
        dtype,
        autocast,
    )
