"""Whole models on the card: compiled equals eager through a schedule, in every mode, with what training brings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, loss_and_grads, oracle, static
from mask_cases import element_masks
from oracles import assert_all_as_good_as, of_rounding
from torch import Tensor, nn
from training import assert_zero_outside

from mst_compile import MixedSparsity, sparsifier, sparsify
from mst_compile.communication import reduce_active_blocks

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
STEPS, T, WIDTH, VOCAB = 12, 64, 128, 160


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Two blocks, the head tied to the embedding; returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(T, WIDTH)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def schedule(attention: str | None = None) -> MixedSparsity:
    return MixedSparsity.published(
        STEPS, 0.8, warmup=3, restoration=3, settle=1, interval=2, ramp_interval=1,
        **({} if attention is None else {"attention": attention, "stride": 16, "attention_window": (2, 10)}),
    )  # fmt: skip


def gpt(device: torch.device, attention: str | None = None, block: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(GPT(), schedule(attention), block=block).to(device)


def tokens(step: int, device: torch.device) -> Tensor:
    return torch.randint(VOCAB, (4, T), generator=torch.Generator().manual_seed(step)).to(device)


def loss_of(run: Any, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(run(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.rank(1)
@pytest.mark.parametrize(("dtype", "block"), [(F32, 32), (BF16, 32), (BF16, 64), (BF16, 128)])
def test_one_step_against_float64(dtype: torch.dtype, block: int, device: torch.device) -> None:
    """Output and every gradient of an MLP with residuals, as near to the truth as eager mode."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Blocks(256, 2, 512).to(device)

    model = sparsify(build(), static(0.7), block=block)
    args = (torch.randn(96, 256, device=device),)
    truth = oracle(model, build, args)
    with torch.autocast(device.type, dtype=BF16, enabled=dtype == BF16):
        eager = loss_and_grads(model, model, args)
        got = loss_and_grads(model, compiled(model, "inductor"), args)
    assert_all_as_good_as(got, eager, truth, dtype)
    for name, mask in element_masks(model).items():
        assert not got[f"grad {name}"][~mask].any(), name


def _as_eager(model: nn.Module, run: Any, ids: Tensor, autocast: Any, eager_run: Any = None) -> Tensor:
    """The compiled loss, its gradients in place; loss and gradients are held against eager mode's, or another's."""
    with autocast:
        want = loss_of(model if eager_run is None else eager_run, ids)
    want.backward()
    eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with autocast:
        loss = loss_of(run, ids)
    loss.backward()
    rounding, loss, want = of_rounding(BF16), loss.detach(), want.detach()
    assert abs(float(loss) - float(want)) <= 8 * rounding * float(want)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == eager.keys()
    for name, right in eager.items():
        # Two runs in bfloat16 differ by roundings that pass through all layers; a wrong block would be off by its size.
        error = float((got[name] - right).norm() / right.norm().clamp_min(1e-12))
        assert error <= 16 * rounding, f"{name}: {error:.2e}"
    return loss


