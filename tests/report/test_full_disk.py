"""Records, pages and files on a disk that is full, or becomes it in the middle; and interrupts between two writes."""

from __future__ import annotations

import csv
import errno
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import fill, small_disk
from torch import nn

from mst_compile import Constant, sparsify
from mst_compile.errors import MSTWarning, WriteError
from mst_compile.export import save
from mst_compile.report import Recorder, files, history


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 3) as made:
        yield made


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / history.TABLE).read_text(), newline="")))


def check(folder: Path, steps: int) -> None:
    """All records are there, in both files."""
    rows = history.read(folder).rows
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert [row["loss"] for row in rows] == [float(step) for step in range(1, steps + 1)]
    assert [float(row["loss"]) for row in table(folder)] == [row["loss"] for row in rows]


# -- full disks --------------------------------------------------------------------------------------------------------


def test_records_wait_for_room(disk: Path) -> None:
    """A column that is new, events and masks among them."""
    recorder, before = Recorder(nn.Linear(2, 2), disk / "run"), None
    with pytest.warns(MSTWarning) as said:  # noqa: PT031
        for step in range(1, 401):
            if step == 50:
                before = fill(disk)
            if step == 300:
                assert before is not None
                before.unlink()
            row = recorder.log(loss=step, **({"more": step} if step > 100 else {}))
            assert row is not None
            if step == 200:
                assert 40 <= len(history.read(disk / "run").rows) < 200, "what is there can be read"
        recorder.close()
    assert [str(w.message) for w in said if issubclass(w.category, MSTWarning)] == [
        f"records of {str(disk / 'run')!r} cannot be written (No space left on device): training goes on, and they "
        "wait in memory until they can be"
    ]
    check(disk / "run", 400)
    assert [row["more"] for row in table(disk / "run")][99:102] == ["", "101.0", "102.0"]


def test_what_is_lost_is_said(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_MOST_WAITING", 20_000)
    recorder = Recorder(nn.Linear(2, 2), disk / "run")
    recorder.log(loss=1)
    filler = fill(disk)
    with pytest.warns(MSTWarning) as said:  # noqa: PT031
        for step in range(2, 2001):
            recorder.log(loss=step)
        waiting = recorder._records._scalars._state[1]
        assert len(waiting) <= 20_000, "memory is bounded"
        recorder.close()
    first, second = (str(w.message) for w in said if issubclass(w.category, MSTWarning))
    assert "training goes on" in first
    kept = len(history.read(disk / "run").rows)
    assert kept > 0
    assert second.startswith(f"{2000 - kept} records of")
    with pytest.raises(WriteError, match="cannot be written"):
        Recorder(nn.Linear(2, 2), disk / "run", step=kept)
    check(disk / "run", kept)
    filler.unlink()
    with Recorder(nn.Linear(2, 2), disk / "run", step=kept) as again:
        again.log(loss=kept + 1)
    check(disk / "run", kept + 1)


def test_what_was_asked_for_is_refused_and_the_old_file_stays(disk: Path) -> None:
    recorder = Recorder(nn.Linear(2, 2), disk / "run")
    recorder.log(loss=1)
    recorder.sample("old")
    model = sparsify(nn.Linear(512, 512), Constant(0.5), block=8)
    save(model, disk / "model.safetensors")
    old = (disk / "model.safetensors").read_bytes()
    filler = fill(disk)
    left = sorted(disk.rglob("*"))
    with pytest.raises(WriteError, match=r"sample\.txt' cannot be written, and is as it was: No space left") as error:
        recorder.sample("new" * 100_000)
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(WriteError, match=r"model\.safetensors' cannot be written.*No space left") as error:
        save(model, disk / "model.safetensors")
    assert error.value.errno == errno.ENOSPC
    pytest.importorskip("matplotlib")
    with pytest.raises(WriteError, match=r"loss\.png' cannot be written"):
        recorder.draw()
    with pytest.raises(WriteError, match="cannot be written"):
        Recorder(nn.Linear(2, 2), disk / "other")
    assert (disk / "run" / "sample.txt").read_text() == "old"
    assert (disk / "model.safetensors").read_bytes() == old
    assert not [f for f in disk.rglob("*") if f not in left and not f.is_dir() and f.stat().st_size], "no half files"
    filler.unlink()
    with Recorder(nn.Linear(2, 2), disk / "other") as other:  # nobody holds the folder
        other.log(loss=1)
    recorder.close()


def test_a_logger_that_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    run = types.SimpleNamespace(id="abc", log=refuse, finish=refuse)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    with (  # noqa: PT031
        pytest.warns(MSTWarning, match=r"Disk quota exceeded") as said,
        Recorder(nn.Linear(2, 2), tmp_path, wandb=True) as recorder,
    ):
        for step in range(1, 4):
            recorder.log(loss=step)
    assert len(said) == 1
    check(tmp_path, 3)


# -- writes that take a part, or are interrupted -----------------------------------------------------------------------


class _Writes:
    """Stands for the system's writes: takes some bytes, raises, or is interrupted before or after one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write, self.plan, self.calls = files._Growing.write, {}, 0
        monkeypatch.setattr(files._Growing, "write", lambda out, data: self(out, data))

    def __call__(self, out: files._Growing, data: bytes) -> int:
        self.calls += 1
        how = self.plan.get(self.calls)
        if how == "before":
            raise KeyboardInterrupt
        taken = self._write(out, data[:7] if how in ("part", "part, after") else data)
        if how in ("after", "part, after"):
            raise KeyboardInterrupt
        return taken


@pytest.mark.parametrize("how", ["before", "after", "part", "part, after"])
@pytest.mark.parametrize("calls", [(5,), (6,), (5, 6), (5, 6, 7), (20,)])
def test_an_interrupted_record_is_whole_at_the_next(
    how: str, calls: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes a record: calls of odd numbers are of ``scalars.jsonl``, the others of ``scalars.csv``."""
    writes = _Writes(monkeypatch)
    recorder = Recorder(nn.Linear(2, 2), tmp_path)
    writes.calls, writes.plan = 0, dict.fromkeys(calls, how)
    for step in range(1, 11):
        try:
            recorder.log(loss=step, step=step)
        except KeyboardInterrupt:
            assert how != "part"
    recorder.close()
    check(tmp_path, 10)
    assert (tmp_path / history.SCALARS).read_text().count("\n") == 10
    assert all(json.loads(line) for line in (tmp_path / history.SCALARS).read_text().splitlines())


def test_losses_of_an_interrupted_step_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    whole, other = (Recorder(model, tmp_path / name, tokens_per_step=8) for name in ("whole", "other"))
    writes = _Writes(monkeypatch)
    for step in range(1, 6):
        whole.log(loss=torch.tensor(step))
        writes.calls, writes.plan = 0, {1: "before"} if step in (2, 3) else {}
        try:
            other.log(loss=step, step=step)
        except KeyboardInterrupt:
            assert step in (2, 3)
        writes.plan = {}
    whole.close()
    other.close()
    for name in ("flops", "flops_of_dense"):
        assert history.read(tmp_path / "whole").column(name) == history.read(tmp_path / "other").column(name)
