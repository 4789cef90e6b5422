"""Read from machine code what a profiler on the GPU would complain about, and hold it against bounds.

cuobjdump and nvdisasm come in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..device.h100 import REGISTERS_PER_THREAD, SHARED_MEMORY_PER_BLOCK


@dataclass(frozen=True)
class Facts:
    """What the machine code of one kernel says.

    Attributes:
        kernel: The kernel's name.
        registers: Per thread, of 255.
        stack: Bytes of stack per thread. A frame is not yet a spill; see `spills`.
        spills: STL and LDL instructions in the SASS: values that did not fit in registers and go to memory.
        shared: Bytes of shared memory per block, of 232448 (227 KiB).
        wgmma: How often each shape ("m64n128k16") of Hopper's warp-group product is issued.
        mma_v2: Products in Ampere's form, which reach about half of Hopper's rate.
        cp_async: Asynchronous copies to shared memory.
        tma: Copies by the Tensor Memory Accelerator.
        buffers: Shapes of the buffers in shared memory; the first of three or more dimensions is the pipeline's depth.
        atomics: Atomic operations on memory.
        ptx: The PTX text.
        ttgir: Triton's GPU dialect, where the buffers are seen.
        sass: The machine code, disassembled.
    """

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: Mapping[str, int]
    mma_v2: int
    cp_async: int
    tma: int
    buffers: tuple[tuple[int, ...], ...]
    atomics: int
    ptx: str = field(repr=False)
    ttgir: str = field(repr=False)
    sass: str = field(repr=False)

    @cached_property
    def depth(self) -> int:
        """Depth of the shallowest pipelined buffer; 0 without one."""
        return min((shape[0] for shape in self.buffers if len(shape) >= 3), default=0)


def _tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True).stdout


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _buffers(ttgir: str) -> tuple[tuple[int, ...], ...]:
    shapes = re.findall(r"ttg\.local_alloc\s*:\s*\(\) -> !ttg\.memdesc<((?:\d+x)+)[a-z]", ttgir)
    return tuple(tuple(int(n) for n in shape.rstrip("x").split("x")) for shape in shapes)


def facts_of(name: str, compiled: Any) -> Facts:
    """Facts of what `triton.compile` returned."""
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    usage, sass = _disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"{name}: cuobjdump reports no resource usage:\n{usage}")
    return Facts(
        kernel=name,
        registers=int(found[1]),
        stack=int(found[2]),
        # Not cuobjdump's LOCAL figure, which stays 0 for spills that ptxas counts as stack.
        spills=_count(r"\b(?:STL|LDL)\b", sass),
        shared=int(compiled.metadata.shared),
        wgmma=Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+)", ptx)),
        mma_v2=_count(r"\bmma\.sync\.aligned", ptx),
        cp_async=_count(r"cp\.async\.c[ag]\.shared", ptx),
        tma=_count(r"cp\.async\.bulk\.tensor", ptx),
        buffers=_buffers(ttgir),
        atomics=_count(r"\bred\.|\batom\.", ptx),
        ptx=ptx,
        ttgir=ttgir,
        sass=sass,
    )


def check(
    facts: Facts,
    *,
    wgmma: bool,
    stages: int | None = None,
    spills: int = 0,
    registers: int = REGISTERS_PER_THREAD,
    shared: int = SHARED_MEMORY_PER_BLOCK,
    atomics: int | None = None,
) -> None:
    """Hold a kernel's facts against bounds.

    Args:
        facts: From `cross_compile`.
        wgmma: Whether it must use Hopper's products, and those only.
        stages: Least depth of every pipelined buffer; None to ask for none.
        spills: Most spill instructions.
        registers: Most registers per thread.
        shared: Most bytes of shared memory per block.
        atomics: Most atomic operations; None to allow any number.

    Raises:
        AssertionError: A bound is broken; the message names the kernel, each such fact and its bound.
    """
    broken = [
        f"{what} is {value}, at most {most} allowed"
        for what, value, most in (
            ("spills", facts.spills, spills),
            ("registers", facts.registers, registers),
            ("shared", facts.shared, shared),
            ("atomics", facts.atomics, facts.atomics if atomics is None else atomics),
            ("mma_v2", facts.mma_v2, 0 if wgmma else facts.mma_v2),
        )
        if value > most
    ]
    if wgmma and not facts.wgmma:
        broken.append("wgmma is empty, at least one product required")
    if stages is not None and facts.depth < stages:
        broken.append(f"depth is {facts.depth}, at least {stages} required (buffers {facts.buffers})")
    if broken:
        raise AssertionError(f"{facts.kernel}: " + "; ".join(broken))
