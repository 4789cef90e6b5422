"""``python -m mst_compile try``: from a text to weights, a sample and a report; what it says of bad input."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from mst_compile.__main__ import main
from mst_compile.errors import DataError
from mst_compile.report import read
from mst_compile.tryout import command, text
from mst_compile.tryout.model import GPT, Shape

TINY = "--width 64 --layers 1 --context 32 --batch 2"


@pytest.fixture
def words(tmp_path: Path) -> Path:
    drawn = random.Random(0).choices(["the", "quick", "brown", "fox", "jumps", "over", "<b>lazy</b>", "dogs"], k=4000)
    file = tmp_path / "my.txt"
    file.write_text("\n".join(" ".join(drawn[i : i + 9]) for i in range(0, len(drawn), 9)))
    return file


def run(*arguments: str | Path) -> int:
    return main(["try", *map(str, arguments)])


def test_from_text_to_report(words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled, as users run it; an earlier try is replaced."""
    out = tmp_path / "out"
    assert run("--data", words, "--out", out, *TINY.split(), "--steps", 20, "--no-compile") == 0
    capsys.readouterr()
    assert run("--data", words, "--out", out, *TINY.split(), "--steps", 12) == 0
    said = capsys.readouterr().out
    for expected in ("dense: compiling", "sparse: compiling", "step   12 of 12", "writes:", "report:"):
        assert expected in said
    for name in ("dense", "sparse"):  # said before it is waited for
        assert said.index(f"{name}: compiling,") < said.index(f"{name}: step")
    for name in ("sparse", "dense"):
        history = read(out / name)
        assert [row["step"] for row in history.rows] == list(range(1, 13))
        assert history.last("val_loss") is not None
        assert history.last("compile_seconds") > 0  # type: ignore[operator]
    sparse, dense = (read(out / name) for name in ("sparse", "dense"))
    assert sparse.rows[0]["density"] == pytest.approx(0.2, abs=0.02)
    assert sparse.rows[-1]["density"] == 1.0
    shape = Shape(**json.loads((out / "sparse" / "shape.json").read_text()))
    assert dense.rows[-1]["flops"] == 12 * shape.dense_flops(64)
    assert sparse.rows[-1]["flops_of_dense"] == sparse.rows[-1]["flops"] / dense.rows[-1]["flops"]
    model = GPT(shape)
    model.load_state_dict(torch.load(out / "sparse" / "model.pt", weights_only=True))
    page = (out / "report.html").read_text()
    assert "<b>lazy" not in page
    assert "What the model wrote" in page


def test_time_says_how_many_steps(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first steps of the dense model tell; where there is too little time for two, there is one."""
    monkeypatch.setattr(command, "_AT_LEAST", 12)
    monkeypatch.setattr(command, "_FEWEST", 12)
    more = ("--data", words, *TINY.split(), "--no-compile")
    monkeypatch.setattr(command.Run, "seconds_per_step", lambda self: 1.0)
    minutes = (command._REPORT + 1.8 * 20) / 60
    assert run(*more, "--out", tmp_path / "both", "--minutes", minutes) == 0
    found = re.search(r"time for (\d+) steps dense and as many sparse", capsys.readouterr().out)
    assert found is not None
    assert 12 <= int(found[1]) <= 20
    for name in ("sparse", "dense"):
        assert len(read(tmp_path / "both" / name).rows) == int(found[1])
    assert run(*more, "--out", tmp_path / "one", "--minutes", 0.01) == 0
    assert "12 steps sparse; time allows no dense run" in capsys.readouterr().out
    assert not (tmp_path / "one" / "dense").exists()
    assert run(*more, "--out", tmp_path / "asked", "--steps", 10, "--no-dense") == 0
    assert not (tmp_path / "asked" / "dense").exists()


BAD: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot be read"),
    "empty": (b"", "there is no text in it"),
    "blank": (b" \n\n\t", "there is no text in it"),
    "tiny": (b"hello", "5 bytes of text are too few"),
    "binary": (b"\x7fELF\0\0" * 4000, "no text file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = BAD[name]
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    assert run("--data", file, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert str(file) in said.err
    assert not (tmp_path / "out").exists()
    assert not said.out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("width", 100),
        ("layers", 0),
        ("steps", 3),
        ("minutes", 0),
        ("minutes", "nan"),
        ("minutes", "inf"),
        ("context", -1),
        ("out", "FILE"),
        ("seed", -1),
        ("seed", 2**63 - 1),
        ("seed", 10**20),
    ],
)
def test_bad_options(option: str, value: Any, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--data", words, f"--{option}", words if value == "FILE" else value) == 2
    assert f"--{option}" in capsys.readouterr().err


@pytest.mark.parametrize("size", [640, 700, 16_400, 17_000, 33_000, 200_000])
def test_every_text_that_is_taken_has_validation_text(size: int, tmp_path: Path) -> None:
    """Whatever its last piece is like."""
    file = tmp_path / "text"
    file.write_text(("some words \u00e9. " * (size // 13 + 1))[:size])
    for seed in range(8):
        train, validation = text.load([file], 32, seed)
        assert len(train) > 32
        assert text.validation_batches(validation, 4, 32, 2)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig", "utf-16"])
def test_encodings_are_read(encoding: str, tmp_path: Path) -> None:
    """Of several files, one with a mark within the whole."""
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(("caf\u00e9 " * 300).encode(encoding))
    train, _ = text.load(files, 32, 0)
    found = bytes(train.tolist()).decode()
    assert "caf\u00e9" in found
    assert "\ufeff" not in found


def test_a_device_without_an_end_is_no_text() -> None:
    with pytest.raises(DataError, match="no text file"):
        text.load([Path("/dev/zero")], 32, 0)


def test_utf_16_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe\x00\xd8" * 400 + b"a")
    with pytest.raises(DataError, match="begins like a text in UTF-16"):
        text.load([tmp_path / "text"], 32, 0)
