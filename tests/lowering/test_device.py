"""A device is one record: a toy one, registered from outside, is what all who ask are told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import compiled, static
from mst_compile.lowering import device
from torch import Tensor, nn
from torch._inductor.lowering import lowerings
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode

import mst_compile
from mst_compile.blocks.bulk import mask_like
from mst_compile.blocks.grid import BlockGrid
from mst_compile.state import selection
from mst_compile.state.selection import select

F32 = torch.float32


@pytest.fixture
def registered() -> Iterator[dict[str, device.Device]]:
    """The records, put back at the end."""
    before = dict(device._records)
    yield device._records
    device._records.clear()
    device._records.update(before)


def only_16(x: torch.dtype, weight: torch.dtype, block: int) -> str | None:
    return None if block == 16 else f"the toy has no block {block}"


def toy(kind: str, **more: Any) -> device.Device:
    return device.Device(
        kind,
        why_no_attention=lambda dtype, size, _: f"the toy has no heads of {size}",
        times=lambda layers, tuned: [device.at_crossover(layer, 0.4) for layer in layers],
        **{"why_unsupported": only_16, "default_block": 16, "finest_block": 16, **more},
    )


def test_a_device_is_added_from_outside(registered: dict[str, device.Device], monkeypatch: pytest.MonkeyPatch) -> None:
    device.register(toy("xpu"))
    monkeypatch.setattr(selection, "is_fake", lambda tensor: False)  # a real weight, but for the device
    model = nn.Linear(64, 64, device="meta")
    with FakeTensorMode():  # needs no such device
        model.weight = nn.Parameter(torch.empty(64, 64, device="xpu"))
    (chosen,) = select(model, static(0.5), None, None, None).candidates
    assert chosen.grid == BlockGrid(64, 64, 16)
    # The guard would like blocks finer than 16, for which the toy has no kernels.
    (chosen,) = select(model, static(0.9), None, None, None).candidates
    assert chosen.grid == BlockGrid(64, 64, 16)
    assert device.of("xpu").why_unsupported(F32, F32, 8) == "the toy has no block 8"


def test_operators_run_the_implementations_of_a_record(registered: dict[str, device.Device]) -> None:
    def attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor] | None:
        return (q + 1, q[..., 0]) if q.shape[-1] == 4 else None

    device.register(toy("xpu", implementations={"attention": attention}))
    name, key = "mst::attention", torch._C._dispatch_key_for_device("xpu")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("mst::linear", key)


def test_an_unknown_device_runs_references_and_says_so() -> None:
    unknown = device.of("abacus")
    assert unknown.type == "abacus"
    assert unknown.why_unsupported(F32, F32, 32) == "no kernel for device abacus"
    assert unknown.why_no_attention(F32, 64, 64) == "no attention kernel for device abacus"
    assert (unknown.default_block, unknown.finest_block) == (32, 4)
    layer = device.Layer(BlockGrid(64, 64, 32), False, 8, F32, F32, bias=True, trained=True)
    (times,) = unknown.times([layer], False)
    assert all(t.crossover == 0 for t in times.values()), "its products are dense at any density"
    assert not unknown.lowerings()
    assert unknown.why_not_compiled() is None


# -- a training on a toy device, which stands in for the CPU -----------------------------------------------------------


@pytest.fixture
def in_place_of_the_cpu(registered: dict[str, device.Device]) -> Iterator[list[str]]:
    """A toy record for the CPU; what is asked of it is noted. It doubles products: nobody else would."""
    asked: list[str] = []

    def linear(x: Any, weight: Any, bias: Any, index: Any, block: int, transposed: bool, *_: Any) -> Any:
        asked.append("declined" if bias is not None else "linear")
        if bias is not None:
            return None  # it declines
        product = lowerings[torch.ops.aten.mm.default](x, lowerings[torch.ops.aten.permute.default](weight, [1, 0]))
        return lowerings[torch.ops.aten.add.Tensor](product, product)

    registered["cpu"] = toy("cpu", lowerings=lambda: {"linear": linear}, keep_memory=lambda: asked.append("memory"))
    with fresh_cache():
        yield asked


def test_everybody_asks_the_record(in_place_of_the_cpu: list[str]) -> None:
    plain, with_bias = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
    model = mst_compile.sparsify(nn.Sequential(plain, with_bias), static(0.9))
    assert [w.grid.block for w in mst_compile.sparsifier(model).weights.values()] == [16, 16]
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected, found = with_bias(2 * plain(x)), compiled(model, "inductor")(x)
    torch.testing.assert_close(found, expected)
    assert in_place_of_the_cpu == ["memory", "linear", "declined"]
    assert all(row.kernel == "block-sparse" for row in mst_compile.explain(model))


def test_its_threshold_decides_between_dense_and_sparse(
    in_place_of_the_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MST_COMPILE_DENSE_THRESHOLD")
    model = mst_compile.sparsify(nn.Linear(64, 64, bias=False), static(0.5))
    x = torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, "inductor")(x), model(x))  # dense: a density of 0.5 lies above 0.4
    assert "linear" not in in_place_of_the_cpu


def test_its_reasons_are_told(in_place_of_the_cpu: list[str]) -> None:
    model = mst_compile.sparsify(nn.Linear(64, 64), static(0.9), block=8)
    assert "the toy has no block 8" in next(iter(mst_compile.explain(model))).status
    with pytest.warns(mst_compile.MSTWarning, match="the toy has no block 8"):
        compiled(model, "inductor")(torch.randn(2, 64))


def test_fine_blocks_keep_no_index_where_none_have_kernels(
    in_place_of_the_cpu: list[str], registered: dict[str, device.Device]
) -> None:
    model = mst_compile.sparsify(nn.Linear(64, 64, bias=False), static(0.9), block=1)
    (weight,) = mst_compile.sparsifier(model).weights.values()
    assert weight.index is None
    assert compiled(model, "inductor")(torch.randn(2, 64)).shape == (2, 64)  # unstructured masks: no warning
    assert "the toy has no block 1" in next(iter(mst_compile.explain(model))).status

    torch._dynamo.reset()
    registered["cpu"] = toy("cpu", why_unsupported=lambda *_: None, finest_block=1)  # moved to a device that has
    compiled(model, "aot_eager")(torch.randn(2, 64))
    assert torch.equal(mask_like(weight.index, weight.grid), weight.mask)
    assert next(iter(mst_compile.explain(model))).kernel == "block-sparse"

    registered["cpu"] = toy("cpu")
    weight.to_device(torch.device("meta"))
    assert weight.index is None


def test_where_nothing_can_be_compiled_the_model_runs_in_eager_mode(
    in_place_of_the_cpu: list[str], registered: dict[str, device.Device]
) -> None:
    registered["cpu"] = dataclasses.replace(registered["cpu"], why_not_compiled=lambda: "the toy has no compiler")
    model = mst_compile.sparsify(nn.Linear(64, 64), static(0.9))
    with pytest.warns(mst_compile.MSTWarning, match="runs in eager mode .* the toy has no compiler"):
        compiled(model, "inductor")(torch.randn(2, 64))
    assert "linear" not in in_place_of_the_cpu


def test_importing_the_package_does_not_import_inductors_lowerings() -> None:
    """They take seconds, and a program that compiles nothing shall not wait for them."""
    code = "import sys, mst_compile; print('torch._inductor.lowering' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
