"""Modules of one model that are sparsified separately: what serves the whole model, and what asks for one of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, unchanged
from mask_cases import element_masks
from torch import Tensor, nn

import mst_compile
from mst_compile import Constant, MixedSparsity, densify, explain, param_groups, sparsifier, sparsify
from mst_compile.communication import check_ranks
from mst_compile.errors import (
    AlreadySparseError,
    ForecastError,
    NotSparseError,
    SeveralSparsifiersError,
)
from mst_compile.flops import Meter, dense_linear_training

STILL = Constant(0.5, growth="none")
MOVING = Constant(0.7, interval=2, gradient_steps=2)


class Pair(nn.Module):
    """Two parts of the same form, and a linear layer beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = Blocks(), Blocks(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(self.encoder(x)))


def pair(first: Any = MOVING, second: Any = STILL) -> Pair:
    torch.manual_seed(0)
    model = Pair()
    sparsify(model.encoder, first, block=4)
    sparsify(model.decoder, second, block=4, seed=1)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(4, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def names(model: nn.Module) -> set[str]:
    return {row.name for row in explain(model)}


def test_explain_lists_all_by_their_names_in_the_model() -> None:
    model = pair()
    parameters = {n for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith("head")}
    assert names(model) == parameters
    assert names(compiled(model)) == parameters
    assert names(nn.Sequential(model)) == {f"0.{n}" for n in parameters}
    assert names(model.encoder) == {n.removeprefix("encoder.") for n in parameters if n.startswith("encoder")}
    densities = {row.name: row.density for row in explain(model)}
    for part in ("encoder", "decoder"):
        for name, weight in sparsifier(getattr(model, part)).weights.items():
            assert densities[f"{part}.{name}"] == weight.density


def test_explain_knows_the_shape_of_what_one_part_left_out() -> None:
    model = Pair()
    sparsify(model.decoder, STILL, exclude="layers.0.*")
    skipped = {row.name: row.shape for row in explain(model) if row.status.startswith("skipped")}
    assert skipped == {"decoder.layers.0.1.weight": (64, 32), "decoder.layers.0.3.weight": (32, 64)}


@pytest.mark.parametrize("wrap", [lambda m: m, compiled, lambda m: nn.Sequential(nn.ReLU(), m)])
def test_the_sparsifier_of_the_whole_is_asked_for_by_part(wrap: Any) -> None:
    model = pair()
    whole = wrap(model)
    with unchanged(model), pytest.raises(SeveralSparsifiersError, match=r"2 modules .*encoder'.*decoder'"):
        sparsifier(whole)
    assert sparsifier(wrap(model.encoder)) is not sparsifier(wrap(model.decoder))


def test_one_part_is_the_sparsifier_of_the_whole() -> None:
    model = Pair()
    sparsify(model.decoder, STILL)
    assert sparsifier(model) is sparsifier(model.decoder)
    with pytest.raises(NotSparseError, match=r"a weight of it is called 'layers\.0\.1\.weight'"):
        sparsifier(model.decoder.layers[0])
    with pytest.raises(NotSparseError, match="sparsify"):
        sparsifier(model.encoder)


def test_a_part_within_a_sparse_model_has_its_own() -> None:
    model = Pair()
    sparsify(model, MOVING, include="encoder.*")
    own = sparsifier(model)
    sparsify(model.decoder, STILL)
    with pytest.raises(SeveralSparsifiersError, match="the model itself, 'decoder'"):
        sparsifier(model)
    assert {n.partition(".")[0] for n in names(model)} == {"encoder", "decoder", "head"}
    assert len(explain(model)) == len(names(model)) == 9
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 3)
    assert own.step_count == sparsifier(model.decoder).step_count == 3


def test_forecast_asks_for_a_part() -> None:
    model = pair()
    with unchanged(model), pytest.raises(SeveralSparsifiersError, match="encoder"):
        mst_compile.forecast(model, tokens=80, tokens_per_step=8)
    assert mst_compile.forecast(model.encoder, tokens=80, tokens_per_step=8).flops > 0


def test_a_meter_adds_the_parts_up() -> None:
    model = pair()
    whole, parts = Meter(model, 8, rest=0), [Meter(p, 8, rest=0) for p in (model.encoder, model.decoder)]
    for meter in (whole, *parts):
        meter.step()
    assert whole.flops == sum(p.flops for p in parts) > 0
    assert dense_linear_training(model) == dense_linear_training(model.head)
    with pytest.raises(ForecastError, match=r"attention_saved=5\b"):
        Meter(model, 8, attention_saved=5)
    check_ranks(model)


