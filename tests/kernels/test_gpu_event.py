"""Topology events read and written by the GPU's kernels, in Triton's interpreter: the same decisions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from mst_compile.kernels.triton import averages, measure, tables, zero
from mst_compile.lowering import cuda
from oracles import assert_within, of_sum
from torch import Tensor, nn
from triton.runtime.interpreter import InterpretedFunction

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.blocks import bulk, index


@contextlib.contextmanager
def kernels_of_a_gpu() -> Iterator[list[str]]:
    """The CPU's tensors are taken as a GPU's are; yields what was launched."""
    launched: list[str] = []

    def interpreted(function: Callable[..., object], name: str) -> object:
        inner = InterpretedFunction(function)

        class Counting:
            def __getitem__(self, grid: object) -> Callable[..., None]:
                launched.append(name)
                return inner[grid]

        return Counting()

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((zero, "zero_inactive"), (measure, "measure_blocks"), (averages, "begin_averages")):
            patch.setattr(module, name, interpreted(getattr(module, name).fn, name))
        patch.setattr(tables, "upload", lambda tensor, device: tensor)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        passes = cuda._Bulk()
        passes._works = True
        patch.setitem(bulk._kernels, "cpu", passes)
        patch.setattr(bulk, "_waits", lambda tensor: True)
        patch.setattr(index, "_goes_far", lambda to, mask: True)
        yield launched


def trained(steps: int, constant: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Masks and second moments after an event every third step; with ``constant`` weights all blocks of a weight are as
    large as any other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 330), nn.GELU(), nn.Linear(330, 256))
    if constant:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
    sparsify(model, Constant(0.5, interval=3, growth="gradient"), block=32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(steps):
        x = torch.ones(64, 256) if constant else torch.randn(64, 256)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    own = sparsifier(model)
    moments = [optimizer.state[p]["exp_avg_sq"] for p in model.parameters() if p.dim() == 2]
    return {name: mask.clone() for name, mask in own.masks.items()}, moments


def test_events_decide_alike() -> None:
    usual, moments = trained(8)
    with kernels_of_a_gpu() as launched:
        found, other = trained(8)
    assert {"zero_inactive", "measure_blocks", "begin_averages"} <= set(launched)
    # Two events: scores, values outside and magnitudes of all weights each. And values are looked at at the beginning.
    assert launched.count("measure_blocks") >= 6
    assert launched.count("begin_averages") == 2
    for name, mask in usual.items():
        assert torch.equal(found[name], mask), name
    for one, right in zip(other, moments, strict=True):
        assert_within(one, right.double(), 8 * of_sum(32 * 32) * right.double())


def test_ties_are_decided_alike_each_time() -> None:
    with kernels_of_a_gpu():
        first, _ = trained(3, constant=True)
        second, _ = trained(3, constant=True)
    usual, _ = trained(3, constant=True)
    for name, mask in first.items():
        assert torch.equal(second[name], mask)
        assert torch.equal(usual[name], mask)
