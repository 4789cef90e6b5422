"""Compile kernels to sm_90 machine code and read from it what a profiler on the GPU would complain about.

Triton needs no GPU to compile for one: ptxas, cuobjdump and nvdisasm come in its wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from . import compat
from .device import REGISTERS_PER_THREAD, SHARED_MEMORY_PER_BLOCK, target
from .kernels import GeneratedKernel, LaunchConfig


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


def _facts(name: str, compiled: Any) -> Facts:
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


def _compile(
    fn: Any, types: Mapping[str, str], constants: Mapping[str, Any], attributes: dict, options: dict[str, Any]
) -> Any:
    import triton
    from triton.compiler import ASTSource

    if type(fn).__name__ == "InterpretedFunction":
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    signature = {n: "constexpr" if n in constants else types.get(n, "constexpr") for n in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=dict(constants), attrs=attributes)
    return triton.compile(source, target=target(), options=options)


def cross_compile(kernel: GeneratedKernel, config: LaunchConfig | None = None) -> Facts:
    """Compile a generated kernel for sm_90 exactly as Inductor would.

    Args:
        kernel: From `kernels_of`.
        config: One of `kernel.configs`; the first by default.

    Returns:
        What the machine code says.

    Raises:
        Exception: Whatever Triton raises when it cannot compile the kernel.
    """
    config = config or kernel.configs[0]
    constants = compat.constants_by_name(kernel.triton_meta)
    constants |= {name: value for name, value in config.blocks.items() if name in kernel.fn.arg_names}
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # The two below as in Inductor's CachingAutotuner: bounds of indirect indices are asserted in the kernel.
        "debug": kernel.inductor_meta.get("assert_indirect_indexing", True),
        "sanitize_overflow": False,
    }
    if "enable_fp_fusion" in kernel.triton_meta:
        options["enable_fp_fusion"] = kernel.triton_meta["enable_fp_fusion"]
    attributes = compat.alignment_attributes(kernel.triton_meta)
    return _facts(kernel.name, _compile(kernel.fn, kernel.triton_meta["signature"], constants, attributes, options))


def cross_compile_jit(
    fn: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    *,
    divisible: Sequence[str] | None = None,
    **options: Any,
) -> Facts:
    """Compile a bare `@triton.jit` function for sm_90.

    Args:
        fn: The function.
        types: Type of each run-time argument, as Triton writes it: "*bf16", "i32".
        constexprs: Value of each compile-time argument.
        num_warps: Warps per block.
        num_stages: Pipeline stages of its loops.
        divisible: Arguments (addresses and integers) known to be divisible by 16; all pointers by default.
        options: Further options of `triton.compile`.

    Raises:
        Exception: Whatever Triton raises when it cannot compile the function.
    """
    if divisible is None:
        divisible = [name for name, type_ in types.items() if type_.startswith("*")]
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    all_options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    return _facts(fn.__name__, _compile(fn, types, constexprs, attributes, all_options))


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
