"""Sparse products with stacks of experts that are spread over ranks: whole under FSDP2, each rank's experts under
expert parallelism, alone and over FSDP2, and as DTensors. Training is that of one process, and nothing is compiled at
events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import assert_same_course
from parallel_cases import whole
from ranks import assert_same_on_all_ranks, mine, results_of
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mst_compile import Constant, explain, sparsifier, sparsify
from mst_compile.parallel.ranks import check_ranks

pytestmark = pytest.mark.xdist_group("ranks")  # one group of processes at a time

EXPERTS, WIDTH, HIDDEN, STEPS = 4, 32, 48, 6
# Roundings by which trainings may part, of the dtype that products are computed in.
PARTED = {torch.float32: 10**3, torch.bfloat16: 4}
SCHEDULE = Constant(0.6, interval=2, growth="gradient")
OPTIONS = {"mst.inner": "aot_eager", "mst.dense_threshold": 1.0}
OPERATORS = {"mst::grouped_linear", "mst::grouped_linear_grad_input", "mst::grouped_linear_grad_weight"}


def run_experts(up: Tensor, down: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Rows of ``x`` sorted by expert, in bfloat16 as where grouped products compile."""
    hidden = F.grouped_mm(x.bfloat16(), up.bfloat16().transpose(-2, -1), offs=ends).relu()
    return F.grouped_mm(hidden, down.bfloat16().transpose(-2, -1), offs=ends).type_as(x)


class Experts(nn.Module):
    """The experts alone; a token goes where ``chosen`` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)
        self.run: Callable[..., Tensor] = run_experts

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.argsort(stable=True)
        counts = F.one_hot(chosen, EXPERTS).sum(0)
        return self.run(self.up, self.down, x[order], counts.cumsum(0).int())[order.argsort()]


class SentExperts(Experts):
    """Tokens are sent to the rank that holds their expert, and back, as torchtitan does it: what is compiled gets local
    tensors."""

    mesh: DeviceMesh

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        group, ranks = self.mesh.get_group(), self.mesh.size()
        order = chosen.argsort(stable=True)
        counts = F.one_hot(chosen, EXPERTS).sum(0)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        send, receive = counts.view(ranks, -1).sum(1).tolist(), received.view(ranks, -1).sum(1).tolist()
        rows = all_to_all_single_autograd(x[order], receive, send, group)
        own = torch.arange(EXPERTS // ranks).repeat(ranks).repeat_interleave(received)
        sort = own.argsort(stable=True)
        ends = received.view(ranks, -1).sum(0).cumsum(0).int()
        up, down = (p.to_local() for p in (self.up, self.down))
        out = self.run(up, down, rows[sort], ends)[sort.argsort()]
        return all_to_all_single_autograd(out, send, receive, group)[order.argsort()]


class BatchOfExperts(Experts):
    """Every expert multiplies all rows of ``x``, or its own entry of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.expand(EXPERTS, -1, -1)
        return torch.einsum("enh,ewh->enw", torch.bmm(x, self.up.mT).relu(), self.down)


class BroadcastOfExperts(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(x, self.up.mT).relu(), self.down.mT)


def cut(model: nn.Module, mesh: DeviceMesh, layout: Any = None) -> nn.Module:
    for name in ("up", "down"):
        parameter = distribute_tensor(getattr(model, name).detach(), mesh, layout or [Shard(0)])
        model.register_parameter(name, nn.Parameter(parameter))
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    data = []
    for _ in range(STEPS):
        chosen = torch.randint(EXPERTS, (32,), generator=generator)
        data.append((torch.randn(32, WIDTH, generator=generator), chosen))
    return data


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def products(run: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        run()
    return {event.name for event in profile.events() or () if event.name in OPERATORS}


def train(models: list[nn.Module], given: Callable[..., Any], dtype: torch.dtype, sums: int = 1) -> None:
    """One process and ranks by the same batches; what is compiled is compiled before the first event.

    Args:
        given: what a model is called with: which of the two, ``x``, ``chosen`` -> arguments.
        dtype: of products.
        sums: how many ranks' gradients are added up, each of a mean over its own rows.
    """
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in models]
    compiled = None
    for step, (x, chosen) in enumerate(batches()):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            (whole_of(model(*given(i, x, chosen))).square().mean() / (sums if i else 1)).backward()
            optimizer.step()
        if step == 1:
            compiled = graphs()
    assert compiled == graphs()
    assert sparsifier(models[1]).weights["up"].changes > 3
    check_same(models, dtype)


def whole_of(out: Tensor) -> Tensor:
    return out.full_tensor() if isinstance(out, DTensor) else out


def check_same(models: list[nn.Module], dtype: torch.dtype) -> None:
    alone, model = models

    def compare(got: Tensor, want: Tensor) -> None:
        assert_same_course(got.to(dtype), want.detach().to(dtype), PARTED[dtype])

    for name, mask in sparsifier(model).masks.items():
        assert torch.equal(mask, sparsifier(alone).masks[name]), name
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        compare(whole(p), q)
        assert q.grad is not None
        assert p.grad is not None
        compare(whole(p.grad), q.grad)
        inactive = sparsifier(model).weights[name].outside(torch.device("cpu"))
        assert not whole(p)[inactive].any()
    check_ranks(model)
    assert_same_on_all_ranks(*map(whole, model.parameters()))
    for weight in sparsifier(model).weights.values():
        assert (weight.uses.served, weight.uses.unmatched) == (True, []), (weight.name, weight.uses)


