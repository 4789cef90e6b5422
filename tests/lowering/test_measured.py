"""Measurements on disk."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import pytest
from mst_compile.lowering.measured import Measurements


def new(folder: Path, length: int = 2) -> Measurements:
    """As another process has it."""
    return Measurements(lambda: folder, length)


def test_what_one_process_measures_others_find(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "on the way"
    new(folder).record("64x64 forward", (0.5, 2.0))
    new(folder).record("64x64 grad-weight", (0.25, 1.0))
    other = new(folder)
    assert other.find("64x64 forward") == (0.5, 2.0)
    assert other.find("64x6") is None
    assert other.starting_with("64x64 ") == [(0.5, 2.0), (0.25, 1.0)]
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".json"], "no drafts stay"


def test_what_a_process_knows_does_not_change_under_it(tmp_path: Path) -> None:
    mine = new(tmp_path)
    mine.record("product", (1.0, 2.0))
    new(tmp_path).record("product", (3.0, 4.0))
    assert mine.find("product") == (1.0, 2.0)
    assert new(tmp_path).find("product") == (3.0, 4.0)


DAMAGED = [
    "", "[1", "{}", "5", '"ab"', "[1]", "[1, 2, 3]", '["a", 1]', "[0, 1]", "[-1, 1]", "[NaN, 1]", "[null, 1]",
    f"[1{400 * '0'}, 1]", 100_000 * "[", "\0\0\0\0", "\udcff[1, 2]",
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_file_that_holds_anything_else_is_no_measurement(text: str, tmp_path: Path) -> None:
    (tmp_path / "product.json").write_text(text, errors="surrogateescape")
    told: list[Path] = []
    measurements = Measurements(lambda: tmp_path, 2, damaged=told.append)
    assert measurements.find("product") is None
    assert measurements.starting_with("prod") == []
    assert told == [tmp_path / "product.json"]
    assert measurements.find("another") is None
    measurements.record("product", (1.0, 2.0))
    assert new(tmp_path).find("product") == (1.0, 2.0)
    assert len(told) == 1


@pytest.mark.parametrize("numbers", [(0.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1.0,), (-1.0, 2.0)])
def test_what_is_no_time_is_not_kept(numbers: tuple[float, ...], tmp_path: Path) -> None:
    mine = new(tmp_path)
    mine.record("product", numbers)
    assert mine.find("product") is None
    assert not list(tmp_path.iterdir())


def test_without_a_folder_the_process_remembers(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    mine = new(in_the_way)
    mine.record("product", (1.0, 2.0))
    assert mine.find("product") == (1.0, 2.0)
    assert mine.find("another") is None


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_written_whole_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(self: Path, target: Path) -> None:
        raise error

    lost: list[OSError] = []
    mine = Measurements(lambda: tmp_path, 2, lost.append)
    monkeypatch.setattr(Path, "replace", replace)
    with contextlib.suppress(KeyboardInterrupt):
        mine.record("product", (1.0, 2.0))
    assert lost == ([error] if isinstance(error, OSError) else [])
    assert not list(tmp_path.iterdir())
    assert mine.find("product") == (1.0, 2.0)
