"""Compiles the C++ kernels at first use, with a plain C++ compiler, into one shared library per instruction set.

The library is cached on disk under a key of its sources, flags, compiler version and instruction set, so it is safe to
share a cache between machines. Environment variables:

``MST_COMPILE_CACHE_DIR``
    where to keep compiled libraries (default: Inductor's cache directory, else ``~/.cache/mst_compile``)
``MST_CPU_ISA``
    ``avx512_bf16``, ``avx512``, ``avx2``, ``baseline``, or ``portable`` (the best of the last two): forces a path
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

HERE = Path(__file__).parent
UNITS = ("grad_weight.cpp", "spmm.cpp", "attention_backward.cpp", "attention.cpp", "blocks.cpp")  # slowest first
HEADERS = ("abi.h", "attention_head.h", "attention_steps.h", "attention_tile.h", "common.h", "vector.h")

FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wno-psabi "
    "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option -Wno-unknown-pragmas"
)
ISA_FLAGS = {
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16",
    "avx512": "-march=x86-64-v4",
    "avx2": "-march=x86-64-v3",
    "baseline": "",
}


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why."""


def source_hash() -> str:
    """SHA-256 over the kernel sources and the flags common to all instruction sets."""
    digest = hashlib.sha256(FLAGS.encode())
    for name in (*UNITS, *HEADERS):
        digest.update(name.encode())
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


# ---- instruction set -------------------------------------------------------------------------------------------------


def _cpu_features() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split(":", 1)[1].split())
    import torch

    names = {"avx512_f": "avx512f", "avx512_bw": "avx512bw", "avx512_vl": "avx512vl", "avx512_dq": "avx512dq"}
    names |= {"fma3": "fma", "avx512_cd": "avx512cd"}
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {names.get(name, name) for name, value in capabilities.items() if value is True}


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets this machine can run, best first."""
    isas = ["baseline"]
    if platform.machine() in ("x86_64", "AMD64"):
        has = _cpu_features()
        if has >= {"avx2", "fma", "bmi2", "f16c"}:
            isas.append("avx2")
            if has >= {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}:
                isas.append("avx512")
                if "avx512_bf16" in has:
                    isas.append("avx512_bf16")
    return tuple(reversed(isas))


def choose_isa() -> str:
    """The instruction set to compile for: the best one, unless ``MST_CPU_ISA`` names another."""
    isas = supported_isas()
    wanted = os.environ.get("MST_CPU_ISA", "")
    if not wanted:
        return isas[0]
    if wanted == "portable":
        return next(isa for isa in isas if isa in ("avx2", "baseline"))
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


def _compile(compiler: tuple[str, ...], flags: list[str], work: Path) -> Path:
    objects = [str(work / f"{unit}.o") for unit in UNITS]
    commands = [[*compiler, *flags, "-c", str(HERE / u), "-o", o] for u, o in zip(UNITS, objects, strict=True)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        list(pool.map(_run, commands))
    target = work / "library.so"
    _run([*compiler, *flags, "-shared", *objects, "-o", str(target)])
    return target


def build(isa: str | None = None) -> Path:
    """Path of the shared library for ``isa`` (default: :func:`choose_isa`), compiled unless the cache has it.

    Raises :class:`BuildError` if there is no compiler, it fails, or the instruction set is not supported.
    """
    isa = isa or choose_isa()
    compiler = find_compiler()
    flags = [*FLAGS.split(), *ISA_FLAGS[isa].split()]
    if isa == "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        isa = f"baseline-{platform.machine()}"
    identity = "\n".join([source_hash(), isa, *flags, *compiler, _version(compiler) or ""])
    name = f"cpu_kernels_{isa}_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    target = cache_dir() / name
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if target.exists():
                return target
            with tempfile.TemporaryDirectory(dir=target.parent) as work:
                try:
                    made = _compile(compiler, [*flags, "-fopenmp"], Path(work))
                except BuildError:
                    # clang may come without an OpenMP runtime: one thread is better than none. Other errors recur.
                    made = _compile(compiler, flags, Path(work))
                os.replace(made, target)
    except OSError as error:
        raise BuildError(f"cannot write the compiled kernels to {target.parent}: {error}") from error
    return target
