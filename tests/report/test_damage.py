"""Runs that diverged, records that something else has written, folders and names of all kinds: a page, or an error that
says which file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from mst_compile import MixedSparsity, sparsify
from mst_compile.__main__ import main
from mst_compile.errors import ArgumentError, MSTWarning, RecordError
from mst_compile.report import Recorder, read

STEPS = 12


def record(folder: Path | str, losses: list[float] | None = None, width: int = 32, **more: Any) -> Recorder:
    torch.manual_seed(0)
    schedule = MixedSparsity.published(STEPS, interval=2, warmup=0.25)
    model = sparsify(nn.Sequential(nn.Linear(width, 32)), schedule, block=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(model, folder, tokens_per_step=4, **more) as recorder:
        for i in range(STEPS):
            model(torch.randn(4, width)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = losses[i % len(losses)] if losses else 1 / (i + 1)
            recorder.log(loss=loss, val_loss=loss if i % 3 == 2 else None)
    return recorder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    record(folder)
    return folder


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# -- numbers -----------------------------------------------------------------------------------------------------------

LARGE = [1e308, -1e308, math.nan, 1.0, math.inf, -math.inf, 1e-320, 0.0, -0.0, 1e200, 3e38]


@pytest.mark.parametrize("losses", [LARGE, [math.nan], [math.inf], [1e308], [1e-320], [-1e308, 1e308]])
def test_any_number_may_be_a_loss(losses: list[float], tmp_path: Path) -> None:
    """It is written as it is, and a page is made."""
    record(tmp_path, losses)
    found = [row["loss"] for row in read(tmp_path).rows]
    wanted = [losses[i % len(losses)] for i in range(STEPS)]
    assert [repr(v) for v in found] == [repr(float(v)) for v in wanted]
    assert main(["report", str(tmp_path)]) == 0
    assert "Results" in (tmp_path / "report.html").read_text()


def test_a_number_beyond_all_floats(tmp_path: Path) -> None:
    with (
        Recorder(nn.Linear(2, 2), tmp_path) as recorder,
        pytest.raises(ArgumentError, match="loss is beyond all floats"),
    ):
        recorder.log(loss=10**400)


# -- records of others -------------------------------------------------------------------------------------------------


def lines(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """Of a file of records the second one changed."""

    def changed(text: str) -> str:
        records = [json.loads(line) for line in text.splitlines()]
        change(records[1 if len(records) > 1 else 0])
        return "".join(f"{json.dumps(each)}\n" for each in records)

    return changed


def whole(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        about = json.loads(text)
        change(about)
        return json.dumps(about)

    return changed


DAMAGE: dict[str, tuple[str, Callable[[str], str]]] = {
    "no step": ("scalars.jsonl", lines(lambda r: r.pop("step"))),
    "a step that is a text": ("scalars.jsonl", lines(lambda r: r.update(step="3"))),
    "a step that is a fraction": ("scalars.jsonl", lines(lambda r: r.update(step=2.5))),
    "seconds that are a text": ("scalars.jsonl", lines(lambda r: r.update(seconds="long"))),
    "a loss that is a list": ("scalars.jsonl", lines(lambda r: r.update(loss=[1]))),
    "an event of a step alone": ("events.jsonl", lambda _: '{"step": 3}\n'),
    "an event without weights": ("events.jsonl", lines(lambda r: r.pop("weights"))),
    "an event whose weights are a list": ("events.jsonl", lines(lambda r: r.update(weights=[1]))),
    "an event with a density that is none": ("events.jsonl", lines(lambda r: r.update(density=None))),
    "masks that are a list": ("masks.jsonl", lines(lambda r: r.update(masks=[1]))),
    "masks that are too short": ("masks.jsonl", lines(lambda r: next(iter(r["masks"].values())).update(bits="AA=="))),
    "masks that are no base64": ("masks.jsonl", lines(lambda r: next(iter(r["masks"].values())).update(bits="A"))),
    "masks without a shape": ("masks.jsonl", lines(lambda r: next(iter(r["masks"].values())).pop("shape"))),
    "phases that are a number": ("run.json", whole(lambda r: r.update(phases=3))),
    "phases of two": ("run.json", whole(lambda r: r.update(phases=[["x", 1]]))),
    "weights without shapes": ("run.json", whole(lambda r: r.update(sparse=[{"name": "x"}]))),
    "nothing": ("run.json", lambda _: ""),
    "a list": ("run.json", lambda _: "[]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_no_recorder_wrote_is_refused_by_name(
    what: str, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change = DAMAGE[what]
    folder = copied(written, tmp_path / "run")
    (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(RecordError, match=f"{folder / name}"):
        read(folder)
    assert main(["report", str(folder)]) == 2
    assert str(folder / name) in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [lambda r: r.update(loss=None), lambda r: r.update(val_loss=None), lambda r: r.pop("loss")]
)
def test_scalars_may_be_missing(change: Any, written: Path, tmp_path: Path) -> None:
    folder = copied(written, tmp_path / "run")
    file = folder / "scalars.jsonl"
    file.write_text(lines(change)(file.read_text()))
    assert main(["report", str(folder)]) == 0


# -- folders and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "a\0b", "/proc/run", "/sys/run", "FILE/run"])
def test_a_folder_that_cannot_be(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = folder.replace("FILE", str(tmp_path / "file"))
    with pytest.raises(ArgumentError, match="folder"):
        Recorder(nn.Linear(2, 2), folder)


def test_the_run_of_another_model_is_not_gone_on_with(written: Path, tmp_path: Path) -> None:
    folder = copied(written, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(RecordError, match=r"a model of 1056 parameters, and this one has 9: name another folder"):
        Recorder(nn.Linear(2, 3), folder, step=6)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["\udcff", "a\0b", "\u65e5\u672c", "$x^{", "a\nb", "{{ 7 * 7 }}", "x" * 3000, "\u202eabc"]
)
def test_any_text_may_be_a_label(name: str, tmp_path: Path) -> None:
    record(tmp_path, label=name, notes={"note": name})
    assert main(["report", str(tmp_path), str(tmp_path)]) == 0
    assert "49" not in read(tmp_path).label


def test_the_name_of_a_folder_that_is_no_text(tmp_path: Path) -> None:
    try:
        folder = tmp_path / os.fsdecode(b"run-\xff")
        record(folder)
    except OSError:
        pytest.skip("this file system has no such names")
    assert main(["report", str(folder)]) == 0
    assert "run-\\udcff" in (folder / "report.html").read_text()


def test_a_folder_of_runs_is_no_run(written: Path, tmp_path: Path) -> None:
    copied(written, tmp_path / "one")
    with pytest.raises(RecordError, match=f"has no run.json. Runs are in {tmp_path / 'one'}"):
        read(tmp_path)


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    """Training goes on; what is recorded of it is lost, and said to be."""
    recorder = Recorder(nn.Linear(2, 2), tmp_path / "run")
    recorder.log(loss=1)
    for file in (tmp_path / "run").iterdir():
        file.unlink()
    (tmp_path / "run").rmdir()
    with pytest.warns(MSTWarning, match=r"records of .*run' cannot be written .*No such file") as said:  # noqa: PT031
        for step in range(5):
            recorder.log(loss=1, new=step)
        recorder.close()
    assert len(said) == 1
