"""What differs between the PyTorch versions that we support (2.11 to 2.14), in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import custom_graph_pass
from torch._inductor.select_algorithm import add_feedback_saver, autotune_select_algorithm
from torch._inductor.virtualized import V

# The class of passes that are told whether they compile for inference; 2.11 tells none.
InferenceAwarePass: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", custom_graph_pass.CustomGraphPass)


def hint(size: Any) -> int:
    """A concrete value of a size that may be symbolic, without a guard on it."""
    sizes = V.graph.sizevars
    if hasattr(sizes, "optimization_hint"):
        return int(sizes.optimization_hint(size))
    return int(sizes.size_hint(size))  # type: ignore[attr-defined]  # 2.11; gone from 2.13


def select(name: str, choices: list[Any], inputs: list[Any], layout: Any, **kwargs: Any) -> Any:
    """Autotune over ``choices``; returns the TensorBox of the winner's result."""
    result = autotune_select_algorithm(name, choices, inputs, layout, **kwargs)
    return result[0] if isinstance(result, tuple) else result  # 2.13 returns the winning choice beside it


def on_tuned(feedback: Callable[..., None]) -> None:
    """Call ``feedback(timings, ...)`` after every autotuning; what follows the timings differs between versions."""
    add_feedback_saver(feedback)


def tf32_allowed() -> bool:
    """Whether float32 products may run in TF32: ``torch.backends.cuda.matmul``'s setting, by its new or old name."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", "none")
    return precision == "tf32" or (precision == "none" and bool(matmul.allow_tf32))


def compile_session() -> contextlib.AbstractContextManager[None]:
    """Within it the process says that it compiles (``torch.compiler.is_compiling()``), as Dynamo has it say; without,
    another thread that calls a compiled function meanwhile is told that it must not be traced. PyTorch from 2.13 on."""
    session: contextlib.AbstractContextManager[None] = getattr(
        torch.compiler, "_compile_session_context", contextlib.nullcontext
    )()
    return session
