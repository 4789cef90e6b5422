"""Measuring on one thread is nobody else's business."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from mst_compile.lowering import cpu_threads
from mst_compile.lowering.cpu_threads import one_thread

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.mark.parametrize("begun", [False, True], ids=["begins meanwhile", "has begun"])
def test_other_threads_keep_theirs(begun: bool) -> None:
    """PyTorch tells a thread how many it may use when it first computes, and never again."""
    begin, look, looked = threading.Event(), threading.Event(), threading.Event()
    found = []

    def work() -> None:
        if begun:
            found.append(torch.get_num_threads())
        begin.set()
        look.wait()
        found.append(torch.get_num_threads())
        looked.set()

    thread = threading.Thread(target=work)
    thread.start()
    begin.wait()
    with one_thread():
        look.set()
        looked.wait()
        assert torch.get_num_threads() == 1
    thread.join()
    assert set(found) == {2}
    assert torch.get_num_threads() == 2


def others_share(dtype: torch.dtype) -> float:
    """What other threads than this one do of a product."""
    a = torch.randn(768, 768).to(dtype)
    a @ a
    time.sleep(0.1)  # threads that have nothing to do go on looking for work for a while
    own, all_of_them = time.thread_time(), time.process_time()
    for _ in range(4):
        a @ a
    own, all_of_them = time.thread_time() - own, time.process_time() - all_of_them
    return 1 - own / all_of_them


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [True, False])
def test_products_run_on_one_thread(dtype: torch.dtype, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every library, also where only PyTorch's own setting is known."""
    if not known:
        monkeypatch.setattr(cpu_threads, "_of_this_thread", lambda: None)
    assert others_share(dtype) > 0.2
    with one_thread():
        assert others_share(dtype) < 0.1
    assert others_share(dtype) > 0.2


def test_this_pytorch_can_be_told_of_one_thread_alone() -> None:
    assert cpu_threads._of_this_thread() is not None
