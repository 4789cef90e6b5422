"""Which weights become sparse, on which grid; what sparsify leaves alone, and how it comes off again."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import Blocks, static, statuses, unchanged
from mask_cases import element_masks
from mst_compile.lowering import device
from oracles import assert_within, of_rounding
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import mst_compile
from mst_compile import Constant, MixedSparsity, Sparsifier, densify, explain, sparsifier, sparsify
from mst_compile.errors import MaskError, NotSparseError, SelectionError
from mst_compile.rules.density import DISTRIBUTIONS
from mst_compile.state import selection

SPARSE = static(0.7)


class Zoo(nn.Module):
    """One of everything that selection has an opinion on."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.fc = nn.Linear(32, 64)
        self.conv1d = Conv1D(48, 64)
        self.back = nn.Linear(48, 32, bias=False)
        self.narrow = nn.Linear(32, 3)
        self.normed = parametrizations.weight_norm(nn.Linear(32, 32))
        self.free = nn.Parameter(torch.randn(40, 32))
        self.conv = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.emb(ids))
        return self.head(x + self.back(self.conv1d(self.fc(x))) + self.normed(x))


def zeros_follow_masks(model: nn.Module, *, grown: bool = False) -> None:
    """Zeros outside the masks; values inside, unless blocks have ``grown`` since, which start at 0."""
    parameters = dict(model.named_parameters())
    for name, mask in element_masks(model).items():
        assert not parameters[name][~mask].any()
        assert grown or bool((parameters[name][mask] != 0).all())


def same_masks(a: Sparsifier, b: Sparsifier) -> bool:
    return a.masks.keys() == b.masks.keys() and all(torch.equal(m, b.masks[n]) for n, m in a.masks.items())


# -- selection ---------------------------------------------------------------------------------------------------------


def test_selection() -> None:
    model = sparsify(Zoo(), SPARSE)
    own = sparsifier(model)
    assert set(own.weights) == {"emb.weight", "fc.weight", "conv1d.weight", "back.weight"}
    assert own.weights["emb.weight"].tied
    assert not own.weights["fc.weight"].tied
    assert "(32, 3)" in own.skipped["narrow.weight"] or "(3, 32)" in own.skipped["narrow.weight"]
    assert "parametrized" in own.skipped["normed.weight"]
    shown = statuses(model)
    assert shown["narrow.weight"].startswith("skipped: ")
    assert shown["normed.weight"].startswith("skipped: ")
    assert "tied" in shown["emb.weight"]
    assert model.head.weight is model.emb.weight
    zeros_follow_masks(model)


def test_include_and_exclude() -> None:
    def names(**options: Any) -> set[str]:
        return set(sparsifier(sparsify(Zoo(), SPARSE, **options)).weights)

    assert names(include="fc") == names(include=["fc.weight"]) == {"fc.weight"}
    assert names(include=["*c*"], exclude="conv1d*") == {"fc.weight", "back.weight"}
    assert names(include="free") == {"free"}
    assert names(exclude=["head", "back.*"]) == {"fc.weight", "conv1d.weight"}, "a tied weight answers to all its names"
    assert names(include="head.weight") == {"emb.weight"}
    skipped = sparsifier(sparsify(Zoo(), SPARSE, include="fc.*", exclude="back")).skipped
    assert "include" in skipped["conv1d.weight"]


@pytest.mark.parametrize("rescale", [False, True])
def test_the_rest_stays_bitwise(rescale: bool) -> None:
    """Weights that stay are as they were, or all larger by the root of the density: that keeps a layer's variance."""
    torch.manual_seed(3)
    model = Zoo()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = {n: id(p) for n, p in model.named_parameters()}
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    keys = list(model.state_dict())
    rng = torch.get_rng_state()
    assert sparsify(model, SPARSE, rescale=rescale) is model
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(model.state_dict()) == keys
    masks = element_masks(model)
    for name, p in model.named_parameters():
        assert (id(p), p.data_ptr()) == (ids[name], pointers[name])
        if name in masks:
            kept = before[name] * masks[name]
            if rescale:
                exact = kept.double() * masks[name].double().mean() ** -0.5
                assert_within(p.detach(), exact, of_rounding(torch.float32, times=3) * exact.abs(), name)
            else:
                assert torch.equal(p, kept)
        else:
            assert torch.equal(p, before[name])


