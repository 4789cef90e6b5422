"""Mixtures of experts to draw: the matrices of all experts in one Parameter each, multiplied in all spellings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import moe  # noqa: F401 - it registers what is called below

EXPERTS = 3
GAP = 1e-4  # between a router's choice and the next one, relative: closer ones are a matter of roundings


class Turning(nn.Module):
    """Experts of which a program can let others work."""

    flag = True


class StackedExperts(Turning):
    """``up`` ``[E, hidden, width]`` and ``down`` ``[E, width, hidden]``, or ``io`` their transposes, and a router.

    Attributes:
        routed: whether a token goes where the router says, else by its position: then one expert gets none. What comes
            back is multiplied by the router's share either way.
        gap: how far the router's closest choice was from the next one; of a model that is not compiled.
    """

    def __init__(self, width: int, hidden: int, rule: str, *, routed: bool, padded: bool = False) -> None:
        super().__init__()
        self.rule, self.routed, self.gap = rule, routed, torch.inf
        self.io = rule.endswith(" io")
        self.up, self.down = self._stack(width, hidden, padded), self._stack(hidden // _halves(rule), width, padded)
        self.bias = nn.Parameter(torch.randn(EXPERTS, hidden) / 4)
        self.router = nn.Linear(width, EXPERTS)

    def _stack(self, width: int, out: int, padded: bool) -> nn.Parameter:
        rows, cols = (width, out) if self.io else (out, width)
        wide = torch.randn(EXPERTS, rows, cols + 8 * padded) / width**0.5
        return nn.Parameter(wide[:, :, :cols])

    def across(self, stack: Tensor) -> Tensor:
        """As what tokens are multiplied with from the right: ``[E, in, out]``."""
        return stack if self.io else stack.mT

    def one(self, matrix: Tensor) -> Tensor:
        """``[out, in]``."""
        return matrix.t() if self.io else matrix

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, share = self._sent(flat)
        return (STACK_RULES[self.rule](self, flat, chosen) * share[:, None]).unflatten(0, x.shape[:2])

    def _sent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The expert of each token, and what counts of its answer."""
        shares = self.router(x).softmax(-1)
        if self.routed:
            shares = shares if self.flag else shares.flip(-1)
            if not torch.compiler.is_compiling():
                first, second = shares.detach().topk(2, -1).values.unbind(-1)
                self.gap = min(self.gap, float((first / second).min()) - 1)
            share, chosen = shares.max(-1)
            return chosen, share
        chosen = torch.arange(len(x)) % (EXPERTS - 1) + int(self.flag)
        return chosen, shares.gather(1, chosen[:, None])[:, 0]


def _halves(rule: str) -> int:
    return 2 if rule == "gated" else 1


def _mine(chosen: Tensor) -> Tensor:
    """Whether an expert gets a token: bool ``[E, n, 1]``."""
    return (chosen == torch.arange(EXPERTS)[:, None])[:, :, None]


