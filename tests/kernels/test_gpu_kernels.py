"""The GPU kernels, on a machine without a GPU: what Inductor generates is compiled for an H100 and held against bounds,
and run by Triton's interpreter against float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_cases import BLOCKS, EPILOGUES, TUNED, Product, check_backward, check_forward, product
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
    kernels = [kernel for graph in made.graphs.values() for kernel in kernels_of(graph.source)]
    return [kernel for kernel in kernels if kernel.kind == "template"]


def kind_of(kernel: GeneratedKernel) -> str:
    return "grad_weight" if "GROUPS" in kernel.source else "gemm"


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
                check_tile(tile, kernel, block, dtype, wgmma=kind != "ieee")


def check_tile(tile: Any, kernel: GeneratedKernel, block: int, dtype: torch.dtype, *, wgmma: bool) -> None:
    """Hold the machine code of one tile against what it asks for."""
    facts, gemm = cross_compile(kernel), isinstance(tile, tiles.GemmTile)
    check(
        facts,
        wgmma=wgmma,
        # The column sums of grad-weight hold on to a buffer of dy for one step longer; IEEE products read their
        # operands from shared memory into registers one step ahead.
        stages=kernel.num_stages - (not gemm or not wgmma),
        spills=0,
        atomics=0,
        shared=tile.shared(block, dtype.itemsize),
    )
    if wgmma:
        assert bool(facts.tma) == tile.tma
        assert bool(facts.cp_async) != tile.tma
    if gemm:
        assert ("ttg.warp_specialize" in facts.ttgir) == tile.specialized
        # A product is waited for before the loop's next one is issued; only where a row tile ends, for all.
        waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", facts.ptx)
        assert (
            waits == (["1", "0", "0"] if tile.chain > 1 else ["0", "0"] if tile.specialized else ["1", "0"])
            or not wgmma
        )


def test_a_language_model_head(interpreter: Interpreter) -> None:
    """50257 rows are no multiple of anything, nor are 5023, which the interpreter is through with sooner."""
    whole, part = (product(16, 64, rows, random_mask(64, rows, 64, False), 64, bias=False) for rows in (50257, 5023))
    for kernel in templates_of(generated(whole)[0]):
        check(cross_compile(kernel), wgmma=True)
    check_forward(part, interpreter.run(generated(part)[0].forward))


# -- numbers -----------------------------------------------------------------------------------------------------------


@st.composite
def products(draw: st.DrawFn, block: int) -> tuple[Product, bool]:
    """A product, and whether its number of tokens is dynamic."""
    in_features, out_features = draw(st.integers(1, 300)), draw(st.integers(1, 300))
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
    return case, draw(st.booleans())


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=20)
@given(data=st.data())
def test_numbers_of_generated_code(block: int, interpreter: Interpreter, data: st.DataObject) -> None:
    case, dynamic = data.draw(products(block))
    made, _ = generated(case, data.draw(st.integers(0, 7)), dynamic=dynamic or None)
    check_forward(case, interpreter.run(made.forward))
    check_backward(case, interpreter.run(made.backward), upstream(case, made))


LOADS = [
    (block, choice)
    for block in BLOCKS
    for choice in range(8)
    if any(
        tile.tma or getattr(tile, "chain", 1) > 1
        for table in (tiles.GEMM, tiles.GRAD_WEIGHT)
        for tile in table[block, "half"][choice : choice + 1]
    )
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("block", "choice"), LOADS)
def test_numbers_of_chains_and_descriptors(block: int, choice: int, transposed: bool, interpreter: Interpreter) -> None:
    """Several chains, the last of which ends beyond the tokens, a line without blocks, ragged edges."""
    mask = random_mask(336, 200, block, transposed)
    case = product(1300, 336, 200, mask, block, transposed=transposed, epilogue="gelu", seed=choice)
    made, _ = generated(case, choice)
    for kernel in templates_of(made):
        offered = (tiles.GRAD_WEIGHT if kind_of(kernel) == "grad_weight" else tiles.GEMM)[block, "half"]
        tile = offered[min(choice, len(offered) - 1)]
        assert ("make_tensor_descriptor" in kernel.source) == tile.tma
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


def test_the_dense_choice_computes_the_same(interpreter: Interpreter) -> None:
    case = product(64, 128, 96, random_mask(128, 96, 32, False), 32, epilogue="silu")
    made = generate(case.function(), case.arguments(), choose=lambda name, choices: len(choices) - 1, config=TUNED)
    assert "mst_dense_linear" in made.forward.source
    assert "mst_dense_linear" in made.backward.source and "mst_dense_grad_weight" in made.backward.source  # noqa: PT018
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