def test_densify_ends_all() -> None:
    model = pair()
    plain = set(vars(Pair().encoder))
    densify(model)
    assert set(vars(model.encoder)) == plain
    for function in (sparsifier, explain, densify):
        with pytest.raises(NotSparseError):
            function(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]
    sparsify(model, STILL)


def test_densify_ends_one() -> None:
    model = pair()
    decoder = sparsifier(model.decoder)
    densify(model.encoder)
    assert sparsifier(model) is decoder
    train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    assert decoder.step_count == 2


# -- training and coming back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_each_part_trains_as_it_would_alone(kind: Any) -> None:
    """One optimizer for both moves each on by its own schedule."""
    model = pair()
    optimizer = kind(model.parameters(), 1e-2)
    before = {part: sparsifier(getattr(model, part)).masks for part in ("encoder", "decoder")}
    train(model, optimizer, 5)
    for part in ("encoder", "decoder"):
        module = getattr(model, part)
        own = sparsifier(module)
        assert own.step_count == 5
        moved = any(not torch.equal(before[part][n], m) for n, m in own.masks.items())
        assert moved == (part == "encoder")
        for name, mask in element_masks(module).items():
            assert not module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_optimizer_state_dicts_bring_both_back(at: int) -> None:
    model = pair()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 4, seed=1)
    again = pair()
    resumed = torch.optim.AdamW(again.parameters(), 1e-2)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, 4, seed=1)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    for part in ("encoder", "decoder"):
        one, other = sparsifier(getattr(model, part)), sparsifier(getattr(again, part))
        assert (one.step_count, one.seed) == (other.step_count, other.seed)
        assert one.step_count == at + 4


def test_copies_have_parts_of_their_own() -> None:
    model = pair()
    twin = copy.deepcopy(model)
    train(twin, torch.optim.AdamW(twin.parameters(), 1e-2), 3)
    assert [sparsifier(m).step_count for m in (model.encoder, model.decoder)] == [0, 0]
    assert [sparsifier(m).step_count for m in (twin.encoder, twin.decoder)] == [3, 3]


# -- learning rates ----------------------------------------------------------------------------------------------------


def seen_rates(model: nn.Module, groups: list[dict[str, Any]]) -> list[float]:
    """The learning rate that each group steps with."""
    optimizer, found = torch.optim.SGD(groups, 1.0), list[float]()
    optimizer.register_step_pre_hook(lambda o, *_: found.extend(g["lr"] for g in o.param_groups))
    model(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    assert all(g["lr"] == 1.0 for g in optimizer.param_groups)
    return found


def test_groups_are_of_one_schedule_each() -> None:
    model = pair(MixedSparsity(10, 0.5), STILL)
    encoder = {id(p) for p in model.encoder.parameters()}
    groups = param_groups(model)
    for group in groups:
        if "density_rate" in group:
            assert len({id(p) in encoder for p in group["params"]}) == 1
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_a_group_across_parts_is_scaled_once_by_its_mean_density() -> None:
    model = pair(Constant(0.75, growth="none"), STILL)
    weights = [p for p in model.parameters() if p.dim() == 2 and p.shape[0] > 8]
    parts = [sparsifier(m) for m in (model.encoder, model.decoder)]
    density = sum(own.density for own in parts) / 2  # both of one form
    (rate,) = seen_rates(model, [{"params": weights, "density_rate": 1.0}])
    assert rate == pytest.approx(1 / density)
    rates = seen_rates(model, [{"params": [p], "density_rate": 1.0} for p in weights])
    each = [w.density for own in parts for w in own.weights.values()]
    assert rates == pytest.approx([1 / d for d in each])


# -- shared weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"exclude": "layers.0.*"}])
def test_a_weight_of_two_parts_is_refused(options: dict[str, Any]) -> None:
    model = Pair()
    model.decoder.layers[0][1].weight = model.encoder.layers[1][1].weight
    sparsify(model.encoder, STILL)
    with unchanged(model), pytest.raises(AlreadySparseError, match=r"layers\.0\.1\.weight is, .* layers\.1\.1\.weight"):
        sparsify(model.decoder, STILL, **options)
    densify(model.encoder)
    sparsify(model, STILL)
    assert sparsifier(model).weights["encoder.layers.1.1.weight"].tied


def test_parts_compile_together() -> None:
    model, x = pair(STILL, Constant(0.8, growth="none")), torch.randn(4, 32)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert all(row.status.startswith(("matched", "skipped")) for row in explain(model))
