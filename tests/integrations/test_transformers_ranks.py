"""Hugging Face's Trainer on two processes, as ``torchrun`` starts them: the same masks, one log, and resuming."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import assert_same_on_all_ranks, run
from trainer_cases import ACCUMULATED, EAGER, MIXED, STEPS, Reports, Sentences, arguments, history, tiny
from training import assert_zero_outside
from transformers import Trainer

from mst_compile import sparsifier
from mst_compile.errors import MSTWarning
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer

SAVED = ACCUMULATED | {"save_steps": 5}


def as_torchrun() -> None:
    """What it tells a process of the others; the group is there already."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "LOCAL_WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def shared_folder() -> Path:
    """A new one, the same on all ranks."""
    names: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    return Path(names[0])


def trained(folder: Path, resume: Path | None = None, **more: Any) -> tuple[Trainer, Reports]:
    reports = Reports()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        made = MSTTrainer(
            tiny(), arguments(folder, ddp_backend="gloo", **{**SAVED, **more}), train_dataset=Sentences(),
            callbacks=[reports, MSTCallback(MIXED, compile=EAGER, block=4)],
        )  # fmt: skip
        made.train(resume_from_checkpoint=None if resume is None else str(resume))
    return made, reports


def a_run_and_the_rest_of_it() -> None:
    as_torchrun()
    folder = shared_folder()
    with contextlib.redirect_stdout(io.StringIO()) as console:
        whole, reports = trained(folder)
    assert isinstance(whole.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert whole.args.world_size == 2
    own = sparsifier(whole.model)
    assert (own.step_count, own.density) == (STEPS, 1.0)
    assert_same_on_all_ranks(*whole.model.parameters(), *own.masks.values())
    # The Trainer tells callbacks of logs on every rank; its own, which write, leave that to rank 0.
    assert console.getvalue().count("'loss'") == (STEPS if dist.get_rank() == 0 else 0)
    assert console.getvalue().count("'mst/phase'") == console.getvalue().count("'loss'") - 1 + dist.get_rank()
    logged = [line["mst/density"] for line in reports.seen if "loss" in line]
    assert logged == list(history(whole, "mst/density").values())
    assert history(whole, "mst/sparsity")[5] == MIXED.sparsity_at(5)
    dist.barrier()
    again, _ = trained(shared_folder(), folder / "checkpoint-5", save_strategy="no")
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert_zero_outside(again.model, again.optimizer.optimizer, gradients=False)
    for key in ("loss", "learning_rate", "mst/density", "mst/flops_saved", "mst/dropped", "mst/grown", "mst/events"):
        assert history(again, key) == history(whole, key), key


SCENARIOS = [a_run_and_the_rest_of_it]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run(SCENARIOS, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("scenario", [s.__name__ for s in SCENARIOS])
def test_two_ranks(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]
