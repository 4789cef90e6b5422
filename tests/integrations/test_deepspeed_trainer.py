"""Hugging Face's Trainer with DeepSpeed: ZeRO trains as the Trainer does without it, and resumes."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import results_of
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from mst_compile import MixedSparsity, sparsifier
from mst_compile.errors import MSTWarning
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer
from tests.oracles import assert_same_course

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")
STEPS, SAVED = 12, 6
MIXED = MixedSparsity.published(STEPS, 0.8, warmup=4, restoration=3, settle=1, interval=2, ramp_interval=1)


def trained(folder: Path, stage: int | None, *, resume: bool = False) -> Any:
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


def as_without(stage: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29735",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    warnings.simplefilter("error", MSTWarning)
    warnings.filterwarnings("ignore", "no graph compiled", MSTWarning)
    with tempfile.TemporaryDirectory() as folder:
        expected = trained(Path(folder, "without"), None)
        for resume in (False, True):
            found = trained(Path(folder, "with"), stage, resume=resume)
            assert sparsifier(found.model).step_count == STEPS
            assert sparsifier(found.model).density == 1
            assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
            for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
                assert_same_course(one.detach(), other.detach(), parted=1000)


def stage_1() -> None:
    as_without(1)


def stage_2() -> None:
    as_without(2)


SCENARIOS = [stage_1, stage_2]
one = results_of(SCENARIOS, 1)  # a process of its own, as DeepSpeed follows no second process group


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("scenario", [s.__name__ for s in SCENARIOS])
def test_a_trainer_with_zero_trains_and_resumes_as_without(one: dict[str, str], scenario: str) -> None:
    assert not one[scenario], one[scenario]
