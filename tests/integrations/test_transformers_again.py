"""``MSTCallback`` where training does not simply run from step 0 to its end: again, resumed from less than all,
stopped, with a callback or a model that has been used before."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_cases import MIXED, STEPS, Config, Sentences, Tiny, arguments, history, tiny, train
from transformers import Trainer, TrainerCallback

from mst_compile import Constant, MixedSparsity, densify, sparsifier, sparsify
from mst_compile.errors import AlreadySparseError, CheckpointError, MSTWarning, ScheduleError
from mst_compile.integrations.transformers import MSTCallback, MSTTrainer

pytestmark = pytest.mark.filterwarnings("ignore:no graph compiled:mst_compile.errors.MSTWarning")
COUNTED = ("mst/flops_saved", "mst/events", "mst/dropped", "mst/grown")
HALF = {"save_strategy": "steps", "save_steps": 6}


def callback(**more: Any) -> MSTCallback:
    return MSTCallback(MIXED, compile=False, block=4, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A run that nothing happens to, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, callback(), **HALF), folder / "checkpoint-6"


def assert_counts_of(trainer: Trainer, whole: Trainer) -> None:
    for key in COUNTED:
        assert history(trainer, key) == history(whole, key), key


# -- a schedule that is not where the Trainer is -----------------------------------------------------------------------


class RunsOut(Tiny):
    """Needs more memory than there is once, after it has trained for a while."""

    def __init__(self, config: Config, at: int) -> None:
        super().__init__(config)
        self.calls, self.at = 0, at

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("CUDA out of memory. Tried to allocate more")
        return super().forward(input_ids, labels, return_dict)


def again(folder: Path) -> None:
    trainer = train(folder, callback())
    trainer.train()


def another_trainer(folder: Path) -> None:
    model = train(folder, callback()).model
    train(folder, MSTCallback(compile=False), model=model)


def smaller_batches(folder: Path) -> None:
    train(folder, callback(), model=RunsOut(Config(), at=6), auto_find_batch_size=True)


def trained_elsewhere(folder: Path) -> None:
    """By a loop of the user's, which took half of the schedule's steps."""
    model = sparsify(tiny(), MIXED, block=4)
    train(folder, MSTCallback(compile=False), model=begun(model, 6), max_steps=STEPS)


def begun(model: Any, steps: int) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i in range(steps):
        model(Sentences()[i]["input_ids"][None], Sentences()[i]["labels"][None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def of_a_dense_run(folder: Path) -> None:
    train(folder, cls=Trainer, **HALF)
    train(folder / "b", callback(), cls=Trainer, resume=str(folder / "checkpoint-6"))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (again, f"at step {STEPS} of total_steps={STEPS}, as the model has trained before.*densify"),
        (another_trainer, f"at step {STEPS} of total_steps={STEPS}, as the model has trained before.*densify"),
        (smaller_batches, f"at step 5 of total_steps={STEPS}.*auto_find_batch_size"),
        (trained_elsewhere, f"at step 6 of total_steps={STEPS}.*over long before"),
        (of_a_dense_run, "takes 6 optimizer steps.*at step 6 of the Trainer: the checkpoint has none.*from_pretrained"),
    ],
)
@pytest.mark.filterwarnings("ignore:the optimizer steps sparse weights:mst_compile.errors.MSTWarning")
@pytest.mark.filterwarnings("ignore:the optimizer state that was loaded:mst_compile.errors.MSTWarning")
def test_a_schedule_that_would_not_end_with_the_run_is_refused(act: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=f"(?s){message}"):
        act(tmp_path)


def test_what_is_left_of_a_schedule_may_be_trained(tmp_path: Path) -> None:
    """Half of it by a loop of the user's; and a constant one for as often as one likes."""
    model = begun(sparsify(tiny(), MIXED, block=4), 6)
    train(tmp_path, MSTCallback(compile=False), model=model, max_steps=STEPS - 6)
    assert (sparsifier(model).step_count, sparsifier(model).density) == (STEPS, 1.0)
    with pytest.warns(MSTWarning, match="still sparse"):
        trainer = train(tmp_path, MSTCallback(Constant(0.5), compile=False, block=4), max_steps=3)
    with pytest.warns(MSTWarning, match="still sparse"):
        trainer.train()
    assert sparsifier(trainer.model).step_count == 6


def test_a_model_that_is_dense_again_begins_another_run(tmp_path: Path) -> None:
    model = train(tmp_path, callback()).model
    trainer = train(tmp_path, callback(), model=densify(model))
    assert history(trainer, "mst/sparsity") == {step: MIXED.sparsity_at(step) for step in range(1, STEPS + 1)}


def test_small_batches_from_the_start_are_no_other_run(whole: Any, tmp_path: Path) -> None:
    """Memory that runs out before the first step is taken, as it mostly does."""
    trainer = train(tmp_path, callback(), model=RunsOut(Config(), at=1), auto_find_batch_size=True)
    assert trainer._train_batch_size < 4
    assert sparsifier(trainer.model).step_count == STEPS
    assert history(trainer, "mst/sparsity") == history(whole[0], "mst/sparsity")


