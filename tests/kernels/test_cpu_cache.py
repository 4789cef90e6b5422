"""Compiled kernels on disk: what is damaged is rebuilt, what was killed leaves nothing, and nobody else can write."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mst_compile.kernels import cpu
from mst_compile.kernels.cpu import build, folder, library
from mst_compile.lowering import device
from stub_compiler import StubCompiler

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"CPU kernels: {cpu.why_unavailable()}")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubCompiler]:
    stub = StubCompiler(tmp_path)
    stub.copies_kernels()
    stub.runtime.touch()
    monkeypatch.setenv("CXX", str(stub.command))
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "made", set())
    yield stub
    stub.end_children()


def kept(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir() if file.name != "build.lock")


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- what is in the cache --------------------------------------------------------------------------------------------

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda _: b"",
    "another's": lambda _: b"#!/bin/sh\nexit 1\n",
    "one bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_no_whole_library_is_built_anew(damage: Callable[[bytes], bytes], compiler: StubCompiler) -> None:
    path = build.build("baseline")
    whole = path.read_bytes()
    path.unlink()  # a library may be loaded from it
    path.write_bytes(damage(whole))
    compiler.called()
    library.Library("baseline")
    assert compiler.compiled() == len(build.units())
    assert kept(path) == [path.name]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("threaded", [True, False])
def test_a_link_to_nowhere_or_a_folder_is_no_library(threaded: bool, compiler: StubCompiler) -> None:
    if not threaded:
        compiler.runtime.unlink()
    path = build.build("baseline")
    path.unlink()
    path.symlink_to("nowhere")
    path.with_name(path.name.replace(".so", "0.so")).mkdir()
    assert build.build("baseline") == path
    assert not path.is_symlink()


def as_if_whole(path: Path, content: bytes) -> Path:
    """Put ``content`` in the place of a library, under a name that fits it."""
    stem = path.name.rpartition("_")[0]
    path.unlink()
    other = path.with_name(f"{stem}_{hashlib.sha256(content).hexdigest()[:32]}.so")
    other.write_bytes(content)
    return other


def test_a_library_that_does_not_load_is_built_once_more(
    compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was built where other system libraries are."""
    good = build.build("baseline")
    other = as_if_whole(good, b"needs another libc")
    build.made.clear()  # another process has made it
    compiler.called()
    library.Library("baseline")
    assert compiler.compiled() == len(build.units())
    assert kept(good) == [good.name]

    compiler.output.write_bytes(other.name.encode())
    as_if_whole(good, b"needs another libc")
    build.made.clear()
    with pytest.raises(OSError, match="cpu_kernels"):
        library.Library("baseline")
    assert compiler.compiled() == len(build.units()), "tried once, not for ever"
    assert str(library._load_once.__wrapped__()).startswith("OSError: "), "and said"


