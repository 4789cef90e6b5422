"""What differs between versions of torch (2.11 to 2.14) and triton (3.6 to 3.9), in one place.

Everything that reaches into private parts of either project and had to be written for more than one version stands
here; the other modules may touch private parts, but only ones that are the same in all of these versions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any


def wrapper_text(graph: Any) -> str:
    """Run Inductor's code generation of a lowered graph and return the text of its Python wrapper.

    Args:
        graph: A `torch._inductor.graph.GraphLowering` whose nodes have been run.

    Returns:
        The module's source.

    Raises:
        NotImplementedError: The C++ wrapper is asked for, which holds no Python to interpret.
    """
    if graph.cpp_wrapper:
        raise NotImplementedError("the C++ wrapper cannot be captured: leave cpp_wrapper off")
    wrapper = graph.codegen()[0]
    # A plain string up to torch 2.6, an object with line maps since.
    return wrapper if isinstance(wrapper, str) else str(wrapper.value)


def clear_caches(modules: Iterable[Any]) -> None:
    """Forget every functools cache that hangs on these modules or classes (what they say about the GPU is memoised)."""
    for module in modules:
        for value in list(vars(module).values()):
            for holder in (value, getattr(value, "__func__", None)):
                clear = getattr(holder, "cache_clear", None)
                if callable(clear):
                    with contextlib.suppress(TypeError):  # a class that has a method of that name is no cache
                        clear()


def constants_by_name(triton_meta: dict[str, Any]) -> dict[str, Any]:
    """Compile-time constants of a generated kernel; some versions key them by a one-element path, not by name."""
    constants = triton_meta.get("constants", {})
    return {(key[0] if isinstance(key, tuple) else key): value for key, value in constants.items()}


def alignment_attributes(triton_meta: dict[str, Any]) -> dict[tuple[int, ...], list[list[Any]]]:
    """Which arguments Inductor promises to be divisible by 16, as triton's `ASTSource` takes it."""
    config = triton_meta["configs"][0]
    if not isinstance(config, dict):
        raise NotImplementedError(f"alignment attributes of type {type(config).__name__}: triton is older than 3.3")
    return dict(config)


def fake_tensor_module() -> Any:
    """The module whose `init_gpu_context` allocates a real tensor in CUDA builds of torch (absent in some versions)."""
    import torch._subclasses.fake_tensor as module

    return module
