"""Compiles the C++ kernels at first use, with a plain C++ compiler, into one shared library per instruction set.

Sources are all ``*.cpp`` and ``*.h`` beside this file, and two headers made from ``table.py`` and ``abi.py``. A library
is cached on disk. Its name holds a key of them, the flags, the machine and the instruction set, so that a cache can be
shared between machines, and a digest of its content, so that what was cut off or exchanged is never loaded. No compiler
is part of the key: a cache that is warm needs none. Environment variables:

``MST_COMPILE_CACHE_DIR``
    where to keep compiled libraries, see ``folder.py``
``MST_COMPILE_BUILD_TIMEOUT``
    seconds after which a build is given up (default: 900)
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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import get_hash_for_files

from . import abi, processor, table
from .dot_rate import dot_rate
from .folder import UntrustedFolderError, cache_dir, open_cache_dir
from .locks import lock, unlock
from .private import check_room, private_folder, reason, say_why
from .processes import CommandError, OutOfTimeError, run_all

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wno-psabi "
    "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option -Wno-unknown-pragmas"
)
_OPENMP = "-fopenmp"
_BUILD_SECONDS = 900.0  # about a minute on two cores; slow machines and busy ones take longer
_ANSWER_SECONDS = 60.0  # for a compiler's version, or a file of two lines
_WAIT_SECONDS = 0.05
_REMOVALS = 20
_INSTALL = "Install g++ or clang++, or point CXX to a C++ compiler that works"


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message says why."""


class NoCompilerError(BuildError):
    """There is no compiler that works."""


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


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets this machine can run, best first."""
    has = processor.features()
    return tuple(isa.name for isa in table.ISAS if has.issuperset(isa.needs.replace("_", "").split()))


def choose_isa() -> str:
    """The instruction set to compile for: the fastest one, unless ``MST_CPU_ISA`` names another."""
    isas = supported_isas()
    wanted = os.environ.get("MST_CPU_ISA", "")
    if not wanted:
        return _fastest(isas)
    if wanted == "portable":
        return next(isa for isa in isas if table.isa_named(isa).portable)
    if wanted not in isas:
        raise BuildError(f"MST_CPU_ISA={wanted!r}: this machine supports {', '.join(isas)} (or 'portable')")
    return wanted


@functools.cache
def _fastest(isas: tuple[str, ...]) -> str:
    """The best one, unless that multiplies bf16 in pairs and the processor is slow at it (``dot_rate.py``)."""
    best = table.isa_named(isas[0])
    rate = dot_rate(find_compiler) if "MST_BF16_PAIRS" in best.macros else None
    return isas[0] if rate is None or rate.pays else isas[1]


# ---- compiler --------------------------------------------------------------------------------------------------------


@functools.cache
def _works(command: tuple[str, ...]) -> bool:
    """Whether a command is a compiler that answers."""
    if shutil.which(command[0]) is None:
        return False
    try:
        run_all([[*command, "--version"]], _ANSWER_SECONDS)
    except CommandError:
        return False
    return True


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command: ``$CXX``, else Inductor's, else g++ or clang++ from the path."""
    if os.environ.get("CXX"):
        command = tuple(shlex.split(os.environ["CXX"]))
        if not _works(command):
            raise NoCompilerError(f"CXX={os.environ['CXX']!r} is not a working C++ compiler: {_INSTALL}")
        return command
    for candidate in (*_inductor_compilers(), "g++", "clang++"):
        if _works((candidate,)):
            return (candidate,)
    raise NoCompilerError(f"no C++ compiler found: {_INSTALL}")


def _inductor_compilers() -> tuple[str, ...]:
    """The commands that Inductor tries. It is not asked itself: it waits for a compiler that hangs."""
    names = inductor_config.cpp.cxx
    return tuple(name for name in (names if isinstance(names, list | tuple) else (names,)) if name)


