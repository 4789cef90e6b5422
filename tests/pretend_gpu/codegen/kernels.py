"""The Triton kernels inside a generated wrapper, as objects, without launching or autotuning them."""

from __future__ import annotations

import ast
import contextlib
import linecache
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class LaunchConfig:
    """One way to launch a kernel that Inductor would try: block sizes and the compiler's options."""

    blocks: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GeneratedKernel:
    """One kernel.

    Attributes:
        name: Its name in the wrapper.
        kind: "template", "pointwise", "reduction", "persistent_reduction", ... (Inductor's heuristic).
        source: The text of its module.
        fn: The `@triton.jit` function (an interpreted one where TRITON_INTERPRET is set).
        triton_meta: Signature, constants and alignment that Inductor would compile it with.
        inductor_meta: Inductor's notes: grid, autotuning hints.
        configs: Every launch configuration Inductor would choose from; one for templates.
    """

    name: str
    kind: str
    source: str = field(repr=False)
    fn: Any = field(repr=False)
    triton_meta: dict[str, Any] = field(repr=False)
    inductor_meta: dict[str, Any] = field(repr=False)
    configs: tuple[LaunchConfig, ...]

    @property
    def num_warps(self) -> int:
        """Warps of the first configuration."""
        return self.configs[0].num_warps

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the first configuration."""
        return self.configs[0].num_stages


@contextlib.contextmanager
def _recording(record: dict[str, Any]) -> Iterator[None]:
    """While a kernel's module runs, take down what its decorator works out instead of building an autotuner."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    def cached_autotune(
        size_hints: Any,
        configs: list[Any],
        triton_meta: dict[str, Any],
        heuristic_type: Any,
        filename: str | None = None,
        inductor_meta: dict[str, Any] | None = None,
        **_: Any,
    ) -> Callable[[Any], Any]:
        record.update(
            kind=heuristic_type.name.lower(),
            triton_meta=triton_meta,
            inductor_meta=inductor_meta or {},
            configs=tuple(LaunchConfig(dict(c.kwargs), c.num_warps, c.num_stages) for c in configs),
        )
        return lambda fn: fn

    with (
        mock.patch.object(triton_heuristics, "cached_autotune", cached_autotune),
        mock.patch.object(triton_helpers, "set_driver_to_gpu"),
    ):
        yield


def load_kernel(name: str, source: str) -> GeneratedKernel:
    """Run the module text of one kernel and return what it defines.

    Args:
        name: The kernel's name.
        source: The text that the wrapper hands to `async_compile.triton`.

    Raises:
        ValueError: The module defines no kernel of that name.
    """
    # Triton reads a kernel's text through inspect, which asks linecache: no file is needed.
    filename = f"<generated {name} {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    module = types.ModuleType(name)
    module.__file__ = filename
    record: dict[str, Any] = {}
    with _recording(record):
        exec(compile(source, filename, "exec"), module.__dict__)
    if name not in module.__dict__ or not record:
        raise ValueError(f"the module text of {name} defines no kernel of that name")
    return GeneratedKernel(name=name, source=source, fn=module.__dict__[name], **record)


def _calls(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "triton"
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "async_compile"
        ):
            name, source = node.args[:2]
            yield ast.literal_eval(name), ast.literal_eval(source)


def kernels_of(source: str) -> list[GeneratedKernel]:
    """Every Triton kernel of a generated wrapper, in the order of definition.

    Args:
        source: The wrapper's text, as in `GraphCode.source`.
    """
    return [load_kernel(name, text) for name, text in _calls(ast.parse(source))]
