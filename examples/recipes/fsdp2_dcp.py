"""Plain PyTorch as torchtitan has it: FSDP2, distributed checkpoints, activation checkpointing, compiled blocks.

What sparse training adds to the dense script is marked with ``# +``.

torchrun --nproc-per-node 2 examples/recipes/fsdp2_dcp.py [folder]
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import mst_compile  # +

STEPS = 20


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(Block(32), Block(32))
    mst_compile.sparsify(model, mst_compile.MixedSparsity(total_steps=STEPS))  # + the same on every rank
    for name, block in list(model.named_children()):
        block = checkpoint_wrapper(block)
        block.compile(backend="mst")  # + in place of backend="inductor"
        fully_shard(block)
        setattr(model, name, block)
    fully_shard(model)
    return model, torch.optim.AdamW(mst_compile.param_groups(model, weight_decay=0.1), lr=3e-3)  # +


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        nn.functional.mse_loss(model(x), x.flip(-1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)  # masks, step count and seed ride in the optimizer's
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)


def main(folder: str = "runs/fsdp2_dcp") -> nn.Module:
    alone = "RANK" not in os.environ  # not started by torchrun
    dist.init_process_group("gloo", **({"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}))
    model, optimizer = build()
    train(model, optimizer, range(STEPS // 2))
    save(model, optimizer, folder)
    model, optimizer = build()  # another process, on as many ranks as it likes
    load(model, optimizer, folder)
    train(model, optimizer, range(STEPS // 2, STEPS))
    print(mst_compile.sparsifier(model))  # +
    dist.destroy_process_group()
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
