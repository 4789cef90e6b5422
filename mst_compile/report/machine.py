"""Where a run took place: processor and versions."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def processor_name(device: torch.device | None = None) -> str:
    """Name of a GPU, or of the processor as far as the system tells.

    Family and model tell generations apart where clouds hide the name: "AMD EPYC" is what several of them call
    themselves.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else name


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What figures measured here, on ``device``, depend on; plain JSON values."""
    return {
        "processor": processor_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mst_compile": metadata.version("mst-compile"),
        "python": platform.python_version(),
    }
