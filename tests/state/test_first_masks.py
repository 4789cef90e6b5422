"""The masks that a run begins with: which weights they are made from, what they keep, and what is refused."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import static, unchanged
from mask_cases import element_masks, expand
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from mst_compile import Constant, MixedSparsity, Override, densify, explain, sparsifier, sparsify
from mst_compile.errors import ArgumentError, MaskError, MSTError, NotSparseError, SelectionError, WeightError
from mst_compile.rules.guard import backbone

SPARSE = static(0.8)
NAME, OTHER = "0.weight", "2.weight"  # 128 x 64, 64 x 128


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """Half of the outputs are to follow an eighth of the inputs: what is learnt has places, as in real models."""
    teacher = torch.randn(8, 32, generator=torch.Generator().manual_seed(2)) / 8**0.5
    return (model(x) - nn.functional.pad(torch.tanh(x[:, :8] @ teacher), (0, 32))).square().mean()


def inputs(count: int, seed: int) -> Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int, lr: float = 1e-3) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1)
    for step in range(steps):
        loss(model, inputs(128, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@functools.cache
def _trained() -> nn.Module:
    return train(fresh(), 300, 1e-2)


def trained() -> nn.Module:
    """A model that does well what it was trained for."""
    return copy.deepcopy(_trained())


def score(model: nn.Module) -> float:
    with torch.no_grad():
        return loss(model, inputs(512, 10**6)).item()


def own_masks(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    return sparsifier(sparsify(model, SPARSE, **options)).masks


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(mask, b[name]) for name, mask in a.items())


# -- from what they are made -------------------------------------------------------------------------------------------


def test_a_trained_model_loses_less_by_magnitude() -> None:
    by_magnitude, at_random, multiplied = (
        score(sparsify(trained(), SPARSE, masks=masks, rescale=rescale))  # type: ignore[arg-type]
        for masks, rescale in (("magnitude", True), ("random", False), ("random", True))
    )
    assert score(trained()) < 0.1 * score(fresh()), "it was trained"
    assert by_magnitude < 0.5 * min(at_random, multiplied)


def test_the_choice_is_made_by_the_weights_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mst_compile")
    new, model = sparsify(fresh(), SPARSE), sparsify(trained(), SPARSE)
    assert sparsifier(new).first_masks == "at random: weights look fresh"
    assert sparsifier(model).first_masks.startswith("by magnitude: the values of 0.weight")
    assert [r.getMessage() for r in caplog.records if "first masks" in r.getMessage()] == [
        f"first masks {sparsifier(m).first_masks}" for m in (new, model)
    ]
    for m in (new, model):
        assert f"first masks: {sparsifier(m).first_masks}" in " ".join(str(explain(m)).split())  # wrapped
    assert same(sparsifier(model).masks, own_masks(trained(), masks="magnitude"))
    assert same(sparsifier(new).masks, own_masks(fresh(), masks="random"))
    assert sparsifier(sparsify(trained(), SPARSE, masks="random")).first_masks == "at random"
    assert sparsifier(copy.deepcopy(model)).first_masks == sparsifier(model).first_masks
    both = sparsify(nn.ModuleDict({"a": trained()}), SPARSE)  # a part of it is enough
    assert "by magnitude" in sparsifier(both).first_masks


def test_a_loaded_state_dict_counts_by_its_values() -> None:
    model = fresh()
    model.load_state_dict(trained().state_dict())
    assert same(own_masks(model), own_masks(trained()))
    model = fresh()
    model.load_state_dict(fresh().state_dict())
    assert "at random" in sparsifier(sparsify(model, SPARSE)).first_masks


@pytest.mark.filterwarnings("ignore")
def test_from_pretrained_is_known(tmp_path: Path) -> None:
    """By the Parameters that it has loaded: a new model of a known configuration has the same name and is fresh."""
    tiny = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    GPT2LMHeadModel(tiny).save_pretrained(tmp_path)  # never trained, so that only its origin tells
    loaded = sparsifier(sparsify(GPT2LMHeadModel.from_pretrained(tmp_path), SPARSE))
    assert loaded.first_masks.startswith("by magnitude: transformer.")
    assert loaded.first_masks.endswith("was loaded by from_pretrained")
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert new.name_or_path == str(tmp_path)
    assert "at random" in sparsifier(sparsify(new, SPARSE)).first_masks


def test_a_schedule_that_starts_dense_needs_no_masks() -> None:
    for masks in (None, "magnitude", "random"):
        model = trained()
        before = copy.deepcopy(model.state_dict())
        sparsify(model, MixedSparsity.published(100), masks=masks)  # type: ignore[arg-type]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert "starts dense" in sparsifier(model).first_masks


# -- what they keep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", ["coverage", "backbone", "none"])
@pytest.mark.parametrize("distribution", ["erdos-renyi", "uniform"])
@pytest.mark.parametrize("magnitude", ["l1", "l2"])
def test_the_largest_blocks_stay_beside_those_of_the_guard(guard: Any, distribution: str, magnitude: str) -> None:
    schedule = Constant(0.7, growth="none", distribution=distribution, magnitude=magnitude)
    model = trained()
    with torch.no_grad():
        model[0].weight[:32] *= 1e-3  # whole block rows that magnitude alone would empty
    at_random = sparsifier(sparsify(copy.deepcopy(model), schedule, guard=guard, masks="random", block=4)).masks
    before = {n: p.detach().double() for n, p in copy.deepcopy(model).named_parameters()}
    own = sparsifier(sparsify(model, schedule, guard=guard, masks="magnitude", block=4))
    for name, weight in own.weights.items():
        mask = weight.mask
        assert int(mask.sum()) == int(at_random[name].sum()), "the density is the schedule's"
        size = before[name].abs() if magnitude == "l1" else before[name].square()
        scores = size.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).mean((1, 3))
        if guard == "coverage":
            assert bool(mask.any(0).all())
            assert bool(mask.any(1).all())
        kept, dropped = scores[mask], scores[~mask]
        if guard == "none":
            assert kept.min() >= dropped.max()
        elif guard == "backbone":
            assert bool(mask[backbone(mask.shape)].all())  # type: ignore[arg-type]
            assert scores[mask & ~backbone(mask.shape)].min() >= dropped.max()  # type: ignore[arg-type]
        else:
            best = (scores == scores.amax(0)) | (scores == scores.amax(1, keepdim=True))
            assert scores[mask & ~best].min() >= dropped.max()
    emptied = own.weights["0.weight"].mask[:8]
    assert bool(emptied.any()) == (guard != "none")


@pytest.mark.parametrize("rescale", [True, False])
def test_trained_weights_are_not_multiplied(rescale: bool) -> None:
    model = trained()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsify(model, SPARSE, rescale=rescale)
    masks = element_masks(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * masks[name] if name in masks else before[name])


def test_magnitude_draws_nothing() -> None:
    seeds = [own_masks(trained(), masks="magnitude", seed=seed) for seed in (0, 1)]
    torch.manual_seed(5)
    with unchanged():  # the user's generator
        assert same(seeds[0], own_masks(trained(), masks="magnitude"))
    assert same(*seeds)
    assert not same(*(own_masks(trained(), masks="random", seed=seed) for seed in (0, 1)))


def test_a_sparse_model_that_becomes_sparse_again_loses_nothing() -> None:
    model = sparsify(trained(), SPARSE)
    train(model, 20)
    before, masks = copy.deepcopy(model.state_dict()), sparsifier(model).masks
    densify(model)
    assert same(own_masks(model, seed=3), masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(64, 32, padding_idx=0), nn.Linear(32, 64, bias=False)
            self.head.weight = self.emb.weight

    torch.manual_seed(0)
    model = sparsify(Tied(), SPARSE)
    assert "at random" in sparsifier(model).first_masks, "the row of the padding token is no training"
    densify(model)
    with torch.no_grad():
        model.emb.weight.copy_(torch.randn(64, 32) * torch.linspace(0.1, 2, 64)[:, None])
    own = sparsifier(sparsify(model, SPARSE))
    assert own.first_masks.startswith("by magnitude: the values of emb.weight")
    assert list(own.masks) == ["emb.weight"]
    assert own.masks["emb.weight"][4:].sum() > 3 * own.masks["emb.weight"][:4].sum()
    assert model.head.weight is model.emb.weight


# -- masks from the user -----------------------------------------------------------------------------------------------


def halves() -> Tensor:
    """Block mask of the first half of the columns of 128 x 64, in blocks of 4."""
    mask = torch.zeros(32, 16, dtype=torch.bool)
    mask[:, :8] = True
    return mask


@pytest.mark.parametrize("kind", ["blocks", "elements"])
@pytest.mark.parametrize("new", [True, False])
def test_masks_that_are_given(kind: str, new: bool) -> None:
    mask = halves() if kind == "blocks" else expand(halves(), 128, 64, 4)
    model = fresh() if new else trained()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = sparsifier(sparsify(model, SPARSE, masks={NAME: mask}, block=4))
    mask[:] = False  # the run has its own
    assert torch.equal(own.masks[NAME], halves())
    others = own_masks(fresh() if new else trained(), block=4)
    assert same({n: m for n, m in own.masks.items() if n != NAME}, {n: m for n, m in others.items() if n != NAME})
    assert own.first_masks.startswith(f"given for 1 weights, of others {'at random' if new else 'by magnitude'}")
    values = dict(model.named_parameters())[NAME]
    factor = 0.5**-0.5 if new else 1.0
    torch.testing.assert_close(values.detach(), before[NAME] * expand(halves(), 128, 64, 4) * factor)
    train(model, 10)
    assert torch.equal(own.masks[NAME], halves())


def test_given_masks_hold_until_an_event_returns_to_the_schedule() -> None:
    model = fresh()
    schedule = Constant(0.8, interval=3, growth="random")
    own = sparsifier(sparsify(model, schedule, masks={NAME: halves()}, block=4))
    train(model, 2)
    assert own.weights[NAME].density == 0.5
    train(model, 1)
    assert own.weights[NAME].density < 0.4


def test_elements_are_blocks_of_one() -> None:
    model, mask = trained(), torch.rand(128, 64) < 0.2
    assert torch.equal(own_masks(model, masks={NAME: mask}, block=1)[NAME], mask)


def cut() -> Tensor:
    mask = expand(halves(), 128, 64, 4)
    mask[3, 3] = False
    return mask


WRONG: dict[str, tuple[Any, type[MSTError], str]] = {
    "a word": ("largest", ArgumentError, r"'magnitude', 'random'.*'largest'"),
    "a list": ([halves()], ArgumentError, "mapping"),
    "a tensor": (halves(), ArgumentError, "mapping"),
    "nowhere": ({"nowhere": halves()}, SelectionError, r"'nowhere'.*0\.weight"),
    "no name": ({0: halves()}, SelectionError, "called 0"),
    "shape": ({NAME: halves().t()}, MaskError, r"0\.weight .*\(32, 16\) blocks.*\(128, 64\) elements.*\(16, 32\)"),
    "dtype": ({NAME: halves().float()}, MaskError, r"torch\.bool.*got \(32, 16\) of torch\.float32"),
    "device": ({NAME: halves().to("meta")}, MaskError, "meta"),
    "layout": ({NAME: halves().to_sparse()}, MaskError, "sparse_coo"),
    "no tensor": ({NAME: [[True]]}, MaskError, r"\[\[True\]\] of type list"),
    "cut blocks": ({NAME: cut()}, MaskError, "1 elements are inactive in blocks with active ones.*block=1"),
    "nothing active": ({NAME: ~torch.ones(32, 16, dtype=torch.bool)}, MaskError, "no active block"),
    "the second of two": ({OTHER: torch.ones(16, 32) > 0, NAME: halves()[1:]}, MaskError, r"mask of 0\.weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_masks_that_do_not_fit_change_nothing(name: str) -> None:
    masks, error, message = WRONG[name]
    model = trained()
    with unchanged(model), pytest.raises(error, match=message):
        sparsify(model, SPARSE, masks=masks, block=4)
    with pytest.raises(NotSparseError):
        sparsifier(model)


def test_masks_for_a_schedule_that_draws_none() -> None:
    model = fresh()
    with unchanged(model), pytest.raises(ArgumentError, match="starts dense"):
        sparsify(model, MixedSparsity.published(100), masks={NAME: halves()}, block=4)


def test_values_that_are_no_numbers_have_no_magnitude() -> None:
    model = trained()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(WeightError, match=r"2\.weight holds values that are not finite"):
        sparsify(model, SPARSE)
    sparsify(model, SPARSE, masks="random")


def test_weights_that_stay_dense_by_an_override() -> None:
    masks = own_masks(trained(), overrides={NAME: Override(sparsity=0.0)})
    assert bool(masks[NAME].all())
