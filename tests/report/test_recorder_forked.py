"""A Recorder in a process that was forked, which trains on its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from forks import in_child, skip_if_autograd_refuses
from helpers import Blocks

from mst_compile import Constant, sparsify
from mst_compile.errors import RecordError
from mst_compile.report import Recorder, read

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def test_what_a_forked_process_trains_is_not_in_the_records(tmp_path: Path) -> None:
    """It has the same Recorder, told of its events; its steps are no part of this run."""
    model = sparsify(Blocks(), Constant(0.7, interval=1), block=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()

    def child() -> str:
        step()
        for record in (lambda: recorder.log(loss=1.0), lambda: recorder.sample("text")):
            with pytest.raises(RecordError, match=r"forked.*folder of its own"):
                record()
        recorder.close()
        with Recorder(model, tmp_path / "child") as own:
            step()
            own.log(loss=2.0)
        return f"{own.step}"

    with Recorder(model, tmp_path / "run") as recorder:
        step()
        recorder.log(loss=3.0)
        skip_if_autograd_refuses()
        files = {file: file.read_bytes() for file in (tmp_path / "run").iterdir()}
        assert in_child(child) == "3"
        assert {file: file.read_bytes() for file in (tmp_path / "run").iterdir()} == files
        step()
        recorder.log(loss=4.0)
    assert [(row["step"], row["loss"]) for row in read(tmp_path / "run").rows] == [(1, 3.0), (2, 4.0)]
    assert [event["step"] for event in read(tmp_path / "run").events] == [1, 2]
    assert [event["step"] for event in read(tmp_path / "child").events] == [3]
