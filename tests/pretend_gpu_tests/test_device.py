"""The pretended device: believed in, and forgotten."""

from __future__ import annotations

import torch
from pretend_gpu import pretend_h100


def test_the_pretend_device_is_seen_and_forgotten() -> None:
    from torch._inductor.utils import is_big_gpu
    from torch.utils._triton import has_triton

    before = (torch.cuda.is_available(), torch.version.cuda, has_triton())
    with pretend_h100():
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        assert is_big_gpu(0)
        assert has_triton()
    assert (torch.cuda.is_available(), torch.version.cuda, has_triton()) == before
