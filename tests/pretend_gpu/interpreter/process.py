"""Run generated code on the CPU in a process of its own, kept between runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..codegen.generated import GraphCode
from .pipes import receive, send

_FOLDER = Path(__file__).resolve().parents[2]  # where the package stands: the worker imports it from there


class WorkerError(RuntimeError):
    """Generated code failed in the worker; the message ends with the traceback from there."""


@dataclass(frozen=True)
class Ran:
    """What a run left: the outputs, and the inputs.

    The code changes inputs that the graph mutates, and also ones that are its own to reuse (saved activations of a
    backward graph become buffers); only the former mean something.
    """

    outputs: list[Any]
    inputs: list[Any]


class Interpreter:
    """A worker process in which every Triton kernel is run by Triton's interpreter, repaired (see `repairs`).

    A context manager. The process is separate because Triton decides on import whether it interprets, and is kept
    because starting takes seconds: feed it as many graphs as you like.

    Args:
        tf32: Cut the operands of float32 products that ask for tf32 down to it, as the tensor core does.
        preload: Modules to import in the worker first, such as those that register extern kernels. The worker has
            this process's `sys.path`.

    Raises:
        WorkerError: From `run`, if the generated code raises, or if the worker is gone.
    """

    def __init__(self, *, tf32: bool = False, preload: Sequence[str] = ()) -> None:
        self._arguments = ["tf32" if tf32 else "exact", *preload]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Interpreter:
        path = [str(_FOLDER), *(p for p in sys.path if p)]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def run(self, code: GraphCode) -> list[Tensor | None]:
        """Run a graph's generated code on its recorded inputs and return its outputs."""
        return self.run_on(code.source, code.inputs).outputs

    def run_on(self, source: str, inputs: Sequence[Any]) -> Ran:
        """Run a wrapper on inputs of your own, which stay as they are: the worker has copies.

        Args:
            source: The wrapper's text.
            inputs: CPU tensors and integers, of the sizes and strides the code was generated for.

        Raises:
            WorkerError: The code raised, or the worker is gone.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerError("the interpreter is not running: use it as a context manager")
        try:
            send(process.stdin, {"source": source, "inputs": list(inputs)})
            answer = receive(process.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise WorkerError(f"the worker has ended with exit code {process.wait()}; see stderr") from error
        if "error" in answer:
            raise WorkerError(f"{answer['error']}\n\nin the worker:\n{answer['traceback']}")
        return Ran(answer["outputs"], answer["inputs"])