def test_a_warm_cache_needs_no_compiler(compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    build._works.cache_clear()
    path = build.build("baseline")
    assert any("--version" in call for call in compiler.called())
    build._works.cache_clear()
    for mode in (0o755, 0o555):
        path.parent.chmod(mode)
        assert build.build("baseline") == path
        assert not compiler.called()
    monkeypatch.setenv("CXX", "/none/c++")
    assert build.build("baseline") == path
    library.Library("baseline")


def test_a_library_for_one_thread_serves_without_a_compiler(
    compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.runtime.unlink()
    path = build.build("baseline")
    monkeypatch.setenv("CXX", "/none/c++")
    assert build.build("baseline") == path
    path.unlink()
    with pytest.raises(build.BuildError, match="Install"):
        build.build("baseline")


def test_kernels_alone_do_not_make_inductor_work() -> None:
    """It must not fail where it has no compiler: the model runs in eager mode, with the kernels of a warm cache."""
    assert device.of("cpu").why_not_compiled() is None
    with build.inductor_config.patch({"cpp.cxx": (None, "/none/c++")}):
        assert "Install" in (device.of("cpu").why_not_compiled() or "")
    assert cpu.available()


# ---- builds that do not end ------------------------------------------------------------------------------------------


def test_a_build_that_was_killed_leaves_nothing(compiler: StubCompiler) -> None:
    compiler.hangs()
    for _ in range(2):
        started = len(compiler.children())
        builder = os.fork()
        if builder == 0:
            build.build("baseline")
            os._exit(0)
        wait_for(lambda: len(compiler.children()) > started)  # noqa: B023
        os.kill(builder, signal.SIGKILL)
        os.waitpid(builder, 0)
    compiler.end_children()
    compiler.works()
    begun = time.monotonic()
    path = build.build("baseline")
    assert time.monotonic() - begun < build._BUILD_SECONDS / 3, "nobody is waited for"
    assert kept(path) == [path.name]
    library.Library("baseline")


def test_an_interrupted_build_ends_its_compilers_and_can_be_begun_again(compiler: StubCompiler, tmp_path: Path) -> None:
    """Ctrl-C while the first step waits for the kernels."""
    compiler.hangs()

    def interrupt() -> None:
        wait_for(lambda: bool(compiler.children()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs behind them ignore it
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            build.build("baseline")
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    wait_for(lambda: all(map(gone, compiler.children())))
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["build.lock"]
    compiler.works()
    assert build.build("baseline").is_file()


def test_a_compiler_that_still_writes_keeps_no_folder(compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a builder that was killed, into the folder that is being removed."""
    where = build.build("baseline").parent
    (abandoned := where / "building-abandoned").mkdir()
    remove, late = shutil.rmtree, ["one.o", "two.o"]

    def rmtree(path: Path, **how: bool) -> None:
        remove(path, **how)
        if late and path == abandoned:
            path.mkdir()
            (path / late.pop()).touch()

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with build._workspace(where):
        assert not abandoned.exists()


def test_a_builder_that_lives_is_left_in_peace(compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not waited for longer than a build may take."""
    compiler.hangs()
    builder = os.fork()
    if builder == 0:
        build.build("baseline")
        os._exit(0)
    wait_for(lambda: bool(compiler.children()))
    compiler.works()
    monkeypatch.setenv("MST_COMPILE_BUILD_TIMEOUT", "0.7")
    path = build.build("baseline")
    (work,) = path.parent.glob("building-*")
    assert (work / "table.h").exists()
    os.kill(builder, signal.SIGKILL)
    os.waitpid(builder, 0)


def test_a_compiler_that_is_killed_is_an_error(compiler: StubCompiler, tmp_path: Path) -> None:
    compiler.on_compile("kill -9 $$\n")
    with pytest.raises(build.BuildError, match="status -9"):
        build.build("baseline")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["build.lock"]


def test_a_compiler_that_hangs_is_ended_with_its_children(
    compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler.hangs()
    monkeypatch.setenv("MST_COMPILE_BUILD_TIMEOUT", "0.5")
    with pytest.raises(build.BuildError, match=r"not finished after 0\.5 seconds"):
        build.build("baseline")
    assert compiler.children()
    wait_for(lambda: all(map(gone, compiler.children())))
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["build.lock"]


def test_a_compiler_that_does_not_answer_is_none(compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.command.write_text("#!/bin/sh\nsleep 1000\n")
    monkeypatch.setattr(build, "_ANSWER_SECONDS", 0.3)
    build._works.cache_clear()
    with pytest.raises(build.BuildError, match="not a working C"):
        build.build("baseline")
    build._works.cache_clear()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_time_limit_that_is_none(text: str, compiler: StubCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MST_COMPILE_BUILD_TIMEOUT", text)
    with pytest.raises(build.BuildError, match=f"MST_COMPILE_BUILD_TIMEOUT='{text}'"):
        build.build("baseline")


# ---- whose folder it is ----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the user's own, still empty, and none that is named."""
    monkeypatch.delenv("MST_COMPILE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o755)
    return tmp_path / "home"


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``path`` look like another user's."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345, follow_symlinks=False)
        return
    lstat = os.lstat

    def of_another(file: Path) -> os.stat_result:
        status = list(lstat(file))
        status[stat.ST_UID] = 12345 if Path(file) == path else status[stat.ST_UID]
        return os.stat_result(status)

    monkeypatch.setattr(folder.os, "lstat", of_another)


def test_the_default_folder_is_the_users_alone(home: Path) -> None:
    before = os.umask(0)
    try:
        made = folder.open_cache_dir()
    finally:
        os.umask(before)
    assert made == home / "mst_compile" == folder.cache_dir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert folder.open_cache_dir() == made


def others_write(home: Path, _: pytest.MonkeyPatch) -> None:
    (home / "mst_compile").mkdir()
    (home / "mst_compile").chmod(0o777)


def others_write_though_sticky(home: Path, _: pytest.MonkeyPatch) -> None:
    (home / "mst_compile").mkdir()
    (home / "mst_compile").chmod(0o1777)


def a_group_writes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "mst_compile").mkdir()
    (home / "mst_compile").chmod(0o775)
    monkeypatch.setattr(folder, "_is_own_group", lambda _: False)


def others_write_above(home: Path, _: pytest.MonkeyPatch) -> None:
    home.chmod(0o777)


def anothers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "mst_compile").mkdir()
    give_away(home / "mst_compile", monkeypatch)


def anothers_above(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(home, monkeypatch)


def anothers_link(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "mine").mkdir(mode=0o700)
    (home / "mst_compile").symlink_to("mine")
    home.chmod(0o1777)
    give_away(home / "mst_compile", monkeypatch)


def a_link_out_of_home(home: Path, _: pytest.MonkeyPatch) -> None:
    (home.parent / "open").mkdir()
    (home.parent / "open").chmod(0o777)
    (home.parent / "open" / "mine").mkdir(mode=0o700)
    (home / "mst_compile").symlink_to("../open/mine")


def a_link_to_a_link(home: Path, _: pytest.MonkeyPatch) -> None:
    (home.parent / "open").mkdir()
    (home.parent / "open").chmod(0o777)
    (home / "mine").mkdir(mode=0o700)
    (home.parent / "open" / "link").symlink_to(home / "mine")
    (home / "mst_compile").symlink_to(home.parent / "open" / "link")


UNSAFE = [others_write, others_write_though_sticky, a_group_writes, others_write_above, anothers, anothers_above]
UNSAFE += [anothers_link, a_link_out_of_home, a_link_to_a_link]


@pytest.mark.parametrize("how", UNSAFE)
def test_nothing_is_loaded_from_where_others_write(
    how: Callable[[Path, pytest.MonkeyPatch], None], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how(home, monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("loaded"))
    reason = library._load_once.__wrapped__()
    assert isinstance(reason, str)
    assert "set MST_COMPILE_CACHE_DIR to a folder" in reason
    with pytest.raises(OSError, match=r"belongs to another user|others may write"):
        folder.open_cache_dir()


def test_what_only_looks_unsafe_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky folder above, links of the user's own, and a group that has no other member."""
    (home.parent / "scratch").mkdir()
    (home.parent / "scratch").chmod(0o1777)
    (home.parent / "scratch" / "mine").mkdir()
    (home.parent / "scratch" / "mine").chmod(0o775)
    (home / "mst_compile").symlink_to("../scratch/mine")
    monkeypatch.setattr(folder, "_is_own_group", lambda _: True)
    assert folder.open_cache_dir() == home / "mst_compile"


def test_a_folder_that_the_user_names_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others_write(home, monkeypatch)
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(home / "mst_compile"))
    assert folder.open_cache_dir() == home / "mst_compile"


def test_without_a_home_there_is_a_folder_of_temporary_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(tmp_path))
    made = folder.open_cache_dir()
    assert made == tmp_path / f"mst_compile_{os.geteuid()}"
    made.chmod(0o777)
    with pytest.raises(folder.UntrustedFolderError, match="mode 777"):
        folder.open_cache_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(home))
    assert folder.cache_dir() == home / ".cache" / "mst_compile"


def test_without_a_folder_of_temporary_files_the_home_serves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that is read-only but for its volumes."""

    def none_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(folder.tempfile, "gettempdir", none_usable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    assert folder.open_cache_dir() == home / "mst_compile"
    monkeypatch.setattr(folder, "_in_home", lambda: Path("~/.cache/mst_compile"))  # of a user who has no home
    with pytest.raises(FileNotFoundError, match="set MST_COMPILE_CACHE_DIR"):
        folder.open_cache_dir()


def test_links_in_a_circle(home: Path) -> None:
    (home / "mst_compile").symlink_to("other")
    (home / "other").symlink_to("mst_compile")
    with pytest.raises(OSError, match="links"):
        folder.open_cache_dir()
