"""What a sparse model is for others: a plain copy, block-sparse tensors, files with masks, other runtimes."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import compiled, static
from oracles import assert_reordered
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mst_compile
from mst_compile import Override, export
from mst_compile.errors import ArgumentError, CheckpointError, MaskError, ModelError, NotSparseError


class Net(nn.Module):
    """Both ways to store a weight, a tied head, a buffer, and a size that blocks of 8 do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 100), Conv1D(32, 100), nn.Linear(32, 56, bias=False)
        self.embed = nn.Embedding(56, 32)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(32))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.shift
        return self.head(x + self.down(torch.relu(self.up(x))))


def sparse(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return mst_compile.sparsify(Net().eval(), static(0.7), block=8, guard="none", **options)


@pytest.fixture
def model() -> nn.Module:
    return sparse(overrides={"up.*": Override(0.5, 4)})


IDS = torch.arange(40).view(2, 20)


# -- plain copies ------------------------------------------------------------------------------------------------------


def alone(script: str, *arguments: object) -> None:
    """Run a script in a process that cannot import mst_compile."""
    block = "import sys; sys.modules['mst_compile'] = None\n"
    command = [sys.executable, "-c", block + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_plain_copy_computes_the_same_and_leaves_the_model_alone(model: nn.Module) -> None:
    want, before = model(IDS), mst_compile.sparsifier(model).masks
    plain = export.plain(torch.compile(model, backend="mst"))
    assert torch.equal(plain(IDS), want)
    assert plain.head.weight is plain.embed.weight
    with pytest.raises(NotSparseError):
        mst_compile.sparsifier(plain)
    assert all(not name.startswith("_mst") for p in plain.parameters() for name in vars(p))
    after = mst_compile.sparsifier(model).masks
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    mst_compile.sparsify(plain, static(0.5), block=8)  # nothing of us is left


def test_what_is_exported_runs_without_us(model: nn.Module, tmp_path: Path) -> None:
    """torch.export, torch.save of a whole module's state and of block-sparse tensors."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(export.plain(model), (IDS,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    ids = torch.randint(56, (5, 20))
    torch.save({"ids": ids, "want": model(ids).detach(), "bsr": export.to_bsr(model)}, tmp_path / "data.pt")
    alone(
        """
        import torch
        given = torch.load(sys.argv[2], weights_only=True)
        program = torch.export.load(sys.argv[1])
        got = program.module()(given["ids"])
        assert torch.equal(got, given["want"])
        for name, tensor in given["bsr"].items():
            assert torch.equal(tensor.to_dense(), program.state_dict[name]), name
        """,
        tmp_path / "model.pt2",
        tmp_path / "data.pt",
    )


# -- block-sparse tensors ----------------------------------------------------------------------------------------------


def test_block_sparse_tensors_hold_the_active_blocks(model: nn.Module) -> None:
    found, weights = export.to_bsr(model), mst_compile.sparsifier(model).weights
    assert found.keys() == weights.keys()
    with torch.no_grad():
        for name, tensor in found.items():
            dense, grid = model.get_parameter(name), weights[name].grid
            assert tensor.layout == torch.sparse_bsr
            assert torch.equal(tensor.to_dense(), dense)
            assert tensor.values().numel() == weights[name].active
            # 100 rows or columns of blocks of 8 are cut into blocks of 4.
            assert tensor.values().shape[1:] == ((4, 4) if 100 in (grid.rows, grid.cols) else (8, 8))


def test_block_sparse_tensors_multiply(model: nn.Module) -> None:
    """What PyTorch itself does with them on a CPU."""
    x = torch.randn(32, 7)
    weight = export.to_bsr(model)["up.weight"]
    assert_reordered((weight @ x), model.up.weight.detach() @ x, 32)


def test_an_active_block_of_zeros_is_kept(model: nn.Module) -> None:
    with torch.no_grad():
        model.up.weight.zero_()
    assert len(export.to_bsr(model)["up.weight"].values()) == int(
        mst_compile.sparsifier(model).masks["up.weight"].sum()
    )


def test_values_outside_the_masks_are_exported(model: nn.Module, tmp_path: Path) -> None:
    """As an average over several topologies has them, which a copy computes with."""
    with torch.no_grad():
        model.up.weight[:9].add_(1e-30)  # whose square is 0
        model.down.weight.data[-1, -1] = 3.0  # leaves no trace
    masks = mst_compile.sparsifier(model).masks
    assert all(torch.equal(t.to_dense(), model.get_parameter(name)) for name, t in export.to_bsr(model).items())
    assert torch.equal(export.plain(model)(IDS), model(IDS))
    export.save(model, tmp_path / "model.safetensors")
    loaded = export.load(Net().eval(), tmp_path / "model.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    found = mst_compile.sparsifier(loaded).masks
    assert all(bool(found[name][mask].all()) for name, mask in masks.items())
    assert not found["up.weight"].all()
    assert torch.equal(mst_compile.sparsifier(model).masks["up.weight"], masks["up.weight"])


def test_values_written_without_a_trace_are_packed(model: nn.Module) -> None:
    model.down.weight.data[-1, -1] = 3.0
    packed = export.packed(model)
    assert torch.equal(packed.down.weight.to_dense(), model.down.weight)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_brings_back_values_and_masks(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export.save(torch.compile(model, backend="mst"), path, {"note": "ours"})
    torch.manual_seed(1)
    loaded = Net().eval()
    assert export.load(loaded, path) is loaded
    check_equal(model, loaded)
    with torch.no_grad():
        fast = compiled(loaded)
        assert_reordered(fast(IDS), model(IDS), 132)
    assert all(row.status.startswith("matched") for row in mst_compile.explain(loaded) if row.density < 1)
    with safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "ours"
    again = sparse(2, overrides={"up.*": Override(0.5, 4)})
    check_equal(model, export.load(again, path))


def check_equal(model: nn.Module, loaded: nn.Module) -> None:
    """The same values, masks and grids."""
    assert torch.equal(loaded(IDS), model(IDS))
    before, after = mst_compile.sparsifier(model), mst_compile.sparsifier(loaded)
    assert after.masks.keys() == before.masks.keys()
    assert all(torch.equal(mask, after.masks[name]) for name, mask in before.masks.items())
    assert all(after.weights[name].grid == weight.grid for name, weight in before.weights.items())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"mst_compile": "mine"}, r"'mst_compile'\] is where the masks are written"),
        ({"step": 3}, r"texts by name, got 'step': 3"),
        ({3: "three"}, r"texts by name, got 3: 'three'"),
        ("note", r"metadata must be a mapping.*'note'"),
        ([("a", "b")], r"metadata must be a mapping"),
    ],
)
def test_metadata_that_cannot_be_written(metadata: Any, message: str, model: nn.Module, tmp_path: Path) -> None:
    """Nothing of the user's is left out or written over in silence, and there is no file."""
    with pytest.raises(ArgumentError, match=message):
        export.save(model, tmp_path / "file", metadata)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    error: BaseException, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, link = tmp_path / "model.safetensors", tmp_path / "latest"
    link.symlink_to(file)
    other = tmp_path / "model.safetensors.tmp"
    other.write_text("somebody's")
    export.save(model, link)
    assert link.is_symlink()
    before = file.read_bytes()

    def save_half(tensors: Any, filename: str, metadata: Any) -> None:
        Path(filename).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", save_half)
    with pytest.raises(type(error)):
        export.save(model, link)
    assert file.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [link, file, other]
    assert other.read_text() == "somebody's"


def test_a_file_is_read_without_us(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export.save(model, path)
    plain = Net()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        tied = json.loads(file.metadata()["mst_compile"])["tied"]
    plain.load_state_dict(tensors | {name: tensors[kept] for name, kept in tied.items()})
    assert torch.equal(plain(IDS), model(IDS))


def test_a_weight_without_zeros_stays_dense(tmp_path: Path) -> None:
    model = mst_compile.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), static(0.5), block=4)
    own = mst_compile.sparsifier(model)
    own.apply_mask("0.weight", torch.ones(4, 4, dtype=torch.bool))
    export.save(model, tmp_path / "a")
    loaded = export.load(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), tmp_path / "a")
    assert list(mst_compile.sparsifier(loaded).weights) == ["1.weight"]
    own.apply_mask("1.weight", torch.ones(4, 4, dtype=torch.bool))
    export.save(model, tmp_path / "b")
    loaded = export.load(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), tmp_path / "b")
    with pytest.raises(NotSparseError):
        mst_compile.sparsifier(loaded)
    assert torch.equal(loaded[1].weight, model[1].weight)


