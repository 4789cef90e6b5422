"""What ``MSTTrainer`` gives sparse weights in the Trainer's optimizers: groups of their own, with laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_same_bits
from torch import Tensor, nn
from trainer_cases import (
    MIXED,
    Tiny,
    arguments,
    tiny,
    train,
)
from transformers import Trainer

from mst_compile import param_groups, sparsifier, sparsify
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer, MSTTrainerMixin, split_groups

pytestmark = pytest.mark.filterwarnings("ignore:no graph compiled:mst_compile.errors.MSTWarning")


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_sparse_weights_have_groups_of_their_own(optim: str, tmp_path: Path) -> None:
    model = tiny()
    made = MSTTrainer(model, arguments(tmp_path, optim=optim), callbacks=[MSTCallback(MIXED, block=4)])
    made.create_optimizer()
    plain = Trainer(tiny(), arguments(tmp_path, optim=optim))
    plain.create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    assert _by_name(made) == _by_name(plain)  # each weight's decay, rate and all other options are the Trainer's
    groups = {tuple(names[id(p)] for p in g["params"]): g.get("density_rate") for g in made.optimizer.param_groups}
    own = {name for members, rate in groups.items() if rate == 1.0 for name in members}
    assert own == set(sparsifier(model).weights)
    asked = [{names[id(p)] for p in g["params"]} for g in param_groups(model) if "density_rate" in g]
    assert [set(members) for members, rate in groups.items() if rate] == asked


def _by_name(trainer: Trainer) -> dict[str, dict[str, Any]]:
    laws = ("params", "density_rate", "density_decay")
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    groups = [(g, {k: v for k, v in g.items() if k not in laws}) for g in trainer.optimizer.param_groups]
    return {names[id(p)]: options for group, options in groups for p in group["params"]}


def test_steps_as_a_loop_with_param_groups(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Notes(MSTTrainer):
        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
            seen.append(dict(inputs))
            return super().training_step(model, inputs, *rest)

    more = {"max_grad_norm": 0, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    trainer = train(tmp_path, MSTCallback(MIXED, compile=False, block=4), model=without_dropout(), cls=Notes, **more)
    model = sparsify(without_dropout(), MIXED, block=4)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), lr=1e-2)
    for inputs in seen:
        model(inputs["input_ids"], inputs["labels"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert_same_bits(p, q)


def without_dropout() -> Tiny:
    model = tiny()
    model.drop.p = 0.0
    return model


def test_laws_of_a_subclass(tmp_path: Path) -> None:
    class Mine(MSTTrainerMixin, Trainer):
        density_decay = 0.0

        def density_rate(density: float) -> float:  # type: ignore[misc, override]
            return 2.0

    made = Mine(tiny(), arguments(tmp_path), callbacks=[MSTCallback(MIXED, block=4)])
    laws = {
        (g["density_rate"](0.5), g["density_decay"])
        for g in made.create_optimizer().param_groups
        if "density_rate" in g
    }
    assert laws == {(2.0, 0.0)}


def test_groups_with_names_and_without_members() -> None:
    model = sparsify(tiny(), MIXED, block=4)
    own = {"up.weight", "down.weight", "head.weight"}
    optimizer = torch.optim.SGD([{"params": list(model.named_parameters())}, {"params": [], "param_names": []}], 0.1)
    split_groups(optimizer, param_groups(model))
    names = {id(p): n for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        assert ("density_rate" in group) == bool(own & set(group["param_names"]))
    assert sorted(n for g in optimizer.param_groups for n in g["param_names"]) == sorted(names.values())
    assert [len(g["params"]) for g in optimizer.param_groups][-1] == 0
    before = [dict(group) for group in optimizer.param_groups]
    split_groups(optimizer, param_groups(model))
    assert [g["param_names"] for g in optimizer.param_groups] == [g["param_names"] for g in before]


def test_an_optimizer_of_the_users_stays(tmp_path: Path) -> None:
    model = sparsify(tiny(), MIXED, block=4)
    own = torch.optim.SGD(param_groups(model, density_rate=0), lr=0.1)
    before = [dict(group) for group in own.param_groups]
    made = MSTTrainer(model, arguments(tmp_path), callbacks=[MSTCallback()], optimizers=(own, None))
    assert made.create_optimizer() is own
    assert [g.keys() for g in own.param_groups] == [g.keys() for g in before]
