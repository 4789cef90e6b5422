"""``python -m mst_compile COMMAND``."""

from __future__ import annotations

import io
import os
import sys

from mst_compile.doctor import command as doctor
from mst_compile.report import command as report
from mst_compile.tryout import command as tryout

_COMMANDS = {"doctor": doctor.main, "report": report.main, "try": tryout.main}
_USAGE = f"usage: python -m mst_compile {{{','.join(_COMMANDS)}}} ...; each with --help says what it does"


def main(argv: list[str]) -> int:
    """Run a command; exit status 2 if there is none of that name, 130 if it was interrupted, 1 if the system has failed
    it, as where a disk is full."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names and samples may hold what a terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(argv)
        if sys.stdout is not None:  # closed before we began, as some services close it
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on, as behind "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor shall the interpreter try at its end
        return 1
    except OSError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _run(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if not argv or argv[0] not in _COMMANDS:
        print(_USAGE, file=sys.stderr)
        return 2
    return _COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