# -- density, blocks, masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["erdos-renyi", "uniform"])
@pytest.mark.parametrize("block", [None, 1, 4, 8, 16])
def test_density_is_the_schedules(distribution: Any, block: int | None) -> None:
    model = nn.Sequential(nn.Linear(256, 400), nn.Linear(400, 256), nn.Linear(256, 130))
    sparsify(model, Constant(0.6, growth="none", distribution=distribution), block=block)
    own = sparsifier(model)
    shapes = [(w.grid.rows, w.grid.cols) for w in own.weights.values()]
    targets = DISTRIBUTIONS[distribution](shapes, 0.6)
    for target, weight in zip(targets, own.weights.values(), strict=True):
        count = int(weight.mask.sum())
        assert count == max(int(weight.backbone.sum()), round(target * weight.grid.blocks))
        assert bool((weight.mask | ~weight.backbone).all())
        assert weight.grid.block == (block or device.of("cpu").default_block)
    # Rounding to blocks, and ragged edges whose blocks hold fewer elements.
    assert own.density == pytest.approx(0.4, abs=0.01)
    zeros_follow_masks(model)


@pytest.mark.parametrize(
    ("device", "shape", "asked", "got"),
    [
        ("cpu", (512, 512), 64, 16),
        ("cuda", (512, 512), 64, 32),
        ("cuda", (4096, 4096), 64, 64),
        ("cuda", (20, 20), None, 32),
        ("cuda", (512, 512), 8, 8),
    ],
)
def test_blocks_stay_coarse_enough_for_a_gpu(device: str, shape: tuple[int, int], asked: int | None, got: int) -> None:
    grid, note = selection._grid(torch.device(device), shape, 0.1, asked)
    assert grid.block == got
    assert (f"block {asked} -> {got}" in note) == (asked is not None and asked != got)
    assert ("density cannot fall below" in note) == (1 / min(grid.shape) > 0.1)


def test_blocks_shrink_where_the_grid_is_too_coarse() -> None:
    model = nn.ModuleDict({"small": nn.Linear(64, 96), "large": nn.Linear(512, 512), "thin": nn.Linear(512, 5)})
    sparsify(model, Constant(0.7, growth="none", distribution="uniform"), block=32)
    own = sparsifier(model)
    # The backbone takes 1 / min(rows, cols) of the blocks, at most half of the density 0.3.
    assert {n: w.grid.block for n, w in own.weights.items()} == {
        "small.weight": 8, "large.weight": 32, "thin.weight": 4,
    }  # fmt: skip
    assert "32 -> 8" in own.weights["small.weight"].note
    assert "32 -> 8" in statuses(model)["small.weight"]
    assert own.weights["large.weight"].note == ""
    assert "backbone" in own.weights["thin.weight"].note
    zeros_follow_masks(model)


def test_ragged_grid() -> None:
    model = sparsify(nn.Sequential(nn.Linear(35, 101)), static(0.5), block=16)
    weight = sparsifier(model).weights["0.weight"]
    assert weight.grid.shape == (7, 3) if weight.grid.block == 16 else (13, 5)
    zeros_follow_masks(model)
    assert weight.density == element_masks(model)["0.weight"].double().mean().item()


def test_masks_depend_on_seed_and_name_alone() -> None:
    def masks(model: nn.Module, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed() % 1000)
        return sparsifier(sparsify(model, SPARSE, **options)).masks

    first, again, other = masks(Blocks()), masks(Blocks().to(torch.bfloat16)), masks(Blocks(), seed=1)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    assert not torch.equal(first["layers.0.1.weight"], first["layers.1.1.weight"])
    reported = sparsifier(sparsify(Blocks(), SPARSE)).masks
    reported["layers.0.1.weight"].zero_()  # a copy: the model's own mask stays


def test_mixed_sparsity_starts_dense() -> None:
    model = Blocks()
    before = copy.deepcopy(model.state_dict())
    sparsify(model, MixedSparsity.published(100))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sparsifier(model).density == 1.0


# -- moving, copying, saving -------------------------------------------------------------------------------------------


def test_before_or_after_a_dtype_change() -> None:
    early = sparsify(Blocks(), SPARSE).to(torch.bfloat16)
    torch.manual_seed(0)
    late = sparsify(Blocks().to(torch.bfloat16), SPARSE)
    early.load_state_dict(late.state_dict())
    zeros_follow_masks(early)
    assert same_masks(sparsifier(early), sparsifier(late))
    for model in (early, late):
        model(torch.randn(2, 32, dtype=torch.bfloat16)).sum().backward()
        for name, mask in element_masks(model).items():
            grad = dict(model.named_parameters())[name].grad
            assert grad is not None
            assert grad.dtype == torch.bfloat16
            assert not grad[~mask].any()


