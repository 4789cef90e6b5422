"""Run a generated wrapper on CPU tensors, its Triton kernels by the interpreter.

The wrapper's text is rewritten as a syntax tree, not by search and replace: names and strings that mean the GPU become
ones that mean the CPU, and the few imports that only exist with CUDA become stand-ins. Everything else, assertions on
sizes and strides included, runs as generated; but memory that it allocates is filled with NaN.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from ..codegen.kernels import GeneratedKernel, LaunchConfig, load_kernel

_STAND_INS = {
    ("torch._inductor.async_compile", "AsyncCompile"),
    ("torch._C", "_cuda_getCurrentRawStream"),
}


class _Cuda:
    """`torch.cuda` as the wrapper sees it: guards and streams that do nothing."""

    @staticmethod
    def _DeviceGuard(index: int) -> Any:
        return contextlib.nullcontext()

    device = stream = _DeviceGuard

    @staticmethod
    def set_device(index: int) -> None:
        pass

    @staticmethod
    def synchronize(*args: Any) -> None:
        pass


class _ToCpu(ast.NodeTransformer):
    """The rewriting described above."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        node.names = [a for a in node.names if (node.module, a.name) not in _STAND_INS]
        return node if node.names else None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "cuda"):
            return ast.copy_location(ast.Name("_pretend_cuda", node.ctx), node)
        node.attr = node.attr.replace("empty_strided_cuda", "empty_strided_cpu")
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = node.id.replace("empty_strided_cuda", "empty_strided_cpu")
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value in ("cuda", "cuda:0"):
            node.value = "cpu"
        return node


def _fewest_programs(configs: tuple[LaunchConfig, ...]) -> LaunchConfig:
    """Every program costs the interpreter the same, however large its blocks."""
    return max(configs, key=lambda c: prod(v for n, v in c.blocks.items() if n in ("XBLOCK", "YBLOCK", "ZBLOCK")))


class _Launcher:
    """What the wrapper calls `.run` on."""

    def __init__(self, kernel: GeneratedKernel) -> None:
        self.kernel = kernel
        self.config = _fewest_programs(kernel.configs)

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        from torch._inductor.runtime.triton_heuristics import GridExpr

        fn, meta, blocks = self.kernel.fn, self.kernel.inductor_meta, self.config.blocks
        own = [name for name in fn.arg_names if name not in blocks]
        extra = list(meta.get("extra_launcher_args", ()))
        if len(args) != len(own) + len(extra):
            raise TypeError(f"{self.kernel.name} takes {own + extra}, {len(args)} arguments given")
        bound = dict(zip(own + extra, args, strict=True)) | kwargs
        grid = GridExpr.from_meta(meta, blocks).eval_slow({**bound, **blocks})
        if 0 in grid:
            return
        try:
            fn[tuple(int(g) for g in grid)](**{n: bound[n] for n in own}, **blocks)
        except Exception as error:
            error.add_note(f"in kernel {self.kernel.name}, grid {grid}, blocks {blocks}")
            raise


class _AsyncCompile:
    """Inductor's compile pool as the wrapper sees it."""

    def triton(self, name: str, source: str, device_str: str = "cpu") -> _Launcher:
        return _Launcher(load_kernel(name, source))

    def wait(self, scope: dict[str, Any]) -> None:
        pass


def load_wrapper(source: str) -> Callable[[list[Any]], Any]:
    """Turn the text of a generated wrapper into a function of a list of CPU tensors, which it empties.

    Args:
        source: As in `GraphCode.source`.

    Raises:
        KeyError: The module defines no entry point.
        AttributeError: It uses a part of `torch.cuda` or of Inductor's compile pool that has no stand-in here.
    """
    tree = ast.fix_missing_locations(_ToCpu().visit(ast.parse(source)))
    filename = f"<generated wrapper {hash(source) & 0xFFFFFFFF:08x}>"
    text = ast.unparse(tree)  # so that the lines in a traceback are those that ran
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {
        "__name__": "generated_wrapper",
        "_pretend_cuda": _Cuda(),
        "AsyncCompile": _AsyncCompile,
        "get_raw_stream": lambda index: 0,
    }
    exec(compile(text, filename, "exec"), scope)
    scope["empty_strided_cpu"] = _worthless
    return scope["call"]


def _worthless(size: Sequence[int], stride: Sequence[int], dtype: Any) -> Any:
    """Fresh memory holds the worst it could: whoever reads what was never written shall be seen."""
    import torch

    empty = torch.empty_strided(size, stride, dtype=dtype)
    if dtype == torch.bool:
        return empty.fill_(True)
    return empty.fill_(torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max)
