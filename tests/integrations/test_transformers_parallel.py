"""Models that Hugging Face's ``from_pretrained`` has made tensor-parallel, alone and under its FSDP2: training is that
of one process, masks too; evaluation and what is saved; layouts that are not served are refused by name.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracles import assert_same_course
from parallel_cases import ROUNDINGS, always_sparse, assert_same_run, whole
from ranks import results_of, run
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mst_compile import Constant, sparsifier, sparsify
from mst_compile.errors import ParallelismError
from mst_compile.parallel.ranks import check_ranks

DistributedConfig = pytest.importorskip("transformers.distributed").DistributedConfig

pytestmark = [
    pytest.mark.xdist_group("ranks"),  # one group of processes at a time
    pytest.mark.skipif(
        torch.accelerator.is_available(), reason="transformers takes accelerators; ranks here have none"
    ),
]

SCHEDULE = Constant(0.6, interval=3)


def as_torchrun() -> None:
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank())}
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "LOCAL_WORLD_SIZE": str(dist.get_world_size())}


def pretrained(**more: Any) -> Path:
    """The files of a model: two key heads, a head of 61 rows, which two ranks do not divide."""
    names: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "intermediate_size": 104, "num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=1, **sizes, **more)).save_pretrained(names[0])
    dist.barrier()
    return Path(names[0])


def load(folder: Path, dtype: torch.dtype, **layout: Any) -> nn.Module:
    given = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **given)


def step(model: Callable[..., Any], optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def batch(number: int) -> Tensor:
    return torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(number))


# -- scenarios: every rank runs them -----------------------------------------------------------------------------------


def is_one_process() -> None:
    """Through two topology events, with the head tied to the embedding and not; what is saved loads on one process."""
    as_torchrun()
    for tied in (False, True):
        folder = pretrained(tie_word_embeddings=tied)
        layout = {"tp_plan": "auto"} if tied else {"tp_size": 2}  # the same
        alone, model = load(folder, torch.float64), load(folder, torch.float64, **layout)
        assert model.model.layers[0].self_attn.o_proj.weight.placements == (Shard(1),)
        models = [sparsify(m, SCHEDULE, block=4) for m in (alone, model)]
        assert sparsifier(model).first_masks == sparsifier(alone).first_masks
        optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in models]
        for number in range(7):
            losses = [step(m, o, batch(number)) for m, o in zip(models, optimizers, strict=True)]
            assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
        assert_same_run(model, alone)
        model.save_pretrained(folder / "trained")
        dist.barrier()
        saved = load(folder / "trained", torch.float64)
        for p, q in zip(saved.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, whole(q))


def compiles() -> None:
    """Every weight runs sparse: as DTensors with gradients, as local tensors where none are recorded."""
    as_torchrun()
    folder = pretrained(tie_word_embeddings=False)
    models = [sparsify(load(folder, torch.float32, **layout), SCHEDULE, block=4) for layout in ({}, {"tp_size": 2})]
    alone, model = models
    fast = always_sparse(model, "aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in models]
    for number in range(4):
        losses = [step(m, o, batch(number)) for m, o in zip((alone, fast), optimizers, strict=True)]
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(batch(9)).logits, model(batch(9)).logits)
    check_ranks(model)
    for name, weight in sparsifier(model).weights.items():
        assert (weight.uses.served, weight.uses.unmatched) == (True, []), (name, weight.uses)


def experts() -> None:
    """Whole experts on every rank, beside tensor parallelism of the rest and alone over FSDP2."""
    as_torchrun()
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    names: list[Any] = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    if dist.get_rank() == 0:
        config = MixtralConfig(vocab_size=61, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, **sizes)
        MixtralForCausalLM(config).save_pretrained(names[0])
    dist.barrier()
    for layout in ({"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2}):
        torch._dynamo.reset()
        models = []
        for given in ({}, {"distributed_config": DistributedConfig(**layout)}):
            model = MixtralForCausalLM.from_pretrained(
                names[0], dtype=torch.float32, experts_implementation="grouped_mm", **given
            )
            models.append(sparsify(model, SCHEDULE, block=4))
        alone, model = models
        fast = always_sparse(model, "aot_eager")
        optimizers = [torch.optim.SGD(m.parameters(), 0.05, foreach=False) for m in models]
        for number in range(7):
            apart = "fsdp_size" in layout
            part = batch(number).chunk(2)[dist.get_rank()] if apart else batch(number)
            losses = [step(m, o, x) for m, o, x in zip((alone, fast), optimizers, (batch(number), part), strict=True)]
            if apart:
                dist.all_reduce(losses[1])
                losses[1] /= 2
            assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)
            if number == 1:
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == torch._dynamo.utils.counters["stats"]["unique_graphs"], "compiled again at an event"
        with torch.no_grad():
            torch.testing.assert_close(fast(batch(9)).logits, model(batch(9)).logits)
        check_ranks(model)
        stacks = [weight for weight in sparsifier(model).weights.values() if weight.stacked]
        assert len(stacks) == 2
        for weight in stacks:
            assert torch.equal(weight.mask, sparsifier(alone).masks[weight.name])
            assert weight.signature[3] == 2
            assert (weight.uses.served, weight.uses.unmatched) == (True, []), (weight.name, weight.uses)
            p, q = (dict(m.named_parameters())[weight.name] for m in (model, alone))
            assert_same_course(whole(p), q.detach(), 10**4)


def packed_columns() -> None:
    """Rows of two projections in one weight, of which a rank holds some of either: no rectangle."""
    as_torchrun()
    plan = {"layers.*.mlp.up_proj": "packed_colwise"}
    folder = pretrained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(folder, torch.float32, tp_size=2, tp_plan={f"model.{name}": style for name, style in plan.items()})
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    match = r"up_proj\.weight is a DTensor .*StridedShard.*ColwiseParallel and RowwiseParallel.*exclude"
    with pytest.raises(ParallelismError, match=match):
        sparsify(model, SCHEDULE, block=4)
    sparsify(model, SCHEDULE, block=4, exclude="*.up_proj")


def under_fsdp() -> None:
    as_torchrun()
    folder = pretrained(tie_word_embeddings=False)
    alone, model = load(folder, torch.float64), load(folder, torch.float64, tp_size=2, fsdp_size=2)
    models = [sparsify(m, SCHEDULE, block=4) for m in (alone, model)]
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in models]
    part = dist.get_rank() // 2
    for number in range(4):
        step(alone, optimizers[0], batch(number))
        step(model, optimizers[1], batch(number).chunk(2)[part])
    check_ranks(model)
    for name, mask in sparsifier(model).masks.items():
        assert torch.equal(mask, sparsifier(alone).masks[name]), name
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same_course(whole(p), q.detach(), ROUNDINGS)


TWO: list[Callable[[], None]] = [is_one_process, compiles, experts, packed_columns]


two = results_of(TWO, 2)


@pytest.mark.parametrize("scenario", [s.__name__ for s in TWO])
def test_two_ranks_of_transformers(two: dict[str, str], scenario: str) -> None:
    assert not two[scenario], two[scenario]


def test_four_ranks_of_transformers(tmp_path: Path) -> None:
    assert not run([under_fsdp], 4, tmp_path)["under_fsdp"]
