"""Hugging Face's Trainer with DeepSpeed: ZeRO trains as the Trainer does without it, and resumes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from mst_compile import MixedSparsity, sparsifier
from mst_compile.errors import MSTWarning
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer
from tests.oracles import assert_same_course

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")
STEPS, SAVED = 12, 6
MIXED = MixedSparsity.published(STEPS, 0.8, warmup=4, restoration=3, settle=1, interval=2, ramp_interval=1)


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    """Of one process: the Trainer begins it, and DeepSpeed can follow no second one."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29733", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(autouse=True)
def _nothing_to_say() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        warnings.filterwarnings("ignore", "no graph compiled", MSTWarning)
        yield


def run(folder: Path, stage: int | None, *, resume: bool = False) -> Any:
    """A Trainer that has trained to the end; to ``resume`` is to begin at the checkpoint that another has left."""
    config = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=SAVED,
        logging_steps=1,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=None if stage is None else config,
    )
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (48, 16))]
    callback = MSTCallback(MIXED, block=4, compile=False)
    trainer = MSTTrainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if resume else None)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_trainer_with_zero_trains_and_resumes_as_without(stage: int, tmp_path: Path) -> None:
    expected = run(tmp_path / "without", None)
    for found in (run(tmp_path / "with", stage), run(tmp_path / "with", stage, resume=True)):
        assert sparsifier(found.model).step_count == STEPS
        assert sparsifier(found.model).density == 1
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
        for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
            assert_same_course(one.detach(), other.detach(), parted=1000)