def why_inductor_has_no_compiler() -> str | None:
    """Why Inductor cannot compile C++ on this machine, or None: kernels may have been built before, elsewhere."""
    if any(_works((name,)) for name in _inductor_compilers()):
        return None
    return f"no C++ compiler works here (tried {', '.join(_inductor_compilers())}): {_INSTALL}"


def _time_limit() -> float:
    """Seconds that a build may take."""
    text = os.environ.get("MST_COMPILE_BUILD_TIMEOUT", "")
    try:
        seconds = float(text or _BUILD_SECONDS)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise BuildError(f"MST_COMPILE_BUILD_TIMEOUT={text!r} must be a positive number of seconds")
    return seconds


# ---- build -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _turn(folder: Path, seconds: float) -> Iterator[None]:
    """Waits while another process builds, so that several do not compile the same thing.

    It saves work, and nothing depends on it: where there are no locks, or whoever holds this one does not get ready
    in the time that a build may take, there is no waiting.
    """
    with open(folder / "build.lock", "w") as file:
        end, held = time.monotonic() + seconds, False
        with contextlib.suppress(OSError):
            while not (held := lock(file.fileno())) and time.monotonic() < end:
                time.sleep(_WAIT_SECONDS)
        try:
            yield
        finally:
            if held:
                unlock(file.fileno())


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A folder to build in, locked as long as its builder lives; those of builders that were killed are removed."""
    for other in folder.glob("building-*"):
        if _is_abandoned(other):
            _remove(other)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder, ignore_cleanup_errors=True) as work:
        file = os.open(work, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                lock(file)
            yield Path(work)
        finally:
            os.close(file)


def _remove(work: Path) -> None:
    """Remove a folder in which a killed builder's compilers may still write: a file that comes after its fellows have
    been listed keeps the folder from going. Once that has gone, none comes."""
    for _ in range(_REMOVALS):
        shutil.rmtree(work, ignore_errors=True)
        if not work.exists():
            return


def _is_abandoned(work: Path) -> bool:
    try:
        file = os.open(work, os.O_RDONLY)
    except OSError:
        return False  # its builder has just removed it
    try:
        return lock(file)
    except OSError:
        return False
    finally:
        os.close(file)


def _has_openmp(compiler: tuple[str, ...], work: Path, seconds: float) -> bool:
    """Whether the compiler makes libraries with OpenMP: clang may come without the header or the runtime."""
    probe = work / "openmp.cc"
    probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
    try:
        run_all(
            [[*compiler, _OPENMP, "-fPIC", "-shared", str(probe), "-o", str(probe.with_suffix(".so"))]], seconds, work
        )
    except OutOfTimeError:
        raise
    except CommandError:
        check_room(work)  # else it says nothing of OpenMP
        return False
    return True


def _compile(compiler: tuple[str, ...], flags: list[str], isa: table.Isa, work: Path, seconds: float) -> Path:
    for name, text in _headers(isa).items():
        (work / name).write_text(text)
    sources = units()
    objects = [str(work / f"{unit.stem}.o") for unit in sources]
    commands = [
        [*compiler, *flags, f"-I{HERE}", f"-I{work}", "-c", str(unit), "-o", made]
        for unit, made in zip(sources, objects, strict=True)
    ]
    target = work / "library.so"
    end = time.monotonic() + seconds
    run_all(commands, seconds, work)
    run_all([[*compiler, *flags, "-shared", *objects, "-o", str(target)]], max(1.0, end - time.monotonic()), work)
    return target


# ---- cache -----------------------------------------------------------------------------------------------------------

made: set[Path] = set()  # libraries that this process has compiled


def _flags(isa: table.Isa, openmp: bool) -> list[str]:
    return [*FLAGS.split(), *isa.flags.split(), *([_OPENMP] if openmp else [])]


def _stem(isa: table.Isa, openmp: bool) -> str:
    """What the names of libraries begin with that may serve. One without OpenMP has a name of its own: it may be wanted
    no more tomorrow."""
    identity = [source_hash(), isa.name, platform.machine(), *_flags(isa, openmp)]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    return f"cpu_kernels_{isa.name}{'' if openmp else '_one_thread'}_{key}_"


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:32]


def _is_whole(library: Path, stem: str) -> bool:
    """Whether a file is what its name says: it may be cut off, empty, or another's."""
    try:
        return library.is_file() and library.name == f"{stem}{_digest(library)}.so"
    except OSError:
        return False


