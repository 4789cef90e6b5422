"""Tests in worker processes, so that one that crashes or hangs costs no other. Needs pytest alone, no plugin of it.

pytest-xdist with pytest-timeout does nearly this; but it gives tests out in parcels, forgets what a crash printed, and
is not everywhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

from .checkout import ROOT
from .worker import CHANNEL

_POLL_SECONDS = 0.2
_START_SECONDS = 120.0  # a worker that has not collected its tests by then hangs
_LAST = 600  # characters of what a process printed before it died
# Tests are small, and a process for each core does all that it needs in one thread.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

Result = dict[str, Any]


class NothingCollected(Exception):
    """No worker came as far as a test; the text says why."""


class _Worker:
    """One process of pytest.

    Attributes:
        test: the number of the test that it runs, if any.
        began: when that, or the process, began.
        ready: whether it has collected its tests.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        folder.mkdir()
        self._log = folder / "log"
        self.channel, there = Pipe()
        # What it leaves behind when it is killed goes with the folder.
        environment = {**os.environ, **_ONE_THREAD, CHANNEL: str(there.fileno()), "TMPDIR": str(folder)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-p",
                 "benchmarks.gpu.worker", *arguments],
                cwd=ROOT, env=environment, pass_fds=[there.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        there.close()
        self.test: int | None = None
        self.began, self.ready = time.monotonic(), False

    def give(self, test: int) -> None:
        self.test, self.began = test, time.monotonic()
        with contextlib.suppress(OSError):  # it has died, which `exited` will tell
            self.channel.send(test)

    def messages(self) -> Iterator[dict[str, Any]]:
        try:
            while self.channel.poll():
                yield self.channel.recv()
        except (EOFError, OSError):
            return

    def exited(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the process with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.channel.close()

    def last_words(self) -> str:
        """How a process ended, and what it printed before."""
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        words = " ".join(self._log.read_text(errors="replace").split())
        at = words.find("Fatal Python error")
        return f"{how}: {words[at : at + _LAST] if at >= 0 else words[-_LAST:]}"


class Pool:
    """Runs tests in their order, as many at a time as there are processes.

    Args:
        arguments: pytest's, which choose the tests.
        test_seconds: a test that takes longer hangs.
        end: when to end all, in ``time.monotonic()``'s seconds.
        choose: from the tests' names and what they run on, card and version, to the names that are to run.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        processes: int,
        test_seconds: float,
        end: float,
        choose: Callable[[list[str], str], list[str]],
    ) -> None:
        self._arguments, self._processes = arguments, processes
        self._test_seconds, self._end, self._choose = test_seconds, end, choose
        self._workers: list[_Worker] = []
        self._waiting: deque[int] = deque()
        self._started, self._why_none = 0, "time was over"
        self._collected: list[str] | None = None

    def run(self) -> Iterator[Result]:
        """The results as they come: name, outcome, seconds, seconds compiling, why.

        Raises:
            NothingCollected: no process came as far as a test.
        """
        with tempfile.TemporaryDirectory(prefix="mst-check-", ignore_cleanup_errors=True) as folder:
            try:
                for _ in range(self._processes):
                    self._start(Path(folder))
                while self._workers and time.monotonic() < self._end:
                    connection.wait([worker.channel for worker in self._workers], _POLL_SECONDS)
                    for worker in list(self._workers):
                        yield from self._attend(worker, Path(folder))
                for worker in self._workers:
                    if worker.test is not None:
                        yield self._ended(worker, "not reached", "it ran when time was over")
            finally:
                for worker in self._workers:
                    worker.kill()
        if self._collected is None:
            raise NothingCollected(self._why_none)

    def _start(self, folder: Path) -> None:
        self._started += 1
        self._workers.append(_Worker(self._arguments, folder / str(self._started)))

    def _attend(self, worker: _Worker, folder: Path) -> Iterator[Result]:
        """Take what a worker says, give it more to do, and replace it where it died or hangs."""
        gone = worker.exited()  # before its messages are read, so that none is lost
        for message in worker.messages():
            if "tests" in message:
                self._collect(message)
                worker.ready = True
            elif worker.test is not None and self._collected is not None:
                yield {"test": self._collected[worker.test], **message["result"]}
                worker.test = None
                gone = gone or message["last"]
        if gone or self._hangs(worker):
            worker.kill()
            self._workers.remove(worker)
            if worker.test is not None:
                yield self._ended(worker, *(("died", worker.last_words()) if gone else ("hung", "")))
            elif not worker.ready:
                self._why_none = worker.last_words() if gone else f"no test was reached in {_START_SECONDS:g} s"
            if self._waiting and worker.ready:  # where one could not start, no other will
                self._start(folder)
        elif worker.ready and worker.test is None:
            if self._waiting:
                worker.give(self._waiting.popleft())
            else:
                worker.kill()
                self._workers.remove(worker)

    def _hangs(self, worker: _Worker) -> bool:
        took = time.monotonic() - worker.began
        return (not worker.ready and took > _START_SECONDS) or (worker.test is not None and took > self._test_seconds)

    def _collect(self, message: dict[str, Any]) -> None:
        if self._collected is None:
            self._collected = message["tests"]
            chosen = self._choose(message["tests"], message["on"])
            self._waiting.extend(message["tests"].index(name) for name in chosen)

    def _ended(self, worker: _Worker, outcome: str, why: str) -> Result:
        assert self._collected is not None
        assert worker.test is not None
        test, seconds = self._collected[worker.test], round(time.monotonic() - worker.began, 2)
        return {"test": test, "outcome": outcome, "why": why, "seconds": seconds, "compiling": 0.0}
