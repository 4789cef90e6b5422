"""The process behind `Interpreter`: reads requests from stdin, answers on stdout, until stdin ends."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from functools import lru_cache
from typing import Any

from .pipes import receive, send


def _answer(request: dict[str, Any], load: Any) -> dict[str, Any]:
    inputs = request["inputs"]
    outputs = load(request["source"])(list(inputs))
    return {"outputs": list(outputs), "inputs": inputs}


def main(tf32: bool, preload: list[str]) -> None:
    """Serve until stdin ends.

    Args:
        tf32: As for `Interpreter`.
        preload: As for `Interpreter`.
    """
    # Prints of kernels and libraries must not get into the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    from . import repairs
    from .wrapper import load_wrapper

    repairs.install(tf32=tf32)
    for name in preload:
        importlib.import_module(name)
    # Hypothesis sends the same code with many inputs.
    load = lru_cache(maxsize=64)(load_wrapper)
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = _answer(request, load)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        send(answers, answer)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("TRITON_INTERPRET=1 must be set before triton is imported")
    main(sys.argv[1] == "tf32", sys.argv[2:])
