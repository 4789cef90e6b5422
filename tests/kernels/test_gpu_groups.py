"""Products with stacks of matrices on a GPU, without one: what Inductor generates, run by Triton's interpreter, against
float64. What it becomes as machine code is in test_gpu_group_tiles.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from gpu_cases import BLOCKS, TUNED
from gpu_group_cases import Groups, check_gradients, check_results, groups
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import block_masks
from mst_compile.kernels.triton import grouped
from pretend_gpu import Generated, Interpreter, generate, kernels_of
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.ops.grouped import grouped_linear_reference
from mst_compile.ops.grouped import groups as bounds_of

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def generated(case: Groups, choice: int = 0, **kwargs: Any) -> Generated:
    """With one of the tiles that are offered, the last where there are fewer."""
    made = generate(
        case.function(), case.arguments(), choose=lambda _, c: min(choice, len(c) - 1), config=TUNED, **kwargs
    )
    for graph in made.graphs.values():
        code = "\n".join(line for line in graph.source.splitlines() if not line.lstrip().startswith("#"))
        assert "ops.mst" not in code
        assert "extern_kernels." not in code
    return made


def run_and_check(made: Generated, case: Groups, interpreter: Interpreter) -> tuple[Tensor, Tensor, Tensor]:
    """Run code that was made for operands of these sizes on these; result and gradients."""
    tensors = iter(t.detach() for t in case.arguments())
    inputs = [len(case.x) if isinstance(old, int) else next(tensors) for old in made.forward.inputs]
    y, *saved = interpreter.run_on(made.forward.source, inputs).outputs
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    saved.sort(key=lambda s: isinstance(s, Tensor))  # sizes come first
    assert len(saved) + 1 == len(made.backward.inputs)
    gx, gw, *_ = (t for t in interpreter.run_on(made.backward.source, [*saved, upstream]).outputs if t is not None)
    check_results(case, y)
    check_gradients(case, gx, gw, upstream)
    return y, gx, gw


def test_lanes_hold_every_bound() -> None:
    for matrices in range(1, 1100):
        count = grouped.lanes(matrices)
        assert matrices + 2 <= count < 2 * (matrices + 2)
        assert count & (count - 1) == 0


# -- numbers -----------------------------------------------------------------------------------------------------------


@st.composite
def structures(draw: st.DrawFn, block: int) -> Groups:
    """What code is generated for; its values are nothing special."""
    in_features, out_features = draw(st.integers(2, 3 * block)), draw(st.integers(2, 3 * block))
    if draw(st.booleans()):  # as in real models
        in_features, out_features = -(-in_features // 16) * 16, -(-out_features // 16) * 16
    matrices, transposed = draw(st.integers(1, 5)), draw(st.booleans())
    stored = (in_features, out_features) if transposed else (out_features, in_features)
    mask = torch.ones(BlockGrid(*stored, block).shape, dtype=torch.bool)
    dtype, weight_dtype = draw(st.sampled_from([(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)]))
    return groups(
        [0] * matrices, in_features, out_features, [mask] * matrices, block,
        more=draw(st.sampled_from([2, 33, 150])), dtype=dtype, weight_dtype=weight_dtype, transposed=transposed,
        epilogue=draw(st.sampled_from(["none", "none", "gelu"])),
        offsets_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )  # fmt: skip


@st.composite
def values(draw: st.DrawFn, of: Groups) -> Groups:
    """The same with other operands: what may change from step to step, without a compilation."""
    left, sizes = len(of.x), []
    for _ in of.masks:
        sizes.append(draw(st.sampled_from([0, 1, left // 2, left])))
        left -= sizes[-1]
    sizes = draw(st.permutations(sizes))
    shape = tuple(of.masks[0].shape)
    more = left if draw(st.booleans()) else 0
    sizes[-1] += left - more  # rows of no group, or none
    return groups(
        sizes, of.x.shape[1], of.outputs, [draw(block_masks(*shape)) for _ in sizes], of.block, more=more,
        dtype=of.x.dtype, weight_dtype=of.weight.dtype, transposed=of.transposed, epilogue=of.epilogue,
        dense_grad=draw(st.lists(st.sampled_from([False, False, True]), min_size=len(sizes), max_size=len(sizes))),
        offsets_dtype=of.offsets_dtype, poisoned=True, seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=2)
@given(data=st.data())
def test_numbers_of_groups(block: int, interpreter: Interpreter, data: st.DataObject) -> None:
    """One code serves all offsets and masks: empty groups, one token, rows of none, empty and full masks."""
    structure = data.draw(structures(block))
    made = generated(structure, data.draw(st.integers(0, 2)))
    for _ in range(2):
        run_and_check(made, data.draw(values(structure)), interpreter)


def some_masks(rows: int, cols: int, block: int, matrices: int) -> list[Tensor]:
    """Each of another density, the first empty, the last full."""
    generator, shape = torch.Generator().manual_seed(1), BlockGrid(rows, cols, block).shape
    return [torch.rand(shape, generator=generator) < e / (matrices - 1) for e in range(matrices)]


@pytest.mark.parametrize("offsets", [[40, 20, 90], [5 - 2**40, 40, 1000], [2**40, 5, 7]])
def test_offsets_that_do_not_ascend(offsets: list[int], interpreter: Interpreter) -> None:
    """As the reference takes them: no row belongs to two, none is read that does not exist."""
    case = groups([30, 30, 30], 64, 96, some_masks(96, 64, 32, 3), 32, offsets_dtype=torch.int64)
    found = bounds_of(torch.tensor(offsets), 90)
    made = generated(case)
    x, weight, _, index = (t.detach() for t in case.arguments())
    ran = interpreter.run_on(made.forward.source, [x, weight, torch.tensor(offsets), index])
    same = dataclasses.replace(case, sizes=[end - start for start, end in found])
    check_results(same, ran.outputs[0])
    right = grouped_linear_reference(x, weight, torch.tensor(offsets), index, 32, False)
    torch.testing.assert_close(ran.outputs[0], right)


@pytest.mark.parametrize(("block", "choice", "transposed"), [(64, 2, False), (128, 1, True)])
def test_groups_of_several_tiles(block: int, choice: int, transposed: bool, interpreter: Interpreter) -> None:
    """Groups that begin and end within tiles of 64 rows, and rows of none behind a matrix that has all its blocks."""
    stored = (150, 100) if transposed else (100, 150)
    masks = some_masks(*stored, block, 4)[::-1]
    case = groups([150, 0, 70, 3], 150, 100, masks, block, more=70, transposed=transposed, poisoned=True)
    made = generated(case, choice)
    assert "BLOCK_M : tl.constexpr = 64" in made.forward.source
    run_and_check(made, case, interpreter)


def test_many_matrices_and_any_number_of_tokens(interpreter: Interpreter) -> None:
    """More groups than a warp has lanes, most of them empty; and the code knows no number of tokens."""
    matrices = 34
    masks = some_masks(48, 32, 32, matrices)
    sizes = [5 * (e % 7 == 3) for e in range(matrices)]
    case = groups(sizes, 32, 48, masks, 32, more=3, dtype=F32)
    arguments = case.arguments()
    torch._dynamo.mark_dynamic(arguments[0], 0)
    made = generate(case.function(), arguments, choose=lambda *_: 0, config=TUNED)
    for more, last in ((3, 0), (0, 300)):
        sizes[-1] = last
        other = groups(sizes, 32, 48, masks, 32, more=more, dtype=F32, seed=last)
        run_and_check(made, other, interpreter)


@pytest.mark.parametrize("how", ["rows of wider", "every other", "transposed", "transposed stack", "wider stack"])
def test_strides_of_groups(how: str, interpreter: Interpreter) -> None:
    """Operands that lie otherwise in memory, amidst NaN."""
    case = groups([20, 0, 30], 64, 96, some_masks(96, 64, 32, 3), 32, more=4)
    if how == "transposed stack":
        case.weight = case.weight.mT.contiguous().mT
    elif how == "transposed":
        case.x = case.x.t().contiguous().t()
    else:
        of = case.weight if how == "wider stack" else case.x
        wide = torch.full((*of.shape[:-1], 2 * of.shape[-1]), torch.nan, dtype=BF16)
        view = wide[..., ::2] if how == "every other" else wide[..., : of.shape[-1]]
        view.copy_(of)
        case = dataclasses.replace(case, **{"weight" if of is case.weight else "x": view})
    arguments = [case.x.detach(), case.weight.detach(), case.offsets, case.index]
    made = generate(case.function(), arguments, choose=lambda *_: 0, config=TUNED)
    assert [k.kind for k in kernels_of(made.forward.source)].count("template") == 1
    check_results(case, interpreter.run(made.forward)[0])


def test_no_rows_at_all(interpreter: Interpreter) -> None:
    case = groups([0, 0, 0], 64, 96, some_masks(96, 64, 32, 3), 32)
    made = generated(case)
    assert not run_and_check(made, case, interpreter)[2].any()


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_what_the_table_takes_for_stacks(density: float, interpreter: Interpreter) -> None:
    """Without tuning nothing is asked, and a product with a stack is ours at any density: the graph has chosen."""
    case = groups([20, 44], 64, 96, some_masks(96, 64, 32, 2), 32)

    def function(*operands: Tensor) -> Tensor:
        return torch.ops.mst.grouped_linear(*operands, 32, False, density)

    made = generate(function, case.arguments())
    assert not made.questions
    run_and_check(made, case, interpreter)


def test_what_follows_a_gradient_is_fused_into_its_store(interpreter: Interpreter) -> None:
    """Each element is stored once, by whoever it belongs to, zeros too."""
    case = groups([20, 0, 30], 64, 96, some_masks(96, 64, 32, 3), 32, more=4, dtype=F32)

    def function(x: Tensor, weight: Tensor, offsets: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.grouped_linear(x, weight * 0.5, offsets, index, 32, False)

    made = generate(function, case.arguments(), choose=lambda *_: 0, config=TUNED)
    (kernel,) = (k for k in kernels_of(made.backward.source) if "arg_DY" in k.source)
    if torch.__version__ >= "2.13":  # 2.11 fuses nothing behind a view, and takes a kernel of its own
        assert "mul" in kernel.name
    for actual, expected in zip(interpreter.run(made.backward), made.backward.outputs, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected)


def test_a_single_element_is_the_references(interpreter: Interpreter) -> None:
    case = groups([1], 64, 1, [torch.ones(1, 2, dtype=torch.bool)], 32)
    made = generate(case.function(), case.arguments())
    assert "torch.ops.mst.grouped_linear.default(" in made.forward.source
    check_results(case, interpreter.run(made.forward)[0])
