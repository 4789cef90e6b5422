"""Stacks of matrices in one Parameter: training is that of the same matrices as weights of their own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import static
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import block_masks, element_masks
from oracles import assert_same_bits, assert_same_course, assert_within, block_sums, of_sum
from torch import Tensor, nn

import mst_compile
from mst_compile import Constant, MixedSparsity, explain, export, sparsifier, sparsify
from mst_compile.blocks.bulk import block_mean_square, zero_blocks_, zero_inactive_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, read_mask, write_index
from mst_compile.errors import CheckpointError, ForecastError, MaskError, SelectionError, WeightError
from mst_compile.rules.gradual_pruning import GradualPruning
from mst_compile.rules.schedule import Schedule

EXPERTS, WIDTH, HIDDEN = 3, 16, 24


class Experts(nn.Module):
    """Each third of the tokens goes to an expert of its own."""

    def __init__(self, stacked: bool, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        up = torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.float64) / 4
        down = torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=torch.float64) / 4
        self.transposed = transposed
        if transposed:
            up, down = up.mT.contiguous(), down.mT.contiguous()
        if stacked:
            self.up, self.down = nn.Parameter(up), nn.Parameter(down)
        else:
            self.up, self.down = (nn.ParameterList(map(nn.Parameter, stack)) for stack in (up, down))

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for part, up, down in zip(x.chunk(EXPERTS), self.up, self.down, strict=True):
            first, second = (up, down) if self.transposed else (up.t(), down.t())
            found.append((part @ first).relu() @ second)
        return torch.cat(found)


def pair(schedule: Schedule, transposed: bool = False, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A stack, and its matrices one by one."""
    options = {"masks": "magnitude", "block": 4, "rescale": False} | options
    one = sparsify(Experts(True, transposed), schedule, **options)
    return one, sparsify(Experts(False, transposed), schedule, include=["up.*", "down.*"], **options)


def same(one: nn.Module, other: nn.Module, parted: int = 10**6) -> None:
    """Same masks, and weights up to rounding, of a stack and of its matrices."""
    masks, single = sparsifier(one).masks, sparsifier(other).masks
    for name in ("up", "down"):
        assert torch.equal(masks[name], torch.cat([single[f"{name}.{i}"] for i in range(EXPERTS)])), name
        for i, matrix in enumerate(getattr(other, name)):
            assert_same_course(getattr(one, name)[i].detach(), matrix.detach(), parted)


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        yield (
            torch.randn(12, WIDTH, generator=generator, dtype=torch.float64),
            torch.randn(12, WIDTH, generator=generator, dtype=torch.float64),
        )


def make_uneven(one: nn.Module, other: nn.Module) -> None:
    """Give the matrices masks of different numbers of blocks, the same on both sides."""
    generator = torch.Generator().manual_seed(4)
    for name, weight in sparsifier(one).weights.items():
        parts = weight.grid.split(weight.mask)
        masks = [part | (torch.rand(part.shape, generator=generator) < i * 0.3) for i, part in enumerate(parts)]
        assert len({int(mask.sum()) for mask in masks}) == EXPERTS
        sparsifier(one).apply_mask(name, torch.cat(masks))
        for i, mask in enumerate(masks):
            sparsifier(other).apply_mask(f"{name}.{i}", mask)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: int = 0) -> None:
    for i, (x, y) in enumerate(batches(skip + steps)):
        if i >= skip:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()


