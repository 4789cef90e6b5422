"""Frozen weights and adapters stay dense unless they are named; an adapter is trained on a sparse base and merged."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, static, unchanged
from mask_cases import element_masks
from torch import Tensor, nn
from training import batches, loss_of

from mst_compile import MSTWarning, densify, explain, sparsifier, sparsify
from mst_compile.errors import SelectionError

SPARSE = static(0.7)


class LoRA(nn.Module):
    """A linear layer with an adapter, its parts named as PEFT names them."""

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.base_layer, self.scaling = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scaling

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base, to which the adapter's product is added as PEFT adds it: through ``.data``."""
        self.base_layer.weight.data += self.lora_B["default"].weight @ self.lora_A["default"].weight * self.scaling
        return self.base_layer


def adapt(model: nn.Module) -> nn.Module:
    """Freeze a model of ``Blocks`` and put adapters on its linear layers."""
    model.requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.layers:
        layer[1], layer[3] = LoRA(layer[1]), LoRA(layer[3])
    return model


def merge(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        layer[1], layer[3] = layer[1].merged(), layer[3].merged()
    return model


def test_frozen_weights_stay_dense_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mst_compile")
    model = Blocks()
    model.layers[0].requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.layers[0].named_parameters()}
    sparsify(model, SPARSE)
    assert set(sparsifier(model).weights) == {"layers.1.1.weight", "layers.1.3.weight"}
    assert all(torch.equal(p, before[n]) for n, p in model.layers[0].named_parameters())
    rows = {row.name: row.status for row in explain(model)}
    said = [record.getMessage() for record in caplog.records]
    for name in ("layers.0.1.weight", "layers.0.3.weight"):
        assert rows[name] == "skipped: frozen (requires_grad is False): include it to make it sparse"
        assert f"{name} stays dense: {rows[name].removeprefix('skipped: ')}" in said


@pytest.mark.parametrize("frozen", [True, False])
def test_adapters_stay_dense(frozen: bool) -> None:
    model = adapt(Blocks()).requires_grad_(not frozen)
    for layer in model.layers:
        for i in (1, 3):
            layer[i].lora_A.requires_grad_(True)
            layer[i].lora_B.requires_grad_(True)
    if frozen:
        with unchanged(model), pytest.raises(SelectionError, match=r"include.*lora_A\.default\.weight': 'an adapter"):
            sparsify(model, SPARSE)
        return
    own = sparsifier(sparsify(model, SPARSE))
    assert list(own.weights) == [f"layers.{i}.{j}.base_layer.weight" for i in (0, 1) for j in (1, 3)]
    assert sum("adapter" in reason for reason in own.skipped.values()) == 8


def test_include_names_frozen_weights_and_adapters() -> None:
    model = adapt(Blocks())
    own = sparsifier(sparsify(model, SPARSE, include=["*.base_layer", "*.1.lora_A.*"]))
    assert len([n for n in own.weights if "base_layer" in n]) == 4
    assert len([n for n in own.weights if "lora_A" in n]) == 2
    assert all(weight.density < 1 for weight in own.weights.values())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
    for row in explain(model):
        frozen = row.name in own.weights and "base_layer" in row.name
        assert ("frozen: it keeps this mask" in row.status) is frozen


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_lora_on_a_sparse_base(mode: str, early: bool) -> None:
    """Adapters come after or before the base is made sparse; training leaves the base alone; what is merged and saved
    computes, as a plain model, what was trained."""
    model = Blocks()
    if early:
        sparsify(adapt(model), SPARSE, include="*.base_layer")
    else:
        adapt(sparsify(model, SPARSE))
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}
    masks = sparsifier(model).masks
    run: Any = compiled(model) if mode == "compiled" else model
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, 1e-2)
    losses = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the sparsity schedule does not advance", MSTWarning)  # as it should be
        for x in batches(40, 64):
            loss = loss_of(run, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert all(torch.equal(mask, masks[n]) for n, mask in sparsifier(model).masks.items())
    if mode == "compiled":
        assert {row.kernel for row in explain(model) if row.block} == {"block-sparse"}
    x = next(batches(1))
    with torch.no_grad():
        trained = run(x)
    outside = {n: ~mask for n, mask in element_masks(model).items()} if early else {}
    merge(densify(model))
    plain = Blocks()
    plain.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), trained)
        torch.testing.assert_close(run(x), trained)
    for name, where in outside.items():
        weight = dict(plain.named_parameters())[name.replace(".base_layer", "")]
        assert bool(weight[where].any()), "a merged weight is dense"


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=r".*layers\.\d\.[13]", init_lora_weights=False)
    model = peft.get_peft_model(Blocks(), config)
    with pytest.raises(SelectionError, match="an adapter"):
        sparsify(model, SPARSE)
    own = sparsifier(sparsify(model, SPARSE, include="*.base_layer"))
    assert len(own.weights) == 4
    x = next(batches(1))
    with torch.no_grad():
        before = model(x)
        merged = densify(model).merge_and_unload()
        torch.testing.assert_close(merged(x), before)
