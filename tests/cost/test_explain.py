"""What ``explain`` says of many layers, of density 1, and of models that were changed after ``sparsify``."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DEBUG, Blocks, static, statuses
from torch import Tensor, nn

import mst_compile
from mst_compile import Constant, explain, sparsifier, sparsify
from mst_compile.cost.layout import short_names


class Long(nn.Module):
    """150 linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"encoder": Blocks(depth=74)})
        self.odd = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(2)])


def test_150_layers_are_a_few_groups_exceptions_first() -> None:
    model = sparsify(Long(), static(), block=4, exclude="transformer.encoder.layers.3.*")
    for name, weight in sparsifier(model).weights.items():  # as the graph passes say it
        odd = name.startswith("odd")
        weight.uses.note([] if odd else ["model.py:1"], ["only a slice of it is multiplied"] if odd else [])
    found = explain(model)
    assert len(found) == 150
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 20
    first = found.groups[0]
    assert [r.name for r in first.rows] == ["odd.0.weight", "odd.1.weight"]
    assert first.first.exception
    assert first.first.status == "not matched: only a slice of it is multiplied"
    assert [group.first.block is None for group in found.groups][-1]  # what was excluded comes last
    assert sum(len(group.rows) for group in found.groups) == 150
    assert "transformer.encoder.layers.0-2,4-73.1.weight" in text
    assert text.index("odd.0-1.weight") < text.index("layers.0-2,4-73")
    summary = found.summary().splitlines()
    assert summary[0] == f"148 sparse weights, density {sparsifier(model).density:.3f}: 146 in block-sparse products"
    assert summary[1] == "2 linear weights stay dense; exceptions: 2"
    assert summary[2].startswith("    2: not matched")
    assert len(summary) <= 6


def test_the_dict_is_plain_and_its_keys_stay() -> None:
    model = sparsify(Blocks(), static(), block=4, exclude="layers.1.3.*")
    found = explain(model).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["format", "flops", "dense_flops", "weights", "groups", "attention", "first_masks"]
    assert found["format"] == 1
    assert list(found["weights"][0]) == [
        "name", "shape", "block", "density", "nonzero", "target", "kernel", "status", "flops", "dense_flops",
        "exception",
    ]  # fmt: skip
    assert list(found["groups"][0]) == ["names", "shape", "block", "density", "kernel", "status", "exception"]
    assert sorted(n for g in found["groups"] for n in g["names"]) == sorted(w["name"] for w in found["weights"])
    assert found["flops"] == sum(w["flops"] for w in found["weights"]) < found["dense_flops"]


def test_at_density_1_products_are_dense_and_nothing_is_saved() -> None:
    """Also where a mask has become full since the last call, and where a graph has never run sparse."""
    model = sparsify(Blocks(), Constant(0.7, growth="none"))
    own, x = sparsifier(model), torch.randn(4, 32)
    run = torch.compile(model, backend="mst", options={**DEBUG, "mst.dense_threshold": 1.0})
    run(x)
    assert {row.kernel for row in explain(model)} == {"block-sparse"}
    for name, mask in own.masks.items():
        own.apply_mask(name, torch.ones_like(mask))
    for _ in range(2):
        found = explain(model)
        assert {row.kernel for row in found} == {"dense"}
        assert all(row.flops == row.dense_flops and row.density == 1 and not row.exception for row in found)
        assert "(100.0%)" in found.summary()
        assert "exceptions: none" in found.summary()
        assert "0 in block-sparse products, 4 in dense ones, chosen at this density" in found.summary()
        run(x)
    early = sparsify(Blocks(), mst_compile.MixedSparsity.published(100))  # begins dense
    torch.compile(early, backend="mst", options=DEBUG)(x)
    assert all(row.kernel == "dense" and row.status.startswith("matched") for row in explain(early))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao:UserWarning")
