"""What DeepSpeed's optimizers are to this library, where DeepSpeed is not installed: classes of the same names, in
modules of the same names, with the attributes that are read, that train copies as those do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_ZERO, _FLAT = "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.fp16.fused_optimizer"


class _Outer:
    """No optimizer of PyTorch's: it steps one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.overflow = False  # of the next step, as the caller says

    def parameters(self, group: int) -> list[nn.Parameter]:
        raise NotImplementedError

    def step(self) -> None:
        if not self.overflow:
            self.train()
        for i in range(len(self.optimizer.param_groups)):
            for p in self.parameters(i):
                p.grad = None

    def train(self) -> None:
        raise NotImplementedError


def _flatten(parameters: list[nn.Parameter], whole: int = 1) -> Tensor:
    """One tensor that they lie in from now on, filled up to a multiple of ``whole``."""
    flat = torch.cat([p.detach().flatten() for p in parameters])
    flat = torch.cat([flat, flat.new_zeros(-flat.numel() % whole)])
    at = 0
    for p in parameters:
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    return flat


def _gradients(parameters: list[nn.Parameter], like: Tensor) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
    return torch.cat([found, found.new_zeros(like.numel() - found.numel())]).float()


class FP16_Optimizer(_Outer):
    """All copies of a group in one tensor of float32."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.fp16_groups = [list(group["params"]) for group in optimizer.param_groups]
        self._flats = [_flatten(group) for group in self.fp16_groups]
        self.fp32_groups_flat = [flat.float().clone() for flat in self._flats]
        for group, copy in zip(optimizer.param_groups, self.fp32_groups_flat, strict=True):
            group["params"] = [copy]

    def parameters(self, group: int) -> list[nn.Parameter]:
        return self.fp16_groups[group]

    def train(self) -> None:
        for group, copy in zip(self.fp16_groups, self.fp32_groups_flat, strict=True):
            copy.grad = _gradients(group, copy)
        self.optimizer.step()
        for flat, copy in zip(self._flats, self.fp32_groups_flat, strict=True):
            flat.copy_(copy)
            copy.grad = None


class DeepSpeedZeroOptimizer(_Outer):
    """Each rank has copies of its part, and steps one group after the other."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        ranks = dist.get_world_size()
        self.real_dp_process_group = [dist.group.WORLD for _ in optimizer.param_groups]
        self.bit16_groups = [list(group["params"]) for group in optimizer.param_groups]
        self.bit16_groups_flat = [_flatten(group[::-1], ranks) for group in self.bit16_groups]
        self.single_partition_of_fp32_groups = [
            flat.chunk(ranks)[dist.get_rank()].float().clone() for flat in self.bit16_groups_flat
        ]
        for group, copy in zip(optimizer.param_groups, self.single_partition_of_fp32_groups, strict=True):
            group["params"] = [copy]

    def parameters(self, group: int) -> list[nn.Parameter]:
        return self.bit16_groups[group]

    def train(self) -> None:
        ranks, groups = dist.get_world_size(), self.optimizer.param_groups
        for i, (flat, copy) in enumerate(
            zip(self.bit16_groups_flat, self.single_partition_of_fp32_groups, strict=True)
        ):
            gradient = _gradients(self.bit16_groups[i][::-1], flat) / ranks
            dist.all_reduce(gradient)
            copy.grad = gradient.chunk(ranks)[dist.get_rank()].clone()
            self.optimizer.param_groups = [groups[i]]
            self.optimizer.step()
            self.optimizer.param_groups = groups
            copy.grad = None
            parts = list(flat.chunk(ranks))
            dist.all_gather(parts, copy.to(flat.dtype))
            flat.copy_(torch.cat(parts))


@contextmanager
def installed() -> Iterator[None]:
    """These classes are DeepSpeed's, as far as anybody sees."""
    modules: dict[str, dict[str, Any]] = {
        "deepspeed": {},
        _ZERO: {"DeepSpeedZeroOptimizer": DeepSpeedZeroOptimizer},
        _FLAT: {"FP16_Optimizer": FP16_Optimizer},
    }
    before = {name: sys.modules.get(name) for name in modules}
    for name, content in modules.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
        for cls in content.values():
            cls.__module__ = name
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.update({name: module})
