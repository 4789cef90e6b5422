"""Models as ``backend="mst"`` compiles them for a pretended GPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from gpu_cases import TUNED
from pretend_gpu import Generated, generate
from torch import nn
from torch._inductor.compile_fx import compile_fx

from mst_compile.graph import backend


def through_backend(model: nn.Module, *args: Any) -> Generated:
    """What Inductor generates of the sparse variant, forward and backward, with all tiles offered."""

    def wrapper(graph_module: Any, examples: Any, inner: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "compile_fx", functools.partial(compile_fx, inner_compile=inner))
            return backend.mst(graph_module, examples, options={"mst.keep_memory": False})

    return generate(model, args, backend_wrapper=wrapper, config=TUNED)
