"""Runs compilers: several at a time, for a limited time, and none is left behind."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_POLL_SECONDS = 0.01


class CommandError(RuntimeError):
    """A command could not be started, failed, or did not end in time; the message says which, and what it wrote."""


class OutOfTimeError(CommandError):
    """A command did not end in time."""


def _memory_file() -> IO[bytes] | None:
    """A file that is on no disk, where the system has such: folders of temporary files may be full or read-only."""
    try:
        return open(os.memfd_create("mst_compile"), "w+b")
    except (AttributeError, OSError):
        return None


class _Process:
    """A command that runs in a process group of its own, so that it can be ended with its children."""

    def __init__(self, command: Sequence[str], scratch: Path | None) -> None:
        self.command = command
        # A file and no pipe: a child that outlives the command would keep a pipe open, and its reader waiting.
        try:
            self._written = _memory_file() or tempfile.TemporaryFile()  # noqa: SIM115
        except OSError as error:
            raise CommandError(
                f"{shlex.join(command)}\nnot started, as what it says can be kept nowhere: {error}"
            ) from error
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._written,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=None if scratch is None else os.environ | dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(scratch)),
            )
        except OSError as error:
            self._written.close()
            raise CommandError(f"{shlex.join(command)}\n{error}") from error

    def ended(self) -> bool:
        """Whether it has succeeded; raises CommandError if it has failed."""
        status = self._process.poll()
        if status:
            raise CommandError(f"{shlex.join(self.command)}\n{self.output().strip()[-2000:] or f'status {status}'}")
        return status is not None

    def output(self) -> str:
        self._written.seek(0)
        return self._written.read().decode(errors="replace")

    def close(self) -> None:
        """End it and its children, if it still runs."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._written.close()


def run_all(commands: Sequence[Sequence[str]], seconds: float, scratch: Path | None = None) -> list[str]:
    """Run commands, as many at a time as there are cores.

    Args:
        seconds: how long all of them may take together.
        scratch: a folder for temporary files of theirs; default the system's, which may be full or not there.

    Returns:
        What each has written.

    Raises:
        CommandError: of the first that failed. All have been ended, children included.
        OutOfTimeError: the time is over. Likewise.
    """
    end = time.monotonic() + seconds
    waiting = list(reversed(commands))
    started: list[_Process] = []
    running: list[_Process] = []

    def start(command: Sequence[str]) -> _Process:
        started.append(_Process(command, scratch))
        return started[-1]

    # Interrupts come to the main thread: another one is not kept from noting whom it has just started.
    starter = concurrent.futures.ThreadPoolExecutor(1)
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(starter.submit(start, waiting.pop()).result())
            running = [process for process in running if not process.ended()]
            if running and time.monotonic() > end:
                raise OutOfTimeError(f"{shlex.join(running[0].command)}\nnot finished after {seconds:g} seconds; ended")
            if running:
                time.sleep(_POLL_SECONDS)
        return [process.output() for process in started]
    finally:
        starter.shutdown()
        for process in started:
            process.close()
