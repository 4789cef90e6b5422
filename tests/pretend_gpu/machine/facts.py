"""Read from machine code what a profiler on the GPU would complain about, and hold it against bounds.

cuobjdump and nvdisasm come in Triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..device.h100 import REGISTERS_PER_THREAD, SHARED_MEMORY_PER_BLOCK

LOADED = "an address from memory"  # in place of an argument


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
        reads: By argument (`LOADED`: an address that comes from memory), how many loads and asynchronous copies from
            there are of each number of bytes (of one thread).
        writes: By argument, the same of stores.
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
    reads: Mapping[str, Mapping[int, int]]
    writes: Mapping[str, Mapping[int, int]]
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


_ADDRESS = r"\[ *(%rd\d+)[^]]*\]"
_LOAD = re.compile(r"\bld\.global([\w.:]*)[^;\[]*" + _ADDRESS)
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\s*\[[^]]*\], " + _ADDRESS + r", (\w+)")
_STORE = re.compile(r"\bst\.global([\w.:]*)\s*" + _ADDRESS)
_PARAMETER = re.compile(r"\bld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ARITHMETIC = re.compile(r"^\s*(?:@!?%p\d+ )?(?!ld)[a-z][\w.:]*\s+(%rd\d+), ([^;]*);", re.MULTILINE)


def _bytes(suffix: str) -> int:
    """Bytes of an access by what follows its name, such as ".L1::evict_last.v4.b32"."""
    bits, lanes = re.search(r"\.[bsuf](\d+)$", suffix), re.search(r"\.v(\d)", suffix)
    if bits is None:
        raise ValueError(f"no size in {suffix!r}")
    return int(bits[1]) // 8 * (int(lanes[1]) if lanes else 1)


def _accesses(ptx: str, arguments: Mapping[str, str]) -> tuple[dict[str, Counter[int]], dict[str, Counter[int]]]:
    """Reads and writes of each number of bytes, by the pointer that the address comes from.

    It is followed through 64-bit registers alone: what is added to it was computed in 32 bits, or loaded.
    """
    # Triton appends pointers to memory of its own, where descriptors lie.
    types = [*arguments.items(), *((name, "*i8") for name in ("global scratch", "profile scratch"))]
    parameters = ((register, *types[int(number)]) for register, number in _PARAMETER.findall(ptx))
    named = {register: name for register, name, of in parameters if of.startswith("*")}
    sources: dict[str, set[str]] = defaultdict(set)
    for target, operands in _ARITHMETIC.findall(ptx):
        sources[target] |= set(re.findall(r"%rd\d+", operands))

    def pointer(register: str) -> str:
        seen: set[str] = set()
        ahead = {register}
        while ahead:
            seen |= ahead
            ahead = {source for r in ahead for source in sources[r]} - seen
        (name,) = {named[r] for r in seen if r in named} or {LOADED}
        return name

    reads: dict[str, Counter[int]] = defaultdict(Counter)
    writes: dict[str, Counter[int]] = defaultdict(Counter)
    for suffix, register in _LOAD.findall(ptx):
        reads[pointer(register)][_bytes(suffix)] += 1
    for register, size in _COPY.findall(ptx):
        reads[pointer(register)][int(size, 0)] += 1
    for suffix, register in _STORE.findall(ptx):
        writes[pointer(register)][_bytes(suffix)] += 1
    return dict(reads), dict(writes)


def facts_of(name: str, compiled: Any, arguments: Mapping[str, str]) -> Facts:
    """Facts of what `triton.compile` returned. `arguments` are those of run time, in order, with their types."""
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    usage, sass = _disassemble(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"{name}: cuobjdump reports no resource usage:\n{usage}")
    reads, writes = _accesses(ptx, arguments)
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
        reads=reads,
        writes=writes,
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
    reads: Mapping[str, int] = {},
    writes: Mapping[str, int] = {},
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
        reads: By argument, of how many bytes each of its reads must be; it must be read.
        writes: The same of writes.

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
    for what, found, required in (("reads", facts.reads, reads), ("writes", facts.writes, writes)):
        for name, size in required.items():
            sizes = dict(found.get(name, {}))
            if set(sizes) != {size}:
                broken.append(f"{what} of {name} by bytes are {sizes}, all of {size} required")
    if broken:
        raise AssertionError(f"{facts.kernel}: " + "; ".join(broken))
