"""Building the CPU kernels: which sources, which compiler, which cached library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import abi, build, library, table
from mst_compile.kernels.cpu.processes import CommandError, run_all
from stub_compiler import StubCompiler
from torch._inductor.custom_graph_pass import get_hash_for_files

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")


# ---- compilers -------------------------------------------------------------------------------------------------------


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=True
    )
    return done.stdout


def loaded_anew(monkeypatch: pytest.MonkeyPatch, **environment: str) -> library.Library | str:
    """What a process with other environment variables would load, or why it has no kernels."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return library._load_once.__wrapped__()


def test_portable_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(loaded_anew(monkeypatch, MST_CPU_ISA="portable"), library.Library)
    assert "avx512" not in build.build().name


def test_without_a_compiler_importing_works(tmp_path: Path) -> None:
    code = "from mst_compile.kernels import cpu; print(cpu.available(), cpu.why_unavailable())"
    said = run_python(code, MST_COMPILE_CACHE_DIR=str(tmp_path), CXX="/none/c++")
    assert said.startswith("False NoCompilerError: ")


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"CXX": "/none/c++"}, "NoCompilerError"),
        ({"CXX": "false"}, "NoCompilerError"),
        ({"MST_CPU_ISA": "z80"}, "BuildError"),
    ],
)
def test_why_there_are_no_kernels(
    environment: dict[str, str], error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = loaded_anew(monkeypatch, MST_COMPILE_CACHE_DIR=str(tmp_path), **environment)
    assert isinstance(reason, str)
    assert reason.startswith(f"{error}: ")


def test_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho no such flag >&2\nexit 1\n')
    compiler.chmod(0o755)
    reason = loaded_anew(monkeypatch, CXX=str(compiler), MST_COMPILE_CACHE_DIR=str(tmp_path / "cache"))
    assert isinstance(reason, str)
    assert reason.startswith("BuildError: ")
    assert "no such flag" in reason


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubCompiler:
    stub = StubCompiler(tmp_path)
    monkeypatch.setenv("CXX", str(stub.command))
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return stub


def test_processes_share_one_build(compiler: StubCompiler, tmp_path: Path) -> None:
    """Two processes that want the same library at once: one compiles, the other waits."""
    compiler.on_compile("sleep 0.5\n")
    builders = []
    for _ in range(2):
        builders.append(os.fork())
        if builders[-1] == 0:
            built = False
            try:
                built = build.build("baseline").read_text() == "\n"
            finally:
                os._exit(0 if built else 1)
    assert [os.waitpid(builder, 0)[1] for builder in builders] == [0, 0]
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert compiler.compiled() == len(build.units())


def test_a_library_without_openmp_is_not_taken_for_one_with_it(compiler: StubCompiler) -> None:
    single = build.build("baseline")
    assert compiler.compiled() == len(build.units())
    assert build.build("baseline") == single  # the only one there is, and no better one can be made
    assert compiler.compiled() == 0

    compiler.runtime.touch()
    threaded = build.build("baseline")
    assert threaded != single
    assert compiler.compiled() == len(build.units())
    single.unlink()
    assert build.build("baseline") == threaded
    assert compiler.compiled() == 0


def test_a_library_with_openmp_stays_when_the_compiler_has_lost_it(compiler: StubCompiler) -> None:
    compiler.runtime.touch()
    threaded = build.build("baseline")
    compiler.runtime.unlink()
    assert build.build("baseline") == threaded
    assert compiler.compiled() == len(build.units())


def test_an_error_of_the_sources_is_no_lack_of_openmp(
    compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler.runtime.touch()
    monkeypatch.setattr(build, "HERE", tmp_path / "empty")  # the stub is asked to link nothing, and does
    script = compiler.command.read_text().replace("while", 'case "$*" in *library.so*) exit 1 ;; esac\nwhile')
    compiler.command.write_text(script)
    with pytest.raises(build.BuildError, match="-fopenmp"):
        build.build("baseline")


# ---- sources ---------------------------------------------------------------------------------------------------------


def copied_sources(folder: Path) -> Path:
    for file in (*build.HERE.glob("*.cpp"), *build.HERE.glob("*.h")):
        shutil.copy(file, folder)
    return folder


def test_the_hash_follows_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fresh_hash() -> str:
        get_hash_for_files.cache_clear()
        return build.source_hash()

    monkeypatch.setattr(build, "HERE", copied_sources(tmp_path))
    seen = [fresh_hash()]
    assert fresh_hash() == seen[0]
    for file in sorted(tmp_path.iterdir()):
        file.write_text(file.read_text() + "// more")
        seen.append(fresh_hash())
    (tmp_path / "another.h").touch()
    seen.append(fresh_hash())
    (tmp_path / "another.cpp").touch()
    seen.append(fresh_hash())
    assert tmp_path / "another.cpp" in build.units()
    monkeypatch.setattr(build, "FLAGS", "-O0")
    seen.append(fresh_hash())
    monkeypatch.setattr(table, "BLOCKS", (8,))
    seen.append(fresh_hash())
    monkeypatch.setattr(abi, "STRUCTURES", abi.STRUCTURES[1:])
    seen.append(fresh_hash())
    assert len(set(seen)) == len(seen) > 15


@pytest.mark.parametrize(
    ("was", "becomes"),
    [("int64_t ldx;", "int32_t ldx;"), ("int64_t ldw, rows, cols;", "int64_t ldw, cols, rows;"), ("threads;", "nt;")],
)
def test_a_struct_that_ctypes_sees_otherwise_is_not_compiled(
    was: str, becomes: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    header = (build.HERE / "abi.h").read_text()
    (tmp_path / "abi.h").write_text(header.replace(was, becomes, 1))
    (tmp_path / "layout.h").write_text(abi.checks())
    (tmp_path / "unit.cpp").write_text('#include "layout.h"')
    command = [*build.find_compiler(), "-std=c++17", "-fsyntax-only", str(tmp_path / "unit.cpp")]
    with pytest.raises(CommandError, match="MstSpmm"):
        run_all([command], 60)
    (tmp_path / "abi.h").write_text(header)
    run_all([command], 60)


# ---- this machine ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """torch ships its own libgomp; a second one would mean a second pool of threads fighting over the cores."""
    code = (
        "from mst_compile.kernels import cpu; assert cpu.available(); "
        "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l}))"
    )
    assert run_python(code).strip() == "1"