def sparse(model: nn.Module) -> nn.Module:
    return sparsify(model, SCHEDULE, block=4, include=["up", "down"])


def sent(i: int, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return (mine(x), mine(chosen)) if i else (x, chosen)


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def gathered_by_fsdp() -> None:
    """The whole stack, gathered from shards of experts."""
    models = [sparse(BatchOfExperts()), sparse(BatchOfExperts())]
    models[1].compile(backend="mst", options=OPTIONS)
    fully_shard(models[1])
    train(models, lambda i, x, _: (mine(x) if i else x,), torch.float32)
    assert products(lambda: models[1](batches()[0][0]).sum().backward()) == OPERATORS


def sent_to_experts() -> None:
    """Local tensors come into the compiled function: with gradients, in evaluation, and of frozen experts."""
    mesh = init_device_mesh("cpu", (2,))
    SentExperts.mesh = mesh
    models = [sparse(Experts()), sparse(cut(SentExperts(), mesh))]
    models[1].run = torch.compile(run_experts, backend="mst", options=OPTIONS, dynamic=True)
    train(models, sent, torch.bfloat16, sums=2)
    x, chosen = batches()[0]
    assert products(lambda: models[1](mine(x), mine(chosen)).sum().backward()) == OPERATORS
    want = models[0](x, chosen).detach()
    with torch.no_grad():
        found = []
        assert products(lambda: found.append(models[1](mine(x), mine(chosen)))) == {"mst::grouped_linear"}
        assert_same_course(found[0].bfloat16(), mine(want).bfloat16(), PARTED[torch.bfloat16])
    models[1].requires_grad_(False)
    assert products(lambda: models[1](mine(x).requires_grad_(), mine(chosen)).sum().backward()) == {
        "mst::grouped_linear",
        "mst::grouped_linear_grad_input",
    }
    text = " ".join(str(explain(models[1])).split())
    assert "this rank multiplies 2 of them" in text
    assert "block-sparse" in text


def sent_to_experts_over_fsdp() -> None:
    """Experts of a rank are shards too, gathered to the DTensor that the rank multiplies its part of."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("fsdp", "ep"))
    SentExperts.mesh = mesh["ep"]
    for before in (True, False):
        torch._dynamo.reset()
        model = cut(SentExperts(), mesh["ep"])
        model = sparse(model) if before else model
        model = fully_shard(model, mesh=mesh["fsdp"])
        models = [sparse(Experts()), model if before else sparse(model)]
        model.run = torch.compile(run_experts, backend="mst", options=OPTIONS, dynamic=True)
        train(models, sent, torch.bfloat16, sums=2)


def as_dtensors() -> None:
    """Products of DTensors: rows that all ranks hold, a batch that is cut by experts, rows that are cut under whole
    stacks."""
    mesh = init_device_mesh("cpu", (2,))
    each = torch.randn(EXPERTS, 8, WIDTH, generator=torch.Generator().manual_seed(5))
    cases: list[tuple[type[Experts], Any, Any, bool]] = [
        (BatchOfExperts, [Shard(0)], [Replicate()], False),
        (BatchOfExperts, [Shard(0)], [Shard(0)], True),
        (BroadcastOfExperts, [Shard(0)], [Replicate()], False),
        (BatchOfExperts, [Replicate()], [Shard(1)], True),
        (BatchOfExperts, [Replicate()], [Replicate()], True),
    ]
    for kind, layout, of_input, batch in cases:
        torch._dynamo.reset()
        models = [sparse(kind()), sparse(cut(kind(), mesh, layout))]
        models[1].compile(backend="mst", options=OPTIONS)

        def given(i: int, x: Tensor, _: Tensor, batch: bool = batch, of_input: Any = of_input) -> tuple[Tensor]:
            x = each + x[0] if batch else x
            return (distribute_tensor(x, mesh, of_input).requires_grad_() if i else x,)

        train(models, given, torch.float32)
        x, y = (given(i, *batches()[0])[0].detach().requires_grad_() for i in range(2))
        models[0](x).square().mean().backward()
        seen = products(lambda models=models, y=y: whole_of(models[1](y)).square().mean().backward())
        assert seen == OPERATORS, (layout, of_input)
        assert x.grad is not None
        assert y.grad is not None
        assert_same_course(whole(y.grad), x.grad, PARTED[torch.float32])


SCENARIOS = [gathered_by_fsdp, sent_to_experts, sent_to_experts_over_fsdp, as_dtensors]
found = results_of(SCENARIOS, 2)


@pytest.mark.parametrize("name", [s.__name__ for s in SCENARIOS])
def test_experts_on_two_ranks(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]