@pytest.mark.parametrize("attention", [None, "sparse", "fixed", "local"])
@pytest.mark.parametrize(
    "optimizer",
    [pytest.param("fused", marks=pytest.mark.rank(3)), pytest.param("capturable", marks=pytest.mark.rank(7))],
)
def test_a_schedule(attention: str | None, optimizer: str, device: torch.device) -> None:
    """Warm-up, plateau with its events, restoration: eager and compiled agree at every call, zeros stay zeros, and
    nothing is compiled again."""
    model = gpt(device, attention)
    run = compiled(model, "inductor")
    # In eager mode attention stays full, so that compiled references serve where it is sparse.
    reference = None if attention is None else compiled(model, "aot_eager")
    adam = torch.optim.AdamW(model.parameters(), 1e-3, **{optimizer: True}) if device.type == "cuda" else (
        torch.optim.AdamW(model.parameters(), 1e-3)
    )  # fmt: skip
    counters, graphs, losses = torch._dynamo.utils.counters["stats"], 0, []
    for step in range(STEPS + 2):
        autocast = torch.autocast(device.type, dtype=BF16)
        losses.append(float(_as_eager(model, run, tokens(0, device), autocast, reference)))
        graphs = graphs or counters["unique_graphs"]
        assert counters["unique_graphs"] == graphs, step
        adam.step()
        assert_zero_outside(model, adam, gradients=False)
        adam.zero_grad()
    assert sparsifier(model).density == 1.0
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("reduce-overhead", marks=pytest.mark.rank(5)),
        pytest.param("max-autotune", marks=pytest.mark.rank(6)),
    ],
)
def test_modes(mode: str, device: torch.device) -> None:
    """CUDA graphs read the topology of the moment; a topology event is seen by the next replay."""
    model = gpt(device)
    run = torch.compile(model, backend="mst", mode=mode)
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        _as_eager(model, run, tokens(step, device), torch.autocast(device.type, dtype=BF16))
        adam.step()
        assert_zero_outside(model, adam, gradients=False)
        adam.zero_grad()


@pytest.mark.rank(8)
def test_gradients_scaled_for_float16(device: torch.device) -> None:
    """A step that GradScaler skips does not count; zeros stay zeros."""
    if device.type != "cuda":
        pytest.skip("float16 autocast is for a GPU")
    model = gpt(device)
    run, adam = compiled(model, "inductor"), torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(init_scale=2.0**30, growth_interval=4)
    for step in range(30):
        with torch.autocast("cuda", dtype=F16):
            loss = loss_of(run, tokens(step, device))
        scaler.scale(loss).backward()
        before, scale = sparsifier(model).step_count, scaler.get_scale()
        scaler.step(adam)
        scaler.update()
        skipped = scaler.get_scale() < scale
        assert sparsifier(model).step_count == before + (not skipped)
        assert_zero_outside(model, adam, gradients=False) if not skipped else None
        adam.zero_grad()
    assert sparsifier(model).step_count >= STEPS


def test_a_checkpoint_goes_on(device: torch.device, tmp_path: Any) -> None:
    """Saved on the card and loaded there, a run takes the same topology and the same weights."""

    def run(model: nn.Module, adam: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            loss_of(model, tokens(step, device)).backward()
            adam.step()
            adam.zero_grad()

    model = gpt(device)
    adam = torch.optim.AdamW(model.parameters(), 1e-3)
    run(model, adam, range(5))
    own = sparsifier(model)
    torch.save([model.state_dict(), adam.state_dict(), own.state_dict()], tmp_path / "run.pt")
    other = gpt(device)
    again = torch.optim.AdamW(other.parameters(), 1e-3)
    for target, state in zip((other, again, sparsifier(other)), torch.load(tmp_path / "run.pt"), strict=True):
        target.load_state_dict(state)
    for name, mask in own.masks.items():
        assert torch.equal(mask, sparsifier(other).masks[name]), name
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    run(other, again, range(5, STEPS))
    assert_zero_outside(other, again, gradients=False)
    assert sparsifier(other).density == 1.0


@pytest.mark.rank(4)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_group_of_one(how: str, device: torch.device, tmp_path: Any) -> None:
    """DistributedDataParallel with the sparse communication hook, and FSDP2."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model: Any = GPT().to(device)
        if how == "ddp":
            sparsify(model, schedule(), block=32)
            wrapped: Any = nn.parallel.DistributedDataParallel(model)
            reduce_active_blocks(wrapped)
        else:
            for part in model.blocks:
                fully_shard(part)
            wrapped = sparsify(fully_shard(model), schedule(), block=32)
        run = torch.compile(wrapped, backend="mst")
        adam = torch.optim.AdamW(model.parameters(), 1e-3)
        losses = []
        for _ in range(STEPS):
            losses.append(loss := loss_of(run, tokens(0, device)))
            loss.backward()
            adam.step()
            adam.zero_grad()
        assert sparsifier(model).density == 1.0
        assert losses[-1] < losses[0]
    finally:
        dist.destroy_process_group()