@pytest.mark.parametrize("schedule", [MIXED, Constant(0.6, interval=2)])
def test_a_checkpoint_without_masks_is_refused(schedule: Any, tmp_path: Path) -> None:
    """It has weights alone; in silence the schedule would begin at 0 in the middle of the run."""

    def made() -> MSTCallback:
        return MSTCallback(schedule, compile=False, block=4)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*still sparse", MSTWarning)
        train(tmp_path, made(), save_only_model=True, **HALF)
    with pytest.raises(CheckpointError, match=r"(?s)resumes at step 6.*was at step 6.*at step 0.*save_only_model"):
        train(tmp_path / "b", made(), resume=str(tmp_path / "checkpoint-6"))


def test_an_interrupted_training_is_resumed_by_the_same_trainer(whole: Any, tmp_path: Path) -> None:
    """Between two checkpoints: the model has taken more steps than the one that is gone back to."""

    class Interrupts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8 and not done:
                done.append(state.global_step)
                raise KeyboardInterrupt

    done: list[int] = []
    given = {"train_dataset": Sentences(), "callbacks": [callback(), Interrupts()]}
    trainer = MSTTrainer(tiny(), arguments(tmp_path, **HALF), **given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sparsifier(trainer.model).step_count == 8
    trainer.train(resume_from_checkpoint=True)
    assert_counts_of(trainer, whole[0])
    for p, q in zip(trainer.model.parameters(), whole[0].model.parameters(), strict=True):
        assert torch.equal(p, q)


# -- callbacks ---------------------------------------------------------------------------------------------------------


def test_every_run_counts_from_0(whole: Any, tmp_path: Path) -> None:
    """A callback that has seen another run, and a Trainer that makes a new model for every one."""
    used = callback()
    train(tmp_path, used)
    assert_counts_of(train(tmp_path, used), whole[0])
    given = {"train_dataset": Sentences(), "callbacks": [MSTCallback(compile=False)]}
    trainer = MSTTrainer(args=arguments(tmp_path), model_init=lambda: sparsify(Tiny(Config()), MIXED, block=4), **given)
    for _ in range(2):
        trainer.train()
        for key in ("mst/flops_saved", "mst/events"):  # of another model
            found = list(history(trainer, key).values())
            assert found[0] in (0.0, 1), key
            assert len(found) == STEPS


def test_two_callbacks_count_as_one_and_resume(whole: Any, tmp_path: Path) -> None:
    """The Trainer warns of it, and writes a list of states."""
    pair = [MSTCallback(compile=False), MSTCallback(compile=False)]
    train(tmp_path, *pair, model=sparsify(tiny(), MIXED, block=4), **HALF)
    resumed = train(
        tmp_path / "b", *pair, model=sparsify(tiny(), MIXED, block=4), resume=str(tmp_path / "checkpoint-6")
    )
    assert_counts_of(resumed, whole[0])


def test_a_second_callback_or_trainer_is_told_apart_from_another_schedule(tmp_path: Path) -> None:
    with pytest.raises(AlreadySparseError, match=r"the schedule that MSTCallback was given.*second callback.*block=4"):
        train(tmp_path, callback(), callback())


def test_a_callback_that_comes_while_training(whole: Any, tmp_path: Path) -> None:
    """It begins to count then; what it would have checked at the beginning, it checks then."""
    late = MSTCallback(compile=False)

    class Adds(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            trainer.add_callback(late)

    trainer = MSTTrainer(
        sparsify(tiny(), MIXED, block=4), arguments(tmp_path), train_dataset=Sentences(), callbacks=[Adds()]
    )
    trainer.train()
    assert history(trainer, "mst/events") == history(whole[0], "mst/events")

    class AddsTooShort(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                short.add_callback(MSTCallback(compile=False))

    model = sparsify(tiny(), MixedSparsity(STEPS * 2), block=4)
    short = MSTTrainer(model, arguments(tmp_path), train_dataset=Sentences(), callbacks=[AddsTooShort()])
    with pytest.raises(ScheduleError, match="would not be over"):
        short.train()


def test_best_weights_of_a_run_that_stopped_early(tmp_path: Path) -> None:
    """Weights of one sparse step under masks of another: both are said."""

    class Stops(MSTTrainer):
        def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
            self.control.should_training_stop = self.state.global_step == 6
            return {"eval_loss": float(self.state.global_step)}

    more = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    with pytest.warns(MSTWarning, match=r"weights of step 3, .* Masks are those of step 6, .* density 0\.294"):
        trainer = train(tmp_path, callback(), cls=Stops, load_best_model_at_end=True, **more)
    assert trainer.state.global_step == sparsifier(trainer.model).step_count == 6
