"""Models that are changed after sparsify: what goes on, what is refused, and what is said."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from helpers import Blocks, compiled, static, statuses
from oracles import assert_reordered
from situations import X, same, start, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from training import assert_zero_outside

from mst_compile import Constant, MSTWarning, Override, densify, explain, sparsifier, sparsify
from mst_compile.errors import NotSparseError, WeightError
from mst_compile.state.binding import of


def test_a_weight_that_is_untied_later_is_told_of() -> None:
    """The module that gets a Parameter of its own trains dense; once is enough."""
    model = nn.Module()
    model.one, model.other = nn.Linear(32, 32), nn.Linear(32, 32)
    model.other.weight = model.one.weight
    sparsify(model, static())
    model.other.weight = nn.Parameter(model.one.weight.detach().clone())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step() -> None:
        model.other(model.one(torch.ones(4, 32))).sum().backward()
        optimizer.step()

    with pytest.warns(MSTWarning, match=r"Linear\.weight was one\.weight .* 2 modules shared.* trains dense"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        step()


def test_weights_that_are_tied_later_are_refused() -> None:
    model, run, _ = start()
    model.layers[1][1].weight = model.layers[0][1].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(WeightError, match=r"layers\.0\.1\.weight and layers\.1\.1\.weight .* tie weights before"):
        train(run, optimizer)


def _exchange(model: nn.Module, names: list[str]) -> None:
    """Each module gets the Parameter of the next one."""
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in names]
    weights = [module.weight for module in modules]
    for module, weight in zip(modules, weights[1:] + weights[:1], strict=True):
        module.weight = weight


@pytest.mark.parametrize("run", ["eager", "compiled"])
@pytest.mark.parametrize("count", [2, 3])
def test_parameters_that_modules_exchange_keep_their_masks(count: int, run: str) -> None:
    """As they keep the optimizer's state: nothing is cut, and the masks are those of other names from now on."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    schedule = Constant(0.7, interval=4, growth="gradient")
    model = sparsify(Blocks(depth=3), schedule, block=4, overrides={"layers.0.1.weight": Override(sparsity=0.5)})
    function = compiled(model) if run == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(function, optimizer, 2)
    names = [f"layers.{i}.1.weight" for i in range(count)]
    masks, own = sparsifier(model).masks, sparsifier(model)
    weights = {n: own.weights[n] for n in names}
    _exchange(model, names)
    values = {n: model.get_parameter(n).detach().clone() for n in names}
    with torch.no_grad():
        assert_reordered(function(X), model(X), 128)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        assert torch.equal(own.masks[name], masks[other])
        assert own.weights[name] is weights[other]
        assert own.weights[name].name == name
    assert own.weights[names[0]].density_target != own.weights[names[1]].density_target
    assert list(own.weights) == list(masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(function, optimizer)
        for name, value in values.items():
            assert torch.equal(model.get_parameter(name), value)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        train(function, optimizer, 6)  # through an event
    assert_zero_outside(model, optimizer)
    saved = own.state_dict()
    own.load_state_dict(saved)
    assert all(of(model.get_parameter(n)) is w for n, w in own.weights.items())
    with torch.no_grad():
        assert_reordered(function(X), model(X), 128)


def test_masks_stay_where_parameters_of_another_grid_come_in() -> None:
    """A Parameter in blocks of another size cannot bring its mask: its values are cut, and that is said."""
    torch.manual_seed(0)
    model = sparsify(Blocks(), static(), overrides={"layers.0.*": Override(block=4), "layers.1.*": Override(block=2)})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, 2)
    masks = sparsifier(model).masks
    _exchange(model, ["layers.0.1.weight", "layers.1.1.weight"])
    with pytest.warns(MSTWarning, match="are set to 0 now that an optimizer steps"):
        train(model, optimizer)
    assert all(torch.equal(mask, masks[n]) for n, mask in sparsifier(model).masks.items())


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "weight_orig"),
        (parametrizations.weight_norm, "original0 and parametrizations.weight.original1"),
        (nn.utils.spectral_norm, "weight_orig"),
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_weights_that_are_computed_later_are_refused(change: Any, names: str) -> None:
    model, run, _ = start()
    change(model.layers[0][1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(WeightError, match=rf"layers\.0\.1\.weight .* computes it of .*{names}"):
        train(run, optimizer)


def test_a_layer_in_place_of_a_sparse_one_joins_the_optimizer() -> None:
    model, run, optimizer = start()
    train(run, optimizer, 3)
    model.layers.append(nn.Sequential(nn.Linear(32, 32)))
    optimizer.add_param_group({"params": list(model.layers[2].parameters())})
    train(run, optimizer, 3)
    assert sparsifier(model).step_count == 6
    assert_zero_outside(model, optimizer, gradients=False)
    model.layers[0][1] = nn.Linear(32, 64)
    optimizer.add_param_group({"params": list(model.layers[0][1].parameters())})
    with pytest.raises(WeightError, match=r"layers\.0\.1\.weight is another Parameter"):
        train(run, optimizer)


def test_another_module_with_the_same_parameter_is_sparse() -> None:
    """As modules for quantization-aware training take the weight of the layer that they replace."""

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight.detach().abs().max() / 127
            rounded = (self.weight / scale).round() * scale
            return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)

    model, _, optimizer = start("gradient", interval=2)
    replaced = Rounded(32, 64)
    replaced.weight, replaced.bias = model.layers[0][1].weight, model.layers[0][1].bias
    model.layers[0][1] = replaced
    run = compiled(model)
    train(run, optimizer, 7)
    assert sparsifier(model).step_count == 7
    assert_zero_outside(model, optimizer, gradients=False)
    same(model, run)
    assert "replaced" not in statuses(model)["layers.0.1.weight"]
    assert next(row for row in explain(model) if row.name == "layers.0.1.weight").density < 0.5


def test_an_optimizer_that_has_lost_the_weights_is_told_of() -> None:
    model, run, optimizer = start()
    train(run, optimizer, 3)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.warns(MSTWarning, match=r"does not advance: AdamW .* as it is now \(load_state_dict\(assign=True\)"):
        train(run, optimizer, 15)


def test_gradients_that_are_left_over_are_no_training() -> None:
    model, run, optimizer = start()
    run(X).sum().backward()
    optimizer.step()
    del optimizer
    other = nn.Linear(4, 4)
    trains = torch.optim.SGD(other.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        for _ in range(30):
            other(torch.ones(4)).sum().backward()
            trains.step()
    assert all(p.grad is not None for p in model.parameters())


def test_lazy_modules_that_stay_dense() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(32, 64), nn.LazyLinear(32)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    with pytest.raises(WeightError, match=r"last\.weight is not initialised yet .* exclude"):
        sparsify(Lazy(), static())
    assert sparsifier(sparsify(Lazy(), static(), include="first.weight")).skipped == {"last.weight": "not in include"}
    model = sparsify(Lazy(), static(), exclude="last")
    assert sparsifier(model).skipped == {"last.weight": "in exclude"}
    assert "skipped" in statuses(model)["last.weight"]
    run = compiled(model)
    run(X)
    train(run, torch.optim.SGD(model.parameters(), 0.1), 3)
    assert sparsifier(model).step_count == 3
    same(model, run)


class Adapted(nn.Module):
    """A model around another, which it gives back, as merge_and_unload of PEFT does."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Blocks()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def test_a_part_that_outlives_its_model_is_told_of() -> None:
    model = sparsify(Adapted(), static())
    part = model.base
    for function in (explain, sparsifier):
        with pytest.raises(NotSparseError, match="pass that module, the one given to"):
            function(part)
    del model
    gc.collect()
    for function in (explain, sparsifier):
        with pytest.raises(NotSparseError, match=r"that one is gone, as after merge_and_unload .* call densify"):
            function(part)
    with pytest.warns(MSTWarning, match=r"is gone, as after merge_and_unload .* masks stay as they are"):
        part(X).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)  # once
        part(X).sum().backward()
    assert densify(part) is part
    assert all(of(p) is None for p in part.parameters())
    part.zero_grad()
    part(X).square().sum().backward()
    assert bool((part.layers[0][1].weight.grad != 0).all())
    with pytest.raises(NotSparseError):
        densify(part)
    assert sparsifier(sparsify(part, static(0.5))).density == pytest.approx(0.5, abs=0.05)