def _grouped(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    """Tokens sorted by expert, in one product."""
    order = chosen.argsort(stable=True)
    ends = _mine(chosen).sum((1, 2)).cumsum(0).int()
    hidden = F.relu(_product(F.grouped_mm, x[order], m.across(m.up), ends))
    return _product(torch._grouped_mm, hidden, m.across(m.down), ends)[order.argsort()]


def _product(by: Callable[..., Tensor], x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """PyTorch's own, or that of transformers where that takes no such dtype or width, or does not compile."""
    x, size = x.to(stack.dtype), stack.element_size()
    fits = all(length * size % 16 == 0 for length in (*stack.shape[1:], max(stack.stride()[-2:])))
    known = stack.dtype == torch.bfloat16 if torch.compiler.is_compiling() else size < 8
    if fits and known:
        return by(x, stack, offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(x, stack, ends)


def _loop(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    found = []
    for i in range(EXPERTS):
        out = F.linear(F.relu(F.linear(x, m.one(m.up[i]))), m.one(m.down[i]))
        found.append(out * (chosen == i)[:, None])
    return torch.stack(found).sum(0)


def _unbound(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    ups, downs = m.across(m.up), m.across(m.down)
    outs = [F.relu(x @ up) @ down for up, down in zip(ups, downs.unbind(0), strict=True)]
    return (torch.stack(outs) * _mine(chosen)).sum(0)


def _visited(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    """Each expert takes its tokens out, and none if it has none."""
    out = torch.zeros_like(x)
    for i in range(EXPERTS):
        rows = (chosen == i).nonzero()[:, 0]
        if len(rows):
            answer = F.linear(F.relu(F.linear(x[rows], m.one(m.up[i]))), m.one(m.down[i]))
            out = out.index_add(0, rows, answer.to(out.dtype))
    return out


def _batched(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    """Every expert is sent all tokens, zeros in the place of others'."""
    hidden = F.relu(torch.bmm(x * _mine(chosen), m.across(m.up)))
    return torch.bmm(hidden, m.across(m.down)).sum(0)


def _biased(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    hidden = torch.baddbmm(m.bias[:, None], x.expand(EXPERTS, -1, -1), m.across(m.up))
    return (torch.bmm(torch.tanh(hidden), m.across(m.down)) * _mine(chosen)).sum(0)


def _gated(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    gate, value = torch.matmul(x, m.across(m.up)).chunk(2, -1)
    return (torch.matmul(F.silu(gate) * value, m.across(m.down)) * _mine(chosen)).sum(0)


def _einsum(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    up, down = ("nk,ekh->enh", "enh,ehk->enk") if m.io else ("nk,ehk->enh", "enh,ekh->enk")
    return (torch.einsum(down, F.gelu(torch.einsum(up, x, m.up)), m.down) * _mine(chosen)).sum(0)


def _gathered(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    """A batch of products, each with a copy of its token's expert."""
    hidden = F.relu(torch.bmm(x[:, None], m.across(m.up)[chosen]))
    return torch.bmm(hidden, m.across(m.down)[chosen])[:, 0]


def _norm_too(m: StackedExperts, x: Tensor, chosen: Tensor) -> Tensor:
    return _batched(m, x, chosen) * (1 + m.up.square().mean() - m.down[1].abs().mean())


# experts, x [n, width], chosen [n] -> [n, width]; by " io" the rules are called that shall get transposed stacks
STACK_RULES: dict[str, Callable[[StackedExperts, Tensor, Tensor], Tensor]] = {
    "grouped": _grouped,
    "grouped io": _grouped,
    "loop": _loop,
    "unbound io": _unbound,
    "visited": _visited,
    "batched": _batched,
    "batched io": _batched,
    "biased io": _biased,
    "gated": _gated,
    "einsum": _einsum,
    "gathered": _gathered,
    "norm too": _norm_too,
}
_ROUTED = ("grouped", "loop", "visited", "batched io", "gated", "gathered")


def _twice(width: int, hidden: int) -> nn.Module:
    """Under two names."""
    experts = StackedExperts(width, hidden, "batched", routed=False)
    return nn.Sequential(experts, nn.Tanh(), experts)


# (width, hidden) -> a module from [batch, length, width] to the same
STACKS: dict[str, Callable[[int, int], nn.Module]] = {
    f"stacks, {rule}": lambda w, h, rule=rule: StackedExperts(w, h, rule, routed=rule in _ROUTED)  # type: ignore[misc]
    for rule in STACK_RULES
} | {
    "stacks, padded": lambda w, h: StackedExperts(w, h, "batched", routed=False, padded=True),
    "stacks, twice": _twice,
}
BY_VALUE = tuple(f"stacks, {rule}" for rule in _ROUTED)  # experts are chosen by what rounding may change
EAGER = "stacks, visited"  # its shapes depend on values
