"""``python -m mst_compile COMMAND``."""

from __future__ import annotations

import sys

from mst_compile.doctor import command as doctor
from mst_compile.report import command as report
from mst_compile.tryout import command as tryout

_COMMANDS = {"doctor": doctor.main, "report": report.main, "try": tryout.main}


def main(argv: list[str]) -> int:
    """Run a command; exit status 2 if there is none of that name."""
    if not argv or argv[0] not in _COMMANDS:
        print(f"usage: python -m mst_compile {{{','.join(_COMMANDS)}}} ...", file=sys.stderr)
        return 2
    return _COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
