"""One H100 that takes everything and does nothing: real tensors on "cuda", real programs, no kernels."""

from __future__ import annotations

import contextlib
import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from ..device.h100 import H100, pretend_h100
from .library import PRELOAD

ALLOCATION, NEW_MEMORY, EVENT = "allocation", "new memory", "event"
_WAITS = "wait "
_NO_LAUNCHES = {ALLOCATION, NEW_MEMORY, EVENT}
_DEPTH = 12  # lines of a stack that are told


@dataclass(frozen=True)
class Wait:
    """Something in which the host waits for the device.

    Attributes:
        what: The operator, or the copy.
        stack: Where, the outermost call first, as "file:line function".
    """

    what: str
    stack: tuple[str, ...]


@dataclass
class Trace:
    """What a program has done on the idle device.

    Attributes:
        kernels: Triton kernel -> launches.
        operators: Operator of PyTorch with a kernel of its own, or "upload" and "download" -> calls.
        allocations: Tensors that memory was taken for; new_memory: those of a size that was not at hand.
        events: Recorded on streams.
        waits: In which the host would have waited for the device.
        inside: Seconds spent within the idle device, for which a GPU has a driver; they are no part of the host's.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    allocations: int = 0
    new_memory: int = 0
    events: int = 0
    waits: list[Wait] = field(default_factory=list)
    inside: float = 0.0

    @property
    def launches(self) -> int:
        """Kernels and copies that the device would have been given; a foreach operator counts once."""
        return self.kernels.total() + self.operators.total()


class Idle:
    """The device while it exists: what to ask it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)  # the library is loaded before torch, so its names are the process's
        self._library.idle_nanoseconds.restype = ctypes.c_int64
        self._library.idle_counts.restype = ctypes.c_int64
        self._library.idle_counts.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self._kernels: Counter[str] = Counter()
        self._waits: list[Wait] = []
        self._tell = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._told)
        self._library.idle_tell(self._tell)

    def _told(self, what: bytes) -> None:
        stack = traceback.extract_stack()[:-1][-_DEPTH:]
        self._waits.append(Wait(what.decode(), tuple(f"{f.filename}:{f.lineno} {f.name}" for f in stack)))

    def launched(self, kernel: str) -> None:
        """A Triton kernel is launched."""
        self._kernels[kernel] += 1

    def seconds_inside(self) -> float:
        """Seconds within the idle device so far."""
        return self._library.idle_nanoseconds() * 1e-9

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """PyTorch's operators compute, on the CPU; Triton kernels do nothing all the same."""
        self._library.idle_execute(1)
        try:
            yield
        finally:
            self._library.idle_execute(0)

    @contextlib.contextmanager
    def tracing(self) -> Iterator[Trace]:
        """Fill a trace with what is done within."""
        trace = Trace(kernels=self._kernels)
        self._kernels.clear()
        self._waits.clear()
        self._library.idle_reset()
        yield trace
        length = self._library.idle_counts(None, 0)
        buffer = ctypes.create_string_buffer(length)
        self._library.idle_counts(buffer, length)
        for line in buffer.value.decode().splitlines():
            count, name = line.split(" ", 1)
            if not name.startswith(_WAITS) and name not in _NO_LAUNCHES:
                trace.operators[name.removeprefix("aten::")] += int(count)
        counts = dict(reversed(line.split(" ", 1)) for line in buffer.value.decode().splitlines())
        trace.allocations, trace.new_memory, trace.events = (
            int(counts.get(name, 0)) for name in (ALLOCATION, NEW_MEMORY, EVENT)
        )
        trace.kernels, trace.waits, trace.inside = Counter(self._kernels), list(self._waits), self.seconds_inside()


class _Launcher:
    """A kernel of generated code, as the wrapper calls it."""

    def __init__(self, name: str, idle: Idle) -> None:
        self._name, self._idle = name, idle

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        self._idle._kernels[self._name] += 1


def _empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _triton_launches(idle: Idle, driver: Any) -> dict[str, Any]:
    """What Triton's driver needs so that a kernel that is launched by hand is compiled, and counted."""

    def launcher(source: Any, metadata: Any) -> Any:
        name = metadata.name
        return lambda *args: idle.launched(name)

    utils = SimpleNamespace(**vars(driver.utils))
    utils.load_binary = lambda *args: (object(), 0, 0, 0, H100.max_threads_per_block)
    return {"launcher_cls": staticmethod(launcher), "utils": utils}


@contextlib.contextmanager
def idle_h100() -> Iterator[Idle]:
    """As `pretend_h100`, and tensors on "cuda" are real ones: whole programs run, compiled or not.

    Every launch returns at once and leaves results without values. Memory is the host's, and zero when it is new. What
    differs from a card beside that: launching costs nothing, so that of the host's time the driver's part is missing.

    Raises:
        RuntimeError: The process was not started in the `environment` that loads the device before torch.
    """
    if not hasattr(ctypes.CDLL(None), "idle_reset"):
        raise RuntimeError("there is no idle device in this process: start it with pretend_gpu.host's environment()")
    os.environ.pop(PRELOAD, None)  # no business of the processes that this one starts
    from torch._inductor.async_compile import AsyncCompile
    from triton.runtime.driver import driver

    with pretend_h100(guard=False), contextlib.ExitStack() as stack:
        idle = Idle()

        def patch(where: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, value, create=True))

        patch(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
        patch(torch._C._dynamo.guards, "_empty_strided_cuda", _empty_strided)
        patch(torch._C, "_cuda_cudaCachingAllocator_is_enabled", lambda: True)
        patch(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch(AsyncCompile, "triton", lambda self, name, source, device_str="cuda": _Launcher(name, idle))
        for name, value in _triton_launches(idle, type(driver.active)).items():
            patch(type(driver.active), name, value)
        yield idle