def test_a_quantised_model_is_told_as_what_it_is() -> None:
    model = sparsify(Blocks(), static(), block=4)
    before = {row.name: row.nonzero for row in explain(model)}
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = explain(quantised)
    for row in found:
        assert row.kernel == "quantised"
        assert row.status == "replaced by Linear (qint8): dense products, zeros kept"
        assert row.exception
        assert row.flops == row.dense_flops == 6 * row.shape[0] * row.shape[1] > 0
        assert row.nonzero <= before[row.name]  # zeros stay zeros, small values round to them
    assert "0 in block-sparse products" in found.summary()
    assert {row.kernel for row in explain(model)} == {"dense"}  # the original is as it was
    assert {row.status for row in explain(model)} == {'not seen by backend="mst" yet'}


def test_weights_of_a_quantised_class_are_told() -> None:
    """As torchao leaves them: a Parameter of a tensor subclass in the same module."""
    torchao = pytest.importorskip("torchao.quantization")
    model = sparsify(Blocks(), static(), block=4)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    for row in explain(model):
        assert row.kernel == "quantised"
        assert row.status.startswith("quantised (")
        assert 0 < row.nonzero < 0.5


def _new_layer(model: nn.Module) -> None:
    model.layers[0][1] = nn.Linear(32, 96)  # type: ignore[index, operator]


def _new_parameter(model: nn.Module) -> None:
    model.layers[0][1].weight = nn.Parameter(torch.randn(96, 32))  # type: ignore[index, union-attr]


def _new_data(model: nn.Module) -> None:
    model.layers[0][1].weight.data = torch.randn(96, 32)  # type: ignore[index, union-attr]


@pytest.mark.parametrize("change", [_new_layer, _new_parameter, _new_data])
def test_a_weight_of_another_shape_is_told(change: Any) -> None:
    model = sparsify(Blocks(), static(), block=4)
    change(model)
    rows = {row.name: row for row in explain(model)}
    row = rows["layers.0.1.weight"]
    assert (row.shape, row.block, row.density, row.kernel, row.exception) == ((96, 32), None, 1.0, "dense", True)
    assert row.flops == row.dense_flops == 6 * 96 * 32
    assert "it was made sparse as 64x32: sparsify after such changes" in row.status
    assert rows["layers.0.3.weight"].block is not None


def test_a_weight_that_is_gone_is_told() -> None:
    model = sparsify(Blocks(), static(), block=4)
    model.layers[0][1] = nn.Identity()
    del model.layers[1]
    rows = {row.name: row for row in explain(model)}
    assert "replaced by a module Identity" in rows["layers.0.1.weight"].status
    assert "gone from the model; it was made sparse as 64x32" in rows["layers.1.1.weight"].status
    assert rows["layers.0.1.weight"].flops == 0
    assert max(map(len, str(explain(model)).splitlines())) <= 100
    assert explain(model).to_dict()["weights"][0]["nonzero"] is None


def test_resized_token_embeddings_are_told() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = sparsify(transformers.GPT2LMHeadModel(config), static(), include=["*c_fc.weight", "*wte.weight"])
    model.resize_token_embeddings(104)
    rows = {row.name: row for row in explain(model)}
    row = next(row for name, row in rows.items() if "wte" in name)
    assert row.exception
    assert row.shape == (104, 32)
    assert "it was made sparse as 96x32" in row.status
    assert rows["transformer.h.0.mlp.c_fc.weight"].block is not None


def test_a_module_that_is_wrapped_is_still_there() -> None:
    model = sparsify(Blocks(), static(), block=4)
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    assert set(statuses(model).values()) == {'not seen by backend="mst" yet'}


