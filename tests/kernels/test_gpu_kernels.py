"""The GPU kernels, on a machine without a GPU: what Inductor generates is compiled for an H100 and held against bounds,
and run by Triton's interpreter against float64."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_cases import BLOCKS, EPILOGUES, TUNED, Product, check_backward, check_forward, product
from gpu_machine_code import check_tile, kind_of, sizes_of_accesses
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_cases import block_masks
from mst_compile.kernels.triton import tiles
from pretend_gpu import Generated, GeneratedKernel, Interpreter, check, cross_compile, generate, kernels_of
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def take(choice: int, asked: dict[str, int]) -> Any:
    """A policy that takes the given choice, the last own one where there are fewer, and notes how many there are."""

    def choose(name: str, choices: list[Any]) -> int:
        own = [c for c in choices if hasattr(c, "mst_product")]
        assert len(own) == len(choices) - 1, "and the dense product"
        asked[name] = len(own)
        return min(choice, len(own) - 1)

    return choose


def generated(case: Product, choice: int = 0, **kwargs: Any) -> tuple[Generated, dict[str, int]]:
    asked: dict[str, int] = {}
    return generate(case.function(), case.arguments(), choose=take(choice, asked), config=TUNED, **kwargs), asked


def upstream(case: Product, made: Generated) -> Tensor:
    """The gradient that ``generate`` has sent back."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(made.result.shape, generator=generator).to(made.result.dtype)


def random_mask(in_features: int, out_features: int, block: int, transposed: bool) -> Tensor:
    stored = (in_features, out_features) if transposed else (out_features, in_features)
    mask = torch.rand(BlockGrid(*stored, block).shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0] = False
    return mask


# -- machine code ------------------------------------------------------------------------------------------------------


def templates_of(made: Generated) -> list[GeneratedKernel]:
    """All templates but the sum of grad-weight's parts."""
    return [kernel for kernel in all_templates_of(made) if kind_of(kernel) != "sum"]


def all_templates_of(made: Generated) -> list[GeneratedKernel]:
    kernels = [kernel for graph in made.graphs.values() for kernel in kernels_of(graph.source)]
    return [kernel for kernel in kernels if kernel.kind == "template"]


GATES = [
    # dtype, tf32, M, transposed, epilogue
    (BF16, False, 512, False, "none"),
    (F16, False, 300, True, "gelu"),
    (F32, True, 300, True, "none"),
    (F32, False, 300, False, "gelu"),
]


