"""A model that a Trainer and ``generate`` can do with, quickly traced, and runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutput

from mst_compile import MixedSparsity
from mst_compile.integrations.transformers import MSTTrainer

STEPS = 12
MIXED = MixedSparsity.published(STEPS, 0.7, warmup=3, restoration=3, settle=2, interval=2, ramp_interval=1)
EAGER = {"options": {"mst.inner": "eager"}}
ACCUMULATED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "save_strategy": "steps", "save_steps": 1}


class Config(PretrainedConfig):
    model_type = "tiny"

    def __init__(self, **more: Any) -> None:
        super().__init__(vocab_size=32, hidden_size=16, num_hidden_layers=1, bos_token_id=1, eos_token_id=None, **more)


class Tiny(PreTrainedModel, GenerationMixin):
    """Guesses the next token from this one: all that a Trainer and ``generate`` ask for, and quickly traced."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(32, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.drop = nn.Dropout(0.1)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> CausalLMOutput:
        x = self.embed(input_ids)
        logits = self.head(self.norm(x + self.drop(self.down(nn.functional.gelu(self.up(x))))))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class Sentences(Dataset):
    """Rows of tokens that follow a rule, with a column that no model takes."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) * 5 + i) % 32
        return {"input_ids": ids, "labels": ids, "source": torch.tensor(i)}


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny(Config())


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3}
    return TrainingArguments(str(folder), **{**usual, **quiet, "logging_steps": 1, **more})


def train(folder: Path, *callbacks: Any, model: Any = None, cls: type = MSTTrainer, **more: Any) -> Trainer:
    resume = more.pop("resume", None)
    data = {"train_dataset": Sentences(), "eval_dataset": Sentences()}
    made = cls(tiny() if model is None else model, arguments(folder, **more), callbacks=list(callbacks), **data)
    made.train(resume_from_checkpoint=resume)
    return made


def history(trainer: Trainer, key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in trainer.state.log_history if key in line and "loss" in line}


class Reports(TrainerCallback):
    """Stands where TensorBoard's and the like do: before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))
