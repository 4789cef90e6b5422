"""Processes that begin at once measure one after the other, and what was disturbed is measured again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mst_compile.kernels.cpu import locks
from mst_compile.lowering import measured, turns
from mst_compile.lowering.cpu_choice import _Answers
from mst_compile.lowering.measured import TRIES, Measurements

pytest.importorskip("fcntl")

PROGRAM = """
import sys
from mst_compile.lowering import cpu_choice, turns

def say(what):
    print(what, flush=True)

def measure(question):
    say("measuring")
    return [float(sys.stdin.readline())]

lock, told = turns.lock, []
def locked(file):
    held = lock(file)
    if not held and not told:
        told.append(say("waiting"))
    return held

turns.lock = locked
cpu_choice._turns = turns.Turns(seconds=600)
answers = cpu_choice._Answers(1, [9.0], str, measure)
while question := sys.stdin.readline():
    told.clear()
    say(answers.of(question.strip())[0])
"""


class Process:
    """One that asks what it is told to; it says what it does, and measures what it is told."""

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"MST_COMPILE_TIMES": str(folder / "times"), "MST_COMPILE_CACHE_DIR": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._end = threading.Timer(300, self.process.kill)
        self._end.start()

    def tell(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self._end.cancel()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    processes = Process(tmp_path), Process(tmp_path)
    yield processes
    for process in processes:
        process.close()


def test_of_two_processes_one_measures_and_nobody_waits_for_one_that_was_killed(two: tuple[Process, Process]) -> None:
    first, second = two
    for question in ("products", "attention"):
        first.tell(question)
        assert first.says() == "measuring"
        second.tell(question)
        assert second.says() == "waiting"
        if question == "products":
            first.tell("0.5")
            assert [first.says(), second.says()] == ["0.5", "0.5"]
    first.process.kill()
    assert second.says() == "measuring"
    second.tell("0.25")
    assert second.says() == "0.25"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("MST_COMPILE_TIMES", raising=False)
    monkeypatch.setattr("mst_compile.lowering.cpu_choice._machine", lambda threads: "machine")
    return tmp_path


def is_free() -> bool:
    with open(turns._file(), "a") as file:
        return locks.lock(file.fileno())


def test_a_turn_is_over_whatever_happens_in_it(cache: Path) -> None:
    own = turns.Turns()

    def fails() -> None:
        with own.take(lambda: False):
            assert not is_free()
            with own.take(lambda: False):  # at once: what is measured asks for another measurement
                assert not is_free()
            assert not is_free()
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert is_free()


def test_who_keeps_a_turn_is_waited_for_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(turns.time, "sleep", lambda s: (slept.append(s), now.__setitem__(0, now[0] + s)))
    own, begun = turns.Turns(3.0), []
    with open(turns._file(), "a") as file:
        assert locks.lock(file.fileno())
        for _ in range(3):
            with own.take(lambda: False):
                begun.append(sum(slept))
        needless = turns.Turns(3.0)
        with needless.take(lambda: True):
            begun.append(sum(slept))
    assert begun[0] == pytest.approx(3.0, abs=2 * turns._POLL_SECONDS)
    assert begun[-1] <= begun[0] + 2 * turns._POLL_SECONDS


def test_without_locks_one_measures_all_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(file: int) -> bool:
        raise OSError("no locks on this file system")

    done = []
    monkeypatch.setattr(turns, "lock", refuses)
    with turns.Turns().take(lambda: False):
        done.append(1)
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", "/dev/null/none")
    with turns.Turns().take(lambda: False):
        done.append(2)
    assert done == [1, 2]


@pytest.mark.parametrize(("whole", "own", "share"), [(0.1, 0.1, 1.0), (0.1, 0.04, 0.4), (0.004, 0.0, 1.0)])
def test_a_processor_that_others_had_is_seen(
    whole: float, own: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = {"perf_counter": 5.0, "thread_time": 1.0}
    for name in clocks:
        monkeypatch.setattr(turns.time, name, lambda name=name: clocks[name])
    measure = lambda: clocks.update(perf_counter=5.0 + whole, thread_time=1.0 + own)  # noqa: E731
    assert turns.share_of_processor(measure) == pytest.approx(share)


def test_a_thread_that_sleeps_has_no_processor() -> None:
    assert turns.share_of_processor(lambda: time.sleep(0.05)) < turns.LOADED


# -- what was disturbed ------------------------------------------------------------------------------------------------


class Later:
    """Processes that begin one after the other; what each measures, and how much of the processor it had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self.asked = monkeypatch, 0

    def process(self, seconds: float, share: float, begun: float | None = None) -> float:
        def measure(_: Any) -> list[float]:
            self.asked += 1
            return [seconds]

        def of(run: Any) -> float:
            run()
            return share

        self._patch.setattr(measured, "_BEGUN", time.time() if begun is None else begun)
        self._patch.setattr(turns, "share_of_processor", of)
        answers = _Answers(1, [9.0], str, measure)
        assert answers.of("question") == answers.of("question")
        return answers.of("question")[0]


@pytest.fixture
def later(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Later:
    return Later(monkeypatch)


def test_what_was_disturbed_is_measured_again(later: Later, cache: Path) -> None:
    begun = time.time()
    assert later.process(1.0, 0.5) == 1.0, "good enough for this process"
    assert later.process(2.0, 0.5, begun) == 1.0, "who ran at that moment would be disturbed as well"
    assert later.process(3.0, 1.0) == 3.0
    assert later.process(4.0, 1.0) == 3.0
    assert later.asked == 2
    assert [file.name for file in cache.glob("times-*/*")] == ["question.json"]


def test_on_a_machine_that_is_always_busy_the_least_disturbed_stays(later: Later) -> None:
    shares = [0.3, 0.6, 0.5]
    assert len(shares) == TRIES
    assert [later.process(float(i), share) for i, share in enumerate(shares, 1)] == [1.0, 2.0, 2.0]
    assert later.process(9.0, 1.0) == 2.0
    assert later.asked == TRIES


def test_a_folder_that_others_go_by_keeps_what_this_run_went_by(
    later: Later, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MST_COMPILE_TIMES", str(tmp_path / "pinned"))
    assert later.process(1.0, 0.1) == 1.0
    assert later.process(2.0, 1.0) == 1.0


@pytest.mark.parametrize("text", ["", "{}", "[0.5]", '[0.5, 1, "now", 1.0]', "[0.5, 1, 1e400, 1.0]", "[2, 1, 0, 1.0]",
                                  "[0.5, 99, 0, 1.0]", "[0.5, 1, 0, -1.0]", "[0.5, 1, 4e9, 1.0]"])  # fmt: skip
def test_a_provisional_file_that_holds_anything_else(text: str, tmp_path: Path) -> None:
    """The last one is of a clock that was wrong."""
    (tmp_path / "question.provisional").write_text(text)
    found = Measurements(lambda: tmp_path, 1)
    assert found.find("question") is None
    assert not found.is_known("question")
    assert found.record_provisional("question", [3.0], 0.6) == (3.0,)
