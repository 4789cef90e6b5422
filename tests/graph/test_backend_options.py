"""Options, the entry point, compile caches, and machines without a compiler."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEBUG, Blocks, static
from mst_compile.kernels import cpu
from mst_compile.lowering.compat import InferenceAwarePass
from torch import fx, nn
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

from mst_compile import sparsifier, sparsify
from mst_compile.errors import BackendOptionError
from mst_compile.graph import backend, cachekey
from mst_compile.graph.cachekey import SourceKey

X = (2, 8, 32)


def python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def error_of(**options: Any) -> str:
    """The message of the option error that compiling a model gives; the model must stay as it was."""
    model = sparsify(Blocks(), static())
    with pytest.raises(BackendOptionError) as caught:
        backend.mst(fx.symbolic_trace(nn.Identity()), [torch.ones(1)], **options)
    with pytest.raises(Exception, match=r"mst|mode|option"):
        torch.compile(model, backend="mst", **options)(torch.randn(X))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mst.dense_treshold": 0.5}, "mst.dense_treshold"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"mst.inner": "onnx"}, "'onnx'"),
        *[({"mst.dense_threshold": v}, repr(v)) for v in (-0.1, 1.5, "half", True)],
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], word: str) -> None:
    assert word in error_of(options=options)


def test_modes() -> None:
    own, patches = backend._split_options("max-autotune-no-cudagraphs", {"epilogue-fusion": False})
    assert own["mst.inner"] == "inductor"
    assert patches["max_autotune"] is True
    assert patches["epilogue_fusion"] is False
    assert patches["freezing"] is False
    assert backend._split_options("default", None)[1].keys() == {"freezing", "post_grad_custom_post_pass"}
    with pytest.raises(BackendOptionError, match=r"'fastest'.*max-autotune"):
        backend.mst(fx.symbolic_trace(nn.Identity()), [torch.ones(1)], mode="fastest")


@pytest.mark.parametrize("threshold", [0.0, 0.29, 0.31, 1.0])
def test_the_dense_threshold_chooses_the_variant(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    spmm = cpu.spmm
    monkeypatch.setattr(cpu, "spmm", lambda *args: (calls.append(1), spmm(*args))[1])
    model = sparsify(nn.Linear(64, 64), static(0.7), block=4)  # 77 of 256 blocks
    fast = torch.compile(model, backend="mst", options={**DEBUG, "mst.dense_threshold": threshold})
    x = torch.randn(2, 64)
    torch.testing.assert_close(fast(x), model(x))
    assert bool(calls) == (threshold > 77 / 256)


def test_weights_know_the_dense_threshold_of_their_graph() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.scaled = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.used(x), self.scaled.weight * 0.5)

    for given, expected in (None, 0.8), (0.6, 0.6), (0.0, 0.0):
        torch._dynamo.reset()
        model = sparsify(Half(), static())
        weights = sparsifier(model).weights
        assert weights["used.weight"].uses.dense_threshold is None
        torch.compile(model, backend="mst", options={**DEBUG, "mst.dense_threshold": given})(torch.randn(2, 32))
        assert weights["used.weight"].uses.dense_threshold == expected
        assert weights["scaled.weight"].uses.dense_threshold is None


@pytest.mark.parametrize("inner", ["inductor", "aot_eager", "eager"])
def test_a_model_that_is_not_sparse(inner: str) -> None:
    """Without sparse weights the backend is the inner one, bitwise."""
    model, x = Blocks(depth=1), torch.randn(X)
    results = []
    for name, options in ((inner, {}), ("mst", {"options": {"mst.inner": inner}})):
        torch._dynamo.reset()
        model.zero_grad()
        y = torch.compile(model, backend=name, **options)(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_backend_is_found_by_name() -> None:
    found = python(
        """
        import sys, torch
        assert "mst" in torch.compiler.list_backends()
        assert "mst_compile" not in sys.modules
        layer = torch.nn.Linear(8, 8)
        y = torch.compile(layer, backend="mst", options={"mst.inner": "eager"})(torch.ones(2, 8))
        print(torch.equal(y, layer(torch.ones(2, 8))), "mst_compile" in sys.modules)
        """
    )
    assert found.split() == ["True", "True"]


# -- caches ------------------------------------------------------------------------------------------------------------


def fresh_hash() -> str:
    cachekey.source_hash.cache_clear()
    custom_graph_pass.get_hash_for_files.cache_clear()
    return cachekey.source_hash()


@pytest.fixture
def _forget_hash() -> Any:
    yield
    cachekey.source_hash.cache_clear()
    custom_graph_pass.get_hash_for_files.cache_clear()


@pytest.mark.usefixtures("_forget_hash")
def test_the_cache_key_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fresh_hash()
    assert SourceKey().uuid() == SourceKey().uuid()
    assert first in SourceKey().uuid()

    changed = {"file": ""}

    def changed_file(path: str, mode: str) -> io.BytesIO:
        return io.BytesIO(Path(path).read_bytes() + b"#" * path.endswith(changed["file"] or "nothing"))

    seen = {first}
    monkeypatch.setattr(custom_graph_pass, "open", changed_file, raising=False)
    names = ("ops/linear.py", "graph/linear.py", "inductor.py", "cpu.py", "cpu/library.py", "spmm.cpp", "vector.h")
    for name in names:
        changed["file"] = name
        seen.add(fresh_hash())
    assert len(seen) == 8
    changed["file"] = ""
    assert fresh_hash() == first


class Own(CustomGraphPass):
    """A user's pass that sees graphs."""

    def __init__(self, key: Any = "mine") -> None:
        self.key, self.graphs = key, []

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(graph)

    def uuid(self) -> Any:
        return self.key


