"""Where a run took place: processor and versions."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from mst_compile.kernels.cpu import processor


def processor_name(device: torch.device | None = None) -> str:
    """Name of a GPU, or of the processor as far as the system tells."""
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor.short_name()


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What figures measured here, on ``device``, depend on; plain JSON values."""
    return {
        "processor": processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mst_compile": metadata.version("mst-compile"),
        "python": platform.python_version(),
    }
