"""The CPU kernels as other compilers build them: clang, and one for aarch64, whose code an emulator runs.

    @pytest.mark.parametrize("name", OTHERS)
    def test(name: str) -> None:
        kernels = library(name)  # skips the test where a tool is missing

clang is ``clang++`` or comes with ``pip install ziglang``. For aarch64 it takes ``aarch64-linux-gnu-g++``, and
``qemu-aarch64-static`` or ``qemu-aarch64`` (Debian: apt install g++-aarch64-linux-gnu qemu-user-static).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
from mst_compile.kernels.cpu import abi, build, table
from mst_compile.kernels.cpu.folder import open_cache_dir
from mst_compile.kernels.cpu.library import Library
from mst_compile.kernels.cpu.processes import run_all

AARCH64 = "aarch64"
_CLANG = tuple(f"clang {isa}" for isa in build.supported_isas())
_SECONDS = 1800.0  # for a build, on a machine that does other things as well

# Names to parametrize a test with. What needs one of them runs on one worker, which builds it.
OTHERS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in (*_CLANG, AARCH64)]


@functools.cache
def library(name: str) -> Library:
    """One of ``OTHERS``, or the usual compiler's for an instruction set. Skips the test if it cannot be made here."""
    if name in build.supported_isas():
        return Library(name)
    if name == AARCH64:
        return _Emulated([_emulator(), str(_program())])
    command = clang()
    with mock.patch.dict(os.environ, CXX=str(command), MST_COMPILE_CACHE_DIR=str(_folder([str(command)]))):
        return Library(name.split()[1])


# ---- compilers -------------------------------------------------------------------------------------------------------

# zig spells instruction sets its own way, and would compile a C++ library of its own for minutes: it gets the headers
# of the usual compiler, which also links. It has no OpenMP.
_ZIG = """#!/bin/sh
case " $* " in
  *" -fopenmp "*) echo "ziglang has no OpenMP" >&2; exit 1 ;;
  *" -c "*) ;;
  *) exec {linker} "$@" ;;
esac
for word; do
  shift
  case $word in -march=x86-64-v*) word=-march=x86_64_v${{word#-march=x86-64-v}} ;; esac
  set -- "$@" "$word"
done
exec {zig} c++ -nostdinc++ {headers} -fno-sanitize=undefined "$@"
"""


def _has_zig() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def _zig() -> list[str]:
    return [sys.executable, "-m", "ziglang"]


@functools.cache
def clang() -> Path:
    """A command that is clang; skips the test if there is none."""
    if found := shutil.which("clang++"):
        return Path(found)
    if not _has_zig():
        pytest.skip("no clang++ here, nor the Python package ziglang")
    linker = build.find_compiler()
    (said,) = run_all([[*linker, "-E", "-x", "c++", "-v", os.devnull]], 60)
    searched = said.split("#include <...> search starts here:")[1].split("End of search list")[0].split()
    headers = " ".join(f"-I{folder}" for folder in searched if "c++" in folder)
    script = _folder(linker) / "clang++"
    with_own_name = script.with_name(f"clang++.{os.getpid()}")
    with_own_name.write_text(_ZIG.format(linker=" ".join(linker), zig=" ".join(_zig()), headers=headers))
    with_own_name.chmod(0o755)
    with_own_name.replace(script)
    return script


def _folder(command: Sequence[str]) -> Path:
    """Where what a compiler makes is kept: libraries do not know by whom they were built."""
    (version,) = run_all([[*command, "--version"]], 60)
    key = hashlib.sha256("\n".join([*command, version]).encode()).hexdigest()[:16]
    folder = open_cache_dir() / f"other_compiler_{key}"
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


def compile_commands(compiler: Sequence[str], isa: table.Isa, work: Path, *flags: str) -> list[list[str]]:
    """What compiles the kernels' sources to objects in ``work``, with the flags that they are built with."""
    for header, text in build._headers(isa).items():
        (work / header).write_text(text)
    common = [*compiler, *build.FLAGS.split(), *isa.flags.split(), *flags, f"-I{build.HERE}", f"-I{work}"]
    return [[*common, "-c", str(unit), "-o", str(work / f"{unit.stem}.o")] for unit in build.units()]


# ---- another processor -----------------------------------------------------------------------------------------------


def _emulator() -> str:
    found = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    return found or pytest.skip("no qemu-aarch64 here")


def _cross_compiler() -> list[str]:
    found = shutil.which("aarch64-linux-gnu-g++")
    return [found or pytest.skip("no aarch64-linux-gnu-g++ here")]


def _program() -> Path:
    """The kernels, with what reads calls from stdin, as one program."""
    compiler = _cross_compiler()
    folder = _folder(compiler)
    key = hashlib.sha256((build.source_hash() + _SERVER.read_text()).encode()).hexdigest()[:16]
    program = folder / f"{AARCH64}_{key}"
    if not program.exists():
        work = folder / f"building-{os.getpid()}"
        work.mkdir()
        commands = compile_commands(compiler, table.isa_named("baseline"), work)
        run_all([*commands, [*commands[0][:-4], "-c", str(_SERVER), "-o", str(work / "server.o")]], _SECONDS)
        run_all([[*compiler, "-static", *map(str, sorted(work.glob("*.o"))), "-o", str(work / "program")]], _SECONDS)
        (work / "program").replace(program)
        shutil.rmtree(work)
    return program


