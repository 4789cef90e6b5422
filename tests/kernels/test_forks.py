"""Forked processes: products run in them, on as many threads, and nobody's lock is in their way."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from forks import in_child, skip_if_autograd_refuses
from helpers import Blocks, compiled, static
from mst_compile.kernels import cpu as kernels
from mst_compile.kernels.cpu import library
from mst_compile.kernels.cpu.forks import Lock
from mst_compile.lowering import cpu_choice
from torch import nn

import mst_compile
from mst_compile import Constant, sparsify

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.skipif(not kernels.available(), reason=f"CPU kernels: {kernels.why_unavailable()}"),
]


def trained(model: nn.Module, run: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for i in range(steps):
        x = torch.randn(512, 32, generator=torch.Generator().manual_seed(i))  # enough for two threads
        loss = (run(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mode", ["eager", "compiled", "compiled in the child"])
def test_a_forked_child_trains_as_its_parent_does(mode: str) -> None:
    """Both from where they parted; PyTorch's own products too, which share their threads with ours."""
    model = sparsify(Blocks(), Constant(0.7, interval=3))
    run = model if mode == "eager" else compiled(model, "inductor" if mode == "compiled" else "aot_eager")
    if mode != "compiled in the child":
        trained(model, run)
    else:
        torch.randn(512, 512) @ torch.randn(512, 512)
    skip_if_autograd_refuses()
    child = in_child(lambda: (trained(model, run), str(mst_compile.sparsifier(model)), torch.get_num_threads()))
    assert child == str((trained(model, run), str(mst_compile.sparsifier(model)), 2))


def test_a_child_of_a_child() -> None:
    model = sparsify(nn.Linear(64, 64), static())
    x = torch.randn(512, 64)
    assert in_child(lambda: in_child(lambda: model(x).sum().item())) == str(model(x).sum().item())


@pytest.mark.parametrize("lock", [library._lock, cpu_choice._products._lock, cpu_choice._attentions._lock])
def test_a_lock_that_another_thread_holds_is_free_in_the_child(lock: Lock) -> None:
    """As while one thread builds the kernels or measures, and another starts the workers of a DataLoader."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        held.wait()

        def take() -> str:
            with lock:
                return "taken"

        assert in_child(take) == "taken"
    finally:
        done.set()
        thread.join()
    with lock:
        pass


class Numbers(torch.utils.data.Dataset[float]):
    """Data that a model makes, as in distillation or active learning."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> float:
        with torch.no_grad():
            return float(self.model(torch.full((512, 32), float(i))).sum())


def test_workers_of_a_data_loader_call_the_model() -> None:
    model = sparsify(Blocks(), static())
    trained(model, model, 1)
    data = Numbers(model)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert [float(x) for x in loader] == pytest.approx([data[i] for i in range(4)])
