"""Models whose layers keep their active blocks alone: what is packed, what it computes, and how it is kept."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from generation import generation
from helpers import static
from oracles import assert_as_good_as
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import mst_compile
from mst_compile import Override, export
from mst_compile.errors import (
    ArgumentError,
    CheckpointError,
    GradientError,
    ModelError,
    MSTWarning,
    NotSparseError,
    WeightError,
)

IDS = torch.arange(40).view(2, 20)


class Net(nn.Module):
    """Both ways to store a weight, a tied head, two layers that share one, and sizes that blocks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 100), Conv1D(32, 100), nn.Linear(32, 56, bias=False)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.embed = nn.Embedding(56, 32)
        self.head.weight = self.embed.weight
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.drop(self.two(torch.relu(self.one(x))))
        return self.head(x + self.down(torch.relu(self.up(x))))


def sparse(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    options = {"block": 8, "guard": "none", "overrides": {"up.*": Override(0.5, 4)}} | options
    return mst_compile.sparsify(Net().eval(), static(0.7), seed=seed, **options)


@pytest.fixture
def model() -> nn.Module:
    return sparse()


@torch.no_grad()
def assert_computes(packed: nn.Module, model: nn.Module, *inputs: Any) -> None:
    """What the model computes in eager mode, as precisely."""
    exact = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    want = model(*inputs)
    assert_as_good_as(packed(*inputs), want, exact, want.dtype)


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_packed_model_computes_the_same(block: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 130), nn.ReLU(), Conv1D(170, 130), nn.ReLU(), nn.Linear(170, 140)).to(dtype)
    mst_compile.sparsify(model, static(0.5), block=block, guard="none")
    packed = export.packed(model)
    for lead in ((3,), (2, 30), ()):
        if lead or dtype != torch.bfloat16:
            x = torch.randn(*lead, 150).to(dtype)
            assert_computes(packed, model, x if lead else x[None])
    assert packed(torch.randn(0, 150).to(dtype)).shape == (0, 140)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "mst"])
def test_it_runs_under_any_backend_in_one_graph(model: nn.Module, backend: str) -> None:
    packed = export.packed(model)
    compiled = torch.compile(packed, backend=backend, fullgraph=True)
    assert_computes(compiled, model, IDS)
    assert_computes(compiled, model, IDS[:, :7])
    with torch.enable_grad():
        assert compiled(IDS).requires_grad is False


def test_masks_full_and_empty() -> None:
    model = sparse()
    own = mst_compile.sparsifier(model)
    own.apply_mask("up.weight", torch.ones_like(own.masks["up.weight"]))
    own.apply_mask("down.weight", torch.zeros_like(own.masks["down.weight"]))
    packed: Any = export.packed(model)
    assert packed.up.weight.density == 1
    assert packed.down.weight.values.numel() == 0
    assert_computes(packed, model, IDS)