class Broken(nn.Module):
    """Dynamo cannot go on after a break within a loop, and leaves the frame to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(32, 32), Blocks()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            x = x @ self.first.weight
        return self.inner(x)


def test_a_frame_that_dynamo_skipped_is_named() -> None:
    torch._dynamo.reset()
    model = sparsify(Broken(), static(), block=4)
    assert set(statuses(model).values()) == {'not seen by backend="mst" yet'}
    torch.compile(model, backend="mst", options=DEBUG)(torch.randn(4, 32))
    found = statuses(model)
    assert found["first.weight"].startswith(
        "Dynamo skipped this frame and runs it eagerly: Broken.forward (test_explain.py:"
    )
    assert all(status.startswith("matched") for name, status in found.items() if name.startswith("inner"))
    assert "TORCH_LOGS=graph_breaks" in explain(model).summary()
    torch._dynamo.reset()
    assert statuses(sparsify(Broken(), static(), block=4))["first.weight"] == 'not seen by backend="mst" yet'


class Recurrent(nn.Module):
    """Dynamo leaves a frame with an LSTM to Python, and makes no graphs of frames of PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 32, proj_size=16), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_the_frame_that_is_named_is_the_users_and_recurrent_weights_are_told() -> None:
    torch._dynamo.reset()
    model = sparsify(Recurrent(), static(), block=4)
    torch.compile(model, backend="mst", options=DEBUG)(torch.randn(4, 2, 32))
    found = statuses(model)
    assert "Recurrent.forward (test_explain.py:" in found.pop("head.weight")
    assert set(found) == {f"lstm.weight_{kind}_l0" for kind in ("ih", "hh", "hr")}
    assert all(status.startswith("skipped: a weight of nn.LSTM") for status in found.values())


def test_the_last_frame_of_pytorch_is_named_where_no_other_was_skipped() -> None:
    torch._dynamo.reset()
    model = sparsify(nn.AdaptiveLogSoftmaxWithLoss(32, 64, [16, 32]), static(), block=4)
    loss = torch.compile(lambda x, y: model(x, y).loss, backend="mst", options=DEBUG)
    loss(torch.randn(8, 32), torch.arange(8) * 8)
    found = statuses(model)["head.weight"]
    assert found.startswith("matched") or "AdaptiveLogSoftmaxWithLoss.forward (adaptive.py:" in found


class Own(nn.Module):
    """A linear layer, and Parameters that it holds itself: of products, and of others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.words = nn.Linear(32, 32), nn.Embedding(16, 32)
        self.router, self.left = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.randn(4, 32))
        self.heads, self.scale = nn.Parameter(torch.randn(32, 4, 2, 4)), nn.Parameter(torch.ones(6, 32))
        self.unused = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x) * self.scale
        by_head = torch.einsum("td,dgij->tgij", x, self.heads).sum()
        return x @ self.words.weight.T.to(x.dtype) + by_head + F.linear(x, self.router).sum() + (self.left @ x.T).sum()


def test_parameters_that_products_take_are_told_though_no_layer_holds_them() -> None:
    torch._dynamo.reset()
    model = sparsify(Own(), static(), block=4)
    assert set(statuses(model)) == {"layer.weight"}
    torch.compile(model, backend="mst", options=DEBUG)(torch.randn(6, 32))
    found = statuses(model)
    assert found.pop("layer.weight").startswith("matched")
    assert found.pop("heads") == "skipped: no matrix and no stack of matrices, by its shape (32, 4, 2, 4)"
    assert set(found) == {"words.weight", "router", "left"}
    matrix = "skipped: a matrix that no linear layer holds: include it to make it sparse"
    assert set(found.values()) == {matrix}
    rows = {row.name: row for row in explain(model)}
    assert (rows["router"].shape, rows["router"].flops) == ((8, 32), 6 * 8 * 32)
    assert (rows["heads"].shape, rows["heads"].flops) == ((32, 4, 2, 4), 0)


def test_a_weight_that_is_read_by_rows_is_no_stack() -> None:
    torch._dynamo.reset()
    layer = sparsify(nn.Linear(32, 32), static(), block=4)
    torch.compile(lambda x: F.conv1d(x, layer.weight[:, :, None]), backend="mst", options=DEBUG)(torch.randn(2, 32, 5))
    assert statuses(layer)["weight"] == "not matched: used by getitem"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["h.0.a", "h.1.a", "h.3.a"], "h.0-1,3.a"),
        (["a.weight", "b.weight"], "a.weight, b.weight"),
        (["h.2.x.1.w", "h.10.x.1.w", "h.2.x.3.w"], "h.2,10.x.1.w, h.2.x.3.w"),
    ],
)
def test_names_that_differ_in_a_number_are_one(names: list[str], text: str) -> None:
    assert ", ".join(short_names(names)) == text
