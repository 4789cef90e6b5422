"""Runs that other people's trainers interrupt and resume, or step with a closure: bit for bit the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from helpers import Blocks
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training import assert_zero_outside, loss_of
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from mst_compile import Constant, MixedSparsity, sparsifier, sparsify
from mst_compile.errors import MSTWarning

STEPS = 14
MIXED = MixedSparsity.published(STEPS, 0.8, warmup=4, restoration=4, settle=2, interval=2, ramp_interval=1)
PHASES = {"warm-up": 2, "plateau": 6, "at an event": 8, "restoration": 11, "settle": 13}


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=MSTWarning, message="no graph compiled")
        warnings.filterwarnings("error", category=MSTWarning, message="values stood outside|the optimizer state that")
        yield


def assert_same_run(a: nn.Module, b: nn.Module) -> None:
    assert sparsifier(a).step_count == sparsifier(b).step_count
    for name, mask in sparsifier(a).masks.items():
        assert torch.equal(mask, sparsifier(b).masks[name]), name
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# -- Hugging Face Trainer ----------------------------------------------------------------------------------------------


class Sentences(Dataset):
    """Rows of random tokens, the same every time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(64, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.1)
    return sparsify(GPT2LMHeadModel(config), MIXED, block=4)


def trainer(folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="steps",
        save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3, **more,
    )  # fmt: skip
    return Trainer(gpt2(), arguments, train_dataset=Sentences())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run that nobody interrupts, and all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    assert sparsifier(run.model).step_count == STEPS
    return folder, run.model


@pytest.mark.parametrize("phase", PHASES)
def test_trainer_resumes(phase: str, whole: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = whole
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{PHASES[phase]}"))
    assert_same_run(model, again.model)


# -- Accelerate --------------------------------------------------------------------------------------------------------


def accelerated(schedule: Any = MIXED) -> tuple[Accelerator, nn.Module, Any]:
    torch.manual_seed(0)
    model = sparsify(Blocks(), schedule)
    accelerator = Accelerator(cpu=True)
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2))


def go_on(run: tuple[Accelerator, nn.Module, Any], steps: range) -> None:
    accelerator, model, optimizer = run
    for step in steps:
        accelerator.backward(loss_of(model, batch_of(step)))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("phase", PHASES)
def test_accelerate_resumes(phase: str, tmp_path: Path) -> None:
    first = accelerated()
    go_on(first, range(PHASES[phase]))
    first[0].save_state(str(tmp_path))
    go_on(first, range(PHASES[phase], STEPS))
    again = accelerated()
    again[0].load_state(str(tmp_path))
    go_on(again, range(PHASES[phase], STEPS))
    assert_same_run(first[1], again[1])


# -- Lightning ---------------------------------------------------------------------------------------------------------


class Lit(lightning.LightningModule):
    """Automatic optimization: every step is ``optimizer.step(closure)``."""

    def __init__(self, growth: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = sparsify(Blocks(), Constant(0.7, interval=3, growth=growth))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        # Which batch a resumed epoch begins with is the loader's affair; the plain model resumes with another, too.
        return loss_of(self.model, batch_of(self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def batch_of(step: int) -> Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(step))


def fit(module: Lit, folder: Path, steps: int, checkpoint: Path | None = None) -> lightning.Trainer:
    run = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=True)],
    )  # fmt: skip
    run.fit(module, DataLoader(TensorDataset(torch.zeros(7, 1))), ckpt_path=checkpoint)
    return run


@pytest.mark.parametrize("growth", ["random", "gradient", "mixed"])
def test_lightning_trains_as_a_plain_loop_and_resumes(growth: str, tmp_path: Path) -> None:
    lit = Lit(growth)
    optimizer = fit(lit, tmp_path / "a", STEPS).optimizers[0]
    assert_zero_outside(lit.model, optimizer, gradients=False)
    plain = Lit(growth).model
    own = torch.optim.AdamW(plain.parameters(), 1e-2)
    for step in range(STEPS):
        own.zero_grad()
        loss_of(plain, batch_of(step)).backward()
        own.step()
    assert_same_run(plain, lit.model)
    again = Lit(growth)
    (checkpoint,) = (tmp_path / "a").glob("*step=7.ckpt")
    fit(again, tmp_path / "b", STEPS, checkpoint)
    assert_same_run(plain, again.model)