def test_modules_that_were_sparsified_separately(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 32)))

    model = net()
    mst_compile.sparsify(model[0], static(0.5), block=4)
    mst_compile.sparsify(model[2], static(0.7), block=8)
    export.save(model, tmp_path / "a")
    loaded = export.load(net(), tmp_path / "a")
    assert mst_compile.sparsifier(loaded).masks.keys() == {"0.weight", "2.0.weight"} == export.to_bsr(model).keys()
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(export.load(model, tmp_path / "a")(x), loaded(x))


def test_files_and_models_that_do_not_fit(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export.save(model, path)
    other = nn.Sequential(nn.Linear(4, 4))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"lacks 0\.bias"):
        export.load(other, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    wide = Net()
    wide.up = nn.Linear(32, 104)
    with pytest.raises(CheckpointError, match=r"up\.\w+ has shape \(100.*\(104"):
        export.load(wide, path)
    coarse = sparse()
    was = copy.deepcopy(coarse.state_dict())
    with pytest.raises(CheckpointError, match=r"up\.weight has \(25, 8\) blocks there and \(13, 4\) here"):
        export.load(coarse, path)
    assert all(torch.equal(tensor, was[name]) for name, tensor in coarse.state_dict().items())
    for text, error in (
        (None, "no 'mst_compile'"),
        ("{}", "no 'version'"),
        ('{"version": 9}', "version 9"),
        ("[", "JSONDecodeError"),
    ):
        save_file(load_file(path), path, {} if text is None else {"mst_compile": text})
        with pytest.raises(CheckpointError, match=error):
            export.load(Net(), path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        export.load(Net(), path)


@pytest.mark.parametrize("change", [{"active": "?"}, {"active": "AAAA"}, {"block": 16}, {"block": None}])
def test_a_mask_that_is_none(model: nn.Module, change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export.save(model, path)
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["mst_compile"])
    found["masks"]["up.weight"] |= change
    save_file(load_file(path), path, {"mst_compile": json.dumps(found)})
    plain = Net()
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(MaskError, match=r"mask of up\.weight"):
        export.load(plain, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("function", [export.plain, export.to_bsr, lambda m: export.save(m, "never written")])
def test_models_that_are_not_sparse(function) -> None:
    with pytest.raises(NotSparseError):
        function(nn.Linear(4, 4))
    with pytest.raises(ModelError):
        function("model")


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_dynamic_int8(model: nn.Module) -> None:
    """torch.ao's dynamic quantisation: zeros stay zero, products are dense, errors are those of the dense weight's."""
    plain = export.plain(model)
    small = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    weight = small.up.weight()
    assert (weight.dequantize()[plain.up.weight == 0] == 0).all()
    assert (weight.dequantize() - plain.up.weight).abs().max() <= 0.51 * weight.q_scale()
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    with torch.no_grad():
        error = (small(IDS) - model(IDS)).norm() / model(IDS).norm()
    assert 0 < error < 0.05


ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(ONNX), reason=f"not installed: {', '.join(ONNX)}")
def test_onnx(model: nn.Module, tmp_path: Path) -> None:
    import onnxruntime

    path = str(tmp_path / "model.onnx")
    torch.onnx.export(export.plain(model), (IDS,), path, input_names=["ids"], dynamic_shapes=({0: "batch"},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = torch.randint(56, (5, 20))
    got = torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])
    assert_reordered(got, model(ids).detach(), 132)
