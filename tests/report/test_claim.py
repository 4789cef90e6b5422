"""A folder has one Recorder at a time; long runs are read, resumed and reported without being held in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

from mst_compile.errors import RecordError
from mst_compile.report import Recorder, files, history
from mst_compile.report.claim import FILE, fcntl

ANOTHER = (
    "import sys, torch, mst_compile; mst_compile.report.Recorder(torch.nn.Linear(8, 8), sys.argv[1], overwrite=True)"
)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_two_recorders_of_one_folder(tmp_path: Path) -> None:
    first = Recorder(model(), tmp_path)
    second = Recorder(model(), tmp_path)
    second.log(loss=2.0)
    for use in (lambda: first.log(loss=1.0), lambda: first.sample("text")):
        with pytest.raises(RecordError, match="a newer Recorder has taken over"):
            use()
    first.close()
    second.log(loss=3.0)
    second.close()
    assert [row["loss"] for row in history.read(tmp_path).rows] == [2.0, 3.0]
    with Recorder(model(), tmp_path, step=2) as third:
        third.log(loss=4.0)
    assert [row["loss"] for row in history.read(tmp_path).rows] == [2.0, 3.0, 4.0]


@pytest.mark.skipif(fcntl is None, reason="this system has no locks of files")
def test_a_recorder_of_another_process(tmp_path: Path) -> None:
    def another() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", ANOTHER, str(tmp_path)], capture_output=True, text=True)

    recorder = Recorder(model(), tmp_path)
    taken_over = Recorder(model(), tmp_path)
    recorder.close()
    taken_over.log(loss=1.0)
    refused = another()
    assert refused.returncode == 1
    assert "RecordError: a Recorder of another process is writing" in refused.stderr
    assert len(history.read(tmp_path).rows) == 1
    taken_over.close()
    assert not (tmp_path / FILE).exists()
    assert another().returncode == 0
    assert history.read(tmp_path).rows == []


def test_a_long_run_is_resumed_in_little_memory(tmp_path: Path) -> None:
    steps = 8_000
    with Recorder(model(), tmp_path, tokens_per_step=8) as recorder:
        row = recorder.log(loss=1.0)
    assert row is not None
    with open(tmp_path / history.SCALARS, "a", encoding="utf-8") as out:
        out.writelines(f"{files.dumps(row | {'step': step})}\n" for step in range(2, steps + 1))
    size = (tmp_path / history.SCALARS).stat().st_size
    twin = model()
    tracemalloc.start()
    with Recorder(twin, tmp_path, tokens_per_step=8, step=steps - 5) as recorder:
        assert recorder.log(loss=torch.tensor(2.0), val_loss=3.0) is not None  # a column more: the table is made anew
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 3 << 19
    assert peak < size / 3, f"{peak >> 10} KiB for {size >> 10} KiB of records"
    found = history.read(tmp_path)
    assert [row["step"] for row in found.rows] == list(range(1, steps - 3))
    assert found.about["resumed"] == [steps - 5]
    table = (tmp_path / history.TABLE).read_text().splitlines()
    assert len(table) == steps - 3
    assert table[0].split(",")[-1] == "val_loss"


def test_records_are_read_one_by_one(tmp_path: Path) -> None:
    file = tmp_path / "records"
    file.write_text('{"a": 1}\n{"a": 2}\nno record\n{"a": 3}')
    records = files.each(file)
    assert [next(records), next(records)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(RecordError, match="line 3 is no record: 'no record'"):
        next(records)
    file.write_text(json.dumps({"a": 1}) + '\n{"a": 2}')
    assert files.read(file) == [{"a": 1}, {"a": 2}], "the last without an end of line counts"
    file.write_text(json.dumps({"a": 1}) + '\n{"a": ')
    assert files.read(file) == [{"a": 1}], "and not if it was not finished"
