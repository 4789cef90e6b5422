"""Hugging Face's Trainer. What sparse training adds to the dense script is marked with ``# +``.

python examples/recipes/hugging_face_trainer.py [folder]
"""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from mst_compile import MixedSparsity  # +
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer  # + in place of transformers.Trainer

STEPS = 20


class Counting(torch.utils.data.Dataset):
    """Rows of tokens that count up."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(16) + i) % 64
        return {"input_ids": ids, "labels": ids}


def main(folder: str = "runs/hugging_face_trainer") -> MSTTrainer:
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # otherwise GPT-2 warns at its first loss, which breaks the graph in two
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=8, learning_rate=3e-3, weight_decay=0.1,
        lr_scheduler_type="cosine", gradient_accumulation_steps=2, logging_steps=5, save_steps=10, report_to=[],
    )  # fmt: skip
    callback = MSTCallback(MixedSparsity(total_steps=STEPS))  # +
    trainer = MSTTrainer(model, arguments, train_dataset=Counting(), callbacks=[callback])  # +
    trainer.train()  # trainer.train(resume_from_checkpoint=True) goes on, bit for bit
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
