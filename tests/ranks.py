"""Real processes that form a ``torch.distributed`` group on this machine (gloo), with a hard time-out.

Starting a process takes seconds, so one group runs several *scenarios*, one after the other. A scenario is a function
at the top of a module, without arguments; every rank calls it, with the group initialised.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mask_cases import element_masks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mst_compile import Constant, MixedSparsity, sparsifier
from mst_compile.rules.schedule import Schedule

Scenario = Callable[[], None]


def run(scenarios: Sequence[Scenario], ranks: int, folder: Path, *, limit: float = 900.0) -> dict[str, str]:
    """Run the scenarios on a group of processes.

    Args:
        limit: seconds after which the processes are killed.

    Returns:
        Scenario's name -> "" where it passed on every rank, else what was raised, rank by rank. The first scenario
        that fails ends the run: ranks may have parted there.
    """
    names, module = [s.__qualname__ for s in scenarios], scenarios[0].__module__
    codes = _join(_start(_work, ranks, folder, (names, module)), limit)
    found: dict[str, str] = {}
    for scenario in scenarios:
        name = scenario.__qualname__
        texts = [_read(folder / f"{name}.{rank}") for rank in range(ranks)]
        wrong = [f"rank {r}: {t or 'not finished'}" for r, t in enumerate(texts) if t != "passed"]
        found[name] = "\n".join([*wrong, f"exit codes {codes}"] if wrong else [])
    return found


def results_of(scenarios: Sequence[Scenario], ranks: int) -> Callable[..., dict[str, str]]:
    """A fixture of a module: what :func:`run` says of its scenarios, run once for all of its tests."""

    @pytest.fixture(scope="module")
    def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
        return run(scenarios, ranks, tmp_path_factory.mktemp("ranks"))

    return found


def exit_codes(
    work: Callable[[], None], ranks: int, folder: Path, *, timeout: float, limit: float = 900.0
) -> list[int | None]:
    """Run one function on a group of processes; the exit code of each, None where it had to be killed.

    Args:
        timeout: seconds, of the group, from when all ranks are there.
        limit: seconds after which the processes are killed.
    """
    return _join(_start(_run_one, ranks, folder, (work, timeout)), limit)


def _start(target: Callable[..., None], ranks: int, folder: Path, args: tuple[object, ...]) -> list[BaseProcess]:
    # All ranks are forked from one process that has done nothing but import: that takes longer than most scenarios.
    # Before Python 3.13 it finds only what is installed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch._inductor.compile_fx", "torch.distributed.fsdp", "mst_compile"])
    environment = dict(os.environ)
    processes = [
        context.Process(target=_begin, args=(environment, target, rank, ranks, str(folder), *args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return list(processes)


def _begin(environment: dict[str, str], target: Callable[..., None], *args: object) -> None:
    """What is forked has the environment of when the first process was."""
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def _join(processes: Sequence[BaseProcess], limit: float) -> list[int | None]:
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return codes


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _join_group(rank: int, ranks: int, folder: str, timeout: float = 600) -> None:
    """Ranks wait for each other while one of them is compiling, on machines that do other things as well."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    file = f"file://{folder}/group.{timeout:g}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))


# -- what the ranks train ----------------------------------------------------------------------------------------------

STEPS = 200
SCHEDULES: list[Schedule] = [
    Constant(0.7, interval=5),
    MixedSparsity.published(STEPS, 0.8, interval=5, ramp_interval=2),
]


class Residual(nn.Module):
    """A residual block whose weights have ragged edges, and whose shards cut through blocks."""

    def __init__(self, width: int, hidden: int, recompute: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return x + checkpoint(self.inside, x, use_reentrant=False)
        return x + self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class ResidualExperts(Residual):
    """Three experts in stacks whose matrices two ranks cannot share alike. Where a token goes is said by the signs of
    two of its features, as they come in: the same on every rank, and in every precision."""

    def __init__(self, width: int, hidden: int, recompute: bool) -> None:
        super().__init__(width, hidden, recompute)
        self.up = nn.Parameter(torch.randn(3, hidden, width) / width**0.5)  # type: ignore[assignment]
        self.down = nn.Parameter(torch.randn(3, hidden, width) / hidden**0.5)  # type: ignore[assignment]

    def inside(self, x: Tensor) -> Tensor:
        sent = (x[:, :2] > 0).sum(1) == torch.arange(3)[:, None]
        hidden = nn.functional.gelu(torch.matmul(self.norm(x), self.up.mT))  # type: ignore[operator]
        return (torch.bmm(hidden, self.down) * sent[:, :, None]).sum(0)  # type: ignore[arg-type]


class Net(nn.Module):
    """Two residual blocks and a head of 5 rows, of which a fourth rank holds none; experts before them if so."""

    def __init__(self, recompute: bool = False, experts: bool = False) -> None:
        super().__init__()
        self.zeroth = ResidualExperts(30, 52, recompute) if experts else nn.Identity()
        self.first, self.second = Residual(30, 52, recompute), Residual(30, 52, recompute)
        self.head = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.zeroth(x))))


def net(dtype: torch.dtype = torch.float64, *, recompute: bool = False, experts: bool = False) -> nn.Module:
    """The same weights on every rank, whatever was drawn before."""
    torch.manual_seed(0)
    return Net(recompute, experts).to(dtype)


def batches(steps: int = STEPS, dtype: torch.dtype = torch.float64, rows: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Whole batches, the same on every rank: inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    for _ in range(steps):
        x = torch.randn(rows, 30, generator=generator, dtype=torch.float64)
        yield x.to(dtype), (x @ teacher).sin().to(dtype)


def mine(batch: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def mean_over_ranks(value: Tensor) -> float:
    value = value.detach().double().clone()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def assert_same_on_all_ranks(*tensors: Tensor) -> None:
    """Bit for bit."""
    for tensor in tensors:
        found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(found, tensor.detach().contiguous())
        assert all(torch.equal(other, tensor) for other in found)


def check_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have every step check that the gradients which the optimizer sees are zero outside the masks."""

    def check(*_: object) -> None:
        for name, mask in element_masks(model).items():
            gradient = dict(model.named_parameters())[name].grad
            assert gradient is not None
            assert not gradient[~mask].any(), f"step {sparsifier(model).step_count}: gradient of {name}"

    optimizer.register_step_pre_hook(check)  # runs after the hooks that all optimizers share


def _work(rank: int, ranks: int, folder: str, names: list[str], module: str) -> None:
    _join_group(rank, ranks, folder)
    functions = __import__(module)
    for name in names:
        torch.manual_seed(0)
        torch._dynamo.reset()
        gc.collect()  # models that errors kept alive
        try:
            getattr(functions, name)()
            dist.barrier()
        except BaseException:  # also what pytest.raises raises
            Path(folder, f"{name}.{rank}").write_text(traceback.format_exc())
            os._exit(1)  # without waiting for the others, which then fail instead of waiting
        Path(folder, f"{name}.{rank}").write_text("passed")
    dist.destroy_process_group()


def _run_one(rank: int, ranks: int, folder: str, work: Callable[[], None], timeout: float) -> None:
    _join_group(rank, ranks, folder)
    dist.barrier()  # starting takes longer than the time that the ranks then have
    dist.destroy_process_group()
    _join_group(rank, ranks, folder, timeout)
    work()
    dist.destroy_process_group()
