"""Training time, with compilation taken apart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch._dynamo.callback import CallbackArgs, callback_handler


@contextlib.contextmanager
def compilations(begins: Callable[[], None]) -> Iterator[None]:
    """Within it ``begins`` is called whenever a compilation begins: by Dynamo, of a backward pass when it first runs,
    or of a variant that the ``mst`` backend has not needed before.

    ``torch._dynamo.reset()`` forgets it, as it forgets all callbacks.
    """

    def told(_: CallbackArgs) -> None:
        begins()

    callback_handler.register_start_callback(told)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # forgotten by a reset
            callback_handler.remove_start_callback(told)


class Clock:
    """Adds up the time of training steps, or of several at a time.

    A step during which anything was compiled counts as compilation; the step after it is charged twice in its stead,
    so that training time still covers every step. What happens between :meth:`stop` and :meth:`start` is not timed.
    A step that a device computes ends when the device has: wait for it before :meth:`stop`.

    Attributes:
        seconds, compile_seconds: so far; may be set, as when a run is resumed.
        processor_seconds: of this process and all its threads in the same steps: on a machine that others use as well,
            what training takes of it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self.processor_seconds = 0.0
        self._owed = 0
        self.start()

    @staticmethod
    def _count() -> int:
        """How many compiler stages have run in this process: what ``torch._dynamo.utils.compile_times`` prints."""
        return sum(len(times) for times in torch._dynamo.utils.compilation_time_metrics.values())

    def start(self) -> None:
        """A step begins."""
        self._compilations = self._count()
        self._start, self._processor = time.perf_counter(), time.process_time()

    def stop(self) -> float:
        """A step has ended: its seconds."""
        elapsed, processor = time.perf_counter() - self._start, time.process_time() - self._processor
        owed = self._owed
        if self._count() > self._compilations:
            told = {"compile_seconds": self.compile_seconds + elapsed, "_owed": owed + 1}
        else:
            told = {
                "seconds": self.seconds + elapsed * (1 + owed),
                "processor_seconds": self.processor_seconds + processor * (1 + owed),
                "compile_seconds": self.compile_seconds - elapsed * owed,
                "_owed": 0,
            }
        self.__dict__.update(told)  # at once, so that an interrupt finds the step counted whole or not at all
        return elapsed
