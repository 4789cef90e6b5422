"""The GPU attention kernels, on a machine without a GPU; see test_gpu_kernels.py."""

from __future__ import annotations

from typing import Any
from unittest import mock

import mst_compile.lowering.inductor  # noqa: F401  (registers the lowerings)
import pytest
import torch
import triton
from attention_parts import COMBINATIONS, combine
from gpu_attention_cases import Case, case, check_numbers
from gpu_cases import TUNED
from hypothesis import given, settings
from hypothesis import strategies as st
from mst_compile.kernels.triton import attention as kernels
from oracles import assert_as_good_as
from pretend_gpu import Generated, Interpreter, check, cross_compile, generate, kernels_of
from torch import Tensor

from mst_compile.ops.attention import attention_reference
from mst_compile.rules.patterns import FULL, Parts

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SPARSE = combine("window and distances", 40, 32)


def generated(given_case: Case, choice: int = 0, **kwargs: Any) -> tuple[Generated, int]:
    """The code with each kernel's ``choice``-th tile, and the largest number of tiles."""
    asked: list[int] = []

    def choose(name: str, choices: list[Any]) -> int:
        asked.append(len(choices))
        return min(choice, len(choices) - 1)

    made = generate(given_case.function(), given_case.arguments(), choose=choose, config=TUNED, **kwargs)
    return made, max(asked, default=1)


# -- machine code ------------------------------------------------------------------------------------------------------

SIZES = [
    *((BF16, False, (size, size)) for size in (64, 128, 256)),
    (BF16, False, (192, 128)),  # latent attention
    *((F32, tf32, (size, size)) for tf32, size in ((True, 64), (True, 128), (False, 128))),
]
# Triton 3.9 spills nothing; 3.6 and 3.8 one register of one fp32 tile, a store and a load.
SPILLS = 2 if triton.__version__.startswith(("3.6.", "3.8.")) else 0
WIDE = ("arg_Q", "arg_K", "arg_V")  # loaded 16 bytes a thread, also from rows a stride apart
# These two hold the loops of the others; the third is what most models have.
GATES = [(p, *size) for p in ("window and distances", "chunk and summaries") for size in SIZES]
GATES += [("everything", *SIZES[0])]


@pytest.mark.parametrize(("what", "dtype", "tf32", "sizes"), GATES, indirect=["tf32"])
def test_every_tile_compiles_to_good_machine_code(
    what: str, dtype: torch.dtype, tf32: bool, sizes: tuple[int, int]
) -> None:
    parts = combine(what, 128, 128)
    size, value_size = sizes
    choice, count = 0, 1
    while choice < count:
        given_case = case(parts, length=250, size=size, value_size=value_size, dtype=dtype, padded=True)
        made, count = generated(given_case, choice)
        for graph in made.graphs.values():
            for kernel in kernels_of(graph.source):
                if kernel.kind == "template":
                    # Tiles of 32 queries or keys are too short for wgmma; IEEE products have no tensor core.
                    facts = cross_compile(kernel)
                    reads = {} if dtype == F32 else dict.fromkeys(WIDE, 16)
                    check(facts, wgmma=bool(facts.wgmma), spills=SPILLS, atomics=0, reads=reads)
                    assert bool(facts.wgmma or facts.mma_v2) == (dtype != F32 or tf32), "tensor cores do the products"
                    assert dtype == F32 or facts.wgmma or size > 128
        choice += 1


def test_tiles_of_every_kind_and_size() -> None:
    for kind, largest in (("half", 256), ("tf32", 128), ("ieee", 128)):
        for size in (16, 64, 80, 128, largest):
            for which in ("forward", "backward"):
                for parts in (Parts(window=40), Parts(step=32)):
                    assert kernels.tiles(size, kind, which, parts)


@given(st.integers(1, 300), st.integers(1, 10**5), st.sampled_from([16, 32, 64, 128]), st.sampled_from([16, 64]))
def test_tiles_hold_whole_classes_where_they_can(step: int, length: int, own: int, walked: int) -> None:
    pack = kernels.pack(kernels.AttentionTile(own, walked, 4, 1), Parts(step=step), length)
    room, chunks = min(own, walked), -(-length // step)
    assert pack & (pack - 1) == 0
    assert 1 <= pack <= min(room, step)
    assert pack == 1 or pack * chunks <= room
    assert 2 * pack > step or 4 * pack * chunks > room, "no more than half of a tile is left empty"


# -- numbers -----------------------------------------------------------------------------------------------------------


def check_generated(given_case: Case, made: Generated, interpreter: Interpreter) -> None:
    results = [interpreter.run(made.forward)[0], *(t for t in interpreter.run(made.backward) if isinstance(t, Tensor))]
    upstream = torch.randn(made.result.shape, generator=torch.Generator().manual_seed(0)).to(given_case.q.dtype)
    check_numbers(given_case, results, upstream)


@st.composite
def cases(draw: st.DrawFn, what: str) -> Case:
    window, stride = (draw(st.sampled_from(sizes)) for sizes in ([1, 7, 32, 64, 100, 500], [1, 5, 16, 32, 64, 300]))
    return case(
        combine(what, window, stride, draw(st.sampled_from([0, 0, 3, 64])), draw(st.integers(1, 2))),
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 1, 3])),
        length=draw(st.sampled_from([1, 2, 31, 64, 97, 150, 200])),
        size=draw(st.sampled_from([16, 24, 32, 64, 80])),
        value_size=draw(st.sampled_from([None, 16, 40, 64])),
        dtype=draw(st.sampled_from([F32, BF16, F16])),
        padded=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        by_position=draw(st.booleans()),
    )


