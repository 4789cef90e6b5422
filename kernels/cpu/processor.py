"""What processor this is."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path

import torch

_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "cache size", "flags", "Features", "CPU part")


@functools.cache
def _facts() -> dict[str, str]:
    """The lines of ``/proc/cpuinfo`` about the first processor; empty where there is no such file."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if not name.strip():
                break
            facts[name.strip()] = value.strip()
    return facts


@functools.cache
def features() -> frozenset[str]:
    """What this CPU has, spelled as in ``/proc/cpuinfo`` without underscores."""
    has = set(_facts().get("flags", "").split())
    if not has:
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        has = {"fma" if name == "fma3" else name for name, value in capabilities.items() if value is True}
    return frozenset(feature.replace("_", "") for feature in has)


def processor_name() -> str:
    """All that tells processors of different speeds apart, as far as the system says it."""
    facts = _facts()
    told = [f"{name}: {facts[name]}" for name in _FIELDS if name in facts]
    return "\n".join(told or [platform.machine(), platform.processor()])


def short_name() -> str:
    """What people call this processor, with family and model, which tell generations apart where clouds hide the name:
    "AMD EPYC" is what several of them call themselves."""
    facts = _facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name}, family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else name
