"""``mst_compile.integrations.transformers`` in Hugging Face's Trainer: it sparsifies, compiles, logs and checks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import assert_reordered
from torch import Tensor
from trainer_cases import (
    ACCUMULATED,
    EAGER,
    MIXED,
    STEPS,
    Reports,
    Sentences,
    arguments,
    history,
    tiny,
    train,
)
from training import assert_zero_outside
from transformers import (
    Trainer,
    TrainerCallback,
)

from mst_compile import Constant, MixedSparsity, explain, sparsifier, sparsify
from mst_compile.errors import (
    AlreadySparseError,
    ArgumentError,
    ModelError,
    MSTError,
    MSTWarning,
    NotSparseError,
    ScheduleError,
)
from mst_compile.flops import Meter, dense_linear_training
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:no graph compiled:mst_compile.errors.MSTWarning")


# -- a run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Reports, list[Any], Path]:
    """A whole run with accumulated gradients, clipped, and a checkpoint of every step."""
    folder, events, reports = tmp_path_factory.mktemp("run"), [], Reports()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MSTWarning)
        callback = MSTCallback(MIXED, compile=EAGER, block=4)
        model = tiny()
        made = MSTTrainer(
            model, arguments(folder, **ACCUMULATED), train_dataset=Sentences(), callbacks=[reports, callback]
        )
        assert sparsifier(model).schedule == MIXED
        sparsifier(model).on_event(events.append)
        made.train()
    return made, reports, events, folder


def test_the_callback_sparsifies_compiles_and_ends_dense(run: Any) -> None:
    trainer, *_ = run
    own = sparsifier(trainer.model)
    assert (own.step_count, own.density) == (STEPS, 1.0)
    assert {w.grid.block for w in own.weights.values()} == {4}
    assert all(row.status.startswith("matched (1 use)") for row in explain(trainer.model))
    assert trainer.model._compiled_call_impl is not None
    assert history(trainer, "loss")[STEPS] < history(trainer, "loss")[1]
    assert max(history(trainer, "grad_norm").values()) > 0.1  # there was something to clip


def test_logs(run: Any) -> None:
    trainer, reports, events, _ = run
    sparsity = history(trainer, "mst/sparsity")
    assert sparsity == {step: MIXED.sparsity_at(step) for step in range(1, STEPS + 1)}
    density = history(trainer, "mst/density")
    assert density == {step: [e.density for e in events if e.step <= step][-1] for step in density}
    for key, count in {
        "events": lambda e: not e.skipped,
        "dropped": lambda e: e.dropped,
        "grown": lambda e: e.grown,
    }.items():
        told = history(trainer, f"mst/{key}")
        assert told == {step: sum(count(e) for e in events if e.step <= step) for step in told}
        assert told[STEPS] > 0
    assert list(dict.fromkeys(history(trainer, "mst/phase").values())) == [
        "warm-up", "plateau", "restoration", "settle",
    ]  # fmt: skip
    saved = history(trainer, "mst/flops_saved")
    assert saved[1] == 0.0 < saved[2] < saved[8] < 1 - min(density.values())
    # The reporter stood first, and saw numbers alone.
    numbers = [line for line in reports.seen if "loss" in line]
    assert [line["mst/density"] for line in numbers] == list(density.values())
    assert all(isinstance(v, int | float) for line in numbers for v in line.values())


def test_saved_flops_are_those_of_the_meter(tmp_path: Path) -> None:
    model, flops = sparsify(tiny(), Constant(0.6, interval=2, growth="gradient"), block=4), []
    meter = Meter(model, 1)

    class Count(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            meter.step()
            flops.append(meter.flops)

    with pytest.warns(MSTWarning, match="still sparse"):
        trainer = train(tmp_path, MSTCallback(compile=False), Count(), model=model)
    dense = dense_linear_training(tiny())
    saved = history(trainer, "mst/flops_saved")
    assert saved == {i + 1: pytest.approx(1 - done / (dense * (i + 1))) for i, done in enumerate(flops)}


def test_without_the_mixin_the_history_has_it_and_the_rates_are_warned_of(tmp_path: Path) -> None:
    reports = Reports()
    with pytest.warns(MSTWarning, match="learning rate of the dense model.*MSTTrainer") as told:
        trainer = train(tmp_path, reports, MSTCallback(MIXED, compile=False, block=4), cls=Trainer)
    assert len([w for w in told if "MSTTrainer" in str(w.message)]) == 1
    assert history(trainer, "mst/sparsity")[5] == MIXED.sparsity_at(5)
    assert not any("mst/density" in line for line in reports.seen)


@pytest.mark.parametrize(("step", "restore"), [(2, False), (5, True), (8, False)])
def test_resumes(step: int, restore: bool, run: Any, tmp_path: Path) -> None:
    """In the same bits: weights, masks, rates, and what is logged."""
    whole, _, _, folder = run
    again = train(
        tmp_path, MSTCallback(MIXED, compile=EAGER, block=4), resume=str(folder / f"checkpoint-{step}"),
        restore_callback_states_from_checkpoint=restore, **ACCUMULATED | {"save_strategy": "no"},
    )  # fmt: skip
    for (name, p), q in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
    assert_zero_outside(again.model, again.optimizer.optimizer, gradients=False)
    for key in ("loss", "learning_rate", "mst/density", "mst/flops_saved", "mst/dropped", "mst/grown", "mst/events"):
        assert history(again, key) == history(whole, key), key


# -- evaluation and generation within training -------------------------------------------------------------------------


class Generates(TrainerCallback):
    """Generates every few steps, and notes what the model in eager mode would have said and lost then."""

    def __init__(self) -> None:
        self.said: list[tuple[Tensor, Tensor]] = []
        self.lost: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % 3 == 0:
            model.eval()
            with eager(model), torch.no_grad():
                rows = [Sentences()[i] for i in range(32)]
                ids = torch.stack([row["input_ids"] for row in rows])
                self.lost.append(float(model(ids, labels=ids).loss))
                expected = model.generate(ids[:2, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
            self.said.append((model.generate(ids[:2, :3], max_new_tokens=4, do_sample=False, pad_token_id=0), expected))


@contextlib.contextmanager
def eager(model: Any) -> Any:
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled


def graphs() -> int:
    found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return found


def test_evaluation_and_generation_are_never_stale_and_recompile_as_inductor_does(tmp_path: Path) -> None:
    usual = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 8}
    plain = tiny()
    plain.compile(backend="eager")
    train(tmp_path, Generates(), model=plain, cls=Trainer, **usual)
    expected = graphs()
    watch = Generates()
    trainer = train(tmp_path, MSTCallback(MIXED, compile=EAGER, block=4), watch, **usual)
    assert graphs() == expected > 2
    assert len(watch.said) == STEPS // 3
    assert all(torch.equal(compiled, eager) for compiled, eager in watch.said)
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len({round(loss, 6) for loss in losses}) == len(losses)  # weights were others each time
    assert_reordered(torch.tensor(losses), torch.tensor(watch.lost), terms=32 * 7)


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_the_end_of_a_sparse_run_is_told(tmp_path: Path) -> None:
    with pytest.warns(MSTWarning, match=r"ended at step 2 and the model is still sparse: density 0\.4"):
        train(tmp_path, MSTCallback(Constant(0.6), compile=EAGER, block=4), max_steps=2)


@pytest.mark.parametrize("best", [6, 12])
def test_the_best_model_may_be_a_sparse_one(best: int, tmp_path: Path) -> None:
    """Metrics that say so choose the checkpoint that is loaded at the end."""

    class Chosen(MSTTrainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            return {"eval_loss": float(abs(self.state.global_step - best))}

    more = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", MSTWarning)
        callback = MSTCallback(MIXED, compile=False, block=4)
        trainer = train(tmp_path, callback, cls=Chosen, load_best_model_at_end=True, **more)
    said = [str(w.message) for w in told if "sparse" in str(w.message) and "no graph" not in str(w.message)]
    zeros = bool((trainer.model.up.weight == 0).any())
    assert zeros == (best == 6) == any(f"weights of step {best}, when the model was still sparse" in s for s in said)
    assert len(said) == int(zeros)


def test_the_trainer_alone_cannot_do_with_a_compiled_wrapper(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The batch received was empty"):
        train(tmp_path, model=torch.compile(tiny(), backend="eager"), cls=Trainer)


def refusals() -> dict[str, tuple[type[MSTError], str, Callable[[Path], Any]]]:
    def longer(folder: Path) -> Any:
        return train(folder, MSTCallback(MixedSparsity(STEPS + 4), block=4))

    def shorter(folder: Path) -> Any:
        return train(folder, MSTCallback(MixedSparsity(STEPS // 2), block=4))

    def cut(folder: Path) -> Any:
        return train(folder, MSTCallback(MixedSparsity(2 * STEPS, settle=0.5), block=4), max_steps=int(1.5 * STEPS))

    def epochs(folder: Path) -> Any:
        """32 rows in batches of 4 twice: 16 steps, which nobody knows until training begins."""
        return train(folder, MSTCallback(MIXED, block=4), max_steps=-1, num_train_epochs=2)

    def users_own(folder: Path) -> Any:
        return train(folder, MSTCallback(), model=sparsify(tiny(), MixedSparsity(100), block=4))

    def compiled(folder: Path) -> Any:
        return train(folder, MSTCallback(MIXED, block=4), model=torch.compile(tiny(), backend="eager"))

    def another_backend(folder: Path) -> Any:
        more = {"torch_compile": True, "torch_compile_backend": "eager"}
        return train(folder, MSTCallback(MIXED, block=4), **more)

    def dense(folder: Path) -> Any:
        return train(folder, MSTCallback())

    def late(folder: Path) -> Any:
        made = MSTTrainer(tiny(), arguments(folder), train_dataset=Sentences())
        made.add_callback(MSTCallback(MIXED, block=4))
        made.train()

    def initialised_anew(folder: Path) -> Any:
        given = {"model_init": tiny, "train_dataset": Sentences(), "callbacks": [MSTCallback(MIXED, block=4)]}
        MSTTrainer(args=arguments(folder), **given).train()

    def two_schedules(folder: Path) -> Any:
        return train(folder, MSTCallback(MIXED), model=sparsify(tiny(), Constant(0.5), block=4))

    def two_blocks(folder: Path) -> Any:
        return train(folder, MSTCallback(MIXED, block=8), model=sparsify(tiny(), MIXED, block=4))

    over = rf"takes {STEPS} optimizer steps, and the schedule has total_steps={STEPS + 4}: it would not be over"
    return {
        "longer": (ScheduleError, over, longer),
        "shorter": (ScheduleError, "over long before, and sparsity stay at 0", shorter),
        "cut": (ScheduleError, "its last steps would be missing", cut),
        "epochs": (ScheduleError, "takes 16 optimizer steps.*Give it total_steps=16", epochs),
        "user's own": (ScheduleError, "total_steps=100: it would not be over", users_own),
        "compiled": (ModelError, "what torch.compile returns.*pass the model itself", compiled),
        "another backend": (ArgumentError, "torch_compile_backend='eager'.*leave both out", another_backend),
        "dense": (NotSparseError, "no schedule to make it so", dense),
        "late": (NotSparseError, "pass the callback to the constructor", late),
        "initialised anew": (NotSparseError, "with model_init", initialised_anew),
        "two schedules": (AlreadySparseError, r"with Constant.*given MixedSparsity", two_schedules),
        "two blocks": (AlreadySparseError, "block=8", two_blocks),
        "no schedule": (ScheduleError, "is not a schedule", lambda _: MSTCallback(0.8)),
        "no compile": (ArgumentError, "compile must be", lambda _: MSTCallback(MIXED, compile="mst")),
        "a backend": (ArgumentError, 'backend is "mst"', lambda _: MSTCallback(MIXED, compile={"backend": "mst"})),
        "no argument": (ArgumentError, r"block.*got \['blocks'\]", lambda _: MSTCallback(MIXED, blocks=4)),
        "auto_step": (ArgumentError, r"got \['auto_step'\]", lambda _: MSTCallback(MIXED, auto_step=False)),
        "arguments alone": (ArgumentError, r"\['block'\] are arguments of sparsify", lambda _: MSTCallback(block=4)),
    }


@pytest.mark.parametrize("what", refusals())
def test_refuses(what: str, tmp_path: Path) -> None:
    error, match, act = refusals()[what]
    with pytest.raises(error, match=f"(?s){match}"):
        act(tmp_path)


def test_refusing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ScheduleError):
        train(tmp_path, MSTCallback(MixedSparsity(100), block=4), model=model)
    assert model._compiled_call_impl is None
    with pytest.raises(NotSparseError):
        sparsifier(model)


@pytest.mark.parametrize("steps", [11, 13])
def test_a_rounded_epoch_is_no_mistake(steps: int, tmp_path: Path) -> None:
    schedule = MixedSparsity(12, settle=2, restoration=2, interval=2)
    trainer = train(tmp_path, MSTCallback(schedule, compile=False, block=4), max_steps=steps)
    assert sparsifier(trainer.model).density == 1.0


def test_model_init_that_sparsifies(tmp_path: Path) -> None:
    given = {"train_dataset": Sentences(), "callbacks": [MSTCallback(compile=EAGER)]}
    made = MSTTrainer(args=arguments(tmp_path), model_init=lambda: sparsify(tiny(), MIXED, block=4), **given)
    made.train()
    assert sparsifier(made.model).step_count == STEPS
    assert made.model._compiled_call_impl is not None


def test_modules_sparsified_separately(tmp_path: Path) -> None:
    model = tiny()
    sparsify(model.up, MIXED, block=4)
    sparsify(model.down, Constant(0.5), block=4)
    with pytest.warns(MSTWarning, match="still sparse"):
        trainer = train(tmp_path, MSTCallback(compile=False), model=model)
    parts = [model.up, model.down]
    sizes = [sum(w.numel for w in sparsifier(part).weights.values()) for part in parts]
    mean = sum(sparsifier(p).density * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes)
    assert history(trainer, "mst/density")[STEPS] == pytest.approx(mean)
    assert history(trainer, "mst/phase")[5] == "plateau, training"