def _cached(folder: Path, stem: str, rejected: Path | None) -> Path | None:
    found = (library for library in sorted(folder.glob(f"{stem}*.so")) if library != rejected)
    return next((library for library in found if _is_whole(library, stem)), None)


def _keep(library: Path, folder: Path, stem: str) -> Path:
    """Move a library into the cache, in one step, and remove those that did not serve."""
    target = folder / f"{stem}{_digest(library)}.so"
    os.replace(library, target)
    for other in folder.glob(f"{stem}*.so"):
        if other != target and not other.is_dir():
            other.unlink(missing_ok=True)
    made.add(target)
    return target


def build(isa: str | None = None, *, rejected: Path | None = None) -> Path:
    """Path of the shared library for ``isa`` (default: :func:`choose_isa`), compiled unless the cache has it.

    The library has OpenMP if the cache has one that does, or the compiler can make one; else it runs on one thread.

    Args:
        rejected: a library of the cache that could not be loaded; another one takes its place.

    Raises:
        BuildError: there is no compiler, it fails or hangs, the instruction set is not supported, or others could write
            to the cache. The message says what to do.
    """
    chosen = table.isa_named(isa or choose_isa())
    try:
        folder = open_cache_dir()
        threaded = _stem(chosen, openmp=True)
        return _cached(folder, threaded, rejected) or _build(chosen, folder, rejected)
    except UntrustedFolderError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        return _build_for_this_process(chosen, rejected, error)


def _build_for_this_process(isa: table.Isa, rejected: Path | None, error: OSError) -> Path:
    """A library that is kept nowhere, as the cache cannot be written, or has no room."""
    try:
        folder = private_folder()
        kept = next((found for stem in _stems(isa) if (found := _cached(folder, stem, rejected))), None)
        built = kept or _build(isa, folder, rejected)
    except OSError as other:
        raise BuildError(
            f"cannot keep the compiled kernels in {_shown_cache_dir()} ({reason(error)}), nor for this process alone "
            f"({reason(other)}); set MST_COMPILE_CACHE_DIR to a folder in which you can write and that has room"
        ) from error
    if kept is None:
        say_why(_shown_cache_dir(), error)
    return built


def _shown_cache_dir() -> Path:
    try:
        return cache_dir()
    except OSError:
        return Path("~/.cache/mst_compile")


def _stems(isa: table.Isa) -> list[str]:
    """Of libraries with OpenMP, and without."""
    return [_stem(isa, openmp) for openmp in (True, False)]


def _build(isa: table.Isa, folder: Path, rejected: Path | None) -> Path:
    """Make what the cache lacks, a library with OpenMP, or one without where the compiler knows none.

    Raises:
        OSError: the folder cannot be written, or has no room.
    """
    with_openmp, without = _stems(isa)
    single = _cached(folder, without, rejected)
    try:
        compiler, seconds = find_compiler(), _time_limit()
        with _turn(folder, seconds), _workspace(folder) as work:
            openmp = _has_openmp(compiler, work, min(seconds, _ANSWER_SECONDS))
            stem = with_openmp if openmp else without
            # Another process may have been faster.
            return _cached(folder, stem, rejected) or _keep(
                _compile(compiler, _flags(isa, openmp), isa, work, seconds), folder, stem
            )
    except CommandError as error:
        if not isinstance(error, OutOfTimeError):
            check_room(folder)  # compilers say it in many ways
        raise BuildError(f"the kernels could not be compiled: {error}\n{_INSTALL}") from error
    except (NoCompilerError, OSError):
        if single is None:
            raise
        return single
