"""An optimizer that keeps its state in a tensor subclass, as 8-bit ones do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Coded(torch.Tensor):
    """State in another form: numbers times 64 as whole numbers, read and written through copies alone."""

    exact = True

    @staticmethod
    def __new__(cls, codes: Tensor) -> Coded:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and cls.exact is not None:
            to, source = args[:2]
            if isinstance(to, Coded):
                to.codes.copy_((source * 64).round() + (0 if cls.exact else 1))
            else:
                to.copy_(source.codes / 64)
            return to
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(f"{func} of Coded")


class CodedSGD(torch.optim.Optimizer):
    """Momentum in a tensor subclass."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["momentum"] = Coded(torch.zeros_like(p))
                    codes = self.state[p]["momentum"].codes
                    codes.mul_(0.9).add_(p.grad * 64)
                    p.sub_(codes / 64, alpha=group["lr"])
