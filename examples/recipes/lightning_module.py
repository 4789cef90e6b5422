"""A LightningModule. What sparse training adds to the dense script is marked with ``# +``.

python examples/recipes/lightning_module.py [folder]
"""

import sys

import lightning
import torch
from torch import Tensor, nn

import mst_compile  # +

STEPS = 20


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Layer()
        mst_compile.sparsify(self.model, mst_compile.MixedSparsity(total_steps=STEPS))  # +
        self.model.compile(backend="mst")  # + in place: checkpoints keep the plain model's keys

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.model(x), x.flip(-1))
        self.log("density", mst_compile.sparsifier(self.model).density)  # +
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(mst_compile.param_groups(self.model, weight_decay=0.1), lr=3e-3)  # +


def main(folder: str = "runs/lightning_module") -> Lit:
    lit = Lit()
    trainer = lightning.Trainer(
        max_steps=STEPS, default_root_dir=folder, accumulate_grad_batches=2, gradient_clip_val=1.0, log_every_n_steps=5,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.randn(2 * STEPS * 16, 32), batch_size=16)
    trainer.fit(lit, data)  # fit(..., ckpt_path=file) goes on from a checkpoint
    return lit


if __name__ == "__main__":
    main(*sys.argv[1:])