def test_autocast(model: nn.Module) -> None:
    """Weights are cast at every call, as those of the model are."""
    packed = export.packed(model)
    exact = copy.deepcopy(model).double()(IDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        usual = model(IDS)
        for run in (packed, torch.compile(packed, backend="aot_eager", fullgraph=True)):
            assert_as_good_as(run(IDS), usual, exact, torch.bfloat16)


def test_the_functional_form_takes_a_packed_weight(model: nn.Module) -> None:
    packed: Any = export.packed(model)
    x = torch.randn(5, 32)
    assert torch.equal(nn.functional.linear(x, packed.up.weight, packed.up.bias), packed.up(x))
    assert torch.equal(nn.functional.linear(x, bias=packed.up.bias, weight=packed.up.weight), packed.up(x))
    with pytest.raises(ArgumentError, match=r"mm takes no packed weight.*to_dense"):
        torch.mm(x, packed.up.weight)


def test_flops_are_those_of_the_active_blocks(model: nn.Module) -> None:
    packed = export.packed(model)
    weights = mst_compile.sparsifier(model).weights
    uses = {"one.weight": 2}
    with FlopCounterMode(display=False) as counter:
        packed(IDS)
    assert counter.get_total_flops() == sum(2 * 40 * w.active * uses.get(n, 1) for n, w in weights.items())


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_text_is_generated_as_by_the_model(cache: str) -> None:
    written = generation(cache)
    packed: Any = export.packed(written.model)
    for compiled in (False, True):
        if compiled:
            packed.compile(backend="aot_eager")
        written.check(packed.generate(written.ids, **written.options))


# -- what is packed ----------------------------------------------------------------------------------------------------


def test_the_model_stays_and_memory_falls(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    packed: Any = export.packed(torch.compile(model, backend="mst"))
    assert model.training
    assert not any(module.training for module in packed.modules())
    assert not any(p.requires_grad for p in packed.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mst_compile.sparsifier(model)
    with pytest.raises(NotSparseError):
        mst_compile.sparsifier(packed)
    weights = mst_compile.sparsifier(model).weights
    for name in ("up", "down", "one"):
        held, weight = getattr(packed, name).weight, weights[f"{name}.weight"]
        blocks = int(weight.mask.sum())
        assert held.values.nbytes == blocks * weight.grid.block**2 * 4
        assert held.index.nbytes == (blocks + held.grid.block_rows + 1) * 4
        assert torch.equal(held.to_dense(), model.get_parameter(f"{name}.weight"))
    names = {name for name, _ in packed.named_parameters()}
    assert names == {"up.bias", "down.bias", "one.bias", "two.bias", "embed.weight"}


def test_shared_weights_are_shared(model: nn.Module) -> None:
    """By layers as they were; an embedding keeps the whole weight, beside the head's blocks."""
    packed: Any = export.packed(model)
    assert packed.one.weight is packed.two.weight
    assert torch.equal(packed.head.weight.to_dense(), packed.embed.weight)
    moved: Any = copy.deepcopy(packed).to(torch.bfloat16)
    assert moved.one.weight.values is moved.two.weight.values
    assert moved.one.weight.dtype == torch.bfloat16
    twice = nn.ModuleList([nn.Linear(16, 16)] * 2)
    mst_compile.sparsify(twice, static(0.5), block=8)
    again: Any = export.packed(twice)
    assert isinstance(again[0], export.PackedLinear)
    assert again[0] is again[1]


def test_a_layer_alone() -> None:
    layer = mst_compile.sparsify(nn.Linear(32, 24), static(0.5), block=8, guard="none")
    packed = export.packed(layer)
    assert isinstance(packed, export.PackedLinear)
    assert "in_features=32, out_features=24, bias=True" in repr(packed)
    assert "24x32, block=8, density=0.5" in repr(packed)
    assert_computes(packed, layer, torch.randn(3, 32))


def test_what_stays_is_named() -> None:
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.ModuleDict({"own": Own(16, 16), "hooked": nn.Linear(16, 16), "plain": nn.Linear(16, 16)})
    mst_compile.sparsify(model, static(0.5), block=8)
    model["hooked"].register_forward_hook(lambda *_: None)
    with pytest.warns(
        MSTWarning, match=r"not packed.*own\.weight: Own is .*hooked\.weight: its layer has hooks"
    ) as told:
        packed = export.packed(model)
    assert len(told) == 1
    assert "plain" not in str(told[0].message)
    kinds = [type(packed[name]) for name in ("own", "hooked", "plain")]  # type: ignore[index]
    assert kinds == [Own, nn.Linear, export.PackedLinear]
    with pytest.raises(WeightError, match=r"no sparse weight .* can be packed.*Own"):
        export.packed(mst_compile.sparsify(Own(16, 16), static(0.5), block=8))


def test_layers_that_others_read() -> None:
    """PyTorch's own encoder layer hands its layers' weights to a fused function where it can."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    mst_compile.sparsify(layer, static(0.5), block=8)
    with pytest.warns(MSTWarning, match=r"self_attn\.out_proj\.weight: NonDynamicallyQuantizableLinear"):
        packed: Any = export.packed(layer)
    assert isinstance(packed.linear1, export.PackedLinear)
    assert_computes(packed, layer, torch.randn(2, 5, 32))


def test_mistakes(model: nn.Module) -> None:
    with pytest.raises(NotSparseError):
        export.packed(nn.Linear(8, 8))
    with pytest.raises(ModelError):
        export.packed("model")  # type: ignore[arg-type]
    packed: Any = export.packed(model)
    for run in (packed.up, torch.compile(packed.up, backend="aot_eager")):
        with pytest.raises(GradientError, match=r"torch\.no_grad"):
            run(torch.randn(3, 32, requires_grad=True))
        with pytest.raises(ArgumentError, match=r"\(3, 33\) and the layer takes 32"):
            run(torch.randn(3, 33))
        with pytest.raises(ArgumentError, match=r"bfloat16 and the packed weight torch\.float32"):
            run(torch.randn(3, 32).bfloat16())
    with torch.no_grad():
        packed.up(torch.randn(3, 32, requires_grad=True))
    packed.up.bias.requires_grad_(True)
    with pytest.raises(GradientError):
        packed.up(torch.randn(3, 32))
    with torch.no_grad():
        model.get_parameter("up.weight").data.fill_(1)
    with pytest.raises(WeightError, match=r"up\.weight holds values outside"):
        export.packed(model)


# -- how it is kept ----------------------------------------------------------------------------------------------------


def test_copies_pickles_and_casts(model: nn.Module) -> None:
    packed = export.packed(model)
    want = packed(IDS)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(IDS), want)
        assert other.one.weight is other.two.weight
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        cast, dense = copy.deepcopy(packed).to(dtype), export.plain(model).to(dtype)
        assert_computes(cast, dense, IDS)
    assert copy.deepcopy(packed).to("meta")(IDS.to("meta")).shape == want.shape


def test_a_pickle_of_another_layout_is_refused(model: nn.Module) -> None:
    packed: Any = export.packed(model)
    packed.up.weight.version = 0
    with pytest.raises(CheckpointError, match="of version 0 and this mst_compile packs version 1"):
        copy.deepcopy(packed)


def test_state_dicts(model: nn.Module) -> None:
    packed, other = export.packed(model), export.packed(sparse(seed=1))
    state = packed.state_dict()
    assert {"up.weight.values", "up.weight.index", "up.bias", "embed.weight"} <= state.keys()
    assert state["up.weight.index"].tolist() != other.state_dict()["up.weight.index"].tolist()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(IDS), packed(IDS)), "masks are loaded too"
    half = export.packed(sparse(seed=1)).to(torch.bfloat16)
    half.load_state_dict(state)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert torch.equal(half(IDS), copy.deepcopy(packed).to(torch.bfloat16)(IDS))


def test_state_dicts_that_do_not_fit(model: nn.Module) -> None:
    packed: Any = export.packed(model)
    state, want = packed.state_dict(), packed(IDS)
    with pytest.raises(CheckpointError, match=r"up\.weight is a whole weight"):
        packed.load_state_dict(model.state_dict())
    broken = state | {"up.weight.index": state["up.weight.index"] + 1}
    with pytest.raises(CheckpointError, match=r"up\.weight\.values and up\.weight\.index are no packed weight"):
        packed.load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"Missing key.*up\.weight\.index"):
        packed.load_state_dict({k: v for k, v in state.items() if k != "up.weight.index"})
    packed.load_state_dict({k: v for k, v in state.items() if not k.startswith("up.weight")}, strict=False)
    assert torch.equal(packed(IDS), want)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        export.plain(model).load_state_dict(state)
