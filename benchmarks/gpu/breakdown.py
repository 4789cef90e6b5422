"""What a training step's time on the GPU goes to, by kind of kernel."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

OTHER = "other"
# Names of kernels, the first that matches: ours and Inductor's templates begin with triton_tem, what Inductor fuses
# with triton_, PyTorch's optimizers run over many tensors, cuBLAS and cuDNN name theirs by what they do.
_KINDS = {
    "templates": r"^triton_tem",
    "generated": r"^triton_",
    "attention": r"flash|fmha|sdpa|attention",
    "dense products": r"gemm|nvjet|cutlass|cublas|gemv|splitk",
    "optimizer and clipping": r"multi_tensor|adam|foreach|lpnorm|norm_",
    "copies and fills": r"memcpy|memset|copy|fill",
}


def kind(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((name for name, pattern in _KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def seconds_by_kind(step: Callable[[], object]) -> dict[str, float]:
    """Seconds that the GPU spends in each kind of kernel during one step, the most first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    total: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        # What an annotation ("Optimizer.step") spans on the GPU is no kernel.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation and event.self_device_time_total:
            total[kind(event.key)] += event.self_device_time_total * 1e-6
    return dict(sorted(total.items(), key=lambda item: -item[1]))
