"""Compile kernels to sm_90 machine code. Triton needs no GPU for that: ptxas comes in its wheel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import compat
from ..codegen.kernels import GeneratedKernel, LaunchConfig
from ..device.h100 import target
from .facts import Facts, facts_of


def _compile(
    name: str,
    fn: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    attributes: dict,
    options: dict[str, Any],
) -> Facts:
    import triton
    from triton.compiler import ASTSource

    if type(fn).__name__ == "InterpretedFunction":
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    signature = {n: "constexpr" if n in constants else types.get(n, "constexpr") for n in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=dict(constants), attrs=attributes)
    arguments = {n: type_ for n, type_ in signature.items() if type_ != "constexpr"}
    return facts_of(name, triton.compile(source, target=target(), options=options), arguments)


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
    return _compile(kernel.name, kernel.fn, kernel.triton_meta["signature"], constants, attributes, options)


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
    return _compile(fn.__name__, fn, types, constexprs, attributes, all_options)
