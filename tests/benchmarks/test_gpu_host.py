"""What the host does in a step on a GPU, counted: no more launches than the dense model's, and no waiting."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.gpu import host


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("host") / "host.json"
    assert host.main(["--model", "tiny", "--steps", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def _kernels(step: dict[str, Any], part: str) -> int:
    return sum(count for name, count in step["kernels"].items() if part in name)


def test_a_step_waits_for_nothing(account: dict[str, Any]) -> None:
    for side in ("inductor", "mst"):
        assert account[side]["step"]["waits"] == []
        assert account[side]["step"]["new memory"] <= 1
    assert "upload" not in account["mst"]["step"]["operators"]


def test_a_step_launches_no_more_than_the_dense_one(account: dict[str, Any]) -> None:
    step, dense = account["mst"]["step"], account["inductor"]["step"]
    assert step["launches"] <= dense["launches"]
    assert step["allocations"] <= dense["allocations"]
    # Four layers and the tied head: each weight is rounded once, forward.
    products = _kernels(step, "tem") - 5
    assert products == 10  # forward and grad-input; grad-weight is dense in blocks of 32, its sums are templates
    assert step["operators"]["mm.dtype_out"] == 5
    assert "zero_" not in step["operators"]
    # One for the embedding, whose gradient is not the product's alone, one for all that clipping has changed.
    assert step["kernels"]["zero_inactive"] == 2


def test_a_second_backward_pass_masks_what_the_first_does(account: dict[str, Any]) -> None:
    """The embedding's gradient: sums of what products computed hold zeros."""
    one, two = account["mst"]["step"], account["mst"]["two passes"]
    assert two["waits"] == []
    assert two["kernels"]["zero_inactive"] == one["kernels"]["zero_inactive"] + 1
    dense = account["inductor"]
    assert two["launches"] - one["launches"] <= dense["two passes"]["launches"] - dense["step"]["launches"]


def test_an_event_waits_thrice(account: dict[str, Any]) -> None:
    """For the scores, for the magnitudes, and for whether values stand outside the masks, each of all weights."""
    event, step = account["event"]["event"], account["mst"]["step"]
    assert [wait[0] for wait in event["waits"]] == ["download"] * 3
    # Zeros in gradients that were read whole, in the moments of what is about to grow, and in all that masks have left:
    # weights, gradients and their moments.
    assert event["kernels"]["zero_inactive"] == 3
    # Three things are read, each in a launch and a copy; the indexes come in one copy, to be handed out by a launch,
    # and another writes a word of each. The rest are tables, of programs and of addresses: two that are read by and two
    # each time that something is zeroed.
    assert event["kernels"]["measure_blocks"] == 3
    assert event["operators"]["_foreach_copy_"] == event["operators"]["_foreach_zero_"] == 1
    assert event["launches"] - step["launches"] <= 3 + 3 + 2 + 1 + 5 + 3


def test_the_steps_around_an_event_wait_for_nothing(account: dict[str, Any]) -> None:
    """A word of all indexes before; behind it, second moments of what has grown begin by the optimizer's step counts,
    which a fused one keeps on the device."""
    before, behind = (account["event"][f"{where} an event"] for where in ("before", "behind"))
    assert before["waits"] == behind["waits"] == []
    launches = account["mst"]["step"]["launches"]
    assert before["launches"] == launches + 1
    assert behind["kernels"]["begin_averages"] == 1
    assert behind["launches"] - launches <= 1 + 3 + 9  # three uploads, and what makes a factor of step counts


def test_times_are_told_by_source(account: dict[str, Any]) -> None:
    assert len(account["mst"]["microseconds"]) == 1
    assert {"dispatch", "gradient hooks", "PyTorch: generated code"} <= account["mst"]["sources"].keys()
    assert "dispatch" not in account["inductor"]["sources"]
