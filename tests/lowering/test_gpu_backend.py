"""``backend="mst"`` for a GPU as a whole, and what it falls back on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_cases import product
from helpers import compiled, static
from mst_compile.lowering import cuda, device
from mst_compile.lowering import gpu as products
from pretend_gpu import Interpreter, generate, kernels_of, pretend_h100
from through_backend import through_backend
from torch import Tensor, nn

import mst_compile
from mst_compile.blocks.grid import BlockGrid

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def gpu() -> Iterator[None]:
    """A pretend GPU that nothing is known of yet."""
    cuda._why_no_kernels.cache_clear()
    with pretend_h100():
        yield
    cuda._why_no_kernels.cache_clear()


# -- whole graphs ------------------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """As Hugging Face writes it: a linear layer that stores ``[in, out]``."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class Mlp(nn.Module):
    """Both ways to store a weight, a tied head, an activation and a residual to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 256)
        self.norm, self.up, self.down = nn.LayerNorm(256), Conv1D(640, 256), nn.Linear(640, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return nn.functional.linear(x, self.embed.weight)


def test_a_model_through_the_backend(interpreter: Interpreter) -> None:
    model = mst_compile.sparsify(Mlp(), static(0.7), block=32, include=["*up*", "*down*", "*embed*"], rescale=False)
    made = through_backend(model, torch.randint(500, (3, 41)))
    forward = [k for k in kernels_of(made.forward.source) if k.kind == "template"]
    backward = [k for k in kernels_of(made.backward.source) if k.kind == "template"]
    assert len(forward) == 3
    sums = [kernel for kernel in backward if "arg_PARTIALS" in kernel.source]  # weights of one shape share theirs
    assert (len(backward) - len(sums), len(sums)) == (6, 2)
    # PyTorch 2.11 fuses nothing through a view of the tokens, into its own matrix product templates neither.
    if torch.__version__ >= "2.13":
        assert any("erf(" in kernel.source for kernel in forward), "the activation is in the kernel's store"
    code = [line for graph in made.graphs.values() for line in graph.source.splitlines() if not line.startswith("#")]
    assert not [line for line in code if "extern_kernels." in line or "ops.mst" in line]
    for graph in made.graphs.values():
        for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


class Gated(nn.Module):
    """Two products with halves of the rows of one weight, and one with some columns of another."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(256, 2 * 320, bias=False), nn.Linear(448, 256)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.both.weight.chunk(2)
        hidden = nn.functional.linear(x, up) * torch.sigmoid(nn.functional.linear(x, gate))
        return nn.functional.linear(hidden, self.down.weight[:, 64:384], self.down.bias)


def test_parts_of_weights_through_the_backend(interpreter: Interpreter) -> None:
    """Templates read them where they lie: nothing of a weight is copied."""
    model = mst_compile.sparsify(Gated(), static(0.7), block=32, rescale=False)
    made = through_backend(model, torch.randn(3, 41, 256))
    assert [k.kind for k in kernels_of(made.forward.source)] == ["template"] * 3
    code = [line for graph in made.graphs.values() for line in graph.source.splitlines() if not line.startswith("#")]
    assert not [line for line in code if "extern_kernels." in line or "ops.mst" in line]
    for graph in made.graphs.values():
        for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


# -- fallbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("x", "weight", "block", "said"),
    [
        (BF16, BF16, 64, None),
        (BF16, F32, 32, None),
        (F64, F64, 64, "no GPU kernel for input torch.float64, weight torch.float64"),
        (BF16, BF16, 16, "no GPU kernel for block 16: the finest is 32"),
    ],
)
def test_what_has_no_gpu_kernel(x: torch.dtype, weight: torch.dtype, block: int, said: str | None) -> None:
    assert device.of("cuda").why_unsupported(x, weight, block) == said


@pytest.mark.usefixtures("gpu")
def test_gpus_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for patch, said in (
        (
            lambda m: m.setattr(torch.cuda, "get_device_capability", lambda: (7, 5)),
            "compute capability 7.5 is below 8.0",
        ),
        (lambda m: m.setattr(torch.version, "hip", "6.4"), "the GPU kernels are for NVIDIA GPUs"),
        (lambda m: m.setattr(cuda.importlib.util, "find_spec", lambda name: None), "triton is not installed"),
    ):
        cuda._why_no_kernels.cache_clear()
        with monkeypatch.context() as context:
            patch(context)
            assert device.of("cuda").why_unsupported(BF16, BF16, 64).startswith(f"no kernels: {said}")
    assert device.of("mps").why_unsupported(BF16, BF16, 64) == "no kernel for device mps"


@pytest.mark.parametrize(("block", "dtype", "m", "n"), [(16, F32, 8, 48), (32, F64, 8, 48), (32, F32, 1, 1)])
def test_the_lowering_falls_back_on_the_reference(
    block: int, dtype: torch.dtype, m: int, n: int, interpreter: Interpreter
) -> None:
    mask = torch.ones(BlockGrid(n, 64, block).shape, dtype=torch.bool)
    case = product(m, 64, n, mask, block, dtype=dtype)
    made = generate(case.function(), case.arguments())
    assert "torch.ops.mst.linear.default(" in made.forward.source
    assert not [k for k in kernels_of(made.forward.source) if k.kind == "template"]
    for graph in made.graphs.values():
        for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
            torch.testing.assert_close(actual, expected)


def test_explain_says_what_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_gpu(*operands: Any) -> str | None:
        with pretend_h100():  # no longer: builds with CUDA would look for the device while they compile
            return device.of("cuda").why_unsupported(*operands)

    record = dataclasses.replace(device.of("cpu"), why_unsupported=as_on_gpu)
    monkeypatch.setitem(device._records, "cpu", record)
    model = mst_compile.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), static(0.5), block=8)
    with pytest.warns(mst_compile.MSTWarning, match="no GPU kernel for block 8"):
        compiled(model)(torch.randn(2, 64))
    for row in mst_compile.explain(model):
        assert row.kernel == "dense"
        assert "no GPU kernel for block 8: the finest is 32" in row.status


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("out_first", [False, True])
def test_the_dense_gradient_fills_its_partials_and_no_more(out_first: bool) -> None:
    x, dy = torch.randn(20, 48), torch.randn(20, 16)
    x[:, 33:], dy[:, 7:] = 0, 0
    rows, width = (7, 48) if out_first else (33, 16)
    memory = torch.full((4 * rows, width), torch.nan)
    products._dense_grad_weight(x, dy, torch.empty(0), out_first=out_first, rows=rows, out=memory[: 2 * rows])
    exact = dy.t() @ x if out_first else x.t() @ dy
    torch.testing.assert_close(memory[:rows], exact[:rows])
    assert not memory[rows : 2 * rows].any(), "the second part"
    assert memory[2 * rows :].isnan().all()