@pytest.mark.parametrize("what", COMBINATIONS)
@settings(max_examples=6)
@given(data=st.data())
def test_numbers_of_generated_code(what: str, interpreter: Interpreter, data: st.DataObject) -> None:
    drawn = data.draw(cases(what))
    made, _ = generated(drawn, data.draw(st.integers(0, 1)))
    check_generated(drawn, made, interpreter)


@settings(max_examples=12)
@given(data=st.data())
def test_any_number_of_residues_may_share_a_tile(interpreter: Interpreter, data: st.DataObject) -> None:
    """Whatever the length: that it is chosen for one makes no other wrong."""
    step, length = data.draw(st.sampled_from([1, 2, 3, 7, 16, 40, 64, 300, 2**40])), data.draw(st.integers(1, 200))
    first = data.draw(st.sampled_from([0, 1, step - 1, step, step + 1, 2 * step, 5 * step + 3, 150, 2**40]))
    window = data.draw(st.sampled_from([0, first]))
    drawn = case(
        Parts(window=window, first=first, step=step),
        group=data.draw(st.integers(1, 2)),
        length=length,
        size=16,
        dtype=data.draw(st.sampled_from([F32, BF16])),
        padded=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**31)),
    )
    pack = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    with mock.patch.object(kernels, "pack", return_value=pack):
        made, _ = generated(drawn)
    check_generated(drawn, made, interpreter)


@pytest.mark.parametrize("what", ["summaries", "window and distances"])
def test_kernels_write_gradients_where_they_stay(what: str) -> None:
    """No kernel follows the templates': Inductor would copy a gradient that lies otherwise than the operator says."""
    made, _ = generated(case(combine(what, 40, 32), group=2))
    *_, last = kernels_of(made.backward.source)
    kinds = [kernel.kind for kernel in kernels_of(made.backward.source)]
    assert last.kind == "template", kinds


def test_queries_that_see_no_key_give_zero(interpreter: Interpreter) -> None:
    nothing = case(SPARSE, padded=True)
    assert nothing.key_mask is not None
    nothing.key_mask[:, :50] = False
    made, _ = generated(nothing)
    check_generated(nothing, made, interpreter)
    out, *_ = interpreter.run(made.forward)
    assert out is not None
    assert not out[:, :, :32].any()


@pytest.mark.parametrize(("size", "dtype"), [(8, F32), (160, F32), (32, torch.float64), (512, BF16)])
def test_what_has_no_kernel_runs_the_reference(size: int, dtype: torch.dtype) -> None:
    made, _ = generated(case(Parts(window=40), size=size, dtype=dtype, length=20))
    assert "torch.ops.mst.attention.default(" in made.forward.source
    assert not [k for k in kernels_of(made.forward.source) if k.kind == "template"]


def test_one_code_serves_any_length(interpreter: Interpreter) -> None:
    first = case(SPARSE, length=64)
    leaves = [t.detach().requires_grad_() for t in (first.q, first.k, first.v)]
    for leaf in leaves:
        torch._dynamo.mark_dynamic(leaf, 2)
    made = generate(lambda q, k, v: torch.ops.mst.attention(q, k, v, None, *first.settings)[0], leaves)
    for length in (64, 33, 170):
        other = case(SPARSE, length=length, seed=length)
        tensors = [other.q, other.k, other.v]
        inputs = [length if isinstance(old, int) else tensors.pop(0) for old in made.forward.inputs]
        out, *_ = interpreter.run_on(made.forward.source, inputs).outputs
        usual, _ = attention_reference(other.q, other.k, other.v, None, *other.settings)
        wide = (t.double() for t in (other.q, other.k, other.v))
        exact, _ = attention_reference(*wide, None, *other.settings)
        assert_as_good_as(out, usual, exact, F32)


def test_short_walks_take_narrow_tiles_first() -> None:
    """The first tile is what runs untuned: within a window, gradients of 32 keys at a time; elsewhere of 64."""
    first = {
        what: kernels.tiles(64, "half", "backward", parts)[0].walked
        for what, parts in (("window", Parts(window=128)), ("all", FULL), ("distances", Parts(first=128, step=128)))
    }
    assert first == {"window": 32, "all": 64, "distances": 64}
