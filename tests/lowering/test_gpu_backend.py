"""``backend="mst"`` for a GPU as a whole, what it falls back on, and where dense products take over."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import product
from helpers import compiled, static
from mst_compile.lowering import crossover, support, tuning
from oracles import assert_reordered
from pretend_gpu import Generated, Interpreter, generate, kernels_of, pretend_h100
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.select_algorithm import get_algorithm_selector_cache

import mst_compile
from mst_compile.blocks.grid import BlockGrid
from mst_compile.graph import backend

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """No crossover measured yet, on a pretend GPU; yields the folder where measurements are kept."""
    monkeypatch.setenv("MST_COMPILE_CACHE_DIR", str(tmp_path))
    caches = (crossover._load, crossover._path, support._why_no_gpu_kernels)
    for cache in caches:
        cache.cache_clear()
    with pretend_h100():
        yield tmp_path
    for cache in caches:
        cache.cache_clear()


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


def through_backend(model: nn.Module, *args: Any) -> Generated:
    def wrapper(graph_module: Any, examples: Any, inner: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "compile_fx", functools.partial(compile_fx, inner_compile=inner))
            return backend.mst(graph_module, examples, options={"mst.keep_memory": False})

    return generate(model, args, backend_wrapper=wrapper)


def test_a_model_through_the_backend() -> None:
    model = mst_compile.sparsify(Mlp(), static(0.7), block=32, include=["*up*", "*down*", "*embed*"], rescale=False)
    made = through_backend(model, torch.randint(500, (3, 41)))
    forward = [k for k in kernels_of(made.forward.source) if k.kind == "template"]
    backward = [k for k in kernels_of(made.backward.source) if k.kind == "template"]
    assert len(forward) == 3
    assert len(backward) == 6
    # PyTorch 2.11 fuses nothing through a view of the tokens, into its own matrix product templates neither.
    if torch.__version__ >= "2.13":
        assert any("erf(" in kernel.source for kernel in forward), "the activation is in the kernel's store"
    code = [line for graph in made.graphs.values() for line in graph.source.splitlines() if not line.startswith("#")]
    assert not [line for line in code if "extern_kernels." in line or "ops.mst" in line]
    with Interpreter(preload=("mst_compile.lowering.inductor",)) as interpreter:
        for graph in made.graphs.values():
            for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
                if isinstance(expected, Tensor):
                    assert_reordered(actual, expected, 16)


# -- fallbacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weight", "block", "said"),
    [
        (BF16, BF16, 64, None),
        (BF16, F32, 32, None),
        (F64, F64, 64, "no GPU kernel for input torch.float64, weight torch.float64"),
        (BF16, BF16, 16, "no GPU kernel for block 16: the finest is 32"),
    ],
)
def test_what_has_no_gpu_kernel(x: torch.dtype, weight: torch.dtype, block: int, said: str | None, fresh: Path) -> None:
    assert support.why_unsupported("cuda", x, weight, block) == said


def test_gpus_without_kernels(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for patch, said in (
        (
            lambda m: m.setattr(torch.cuda, "get_device_capability", lambda: (7, 5)),
            "compute capability 7.5 is below 8.0",
        ),
        (lambda m: m.setattr(torch.version, "hip", "6.4"), "the GPU kernels are for NVIDIA GPUs"),
        (lambda m: m.setattr(support.importlib.util, "find_spec", lambda name: None), "triton is not installed"),
    ):
        support._why_no_gpu_kernels.cache_clear()
        with monkeypatch.context() as context:
            patch(context)
            assert support.why_unsupported("cuda", BF16, BF16, 64).startswith(f"no kernels: {said}")
    assert support.why_unsupported("mps", BF16, BF16, 64) == "no kernel for device mps"


@pytest.mark.parametrize(("block", "dtype", "m", "n"), [(16, F32, 8, 48), (32, F64, 8, 48), (32, F32, 1, 1)])
def test_the_lowering_falls_back_on_the_reference(block: int, dtype: torch.dtype, m: int, n: int) -> None:
    mask = torch.ones(BlockGrid(n, 64, block).shape, dtype=torch.bool)
    case = product(m, 64, n, mask, block, dtype=dtype)
    made = generate(case.function(), case.arguments())
    assert "torch.ops.mst.linear.default(" in made.forward.source
    assert not [k for k in kernels_of(made.forward.source) if k.kind == "template"]
    with Interpreter(preload=("mst_compile.lowering.inductor",)) as interpreter:
        for graph in made.graphs.values():
            for actual, expected in zip(interpreter.run(graph), graph.outputs, strict=True):
                torch.testing.assert_close(actual, expected)


def test_explain_says_what_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_gpu(device: str, *operands: Any) -> str | None:
        with pretend_h100():  # no longer: builds with CUDA would look for the device while they compile
            return support.why_unsupported("cuda", *operands)

    monkeypatch.setattr("mst_compile.graph.linear.why_unsupported", as_on_gpu)
    model = mst_compile.sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), static(0.5), block=8)
    with pytest.warns(mst_compile.MSTWarning, match="no GPU kernel for block 8"):
        compiled(model)(torch.randn(2, 64))
    for row in mst_compile.explain(model):
        assert row.kernel == "dense"
        assert "no GPU kernel for block 8: the finest is 32" in row.status


# -- the crossover -----------------------------------------------------------------------------------------------------

GRID = BlockGrid(256, 512, 64)


def test_crossover_is_measured_by_tuning(fresh: Path) -> None:
    estimate = crossover.of_grid(GRID)
    assert 0 < estimate < 1

    class Choice:
        def __init__(self, product: str | None = None) -> None:
            if product:
                self.mst_product = GRID, product, 0.2

    # At density 0.2 sparse takes 1 + 2 against 2 + 4 dense: with twice the density they would be as fast.
    crossover.from_tuning({Choice("forward"): 1.0, Choice("forward"): 1.5, Choice(): 2.0}, "mst_linear")
    crossover.from_tuning({Choice("grad-weight"): 2.0, Choice(): 4.0}, "mst_grad_weight")
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    # A foreign question, and one where a side failed, change nothing.
    crossover.from_tuning({Choice(): 1.0}, "mm")
    crossover.from_tuning({Choice("forward"): float("inf"), Choice(): 2.0}, "mst_linear")
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    # Another process reads what this one has measured.
    crossover._load.cache_clear()
    assert crossover.of_grid(GRID) == pytest.approx(0.4)
    # Sparse so slow that dense always wins, sparse so fast that it never does.
    crossover.record(BlockGrid(64, 64, 32), "forward", 0.2, dense=1.0, sparse=100.0)
    assert crossover.of_grid(BlockGrid(64, 64, 32)) == pytest.approx(0.002)
    crossover.record(BlockGrid(64, 128, 32), "forward", 0.2, dense=100.0, sparse=1.0)
    assert crossover.of_grid(BlockGrid(64, 128, 32)) == 1.0


def test_crossover_of_several_weights_counts_their_sizes(fresh: Path) -> None:
    small, large = BlockGrid(64, 64, 32), BlockGrid(64, 192, 32)
    crossover.record(small, "forward", 0.5, dense=1.0, sparse=1.0)
    crossover.record(large, "forward", 0.5, dense=1.0, sparse=2.5)
    assert crossover.of_weights([small, large], "cuda") == pytest.approx((0.5 + 3 * 0.2) / 4)
    assert crossover.of_weights([small, large], "cpu") == crossover.CPU


def test_a_broken_record_is_no_error(fresh: Path) -> None:
    crossover._path().write_text('{"256x512/64": ')
    crossover._load.cache_clear()
    estimate = crossover.of_grid(GRID)
    crossover.record(GRID, "forward", 0.1, dense=2.0, sparse=1.0)
    assert crossover.of_grid(GRID) == pytest.approx(0.2) != estimate
    assert json.loads(crossover._path().read_text())
    assert [p.name for p in fresh.iterdir()] == [crossover._path().name], "no drafts stay behind"


def test_inductor_tells_us_what_it_has_tuned() -> None:
    assert crossover.from_tuning in get_algorithm_selector_cache().feedback_saver_fns


@pytest.mark.parametrize(("threshold", "sparse"), [(0.45, False), (0.55, True)])
def test_the_backend_asks_for_the_crossover(threshold: float, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[BlockGrid], str]] = []

    def of_weights(grids: Any, device: str) -> float:
        seen.append((list(grids), device))
        return threshold

    monkeypatch.setattr(crossover, "of_weights", of_weights)
    model = mst_compile.sparsify(nn.Linear(128, 64), static(0.5), block=16)
    fast = compiled(model)
    fast(torch.randn(2, 128))  # while it compiles both kinds are seen
    with torch.profiler.profile() as profile:
        fast(torch.randn(2, 128))
    ran = [event.key for event in profile.key_averages()]
    assert any("mst::linear" in key for key in ran) == sparse
    assert ([BlockGrid(64, 128, 16)], "cpu") in seen


def test_tuning_uses_the_density_that_training_will_have() -> None:
    model = mst_compile.sparsify(nn.Linear(1024, 1024), static(0.9), block=32)
    compiled(model)(torch.randn(2, 1024))
    weight = mst_compile.sparsifier(model).weights["weight"]
    assert tuning.expected_density(weight.grid) == weight.density_target == pytest.approx(0.1)
    index = tuning.realistic_index(weight.grid, "cpu")
    assert int(index[0]) == pytest.approx(0.1 * weight.grid.blocks, rel=0.2)
    assert index.numel() == weight.grid.index_length
