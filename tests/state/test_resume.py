"""A run that was interrupted and resumed is bitwise the run that was not, whatever carried the topology."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Blocks
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dsd
from training import OPTIMIZERS, STEPS, batches, fresh, loss_of, runner

from mst_compile import Constant, MixedSparsity, param_groups, sparsifier, sparsify
from mst_compile.errors import CheckpointError, MSTWarning
from mst_compile.rules.schedule import Schedule

SCHEDULES: dict[str, Schedule] = {
    "mixed": MixedSparsity.published(
        STEPS, sparsity=0.8, warmup=8, restoration=8, settle=4, interval=3, ramp_interval=2
    ),
    "scores of three steps": Constant(0.7, interval=5, gradient_steps=3),
    "an event a step": Constant(0.7, interval=1),
}
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    **{name: OPTIMIZERS[name] for name in ("adamw", "adamw foreach", "adamw fused", "adamw amsgrad", "sgd")},
    "plain sgd": lambda p: torch.optim.SGD(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
}
Run = tuple[nn.Module, torch.optim.Optimizer]


def train(run: Run, data: list[Tensor], mode: str = "none", after: Callable[[], None] = lambda: None) -> list[float]:
    model, optimizer = run
    function, losses = runner(model, mode), []
    for x in data:
        optimizer.zero_grad()
        loss = loss_of(function, x)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after()
    return losses


def start(schedule: Schedule, maker: str, dtype: torch.dtype = torch.float32, seed: int = 7) -> Run:
    torch.manual_seed(0)
    model = sparsify(Blocks().to(dtype), schedule, seed=seed)
    return model, MAKERS[maker](model.parameters())


def save(run: Run, *, whole: bool) -> bytes:
    model, optimizer = run
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if whole:
        state["mst"] = sparsifier(model).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def load(run: Run, saved: bytes, order: tuple[str, ...] = ("model", "optimizer", "mst")) -> None:
    model, optimizer = run
    state = torch.load(io.BytesIO(saved), weights_only=True)
    owners = {"model": model, "optimizer": optimizer, "mst": sparsifier(model)}
    for part in order:
        if part in state:
            owners[part].load_state_dict(state[part])


def assert_same(a: Run, b: Run) -> None:
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert a[1].state[p].keys() == b[1].state[q].keys()
        for key, value in a[1].state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[1].state[q][key])), key
    assert sparsifier(a[0]).step_count == sparsifier(b[0]).step_count
    for name, mask in sparsifier(a[0]).masks.items():
        assert torch.equal(mask, sparsifier(b[0]).masks[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.filterwarnings("ignore:Adafactor keeps state:mst_compile.MSTWarning")
def test_model_and_optimizer_alone_resume_at_every_step(maker: str, name: str, dtype: torch.dtype) -> None:
    """Before, at and after topology events, across all phases; nothing but the two state dicts everybody saves."""
    data = [x.to(dtype) for x in batches()]
    saved: list[bytes] = []
    whole = start(SCHEDULES[name], maker, dtype)
    losses = train(whole, data, after=lambda: saved.append(save(whole, whole=False)))
    for step in range(1, STEPS, 1 if maker == "adamw" else 7):
        again = start(SCHEDULES[name], maker, dtype, seed=step)  # the checkpoint's seed counts
        load(again, saved[step - 1])
        assert sparsifier(again[0]).step_count == step
        assert train(again, data[step:]) == losses[step:]
        assert_same(whole, again)


@pytest.mark.parametrize(
    "order", [("optimizer", "model"), ("mst", "model", "optimizer"), ("model", "mst", "optimizer")]
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_order_of_loading_does_not_matter(name: str, order: tuple[str, ...]) -> None:
    data = list(batches())
    run = start(SCHEDULES[name], "adamw")
    train(run, data[:13])
    saved = save(run, whole="mst" in order)
    losses = train(run, data[13:])
    again = start(SCHEDULES[name], "adamw", seed=3)
    load(again, saved, order)
    assert train(again, data[13:]) == losses
    assert_same(run, again)


@pytest.mark.parametrize("at", [7, 8, 9, 20])
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compiled_runs_resume(mode: str, at: int) -> None:
    data = list(batches())
    run = start(SCHEDULES["mixed"], "adamw")
    train(run, data[:at], mode)
    saved = save(run, whole=False)
    losses = train(run, data[at:], mode)
    torch._dynamo.reset()
    again = start(SCHEDULES["mixed"], "adamw")
    load(again, saved)
    assert train(again, data[at:], mode) == losses
    assert_same(run, again)


@pytest.mark.parametrize("with_sparsifier", [False, True])
@pytest.mark.parametrize("maker", ["adamw", "plain sgd"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_distributed_checkpoint(name: str, maker: str, with_sparsifier: bool, tmp_path: Path) -> None:
    """``torch.distributed.checkpoint`` makes an optimizer's state by stepping once with nothing: that is no step."""
    data = list(batches())
    run = start(SCHEDULES[name], maker)
    train(run, data[:13])

    def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        optimizer.zero_grad()
        model_state, optimizer_state = dsd.get_state_dict(model, optimizer)
        extra = {"mst": sparsifier(model)} if with_sparsifier else {}
        return {"model": model_state, "optimizer": optimizer_state, **extra}

    dcp.save(parts(*run), checkpoint_id=tmp_path, no_dist=True)
    losses = train(run, data[13:])
    again = start(SCHEDULES[name], maker, seed=3)
    template = parts(*again)
    assert sparsifier(again[0]).step_count == 0
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    dsd.set_state_dict(*again, model_state_dict=template["model"], optim_state_dict=template["optimizer"])
    assert sparsifier(again[0]).step_count == 13
    assert train(again, data[13:]) == losses
    assert_same(run, again)


