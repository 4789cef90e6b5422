"""Functions run in a forked child, with a time-out."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

import pytest
import torch


def skip_if_autograd_refuses() -> None:
    """PyTorch refuses every backward pass in a child, with an error of its own, once one in the parent has used threads
    for other devices, as in its CUDA builds: https://github.com/pytorch/pytorch/wiki/Autograd-and-Fork."""

    def refused() -> bool:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError as error:
            return "Autograd-and-Fork" in str(error)
        return False

    if in_child(refused) == "True":
        pytest.skip("PyTorch's autograd was used for other devices before, and refuses to run in forked processes")


def in_child(function: Callable[[], object], seconds: float = 30.0) -> str:
    """What ``function`` returns in a child, as a text; AssertionError where it raises, or does not return in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.write(writer, str(function()).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    os.close(writer)
    ended = bool(select.select([reader], [], [], seconds)[0])
    if not ended:
        os.killpg(child, signal.SIGKILL)  # its children have the pipe open too
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader) as file:
        text = file.read()
    assert ended, f"the child has not ended in {seconds:g} seconds"
    assert status == 0, f"the child has ended with status {status}; what it raised stands in stderr"
    return text
