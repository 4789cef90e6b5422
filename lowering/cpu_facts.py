"""What this machine has for the CPU kernels."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import torch
from mst_compile.kernels import cpu as kernels
from mst_compile.kernels.cpu import build, folder, processor
from mst_compile.kernels.cpu.dot_rate import dot_rate

from .device import Fact

_BFLOAT16 = {"avx512bf16", "amxbf16", "bf16", "armbf16"}  # what processors call it
_SLOW = 1.5  # times float32's time, from which on bfloat16 is a bad choice


def facts() -> list[Fact]:
    """The processor and its instruction sets, the compiler, the cache, and the kernels, which are built if need be."""
    return [
        Fact("processor", f"{processor.short_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"),
        *_instruction_sets(),
        _compiler(),
        _cache(),
        _kernels(),
    ]


def _instruction_sets() -> Iterator[Fact]:
    try:
        chosen = build.choose_isa()
    except build.BuildError as error:
        yield Fact("instructions", os.environ["MST_CPU_ISA"], str(error))
        return
    others = ", ".join(isa for isa in build.supported_isas() if isa != chosen)
    yield Fact("instructions", f"{chosen} (others that run here: {others or 'none'})")
    rate = dot_rate(build.find_compiler) if "avx512bf16" in processor.features() else None
    if rate is not None:
        yield Fact(
            "bf16 dot products",
            f"a multiply-add by dot products takes {rate.dot / 2 / rate.fma:.2f} of float32's time: "
            + ("they are used" if rate.pays else "numbers are widened"),
        )
    yield _bfloat16()
    if "amxbf16" in processor.features():
        yield Fact("AMX", "here; our kernels do not use it, so bfloat16 products go to the library where it is faster")


def _bfloat16() -> Fact:
    """Whether the processor computes in it, and what a dense product takes: without instructions for it, where the
    library has no way round, many times what it takes in float32."""
    here = _BFLOAT16 & processor.features()
    has = f"has instructions for it ({', '.join(sorted(here))})" if here else "has no instructions for it"
    ratio = _product_seconds(torch.bfloat16) / _product_seconds(torch.float32)
    text = f"the processor {has}; a dense product takes {ratio:.2g} times what it takes in float32"
    slow = ": train in float32 here, without autocast, and compare sparse models with dense ones in float32"
    return Fact("bfloat16", text + slow if ratio > _SLOW else text)


def _product_seconds(dtype: torch.dtype) -> float:
    """The shortest time of a product of 512 x 512 matrices, of some."""
    a = torch.ones(512, 512, dtype=dtype, device="cpu")
    torch.mm(a, a)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _compiler() -> Fact:
    try:
        command = " ".join(build.find_compiler())
    except build.NoCompilerError as error:
        return Fact("C++ compiler", "none", str(error))
    return Fact("C++ compiler", command, kernels.why_inductor_has_no_compiler())


def _cache() -> Fact:
    try:
        where = folder.open_cache_dir()
    except OSError as error:
        return Fact("cache folder", str(folder.cache_dir()), f"{error}; set MST_COMPILE_CACHE_DIR to another")
    if not os.access(where, os.W_OK):
        return Fact("cache folder", str(where), "nobody can write there; set MST_COMPILE_CACHE_DIR to another")
    return Fact("cache folder", str(where))


def _kernels() -> Fact:
    before, start = set(build.made), time.perf_counter()
    problem = kernels.why_unavailable()
    if problem is not None:
        return Fact("kernels", "none", problem)
    seconds = time.perf_counter() - start
    how = f"compiled in {seconds:.0f} s" if build.made - before else "compiled before"
    return Fact("kernels", how)