def round_trip(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, round_trip])
def test_copies_live_their_own_life(how: Any) -> None:
    model = sparsify(Blocks(), Constant(0.7, interval=1, growth="random"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    twin = how(model)
    own, other = sparsifier(model), sparsifier(twin)
    assert other is not own
    assert other.step_count == 1
    assert all(p is dict(twin.named_parameters())[w.name] for w, p in other.parameters())
    assert same_masks(own, other)
    before = own.masks
    twin_optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    twin(torch.randn(4, 32)).sum().backward()
    twin_optimizer.step()
    assert (own.step_count, other.step_count) == (1, 2)
    assert all(torch.equal(before[n], m) for n, m in own.masks.items())
    assert any(not torch.equal(before[n], m) for n, m in other.masks.items())
    zeros_follow_masks(twin, grown=True)


def test_a_checkpoint_loads_into_the_plain_model_and_back() -> None:
    plain, model = Blocks(), sparsify(Blocks(), SPARSE)
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(plain(x), model(x))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "mst": sparsifier(model).state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = sparsify(Blocks(), SPARSE, seed=5)
    other.load_state_dict(state["model"])
    sparsifier(other).load_state_dict(state["mst"])
    assert torch.equal(other(x), model(x))
    assert same_masks(sparsifier(other), sparsifier(model))
    zeros_follow_masks(other)


def test_densify_leaves_nothing_behind() -> None:
    model = Blocks()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    own_attributes = {n: set(vars(p)) for n, p in model.named_parameters()}
    own = sparsifier(sparsify(model, Constant(0.7, interval=1)))
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert densify(model) is model
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert {n: set(vars(p)) for n, p in model.named_parameters()} == own_attributes
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model(torch.randn(8, 32)).square().sum().backward()
    assert all(bool((p.grad != 0).all()) for n, p in model.named_parameters() if p.dim() == 2)
    optimizer.step()
    assert own.step_count == 0
    assert all(bool((p != 0).all()) for n, p in model.named_parameters() if p.dim() == 2)
    for function in (sparsifier, densify, explain):
        with pytest.raises(NotSparseError):
            function(model)
    sparsify(model, SPARSE)
    zeros_follow_masks(model)


def test_wrappers_lead_to_the_same_sparsifier() -> None:
    model = sparsify(Blocks(), SPARSE)
    assert sparsifier(torch.compile(model, backend="eager")) is sparsifier(model)
    assert sparsifier(nn.Sequential(model)) is sparsifier(model)


def test_explain_counts_flops() -> None:
    model = sparsify(Blocks(), SPARSE)
    for row in explain(model):
        assert row.dense_flops == 6 * row.shape[0] * row.shape[1]
        assert row.flops == pytest.approx(row.density * row.dense_flops)
    assert "MFLOPs" in str(explain(model))
    with unchanged(model):
        str(explain(model))


def test_explain_tells_what_has_grown_and_not_trained() -> None:
    model = sparsify(Blocks(), SPARSE)
    for row in explain(model):
        assert row.nonzero == pytest.approx(row.density)
    name, mask = next(iter(sparsifier(model).masks.items()))
    sparsifier(model).apply_mask(name, torch.ones_like(mask))
    grown = next(row for row in explain(model) if row.name == name)
    assert grown.density == 1.0
    assert 0 < grown.nonzero < 1
    assert f"1.000    {grown.nonzero:.3f}" in str(explain(model))  # density, non-zero


def test_public_names() -> None:
    assert set(mst_compile.__all__) <= set(dir(mst_compile))


def test_a_mask_can_be_set_by_hand() -> None:
    model = sparsify(Blocks(), SPARSE)
    own = sparsifier(model)
    name, mask = next(iter(own.masks.items()))
    mask[:] = False
    mask[0, 1] = mask[1, 0] = True
    own.apply_mask(name, mask)
    assert torch.equal(own.masks[name], mask)
    zeros_follow_masks(model, grown=True)


def test_a_mask_that_does_not_fit_changes_nothing() -> None:
    model = sparsify(Blocks(), SPARSE)
    own = sparsifier(model)
    name, mask = next(iter(own.masks.items()))
    for wrong in (mask[1:], mask.float(), [[True]]):
        with pytest.raises(MaskError, match="must have"):
            own.apply_mask(name, wrong)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="nowhere"):
        own.apply_mask("nowhere", mask)
    assert torch.equal(own.masks[name], mask)
