"""``python -m mst_compile try`` and its folder: what cannot be written to, what is others', what an interruption and a
full disk leave behind, and terminals that cannot show everything."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from mst_compile.__main__ import main
from mst_compile.errors import MSTWarning
from mst_compile.report import files, read
from mst_compile.tryout import command, place

TINY = ["--width", "64", "--layers", "1", "--context", "32", "--batch", "2", "--no-compile"]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    file = tmp_path / "my.txt"
    file.write_text("the quick brown fox jumps over the lazy dogs\n" * 400)
    return file


def run(words: Path, out: Path | str, *more: Any) -> int:
    return main(["try", "--data", str(words), "--out", str(out), *TINY, *map(str, more or ("--steps", 10))])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["below a file", "no such device", "not writable"])
def test_a_folder_that_cannot_be_written_to(where: str, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is trained."""
    out = {"below a file": words / "out", "no such device": Path("/proc/out"), "not writable": Path("/sys/out")}[where]
    if not out.parent.exists():
        pytest.skip(f"there is no {out.parent} here")
    assert run(words, out) == 2
    said = capsys.readouterr()
    assert f"--out must name a folder that can be written to, and {str(out)!r} is none: " in said.err
    assert not said.out


@pytest.mark.parametrize("argument", ["--out", "--data"])
def test_an_empty_path(argument: str, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variable of the shell that is not set is not the current folder."""
    with pytest.raises(SystemExit):
        main(["try", "--data", str(words), "--out", "out", argument, ""])
    assert f"argument {argument}: a path is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", place.RUNS)
@pytest.mark.parametrize("more", [("--steps", 10), ("--minutes", 0.01)])
def test_what_others_keep_in_the_folder_stays(
    name: str, more: Any, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / name / "inside").mkdir(parents=True)
    (out / name / "inside" / "mine.txt").write_text("precious")
    before = tree(out)
    assert run(words, out, *more) == 2
    assert str(out / name) in capsys.readouterr().err
    assert tree(out) == before


def test_a_run_that_is_left_out_leaves_what_was_put_beside_it(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense run of an earlier try is gone, and not a file of the user's."""
    out = tmp_path / "out"
    assert run(words, out) == 0
    (out / "dense" / "mine.txt").write_text("precious")
    monkeypatch.setattr(command, "_FEWEST", 10)
    assert run(words, out, "--minutes", 1e-3) == 0
    assert tree(out / "dense") == {"mine.txt": b"precious"}


def test_home_is_meant_by_a_tilde(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["try", "--data=~/my.txt", "--out=~/out", *TINY, "--steps", "10", "--no-dense"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "~").exists()
    assert main(["report", "~/out/sparse", "--out=~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
    capsys.readouterr()
    assert main(["report", "~/out"]) == 2
    assert f"Runs are in {tmp_path / 'out' / 'sparse'}" in capsys.readouterr().err


def test_two_tries_do_not_mix(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is refused, and the next one is not."""
    out = tmp_path / "out"
    with place.held(out):
        assert run(words, out) == 2
        assert "another try is writing to" in capsys.readouterr().err
        assert not any(out.iterdir())
    assert run(words, out, "--steps", 10, "--no-dense") == 0


# -- in the middle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["dense", "sparse", "sample", "report"])
def test_an_interruption_is_said_and_nothing_is_in_the_way_of_the_next_try(
    stage: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    train = command.Run._train_step

    def some(self: command.Run) -> None:
        if self.name == stage and self.step == 5:
            raise KeyboardInterrupt
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(command.Run, "_train_step", some)
        if stage == "sample":
            patch.setattr("mst_compile.tryout.training.sample", interrupted)
        if stage == "report":
            patch.setattr("mst_compile.report.page.render", interrupted)
        assert run(words, tmp_path / "out") == 130
    said = capsys.readouterr()
    assert said.err.strip() == "interrupted"
    assert not [name for name in tree(tmp_path / "out") if name.endswith(".tmp")]
    assert len(read(tmp_path / "out" / "dense").rows) == (5 if stage == "dense" else 10)  # what was recorded is there
    assert run(words, tmp_path / "out") == 0
    assert [len(read(tmp_path / "out" / name).rows) for name in place.RUNS] == [10, 10]


@pytest.mark.parametrize("name", ["model.pt", "run.json", "scalars.csv", "report.html"])
def test_a_disk_that_is_full(
    name: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said with the name of the file, which holds what it held before, or is not there."""

    def full(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).name == f"{name}.tmp":
            raise OSError(28, "No space left on device")

    if not Path("/proc/self/fd").exists():
        pytest.skip("files are not known by their numbers here")
    monkeypatch.setattr(files.os, "fsync", full)
    assert run(words, tmp_path / "out") in (1, 2)
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "No space left on device" in err
    assert name in err
    assert not [left for left in tree(tmp_path / "out") if left.endswith((".tmp", name))]


def test_a_report_that_cannot_be_written(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words, tmp_path / "out", "--steps", 10, "--no-dense") == 0
    if Path("/sys").exists():
        assert main(["report", str(tmp_path / "out" / "sparse"), "--out", "/sys/page.html"]) == 2
        assert "--out must name a file that can be written, and '/sys/page.html' is none" in capsys.readouterr().err


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_what_was_asked_for_is_no_warning(words: Path, tmp_path: Path) -> None:
    """Eager products under --no-compile."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        assert run(words, tmp_path / "out", "--steps", 12, "--no-dense") == 0


def test_a_terminal_that_has_not_all_characters(words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no text in the system's encoding included."""
    words = words.rename(tmp_path / "w\u00f6rter\udcff.txt")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors="strict"))
    more = ("--steps", 10, "--no-dense", "--prompt", "\u65e5\udcff")
    assert run(words, tmp_path / "\u65e5\u672c\udcff", *more) == 0
    sys.stdout.flush()
    assert b"\\u65e5\\u672c\\udcff" in written.getvalue()
    assert b"100%" not in written.getvalue()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "usage: python -m mst_compile {doctor,report,try}" in capsys.readouterr().out


def test_no_compiler(words: Path, tmp_path: Path) -> None:
    """Said at once, in a line, and not by Inductor in the middle of the first step."""
    arguments = ["try", "--data", str(words), "--out", str(tmp_path / "out"), "--steps", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "mst_compile", *arguments],
        env=os.environ | {"CXX": "/nonexistent/g++"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "/nonexistent/g++" in done.stderr
    assert "Install g++ or clang++" in done.stderr
    assert "--no-compile" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_reader_who_has_left(words: Path, tmp_path: Path) -> None:
    """As ``| head -1`` does: no traceback, not even at the interpreter's end."""
    arguments = ["try", "--data", str(words), "--out", str(tmp_path / "out"), *TINY, "--steps", "10"]
    command = [sys.executable, "-m", "mst_compile", *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1
    assert not done.stderr