def assert_zero_outside(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    masks = element_masks(model)
    for name, parameter in model.named_parameters():
        state = [] if optimizer is None else [s for s in optimizer.state[parameter].values() if s.dim() == 3]
        for tensor in [parameter.detach(), *state, *([] if parameter.grad is None else [parameter.grad])]:
            assert not tensor[~masks[name]].any(), name


GENTLE = MixedSparsity(20, sparsity=0.7, warmup=0.3, interval=3, growth="gradient", regrown_warmup=4)
SCHEDULES = {
    "gradients": MixedSparsity(20, sparsity=0.7, warmup=0.2, interval=3, growth="gradient"),
    "several gradients": MixedSparsity(20, sparsity=0.7, warmup=0.3, interval=4, growth="gradient", gradient_steps=2),
    "gentle": GENTLE,
    "uniform": MixedSparsity(20, sparsity=0.6, warmup=0.2, interval=3, growth="gradient", distribution="uniform"),
    "prunes": GradualPruning(15, sparsity=0.75, end=0.9, interval=3, growth="gradient"),
    "l1": MixedSparsity(20, sparsity=0.7, warmup=0.2, interval=3, growth="gradient", magnitude="l1"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("guard", ["coverage", "backbone", "none"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stack_is_trained_as_its_matrices_are(schedule: str, guard: Any, transposed: bool) -> None:
    one, other = pair(SCHEDULES[schedule], transposed, guard=guard)
    same(one, other)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, other)]
    for i in range(20):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            train(model, optimizer, 1, skip=i)
        same(one, other)
        assert_zero_outside(one, optimizers[0])
        for weight in sparsifier(one).weights.values():
            assert torch.equal(read_mask(weight.index, weight.grid), weight.mask)  # type: ignore[arg-type]
    assert sparsifier(one).step_count == 20


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_whatever_optimizer_steps_it(optimizer: str) -> None:
    one, other = pair(SCHEDULES["gradients"])
    for model in (one, other):
        train(model, OPTIMIZERS[optimizer](model.parameters()), 20)
    same(one, other)
    assert_zero_outside(one)


@pytest.mark.parametrize("schedule", ["prunes", "gradients"])
def test_matrices_with_different_numbers_of_blocks(schedule: str) -> None:
    """Each loses as many as it has too many."""
    one, other = pair(SCHEDULES[schedule])
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, other)]
    for i in range(12):
        for model, optimizer in zip((one, other), optimizers, strict=True):
            train(model, optimizer, 1, skip=i)
        if i == 6:
            make_uneven(one, other)
        same(one, other)
    assert_zero_outside(one, optimizers[0])


@settings(max_examples=30)
@given(
    matrices=st.integers(1, 4),
    rows=st.integers(1, 4),
    cols=st.integers(1, 20),
    block=st.sampled_from([1, 2, 4, 8, 32]),
    layout=st.sampled_from(["contiguous", "transposed", "gaps", "expanded first"]),
    data=st.data(),
)
def test_passes_over_a_stack_are_those_over_its_matrices(
    matrices: int, rows: int, cols: int, block: int, layout: str, data: st.DataObject
) -> None:
    """Gradients and states of optimizers have whatever strides their makers gave them."""
    rows *= block
    grid = BlockGrid.over((matrices, rows, cols), block)
    tensor = torch.randn(matrices, rows, cols)
    tensor = {
        "contiguous": tensor,
        "transposed": tensor.mT.contiguous().mT,
        "gaps": torch.randn(matrices, rows + 3, cols + 2)[:, 1 : rows + 1, :cols],
        "expanded first": tensor.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    masks = [data.draw(block_masks(*grid.matrix.shape)) for _ in range(matrices)]
    mask, index = torch.cat(masks), new_index(grid)
    assert index.shape == (matrices, grid.matrix.index_length)
    write_index(index, grid, mask, dense_grad=True, changes=5)
    for one, own in zip(index, masks, strict=True):
        alone = new_index(grid.matrix)
        write_index(alone, grid.matrix, own, dense_grad=True, changes=5)
        assert torch.equal(one, alone)
    assert torch.equal(read_mask(index, grid), mask)

    size = block_sums(torch.ones(rows, cols), block)
    wanted = torch.cat([block_sums(one.double().square(), block) / size for one in tensor])
    assert_within(block_mean_square(tensor, grid), wanted, of_sum(block * block) * wanted)
    before = tensor.clone()
    for held in (index, None):
        cut = tensor.clone(memory_format=torch.preserve_format) if layout != "gaps" else tensor
        expected = [one.clone() for one in before]
        for one, own in zip(expected, masks, strict=True):
            zero_inactive_(one, grid.matrix, own, None)
        version = cut._version
        zero_inactive_(cut, grid, mask, held)
        assert_same_bits(cut, torch.stack(expected))
        assert cut._version > version or bool(mask.all())
    again = before.clone(memory_format=torch.preserve_format)
    zero_blocks_(again, grid, mask)
    expected = [one.clone() for one in before]
    for one, own in zip(expected, masks, strict=True):
        zero_blocks_(one, grid.matrix, own)
    assert_same_bits(again, torch.stack(expected))


def test_a_gradient_that_somebody_lays_out_otherwise_is_masked() -> None:
    model = sparsify(Experts(True), static(), block=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter).mT.contiguous().mT
        assert not parameter.grad.is_contiguous()
    optimizer.step()
    assert_zero_outside(model)


# -- which are sparse --------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, shape: tuple[int, ...], **more: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.out = nn.Linear(16, 16)
        for name, value in more.items():
            setattr(self, name, value)


class MoEHolder(Holder):
    pass


def test_experts_are_found_by_what_they_are_called() -> None:
    model = nn.ModuleDict({"plain": Holder((4, 16, 8)), "experts": Holder((4, 16, 8)), "other": MoEHolder((4, 16, 8))})
    own = sparsifier(sparsify(model, static(), block=4))
    assert {"experts.weight", "other.weight"} <= set(own.weights)
    assert "nothing says" in own.skipped["plain.weight"]
    assert own.weights["experts.weight"].shape == (4, 16, 8)


def test_others_are_named() -> None:
    model = Holder((4, 16, 8))
    assert list(sparsifier(sparsify(model, static(), block=4, include="weight")).weights) == ["weight"]
    mst_compile.densify(model)
    own = sparsifier(sparsify(model, static(), block=4, include=["weight", "out"]))
    assert set(own.weights) == {"weight", "out.weight"}


def test_excluded_experts_stay_dense() -> None:
    own = sparsifier(sparsify(nn.ModuleDict({"experts": Holder((4, 64, 32))}), static(), exclude="*experts.weight"))
    assert own.skipped == {"experts.weight": "in exclude"}


@pytest.mark.parametrize(("rows", "block", "note"), [(64, 8, ""), (60, 4, "8 -> 4"), (100, 4, "8 -> 4")])
def test_no_block_lies_in_two_matrices(rows: int, block: int, note: str) -> None:
    model = nn.ModuleDict({"experts": Holder((3, rows, 64))})
    weight = sparsifier(sparsify(model, static(0.5), block=8)).weights["experts.weight"]
    assert weight.grid.block == block
    assert note in weight.note


def test_rows_that_no_block_divides_are_said() -> None:
    own = sparsifier(sparsify(nn.ModuleDict({"experts": Holder((3, 18, 40))}), static(0.5)))
    assert "18 rows, which no block of 4 or more divides" in own.skipped["experts.weight"]


def test_a_stack_that_is_no_matrix_of_rows_is_refused() -> None:
    model = nn.ModuleDict({"experts": Holder((3, 16, 8))})
    model["experts"].weight = nn.Parameter(torch.randn(3, 8, 16).mT)
    with pytest.raises(WeightError, match=r"whose rows do not follow one another.*contiguous_format"):
        sparsify(model, static())
    assert not any(hasattr(p, "_mst_weight") for p in model.parameters())


def test_densities_are_those_of_the_matrices() -> None:
    one, other = pair(Constant(0.7, growth="none"), overrides={"up*": mst_compile.Override(sparsity=0.4)})
    found, single = sparsifier(one).weights, sparsifier(other).weights
    for name, weight in single.items():
        assert weight.density_target == found[name[: name.index(".")]].density_target
    assert found["up"].density_target == pytest.approx(0.6)


# -- masks that users give ---------------------------------------------------------------------------------------------


def test_masks_are_taken_in_every_form() -> None:
    given_ = sparsifier(sparsify(Experts(True), static(), block=4, seed=5)).masks
    grids = {n: w.grid for n, w in sparsifier(sparsify(Experts(True), static(), block=4)).weights.items()}
    forms: list[Callable[[str, Tensor], Tensor]] = [
        lambda _, mask: mask,
        lambda n, mask: mask.view(EXPERTS, *grids[n].matrix.shape),
        lambda n, mask: grids[n].expand(mask).view(grids[n].dims),
    ]
    for form in forms:
        model = sparsify(Experts(True), static(), block=4, masks={n: form(n, m) for n, m in given_.items()})
        for name, mask in sparsifier(model).masks.items():
            assert torch.equal(mask, given_[name])
        assert_zero_outside(model)
    model = sparsify(Experts(True), static(), block=4)
    for form in forms[:2]:
        for name, mask in given_.items():
            sparsifier(model).apply_mask(name, form(name, ~mask))
            assert torch.equal(sparsifier(model).masks[name], ~mask)
            sparsifier(model).apply_mask(name, form(name, mask))
    assert_zero_outside(model)


def test_random_masks_are_each_matrix_s_own() -> None:
    masks = sparsifier(sparsify(Experts(True), static(), block=4, masks="random")).masks
    again = sparsifier(sparsify(Experts(True), static(), block=4, masks="random")).masks
    for name, mask in masks.items():
        assert torch.equal(mask, again[name])
        parts = mask.chunk(EXPERTS)
        assert len({part.sum().item() for part in parts}) == 1
        assert not torch.equal(parts[0], parts[1])


def test_masks_that_do_not_fit_are_refused() -> None:
    model = sparsify(Experts(True), static(), block=4)
    before = sparsifier(model).masks
    rows, cols = before["up"].shape
    for wrong in (torch.ones(EXPERTS + 1, rows // EXPERTS, cols).bool(), torch.ones(rows // EXPERTS, cols).bool()):
        with pytest.raises(MaskError):
            sparsifier(model).apply_mask("up", wrong)
        with pytest.raises(MaskError):
            sparsify(Experts(True), static(), block=4, masks={"up": wrong})
    empty = before["up"].clone()
    empty[: rows // EXPERTS] = False
    with pytest.raises(MaskError, match="no active block in one of its matrices"):
        sparsify(Experts(True), static(), block=4, masks={"up": empty})
    assert all(torch.equal(mask, before[name]) for name, mask in sparsifier(model).masks.items())


# -- coming back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["sparsifier", "optimizer"])
def test_a_resumed_run_is_the_same_run(by: str) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sparsify(Experts(True), GENTLE, block=4)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    whole, optimizer = fresh()
    train(whole, optimizer, 20)
    first, optimizer = fresh()
    train(first, optimizer, 11)
    file = io.BytesIO()
    state = sparsifier(first).state_dict() if by == "sparsifier" else None
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict(), "own": state}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)
    second, optimizer = fresh()
    second.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    if state is not None:
        sparsifier(second).load_state_dict(found["own"])
    train(second, optimizer, 9, skip=11)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
    for a, b in zip(sparsifier(whole).masks.values(), sparsifier(second).masks.values(), strict=True):
        assert torch.equal(a, b)


def test_masks_follow_values_that_are_loaded_matrix_by_matrix() -> None:
    one, other = pair(static())
    make_uneven(one, other)
    donor = Experts(True)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.mul_(torch.rand_like(parameter))
    one.load_state_dict(donor.state_dict())
    single = {f"{n}.{i}": m for n, stack in donor.state_dict().items() for i, m in enumerate(stack)}
    other.load_state_dict(single)
    for model in (one, other):
        with pytest.warns(mst_compile.MSTWarning, match="values stood outside"):
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    same(one, other)


def test_copies_and_pickles_go_on_by_themselves() -> None:
    model = sparsify(Experts(True), SCHEDULES["gradients"], block=4)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 5)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        train(each, torch.optim.AdamW(each.parameters(), lr=1e-2), 6, skip=5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())
    assert_zero_outside(twin)


def test_a_file_with_masks(tmp_path: Any) -> None:
    pytest.importorskip("safetensors")
    model = sparsify(nn.ModuleDict({"experts": Holder((4, 16, 8))}), static(), block=4)
    export.save(model, tmp_path / "model.safetensors")
    for fresh in (nn.ModuleDict({"experts": Holder((4, 16, 8))}), model):
        export.load(fresh, tmp_path / "model.safetensors")
        for name, mask in sparsifier(model).masks.items():
            assert torch.equal(sparsifier(fresh).masks[name], mask)
        assert_same_bits(fresh["experts"].weight.detach(), model["experts"].weight.detach())


def test_block_sparse_tensors_are_of_single_matrices() -> None:
    model = sparsify(nn.ModuleDict({"experts": Holder((4, 16, 8))}), static(), block=4)
    assert set(export.to_bsr(model)) == {"experts.out.weight"}


def test_a_checkpoint_of_another_number_of_experts_is_refused() -> None:
    state = sparsifier(sparsify(nn.ModuleDict({"experts": Holder((4, 16, 8))}), static(), block=4)).state_dict()
    other = sparsify(nn.ModuleDict({"experts": Holder((2, 16, 8))}), static(), block=4)
    with pytest.raises((CheckpointError, MaskError)):
        sparsifier(other).load_state_dict(state)


# -- what is said of them ----------------------------------------------------------------------------------------------


def test_flops_are_of_the_matrices_that_a_token_meets() -> None:
    model = nn.ModuleDict({"experts": Holder((4, 16, 8), top_k=2)})
    sparsify(model, static(0.5), block=4, include="*experts.weight")
    weight = sparsifier(model).weights["experts.weight"]
    assert (weight.visits, weight.per_token) == (2, 0.5)
    assert mst_compile.flops.linear_training(weight) == 6 * weight.active // 2
    row = next(row for row in explain(model) if row.name == "experts.weight")
    assert (row.shape, row.flops, row.dense_flops) == ((4, 16, 8), 6 * weight.active // 2, 6 * 4 * 16 * 8 // 2)
    assert "FLOPs of a token in 2 of its 4 matrices" in row.status
    assert "4x16x8" in str(explain(model))


@pytest.mark.parametrize(
    ("more", "visits"), [({}, 1), ({"top_k": 3}, 3), ({"top_k": 9}, 1), ({"num_experts_per_tok": 4}, 4)]
)
def test_how_many_experts_a_token_meets_is_read_off_the_model(more: dict[str, int], visits: int) -> None:
    model = nn.ModuleDict({"experts": Holder((4, 16, 8), **more)})
    assert sparsifier(sparsify(model, static(), block=4)).weights["experts.weight"].visits == visits


def test_a_forecast_counts_what_tokens_meet() -> None:
    model = nn.ModuleDict({"experts": Holder((4, 64, 32), top_k=1)})
    found = mst_compile.forecast(model, Constant(0.75, growth="none"), tokens=1000, tokens_per_step=100, block=4)
    assert found.dense_flops == 10 * 100 * 6 * (64 * 32 + 16 * 16)
    with pytest.raises(ForecastError, match="no measured rates for stacks"):
        mst_compile.forecast(
            model, Constant(0.75, growth="none"), tokens=1000, tokens_per_step=100, hardware="H100", block=16
        )


def test_a_name_that_is_no_stack_is_refused() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(8, 8, 5), "out": nn.Linear(16, 16)})
    with pytest.raises(SelectionError, match="names no matrix"):
        sparsify(model, static(), include=["out", "conv.weight"])