_SERVER = Path(__file__).with_name("kernels") / "serve_calls.cpp"
_FUNCTIONS = (
    "mst_spmm", "mst_grad_weight", "mst_zero_inactive", "mst_block_sumsq", "mst_attention", "mst_attention_backward",
    "mst_packed",
)  # fmt: skip


class _Emulated(Library):
    """Kernels in a process that shares no memory with this one: operands go there, and come back with the results."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, function: str, arguments: ctypes.Structure | bytes) -> None:
        if isinstance(arguments, bytes):
            arguments = abi.Packed.from_buffer_copy(arguments)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        memory = list(_memory(arguments))
        self._process.stdin.write(struct.pack("=qq", _FUNCTIONS.index(function), ctypes.sizeof(arguments)))
        self._process.stdin.write(bytes(arguments))
        self._process.stdin.write(struct.pack("=q", len(memory)))
        for offset, address, size in memory:
            self._process.stdin.write(struct.pack("=qq", offset, size) + ctypes.string_at(address, size))
        self._process.stdin.flush()
        (status,) = struct.unpack("=q", self._process.stdout.read(8))
        for _, address, size in memory:
            ctypes.memmove(address, self._process.stdout.read(size), size)
        assert status <= 0, "written beside an operand"
        if status:
            raise RuntimeError(f"CPU kernel: {abi.ERRORS.get(status, status)}")


def _memory(arguments: ctypes.Structure) -> Iterator[tuple[int, int, int]]:
    """Offset in the struct, address and bytes of all that pointers of it lead to."""
    sizes = _sizes(arguments)
    for name, kind in ((field[0], field[1]) for field in arguments._fields_):
        value, offset = getattr(arguments, name), getattr(type(arguments), name).offset
        if kind is abi.Heads:
            value, offset = value.data, offset + abi.Heads.data.offset
        elif kind is not ctypes.c_void_p:
            continue
        if value and sizes[name]:
            yield offset, value, sizes[name]


def _item(code: int) -> int:
    return table.DTYPES[code].torch.itemsize


def _sizes(a: ctypes.Structure) -> dict[str, int]:
    """Bytes that each pointer of a struct leads to, from the comments of abi.h."""

    def matrix(rows: int, ld: int, cols: int, size: int) -> int:
        return ((rows - 1) * ld + cols) * size if rows > 0 and cols > 0 else 0

    if isinstance(a, abi.Attention):

        def heads(t: abi.Heads, count: int, row: int) -> int:
            last = (a.batch - 1) * t.batch + (count - 1) * t.head + (a.length - 1) * t.token
            return (last + row) * _item(a.dtype)

        count = {name: a.key_heads if name in ("k", "v", "dk", "dv") else a.heads for name, _ in abi.Attention._fields_}
        row = dict.fromkeys(("q", "k", "dq", "dk"), a.size) | dict.fromkeys(("v", "out", "grad", "dv"), a.value_size)
        sizes = {name: heads(getattr(a, name), count[name], row[name]) for name in row}
        return sizes | {"key_mask": a.batch * a.length, "lse": a.batch * a.heads * a.length * 4}

    if isinstance(a, abi.Packed):
        rows, item = -(-a.outputs // a.block), _item(a.dtype)
        active = ctypes.c_int32.from_address(a.index + 4 * rows).value
        sizes = {"index": 4 * (rows + 1 + active), "w": active * a.block**2 * item}
        sizes |= {"x": matrix(a.m, a.ldx, a.reduction, item), "bias": a.outputs * _item(a.bias_dtype)}
        return sizes | {"y": matrix(a.m, a.ldy, a.outputs, item)}
    blocks = -(-a.rows // a.block), -(-a.cols // a.block)
    sizes = {"index": 4 * (8 + sum(blocks) + 2 + 2 * blocks[0] * blocks[1])}
    if isinstance(a, abi.Spmm):
        outputs, reduction = (a.rows, a.cols) if a.outputs_are_rows else (a.cols, a.rows)
        sizes |= {"x": matrix(a.m, a.ldx, reduction, _item(a.x_dtype)), "bias": outputs * _item(a.bias_dtype)}
        sizes |= {"w": matrix(a.rows, a.ldw, a.cols, _item(a.w_dtype))}
        return sizes | {"y": matrix(a.m, a.ldy, outputs, _item(a.x_dtype))}
    if isinstance(a, abi.GradWeight):
        item = _item(a.in_dtype)
        sizes |= {"a": matrix(a.m, a.lda, a.rows, item), "b": matrix(a.m, a.ldb, a.cols, item)}
        sizes |= {"colsum": 4 * (a.rows if a.colsum_of_a else a.cols)}
        return sizes | {"out": matrix(a.rows, a.ldo, a.cols, _item(a.out_dtype))}
    size = a.element_size if isinstance(a, abi.ZeroInactive) else _item(a.dtype)
    return sizes | {"w": matrix(a.rows, a.ldw, a.cols, size), "out": 4 * blocks[0] * blocks[1]}