@pytest.mark.parametrize(("dtype", "tf32", "m", "transposed", "epilogue"), GATES, indirect=["tf32"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_tile_compiles_to_good_machine_code(
    dtype: torch.dtype, tf32: bool, m: int, transposed: bool, epilogue: str, block: int
) -> None:
    mask = random_mask(512, 256, block, transposed)
    case = product(m, 512, 256, mask, block, dtype=dtype, transposed=transposed, epilogue=epilogue)
    kind = "half" if dtype != F32 else "tf32" if tf32 else "ieee"
    offered = {"gemm": tiles.GEMM[block, kind], "grad_weight": tiles.GRAD_WEIGHT[block, kind]}
    for choice in range(max(map(len, offered.values()))):
        made, asked = generated(case, choice)
        assert list(asked.values()) == [len(offered["gemm"]), len(offered["grad_weight"])]
        found = templates_of(made)
        assert sorted(map(kind_of, found)) == ["gemm", "gemm", "grad_weight"]
        for kernel in found:
            which = kind_of(kernel)
            if choice >= len(offered[which]):
                continue
            tile = offered[which][choice]
            # Inductor fuses no epilogue where that spills, as it does here, and takes long to compile.
            if not (which == "gemm" and tile.wide(block) and "erf(" in kernel.source):
                check_tile(tile, kernel, block, dtype, kind)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("rows", "cols", "dtype"), [(256, 512, BF16), (272, 400, F32), (199, 33, F16)])
def test_parts_are_summed_by_16_bytes(block: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    case = product(1500, cols, rows, random_mask(cols, rows, block, False), block, dtype=dtype, bias=False)
    made, _ = generated(case)
    assert "SPLIT : tl.constexpr = 2" in made.backward.source
    (kernel,) = (k for k in all_templates_of(made) if kind_of(k) == "sum")
    facts = cross_compile(kernel)
    writes = min(16, dtype.itemsize * cols & -(dtype.itemsize * cols))  # rows of 33 begin anywhere
    check(facts, wgmma=False, spills=0, atomics=0, reads={"arg_PARTIALS": 16}, writes={"out_ptr0": writes})


UNALIGNED = [
    # dtype, tf32, in, out, block, transposed, choice, dynamic; 33 and 199 are no multiples of anything
    (BF16, False, 199, 33, 32, False, 3, False),
    (F16, False, 33, 199, 64, True, 0, False),
    (BF16, False, 199, 199, 128, True, 2, True),
    (F32, True, 199, 33, 32, True, 1, False),
    (F32, True, 33, 199, 128, False, 0, False),
    (F32, False, 199, 199, 64, False, 0, False),
]


@pytest.mark.parametrize(
    ("dtype", "tf32", "in_features", "out_features", "block", "transposed", "choice", "dynamic"),
    UNALIGNED,
    indirect=["tf32"],
)
def test_unaligned_widths_are_loaded_as_aligned_ones_are(
    dtype: torch.dtype,
    tf32: bool,
    in_features: int,
    out_features: int,
    block: int,
    transposed: bool,
    choice: int,
    dynamic: bool,
) -> None:
    mask = random_mask(in_features, out_features, block, transposed)
    case = product(300, in_features, out_features, mask, block, dtype=dtype, transposed=transposed)
    made, _ = generated(case, choice, dynamic=dynamic or None)
    found = templates_of(made)
    assert sorted(map(kind_of, found)) == ["gemm", "gemm", "grad_weight"]
    ieee = dtype == F32 and not tf32
    for kernel in found:
        stages = kernel.num_stages - (kind_of(kernel) == "grad_weight" or ieee)
        sizes = sizes_of_accesses(kernel, dtype, tf32=tf32)
        check(cross_compile(kernel), wgmma=not ieee, stages=stages, atomics=0, **sizes)


@pytest.mark.parametrize(("offset", "stride"), [(0, 66), (1, 72)])
def test_aligned_widths_in_unaligned_memory(offset: int, stride: int, interpreter: Interpreter) -> None:
    """Rows of 64 features that begin anywhere, amidst what must not be multiplied."""
    case = product(64, 64, 96, random_mask(64, 96, 32, False), 32)
    whole = torch.full((64, stride), torch.nan, dtype=BF16)
    whole[:, offset : offset + 64] = case.x

    def function(whole: Tensor, *rest: Any) -> Tensor:
        return torch.ops.mst.linear(whole[:, offset : offset + 64], *rest, 32, False)

    made = generate(function, [whole, *case.arguments()[1:]], choose=take(0, {}), config=TUNED)
    for kernel in templates_of(made):
        check(cross_compile(kernel), wgmma=True, **sizes_of_accesses(kernel, BF16, tf32=False))
    check_forward(case, interpreter.run(made.forward))


def test_a_language_model_head(interpreter: Interpreter) -> None:
    """50257 rows are no multiple of anything, nor are 5023, which the interpreter is through with sooner."""
    whole, part = (product(16, 64, rows, random_mask(64, rows, 64, False), 64, bias=False) for rows in (50257, 5023))
    for kernel in templates_of(generated(whole)[0]):
        check(cross_compile(kernel), wgmma=True, **sizes_of_accesses(kernel, BF16, tf32=False))
    check_forward(part, interpreter.run(generated(part)[0].forward))


# -- numbers -----------------------------------------------------------------------------------------------------------


@st.composite
def products(draw: st.DrawFn, block: int) -> tuple[Product, bool]:
    """A product, and whether its number of tokens is dynamic."""
    in_features, out_features = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    lengthened = draw(st.sampled_from([0, 0, 1, 5, 8]))
    if draw(st.booleans()):  # as in real models
        in_features, out_features = -(-in_features // 16) * 16, -(-out_features // 16) * 16
    transposed = draw(st.booleans())
    stored = (in_features, out_features) if transposed else (out_features, in_features)
    mask = draw(block_masks(*BlockGrid(*stored, block).shape))
    dtype, weight_dtype = draw(st.sampled_from([(BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)]))
    m = draw(st.sampled_from([1, 7, 64, 128, 300, 512, (2, 33), (3, 1, 50)]))
    case = product(
        m, in_features, out_features, mask, block,
        dtype=dtype, weight_dtype=weight_dtype, transposed=transposed, bias=draw(st.booleans()),
        epilogue=draw(st.sampled_from(sorted(EPILOGUES))), dense_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )  # fmt: skip
    if lengthened:  # rows of a longer tensor, which holds NaN besides
        longer = torch.nn.functional.pad(case.x, (0, lengthened), value=torch.nan)
        case.x = longer[..., :in_features]
    return case, draw(st.booleans())


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=20)
@given(data=st.data())
def test_numbers_of_generated_code(block: int, interpreter: Interpreter, data: st.DataObject) -> None:
    case, dynamic = data.draw(products(block))
    made, _ = generated(case, data.draw(st.integers(0, 7)), dynamic=dynamic or None)
    check_forward(case, interpreter.run(made.forward))
    check_backward(case, interpreter.run(made.backward), upstream(case, made))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_is_rounded_once(transposed: bool, interpreter: Interpreter) -> None:
    """The backward pass reads the copy that the forward pass has made; without one it makes its own."""
    mask = random_mask(160, 96, 32, transposed)
    case = product(70, 160, 96, mask, 32, weight_dtype=F32, transposed=transposed, bias=False)
    launches = []
    for rounded in (False, True):
        one = dataclasses.replace(case, rounded=rounded)
        made, _ = generated(one)
        launches.append([graph.source.count(".run(") for graph in (made.forward, made.backward)])
        check_forward(one, interpreter.run(made.forward))
        check_backward(one, interpreter.run(made.backward), upstream(one, made))
    assert launches == [[2, 4], [2, 3]]


LOADS = [
    (block, choice)
    for block in BLOCKS
    for choice, tile in enumerate(tiles.GEMM[block, "half"])
    if tile.tma or tile.chain > 1
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("block", "choice"), LOADS)
def test_numbers_of_chains_and_descriptors(block: int, choice: int, transposed: bool, interpreter: Interpreter) -> None:
    """One chain or three (of two in a group), the last of which ends beyond the tokens; a line without blocks, ragged
    edges."""
    mask = random_mask(336, 200, block, transposed)
    case = product(
        700 if transposed else 2100, 336, 200, mask, block, transposed=transposed, epilogue="gelu", seed=choice
    )
    made, _ = generated(case, choice)
    for kernel in templates_of(made):
        by_descriptor = kind_of(kernel) == "gemm" and tiles.GEMM[block, "half"][choice].tma
        assert ("make_tensor_descriptor" in kernel.source) == by_descriptor
    check_forward(case, interpreter.run(made.forward))
    check_backward(case, interpreter.run(made.backward), upstream(case, made))


@pytest.fixture(scope="module")
def rounding() -> Iterator[Interpreter]:
    with Interpreter(tf32=True, preload=("mst_compile.lowering.inductor",)) as running:
        yield running


@pytest.mark.xdist_group("tf32")
@pytest.mark.parametrize("tf32", [True, False], indirect=True)
def test_float32_products_follow_the_setting(tf32: bool, rounding: Interpreter) -> None:
    """The operands of a TF32 product lose all but 10 bits of their mantissas, those of an IEEE one lose none."""
    case = product(64, 256, 128, random_mask(256, 128, 32, False), 32, dtype=F32)
    made, _ = generated(case)
    outputs, gradients = rounding.run(made.forward), rounding.run(made.backward)
    check_forward(case, outputs, 2**-10 if tf32 else 0.0)
    check_backward(case, gradients, upstream(case, made), 2**-10 if tf32 else 0.0)
    if tf32:
        with pytest.raises(AssertionError):
            check_forward(case, outputs)


@pytest.mark.parametrize("block", BLOCKS)
def test_one_code_serves_any_number_of_tokens(block: int, interpreter: Interpreter) -> None:
    mask = random_mask(192, 130, block, False)
    case = product(96, 192, 130, mask, block, epilogue="gelu")
    arguments = case.arguments()
    torch._dynamo.mark_dynamic(arguments[0], 0)
    made = generate(case.function(), arguments, choose=take(0, {}), config=TUNED)
    for m in (96, 2, 300):
        other = product(m, 192, 130, mask, block, epilogue="gelu", seed=m)
        tensors = [other.x, other.weight, other.bias, other.index]
        inputs = [m if isinstance(old, int) else tensors.pop(0) for old in made.forward.inputs]
        check_forward(other, interpreter.run_on(made.forward.source, inputs).outputs)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("in_features", "out_features"), [(128, 96), (199, 33), (64, 33)])
def test_the_dense_choice_computes_the_same(
    in_features: int, out_features: int, transposed: bool, interpreter: Interpreter
) -> None:
    mask = random_mask(in_features, out_features, 32, transposed)
    case = product(64, in_features, out_features, mask, 32, transposed=transposed, epilogue="silu")
    made = generate(case.function(), case.arguments(), choose=lambda name, choices: len(choices) - 1, config=TUNED)
    assert "mst_dense_linear" in made.forward.source
    assert "mst_dense_linear" in made.backward.source and "mst_dense_grad_weight" in made.backward.source  # noqa: PT018
    check_forward(case, interpreter.run(made.forward))
    check_backward(case, interpreter.run(made.backward), upstream(case, made))


@pytest.mark.parametrize(("in_features", "out_features"), [(128, 96), (199, 33)])
@pytest.mark.parametrize(("block", "density", "dense"), [(32, 0.2, 1), (64, 0.2, 0), (32, 0.3, 3)])
def test_what_the_table_takes_computes_the_same(
    block: int, density: float, dense: int, in_features: int, out_features: int, interpreter: Interpreter
) -> None:
    """Without tuning: our tiles, dense products, and both in one graph, of operands that need padding or do not."""
    case = product(64, in_features, out_features, random_mask(in_features, out_features, block, False), block)

    def function(*operands: Tensor) -> Tensor:
        return torch.ops.mst.linear(*operands, block, False, density)

    made = generate(function, case.arguments())
    assert not made.questions
    assert len(templates_of(made)) == 3 - dense
    check_forward(case, interpreter.run(made.forward))
    check_backward(case, interpreter.run(made.backward), upstream(case, made))


def test_results_do_not_depend_on_what_memory_held(interpreter: Interpreter) -> None:
    """Zeros are written, not assumed, and parts are added in a fixed order."""
    case = product(2100, 96, 64, random_mask(96, 64, 32, False), 32)
    made, _ = generated(case)
    assert "SPLIT : tl.constexpr = 4" in made.backward.source, "several partials"
    first, second = interpreter.run(made.backward), interpreter.run(made.backward)
    check_backward(case, first, upstream(case, made))
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("how", ["rows of wider", "every other", "transposed", "expanded"])
def test_strides(how: str, interpreter: Interpreter) -> None:
    case = product(64, 96, 80, random_mask(96, 80, 32, False), 32)
    if how == "expanded":
        case.x = case.x[:1].expand(64, -1)
    elif how == "transposed":
        case.x = case.x.t().contiguous().t()
    else:
        wide = torch.full((64, 2 * 96), torch.nan, dtype=BF16)
        view = wide[:, :96] if how == "rows of wider" else wide[:, ::2]
        case.x = view.copy_(case.x)
    arguments = [case.x, *case.arguments()[1:]]
    made = generate(case.function(), arguments, choose=take(0, {}), config=TUNED)
    check_forward(case, interpreter.run(made.forward))
    # The input needs no gradient here, which is a case of its own; check_backward wants one.
    g = upstream(case, made)
    dx = (g.double() @ case.weight.double()).to(BF16)
    check_backward(case, [dx, *(t for t in interpreter.run(made.backward) if t is not None)], g)


def test_features_that_lie_apart(interpreter: Interpreter) -> None:
    """As a convolution leaves them: tokens side by side in memory, to be laid out anew, with strides that are known."""
    case = product((3, 16), 96, 80, random_mask(96, 80, 32, False), 32)
    case.x = case.x.mT.contiguous().mT
    made, _ = generated(case)
    check_forward(case, interpreter.run(made.forward))
    check_backward(case, interpreter.run(made.backward), upstream(case, made))


# -- padded operands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [48, (3, 16)])
def test_both_products_of_a_head_share_one_gradient(m: int | tuple[int, int], interpreter: Interpreter) -> None:
    """What ends the backward pass of the loss writes the gradient of 777 logits once, into the rows that both read."""
    case = product(m, 64, 777, random_mask(64, 777, 64, False), 64, bias=False)
    labels = torch.randint(777, (48,))

    def loss(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        logits = torch.ops.mst.linear(x, weight, None, index, 64, False)
        return torch.nn.functional.cross_entropy(logits.float().view(-1, 777), labels)

    x, weight, _, index = case.arguments()
    made = generate(loss, [x, weight, index], choose=take(0, {}))
    sizes = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\)", made.backward.source)
    last = [int(size.split(",")[-1] or 1) for size in sizes if size]
    assert last.count(784) == 1
    assert 777 not in last
    for actual, expected in zip(interpreter.run(made.backward), made.backward.outputs, strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(actual, expected)


def test_results_keep_the_strides_of_eager_mode(interpreter: Interpreter) -> None:
    first = product((2, 24), 64, 199, random_mask(64, 199, 32, False), 32, epilogue="gelu")
    second = product((2, 24), 199, 33, random_mask(199, 33, 32, False), 32)

    def function(x: Tensor, weight: Tensor, bias: Tensor, index: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        hidden = first.function()(x, weight, bias, index)
        return hidden, torch.ops.mst.linear(hidden, *rest, 32, False)

    made = generate(function, [*first.arguments(), *second.arguments()[1:]], choose=take(0, {}))
    outputs = interpreter.run(made.forward)
    check_forward(first, outputs)
    assert [t.stride() for t in outputs[:2]] == [t.stride() for t in made.result]
    second.x = outputs[0]
    check_forward(second, outputs[1:])
