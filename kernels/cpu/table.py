"""What the CPU kernels exist for: dtypes, block sizes and instruction sets, each stated here and nowhere else.

The build turns the table into a header (:func:`header`), from which the C++ side makes its dispatch. ``supports``, the
codes that cross the C ABI, the choice of an instruction set and the error messages read it too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Dtype(NamedTuple):
    """An element type of tensors. Its code in the C ABI is its place in :data:`DTYPES`."""

    torch: torch.dtype
    cpp: str  # what elements.h calls it


class Isa(NamedTuple):
    """An instruction set that a library is compiled for."""

    name: str
    needs: str  # of the CPU: flags as /proc/cpuinfo spells them
    flags: str  # of the compiler
    lanes: int  # floats in a vector
    macros: str = ""  # what the C++ sources ask for, where vector extensions give bad code
    portable: bool = False  # whether MST_CPU_ISA=portable may choose it


DTYPES = (Dtype(torch.float32, "float"), Dtype(torch.bfloat16, "bf16"))

# (activations, weight) of a product; the weight is rounded to the activations' dtype as it is packed.
PRODUCTS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
# (activations and gradients, gradient of the weight)
GRADIENTS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)

BLOCKS = (1, 2, 4, 8, 16, 32, 64)  # 1, 2, 4, and multiples of 8

_AVX2 = "avx2 fma bmi2 f16c"
_AVX512 = f"{_AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"

# Best first; the last one runs everywhere: without flags compilers take SSE2 on x86-64, and NEON on aarch64.
ISAS = (
    Isa("avx512_bf16", f"{_AVX512} avx512_bf16", "-march=x86-64-v4 -mavx512bf16", 16, "MST_AVX512 MST_BF16_PAIRS"),
    Isa("avx512", _AVX512, "-march=x86-64-v4", 16, "MST_AVX512"),
    Isa("avx2", _AVX2, "-march=x86-64-v3", 8, portable=True),
    Isa("baseline", "", "", 4, portable=True),
)

CODES = {dtype.torch: code for code, dtype in enumerate(DTYPES)}


def isa_named(name: str) -> Isa:
    """The instruction set called ``name``; raises KeyError if there is none."""
    return {isa.name: isa for isa in ISAS}[name]


def dtype_names() -> str:
    """All dtypes, for messages: ``float32, bfloat16``."""
    return ", ".join(str(dtype.torch).removeprefix("torch.") for dtype in DTYPES)


def _pair(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return ", ".join(f"{CODES[dtype]}, {DTYPES[CODES[dtype]].cpp}" for dtype in dtypes)


def header(isa: Isa) -> str:
    """``table.h``: the table as C++ macros, for one instruction set."""
    lists = {
        "MST_DTYPES": [f"{code}, {dtype.cpp}" for code, dtype in enumerate(DTYPES)],
        "MST_PRODUCTS": [_pair(dtypes) for dtypes in PRODUCTS],
        "MST_GRADIENTS": [_pair(dtypes) for dtypes in GRADIENTS],
        "MST_BLOCKS": [str(block) for block in BLOCKS],
    }
    lines = ["// Made from table.py.", "#pragma once", f"#define MST_LANES {isa.lanes}"]
    lines += [f"#define {macro} 1" for macro in isa.macros.split()]
    lines += [f"#define {name}(X) " + " ".join(f"X({row})" for row in rows) for name, rows in lists.items()]
    return "\n".join(lines) + "\n"