def test_a_flattened_optimizer_state_loses_the_topology_and_says_so() -> None:
    """``flatten_optimizer_state_dict`` keeps what the optimizer itself knows; the sparsifier's own state helps."""
    options = dsd.StateDictOptions(flatten_optimizer_state_dict=True)
    data = list(batches())
    run = start(SCHEDULES["mixed"], "adamw")
    train(run, data[:13])
    model_state, optimizer_state = dsd.get_state_dict(*run, options=options)
    saved = {k: v.clone() if isinstance(v, Tensor) else v for k, v in (model_state | optimizer_state).items()}
    own = sparsifier(run[0]).state_dict()
    losses = train(run, data[13:])
    again = start(SCHEDULES["mixed"], "adamw", seed=3)
    with pytest.warns(MSTWarning, match="has no topology of"):
        dsd.set_state_dict(
            *again,
            model_state_dict={k: saved[k] for k in model_state},
            optim_state_dict={k: saved[k] for k in optimizer_state},
            options=options,
        )
    sparsifier(again[0]).load_state_dict(own)
    assert train(again, data[13:]) == losses
    assert_same(run, again)


def test_state_is_left_as_the_optimizer_made_it() -> None:
    """What rides in the state dict is never in the optimizer's own state, so no optimizer can trip over it."""
    run = start(SCHEDULES["mixed"], "adamw")
    train(run, list(batches())[:9])
    saved = save(run, whole=False)
    again = start(SCHEDULES["mixed"], "adamw")
    load(again, saved)
    for _, optimizer in (run, again):
        assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    plain = Blocks()
    optimizer = MAKERS["adamw"](plain.parameters())
    optimizer.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True)["optimizer"])
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_a_checkpoint_of_another_block_is_refused() -> None:
    run = start(SCHEDULES["mixed"], "adamw")
    train(run, list(batches())[:9])
    state = run[1].state_dict()
    model = sparsify(Blocks(), SCHEDULES["mixed"], block=1)
    optimizer = MAKERS["adamw"](model.parameters())
    masks = sparsifier(model).masks
    with pytest.raises(CheckpointError, match="block 1"):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    assert sparsifier(model).step_count == 0
    assert all(torch.equal(mask, masks[n]) for n, mask in sparsifier(model).masks.items())


def test_an_optimizer_state_without_topology_is_told() -> None:
    plain = Blocks()
    optimizer = MAKERS["adamw"](plain.parameters())
    loss_of(plain, next(batches())).backward()
    optimizer.step()
    model = fresh()
    with pytest.warns(MSTWarning, match="no topology of layers.0.1.weight"):
        MAKERS["adamw"](model.parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("way", ["to one group", "from one group", "from a dense run", "to a dense run"])
def test_a_checkpoint_of_other_parameter_groups_is_refused(way: str) -> None:
    """State goes to Parameters by their places; PyTorch says that groups differ, and not why."""

    def made(sparse: bool, grouped: bool) -> Run:
        torch.manual_seed(0)
        model = sparsify(Blocks(), SCHEDULES["mixed"], block=4) if sparse else Blocks()
        return model, torch.optim.AdamW(param_groups(model, weight_decay=0.1) if grouped else model.parameters(), 1e-2)

    saved, loaded = {
        "to one group": (made(True, True), made(True, False)),
        "from one group": (made(True, False), made(True, True)),
        "from a dense run": (made(False, False), made(True, True)),
        "to a dense run": (made(True, True), made(False, False)),
    }[way]
    train(saved, list(batches(3)))
    train(loaded, list(batches(1)))
    before = {k: v.clone() for k, v in loaded[0].state_dict().items()}
    with pytest.raises(CheckpointError, match=r"groups hold \[.*here they hold \[.*groups of their own"):
        loaded[1].load_state_dict(saved[1].state_dict())
    assert all(torch.equal(v, before[k]) for k, v in loaded[0].state_dict().items())
    if way != "to a dense run":
        assert sparsifier(loaded[0]).step_count == 1
    train(loaded, list(batches(1)))


def test_plain_optimizers_say_what_they_always_said() -> None:
    one = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]}], 0.1)
    two = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)], 0.1)
    with pytest.raises(ValueError, match="different number of parameter groups") as told:
        one.load_state_dict(two.state_dict())
    assert not isinstance(told.value, CheckpointError)


def test_scores_of_one_block_are_saved_in_both_states() -> None:
    """One file holds the optimizer's state and the sparsifier's: neither may be a view of the other's memory."""
    model = sparsify(nn.Linear(8, 8), Constant(0.5, interval=4, gradient_steps=2), block=8, guard="none")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
    scores, buffer = sparsifier(model).weights["weight"].scores, io.BytesIO()
    assert scores is not None
    torch.save([optimizer.state_dict(), sparsifier(model).state_dict()], buffer)
    buffer.seek(0)
    optimizer.load_state_dict(torch.load(buffer)[0])
    assert torch.equal(sparsifier(model).weights["weight"].scores, scores)
