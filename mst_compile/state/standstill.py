"""Says when a model is trained while its schedule stands still.

Steps are counted by hooks on the optimizers that train the sparse weights, or copies of them that are followed
(:mod:`.masters`). Where others train copies, or a program writes them without any optimizer, nothing is counted, and
the model would keep its first masks to the end without a word. What is seen all the same are gradients: they arrive.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from mst_compile.blocks.memory import address_of
from mst_compile.blocks.shards import is_copied_by, local_part
from mst_compile.errors import MSTWarning, ParallelismError

from .optimizers import alive
from .run import Run
from .weight import SparseWeight

_PATIENCE = 10  # steps of other optimizers, or gradients of a weight, before anything is said or looked at
_COPIES = (
    "An optimizer that trains copies of the weights, as those with master weights in a wider dtype do, is not seen to "
    "train them: let it train the Parameters themselves, under autocast"
)
_BY_HAND = "pass auto_step=False to sparsify and call sparsifier(model).step() yourself"


@dataclass
class _Looks:
    """What is known of a weight whose gradients arrive while no step is counted: how many have, when it is looked at
    next, and how it was when it was looked at first: the version, the place and the sums of its rows."""

    arrivals: int = 0
    next: int = _PATIENCE
    was: tuple[int, int, Tensor] | None = None


class Standstill:
    """Watches a run in which no step was counted.

    Args:
        auto_step: whether steps are counted by hooks.
    """

    def __init__(self, run: Run, auto_step: bool) -> None:
        self._run = run
        self._auto_step = auto_step
        self._looks: dict[str, _Looks] | None = {}  # None: nobody has to look any more
        self._arrived = False  # gradients, since an optimizer without sparse weights has stepped last
        self._foreign_steps = 0  # of such optimizers; -1: warned
        self._masked: list[object] = []  # what was known of gradients at the last such step

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be seen in gradients that arrive."""
        return self._looks is None

    def counted(self) -> None:
        """A step was counted."""
        self._looks = None

    def own_step(self) -> None:
        """An optimizer with sparse weights has stepped."""
        self._foreign_steps = min(self._foreign_steps, 0)

    # -- no optimizer at all -----------------------------------------------------------------------------------------

    def arrived(self, weight: SparseWeight, parameter: Tensor) -> None:
        """A gradient of ``weight`` has arrived, and no optimizer that trains it is stepping."""
        if self._looks is None:
            return
        self._arrived = True
        looks = self._looks.setdefault(weight.name, _Looks())
        looks.arrivals += 1
        if looks.arrivals < looks.next:
            return
        looks.next *= 2
        now = parameter._version, address_of(parameter), _sums(parameter)
        if looks.was is None:
            looks.was = now
        elif looks.was[:2] != now[:2] or not torch.equal(looks.was[2], now[2]):
            self._looks = None
            if self._foreign_steps >= 0:
                self._foreign_steps = -1
                self._warn_of_writes(weight, looks.arrivals)

    def _warn_of_writes(self, weight: SparseWeight, arrivals: int) -> None:
        do = f"Let step() of a torch.optim.Optimizer train model.parameters(), or {_BY_HAND}"
        if not self._auto_step:
            do = "sparsify was told auto_step=False: call sparsifier(model).step() after every training step"
        warnings.warn(
            f"the sparsity schedule does not advance: {arrivals} gradients of {weight.name} have arrived and its "
            f"values have changed, but no step was counted. {do}",
            MSTWarning,
            stacklevel=2,
        )

    # -- an optimizer that has none of the weights -------------------------------------------------------------------

    def check(self, optimizer: Optimizer) -> None:
        """An optimizer that trains no sparse weight is about to step, nor copies of one that are followed.

        Raises:
            ParallelismError: DeepSpeed has given it copies of them all the same.
        """
        for weight, parameter in self._run.weights.held():
            if is_copied_by(parameter, optimizer):
                raise ParallelismError(
                    f"DeepSpeed trains a copy of {weight.name} in its place, in a way that is not followed: no step "
                    "would be counted, and what a topology event drops would come back from the copy. Served are ZeRO "
                    "stages 0, 1 and 2, also with offload_optimizer on the CPU, and bf16 and fp16, without ZenFlow; "
                    "stage 3 is not: use stage 2, or PyTorch's fully_shard (FSDP2). DeepSpeed must be imported before "
                    "the first training step"
                )

    def foreign_step(self, optimizer: Optimizer) -> None:
        """An optimizer that trains no sparse weight has stepped."""
        if self._foreign_steps < 0 or not self._auto_step or any(weight.timed for weight in self._run.weights):
            return
        arrived, self._arrived = self._arrived, False
        if self._run.step_count > 0 and not (self._had_backward() or arrived):
            return  # gradients that were left over: the model is not trained any more
        trained = bool(arrived or self._run.weights.with_gradients())
        if trained:
            what = (
                "owns none of the sparse weights. Build the optimizer from model.parameters() of the sparsified model "
                f"as it is now (load_state_dict(assign=True), for one, makes other Parameters), or {_BY_HAND}. "
                f"{_COPIES}"
            )
        elif self._run.step_count == 0 and self._trains_around(optimizer):
            what = (
                "trains other Parameters of the model while all sparse weights are frozen, which keep their values and "
                "masks. That is right for adapters on a sparse base; else unfreeze them, or densify(model) and train "
                "what is left as an ordinary model"
            )
        else:
            return
        self._foreign_steps += 1
        if self._foreign_steps < _PATIENCE:
            return
        self._foreign_steps = -1
        if trained and any(self._run.of(other) for other in alive()):
            return  # whose turn is still to come, as where two models train in turn
        warnings.warn(
            f"the sparsity schedule does not advance: {type(optimizer).__name__} has stepped {_PATIENCE} times but "
            f"{what}",
            MSTWarning,
            stacklevel=5,
        )

    def _had_backward(self) -> bool:
        """Whether gradients have been computed since this was asked last."""
        before, self._masked = self._masked, [weight.masked for weight in self._run.weights]
        return len(before) == len(self._masked) and any(a is not b for a, b in zip(before, self._masked, strict=True))

    def _trains_around(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer trains Parameters of the model, whose sparse weights are all frozen."""
        model = self._run.root()
        if model is None or any(parameter.requires_grad for _, parameter in self._run.weights.held()):
            return False
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(id(parameter) in known for parameter in model.parameters())


def _sums(parameter: Tensor) -> Tensor:
    """Sums of the rows that this rank holds: other values have others, and they are few."""
    local, _ = local_part(parameter.detach())
    return local.abs().sum(-1, dtype=torch.float64 if local.dtype == torch.float64 else torch.float32)
