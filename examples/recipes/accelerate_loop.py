"""A loop with Hugging Face Accelerate. What sparse training adds to the dense script is marked with ``# +``.

python examples/recipes/accelerate_loop.py [folder]
"""

import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import mst_compile  # +

STEPS = 20


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def main(folder: str = "runs/accelerate_loop") -> nn.Module:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = Layer().to(accelerator.device)
    mst_compile.sparsify(model, mst_compile.MixedSparsity(total_steps=STEPS))  # +
    model.compile(backend="mst")  # + before prepare; Accelerator(dynamo_backend=...) does not know "mst"
    optimizer = torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=3e-3)  # +
    data = torch.utils.data.DataLoader(torch.randn(2 * STEPS * 16, 32), batch_size=16)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for x in data:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), x.flip(-1))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)  # load_state(folder) goes on, bit for bit
    accelerator.print(mst_compile.sparsifier(model))  # +
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