class Aware(InferenceAwarePass):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        self.told.append(is_inference)

    def uuid(self) -> Any:
        return "aware"


def key_of(given: Any) -> Any:
    return backend._split_options(None, {"post_grad_custom_post_pass": given})[1]["post_grad_custom_post_pass"].uuid()


def test_a_users_own_pass_is_run_and_kept_in_the_key() -> None:
    own = Own()
    with inductor_config.patch(post_grad_custom_post_pass=own):
        key = backend._split_options(None, None)[1]["post_grad_custom_post_pass"]
    assert key.uuid() != SourceKey().uuid()
    assert "mine" in key.uuid()
    key(fx.Graph())
    assert len(own.graphs) == 1
    SourceKey()(fx.Graph())


def test_a_pass_in_the_options_is_run_and_kept_in_the_key() -> None:
    assert cachekey.source_hash() in key_of(Own())
    assert len({SourceKey().uuid(), key_of(Own()), key_of(Own("another")), key_of([Own(), Own("another")])}) == 4
    # Without a key of its own nothing may be cached.
    assert key_of(Own(None)) is key_of(lambda graph: None) is None

    passes = Own(), Aware()
    model = sparsify(nn.Linear(32, 32), static())
    fast = torch.compile(model, backend="mst", options={"post_grad_custom_post_pass": list(passes)})
    torch.testing.assert_close(fast(torch.ones(2, 32)), model(torch.ones(2, 32)))
    assert any("mst.linear" in str(n.target) for graph in passes[0].graphs for n in graph.nodes)
    assert len(passes[0].graphs) == len(passes[1].told)
    assert set(passes[1].told) == ({False} if InferenceAwarePass is not CustomGraphPass else {None})


CACHED = """
    import torch, torch._inductor, mst_compile
    from torch._dynamo.utils import counters
    torch.manual_seed(0)
    model = mst_compile.sparsify(torch.nn.Linear(64, 64), mst_compile.Constant(0.8, growth="none"))
    y = torch.compile(model, backend="mst")(torch.randn(4, 64))
    y.sum().backward()
    print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"],
          counters["inductor"]["fxgraph_cache_bypass"], y.sum().item(), model.weight.grad.sum().item())
"""


def test_caches_serve_the_next_process_unless_the_sources_changed(tmp_path: Path) -> None:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (python(CACHED, **environment).split() for _ in range(2))
    patch = "import mst_compile.graph.cachekey as key; key.source_hash = lambda: 'other'\n"
    third = python(patch + textwrap.dedent(CACHED), **environment).split()
    assert [int(v) for v in first[:3]] == [0, 1, 0]
    assert [int(v) for v in second[:3]] == [1, 0, 0]
    assert [int(v) for v in third[:3]] == [0, 1, 0]
    assert first[3:] == second[3:] == third[3:]


# -- no compiler -------------------------------------------------------------------------------------------------------


def test_without_a_compiler_one_warning_and_correct_results(tmp_path: Path) -> None:
    found = python(
        """
        import warnings, torch, mst_compile
        torch.manual_seed(0)
        def run(model):
            losses, optimizer = [], torch.optim.SGD(model.parameters(), 0.1)
            for _ in range(6):
                loss = model(torch.ones(4, 64)).square().mean()
                loss.backward(); optimizer.step(); optimizer.zero_grad()
                losses.append(loss.item())
            return losses
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results = []
            for fast in (False, True, True):
                torch.manual_seed(0)
                model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
                mst_compile.sparsify(model, mst_compile.Constant(0.8, interval=2))
                results.append(run(torch.compile(model, backend="mst") if fast else model))
        assert results[0] == results[1] == results[2], results
        own = [w for w in caught if issubclass(w.category, mst_compile.MSTWarning)]
        print(len(own)); print(own[0].message)
        for row in mst_compile.explain(model).rows: print(row.kernel, "|", row.status)
        """,
        CXX="/nonexistent/compiler", MST_COMPILE_CACHE_DIR=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "i"),
    )  # fmt: skip
    count, message, *table = found.splitlines()
    assert count == "1"
    assert "/nonexistent/compiler" in message
    assert "Install" in message
    assert sum("dense" in line and "no kernels" in line for line in table) == 2
