"""A cache that is full, becomes it in the middle, or cannot be written: kernels are compiled for the process alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from full_disk import fill, small_disk
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, dot_rate, library, private
from stub_compiler import StubCompiler

from mst_compile.errors import MSTWarning

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StubCompiler:
    """Temporary files are in ``tmp_path / "temporary"``, and the cache is on a disk of a megabyte."""
    stub = StubCompiler(tmp_path)
    stub.copies_kernels()
    stub.runtime.touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("CXX", str(stub.command))
    monkeypatch.setattr(build, "made", set())
    monkeypatch.setattr(private, "_made", {})
    return stub


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 1) as made:
        monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(made / "cache"))
        yield made


def temporary(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "temporary").iterdir()]


@pytest.mark.parametrize("full", [True, False])
def test_a_cache_without_room(full: bool, compiler: StubCompiler, disk: Path, tmp_path: Path) -> None:
    """Full from the beginning, or by what is compiled; with OpenMP all the same."""
    if full:
        fill(disk)
    with pytest.warns(MSTWarning, match=r"cannot be kept in .*cache \(No space left on device\): this process") as said:  # noqa: PT031
        path = build.build("baseline")
        assert build.build("baseline") == path, "compiled once in a process"
    assert len(said) == 1
    assert path.parent.parent == tmp_path / "temporary"
    assert "one_thread" not in path.name
    assert path.parent.stat().st_mode & 0o77 == 0
    library.Library("baseline")
    assert not list(disk.glob("cache/building-*"))
    compiled = compiler.compiled()
    assert compiled >= len(build.units())
    private._remove(os.getpid() + 1, path.parent)  # as a forked child would at its end
    assert path.exists()
    private._remove(os.getpid(), path.parent)
    assert temporary(tmp_path) == []


def test_a_disk_that_fills_up_in_the_middle(
    compiler: StubCompiler, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the test for OpenMP."""
    run_all = build.run_all

    def run(commands: Sequence[Sequence[str]], *rest: Any) -> list[str]:
        if any("-c" in command for command in commands) and not (disk / "filler").exists():
            fill(disk)
        return run_all(commands, *rest)

    monkeypatch.setattr(build, "run_all", run)
    with pytest.warns(MSTWarning, match="No space left"):
        path = build.build("baseline")
    assert not list(disk.glob("cache/*.so"))
    assert path.is_file()


def test_a_folder_that_cannot_be_written(
    compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(MSTWarning, match=r"cannot be kept in .*file/cache \(Not a directory\)"):
        library.Library("baseline")
    monkeypatch.setattr(private, "_made", {})
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(build.BuildError, match=r"\(Not a directory\), nor for this process alone \(No such file"):
        build.build("baseline")


def test_a_source_that_does_not_compile_is_no_lack_of_room(
    compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    compiler.on_compile("echo no such thing >&2; exit 1\n")
    with pytest.raises(build.BuildError, match="no such thing"):
        build.build("baseline")
    assert temporary(tmp_path) == []


def test_compilers_write_where_the_library_will_be(
    compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of temporary files may be full."""
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    compiler.on_compile(f"echo $TMPDIR >> {tmp_path}/where\n")
    build.build("baseline")
    places = set((tmp_path / "where").read_text().split())
    assert [Path(place).parent for place in places] == [tmp_path / "cache"]


@pytest.mark.skipif("avx512_bf16" not in build.supported_isas(), reason="this processor has no bf16 dot products")
def test_the_processor_is_measured_all_the_same(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "cache").mkdir()
    fill(disk)
    assert dot_rate.dot_rate(build.find_compiler) is not None
    assert [file.stat().st_size for file in disk.glob("cache/*")] == []


@pytest.mark.parametrize("cached", [False, True])
def test_a_disk_that_nothing_can_be_run_from(
    cached: bool, compiler: StubCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is loaded, from where something can be."""
    cache = tmp_path / "noexec"
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(cache))
    load = library.ctypes.CDLL

    def refusing(path: str) -> Any:
        if path.startswith(str(cache)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(library.ctypes, "CDLL", refusing)
    if cached:
        build.build("baseline")
        build.made.clear()  # by another process
        compiler.called()
    with pytest.warns(MSTWarning, match=r"loaded from .*noexec \(failed to map segment from shared object\), as on a"):
        library.Library("baseline")
    assert compiler.compiled() == (0 if cached else len(build.units()))
    assert len(list(cache.glob("*.so"))) == 1
    build.made.clear()
    monkeypatch.setattr(library, "copy_of", lambda path: path)
    with pytest.raises(OSError, match="failed to map segment"):
        library.Library("baseline")
