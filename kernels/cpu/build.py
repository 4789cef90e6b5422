"""Compiles the C++ kernels at first use, with a plain C++ compiler, into one shared library per instruction set.

Sources are all ``*.cpp`` and ``*.h`` beside this file, and two headers made from ``table.py`` and ``abi.py``. A library
is cached on disk under a key of them, the flags, the compiler's version, the machine and the instruction set, so it is
safe to share a cache between machines. Environment variables:

``MST_COMPILE_CACHE_DIR``
    where to keep compiled libraries (default: Inductor's cache directory, else ``~/.cache/mst_compile``)
``MST_CPU_ISA``
    the name of an instruction set of ``table.py``, or ``portable`` (the best of those that are): forces a path
``CXX``
    the compiler
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch._inductor.custom_graph_pass import get_hash_for_files

from . import abi, table

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wno-psabi "
    "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option -Wno-unknown-pragmas"
)
_OPENMP = "-fopenmp"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why."""


# ---- sources ---------------------------------------------------------------------------------------------------------


def units() -> list[Path]:
    """The C++ files that are compiled, the largest first: they take longest."""
    return sorted(HERE.glob("*.cpp"), key=lambda file: (-file.stat().st_size, file.name))


def _headers(isa: table.Isa) -> dict[str, str]:
    """The headers that are made, by name."""
    return {"table.h": table.header(isa), "layout.h": abi.checks()}


def source_hash() -> str:
    """SHA-256 over the kernel sources and the flags common to all instruction sets."""
    files = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")])
    made = [text for isa in table.ISAS for text in _headers(isa).values()]
    extra = "\n".join([FLAGS, *(file.name for file in files), *made])
    return get_hash_for_files(tuple(map(str, files)), extra).hex()


# ---- instruction set -------------------------------------------------------------------------------------------------


def _cpu_features() -> set[str]:
    """What this CPU has, spelled without underscores."""
    features: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                features = set(line.split(":", 1)[1].split())
                break
    if not features:
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        features = {"fma" if name == "fma3" else name for name, value in capabilities.items() if value is True}
    return {feature.replace("_", "") for feature in features}


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets this machine can run, best first."""
    has = _cpu_features()
    return tuple(isa.name for isa in table.ISAS if has.issuperset(isa.needs.replace("_", "").split()))


def choose_isa() -> str:
    """The instruction set to compile for: the best one, unless ``MST_CPU_ISA`` names another."""
    isas = supported_isas()
    wanted = os.environ.get("MST_CPU_ISA", "")
    if not wanted:
        return isas[0]
    if wanted == "portable":
        return next(isa for isa in isas if table.isa_named(isa).portable)
    if wanted not in isas:
        raise BuildError(f"MST_CPU_ISA={wanted!r}: this machine supports {', '.join(isas)} (or 'portable')")
    return wanted


# ---- compiler --------------------------------------------------------------------------------------------------------


@functools.cache
def _version(command: tuple[str, ...]) -> str | None:
    """First line of ``--version``, or None if the command is no working compiler."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0] if done.returncode == 0 else None


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: ``$CXX``, else Inductor's, else g++ or clang++ from the path."""
    if os.environ.get("CXX"):
        command = tuple(shlex.split(os.environ["CXX"]))
        if _version(command) is None:
            raise BuildError(f"CXX={os.environ['CXX']!r} is not a working C++ compiler")
        return command
    candidates = ["g++", "clang++"]
    with contextlib.suppress(Exception):  # absent compilers raise, and the function may move between versions
        from torch._inductor.cpp_builder import get_cpp_compiler

        candidates.insert(0, get_cpp_compiler())
    for candidate in candidates:
        if _version((candidate,)) is not None:
            return (candidate,)
    raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    if os.environ.get("MST_COMPILE_CACHE_DIR"):
        return Path(os.environ["MST_COMPILE_CACHE_DIR"])
    with contextlib.suppress(Exception):
        from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

        return Path(inductor_cache_dir()) / "mst_compile"
    return Path.home() / ".cache" / "mst_compile"


# ---- build -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a file lock, where the platform has them, so that several processes do not compile the same thing."""
    with open(path, "w") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()[-2000:]}")


@functools.cache
def _has_openmp(compiler: tuple[str, ...]) -> bool:
    """Whether the compiler makes libraries with OpenMP: clang may come without the header or the runtime."""
    with tempfile.TemporaryDirectory() as work:
        probe = Path(work) / "openmp.cpp"
        probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        try:
            _run([*compiler, _OPENMP, "-fPIC", "-shared", str(probe), "-o", str(probe.with_suffix(".so"))])
        except BuildError:
            return False
    return True


def _compile(compiler: tuple[str, ...], flags: list[str], isa: table.Isa, work: Path) -> Path:
    for name, text in _headers(isa).items():
        (work / name).write_text(text)
    sources = units()
    objects = [str(work / f"{unit.stem}.o") for unit in sources]
    commands = [
        [*compiler, *flags, f"-I{HERE}", f"-I{work}", "-c", str(unit), "-o", made]
        for unit, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(_run, commands))
    target = work / "library.so"
    _run([*compiler, *flags, "-shared", *objects, "-o", str(target)])
    return target


def _target(isa: table.Isa, compiler: tuple[str, ...], flags: list[str]) -> Path:
    """Where the library is kept. One without OpenMP has a name of its own: it may be wanted no more tomorrow."""
    identity = [source_hash(), isa.name, platform.machine(), *flags, *compiler, _version(compiler) or ""]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    return cache_dir() / f"cpu_kernels_{isa.name}{'' if _OPENMP in flags else '_one_thread'}_{key}.so"


def build(isa: str | None = None) -> Path:
    """Path of the shared library for ``isa`` (default: :func:`choose_isa`), compiled unless the cache has it.

    The library has OpenMP if the cache has one that does, or the compiler can make one; else it runs on one thread.
    Raises :class:`BuildError` if there is no compiler, it fails, or the instruction set is not supported.
    """
    chosen = table.isa_named(isa or choose_isa())
    compiler = find_compiler()
    flags = [*FLAGS.split(), *chosen.flags.split()]
    target = _target(chosen, compiler, [*flags, _OPENMP])
    if target.exists():
        return target
    try:
        if _has_openmp(compiler):
            flags.append(_OPENMP)
        target = _target(chosen, compiler, flags)
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if target.exists():
                return target
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                os.replace(_compile(compiler, flags, chosen, Path(work)), target)
    except OSError as error:
        raise BuildError(f"cannot write the compiled kernels to {target.parent}: {error}") from error
    return target
