"""``recommend(model, ...)``: which schedule, if any, makes the most of a number of tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mst_compile.api import densify, sparsify
from mst_compile.cost.fitted import FIT
from mst_compile.cost.flops import check_tokens, elements_per_token
from mst_compile.cost.forecast import Forecast, of_run, rest_of
from mst_compile.cost.inputs import check_loss, check_options, steps_of
from mst_compile.errors import ForecastError
from mst_compile.rules.checks import check_choice, check_model, check_number, shown
from mst_compile.rules.constant import Constant
from mst_compile.rules.mixed_sparsity import MixedSparsity, advisers
from mst_compile.rules.schedule import Schedule
from mst_compile.state.sparsifier import parts_of, sparsifier

SPARSITIES = (0.5, 0.6, 0.7, 0.8)  # at 90 % the study's runs lie above the law
ENDS = ("dense", "sparse")
_POINTS = 10_000  # of a run that the mean sparsity is taken of, at least
_SHORTER = 10.0  # than the study's shortest run: of still shorter ones the law says what cannot be


@dataclass(frozen=True)
class Option:
    """One way to train the model, and what the law of losses says of it.

    Attributes:
        name: in words.
        schedule: None for plain dense training.
        share: training FLOPs, as a share of the dense run's.
        behind: predicted loss less that of the dense run of the same model on as many tokens, nats a token.
        lead: predicted loss less that of the best dense run of as many FLOPs: a narrower model, or fewer tokens, or
            both.
    """

    name: str
    schedule: Schedule | None
    share: float
    behind: float
    lead: float


@dataclass(frozen=True)
class Recommendation:
    """What :func:`recommend` returns; prints as text.

    Attributes:
        option: what to do.
        options: all that were looked at, cheapest first.
        rival: the best dense run of equal FLOPs, in words.
        blocks: sizes of the blocks that the model's weights get on the device they are on.
        forecast: FLOPs and phases of the schedule; None for plain dense training.
        reasons: why.
        unknown: what the recommendation does not know.
    """

    option: Option
    options: list[Option]
    rival: str
    blocks: list[int]
    forecast: Forecast | None = field(repr=False)
    reasons: list[str] = field(repr=False)
    unknown: list[str] = field(repr=False)

    @property
    def schedule(self) -> Schedule | None:
        """The schedule to give to ``sparsify``; None: train dense."""
        return self.option.schedule

    def __str__(self) -> str:
        lines = [f"recommended: {self.option.name}"]
        lines += [f"  why: {reason}" for reason in self.reasons]
        lines += [f"  not known: {gap}" for gap in self.unknown]
        lines += ["", f"{'option':42} {'FLOPs of dense':>14} {'loss - dense':>13} {'loss - rival':>13}"]
        lines += [f"{o.name:42} {o.share:14.2f} {o.behind:+13.3f} {o.lead:+13.3f}" for o in self.options]
        return "\n".join(lines)


@dataclass(frozen=True)
class Task:
    """A model and its data, in numbers: hidden weights, other FLOPs of a token, tokens of the run, and of the text."""

    weights: float
    rest: float
    tokens: float
    unique: float

    @property
    def dense_flops(self) -> float:
        return self.tokens * (6 * self.weights + self.rest)

    def loss(self, active: float) -> float:
        """Predicted loss above the floor, so many hidden weights being active on average."""
        return FIT.law.above_floor(active, self.weights, self.tokens, self.unique)

    def share(self, active: float) -> float:
        """FLOPs of such a run, as a share of the dense one's."""
        return (6 * active + self.rest) / (6 * self.weights + self.rest)

    def rival(self, share: float) -> tuple[float, float, float]:
        """The best dense run of a share of the FLOPs: its loss above the floor, its width as a share of the model's,
        its tokens as a share of the run's. The rest of a step grows with the width, hidden weights with its square.
        No rival has fewer weights than any run of the study, unless the model itself does."""
        found = []
        for percent in range(5, 101):
            width = percent / 100
            weights = self.weights * width**2
            if weights < min(FIT.active[0], self.weights):
                continue
            tokens = share * self.dense_flops / (6 * weights + self.rest * width)
            found.append((FIT.law.above_floor(weights, weights, tokens, self.unique), width, tokens / self.tokens))
        return min(found)


def recommend(
    model: nn.Module,
    *,
    tokens: float,
    tokens_per_step: int,
    unique_tokens: float | None = None,
    budget: float | None = None,
    end: str = "dense",
    loss: Callable[[], Tensor] | None = None,
    **options: Any,
) -> Recommendation:
    """How to train ``model`` on so many tokens: the schedule that a law of losses, fitted to this project's study, puts
    furthest ahead of the best dense model of equal FLOPs, or nearest to the dense run within a budget.

    Nothing is changed, and nothing is trained. The law knows small byte-level language models (docs/theory.md);
    differences between its losses are used, not losses. No mask moves in what it recommends, since in the study moving
    blocks of 8 and larger did not pay (docs/quality.md).

    Args:
        model: a plain one, whose linear weights ``sparsify`` would choose.
        tokens: of the whole run.
        tokens_per_step: of one optimizer step.
        unique_tokens: of the text, if it is repeated; default: it is not.
        budget: most training FLOPs, as :func:`mst_compile.forecast` counts them; default: no limit.
        end: ``"dense"``, the weights return and the model ends dense; or ``"sparse"``.
        loss: runs the forward pass on one step's batch and returns the loss, to count the FLOPs that sparsity does not
            touch, attention among them; default: those of the other linear layers alone.
        options: of :func:`mst_compile.sparsify`.

    Raises:
        ForecastError: numbers are not positive, the run is shorter than a tenth of the study's shortest, of which the
            law knows nothing, ``end`` is neither, the model is sparse already, an option is none of
            :func:`mst_compile.sparsify`'s, ``loss`` returns no loss of the model, or nothing fits into the budget.
        ModelError: ``model`` is no module.
    """
    check_model("recommend", model)
    per_step = check_tokens("tokens_per_step", tokens_per_step)
    total = check_number("tokens", tokens, positive=True, error=ForecastError)
    unique = math.inf
    if unique_tokens is not None:
        unique = check_number("unique_tokens", unique_tokens, positive=True, error=ForecastError)
    if budget is not None:
        budget = check_number("budget", budget, positive=True, error=ForecastError)
    check_choice("end", end, ENDS, ForecastError)
    steps = steps_of(total, per_step)
    _check_long_enough(steps * per_step)
    check_loss(loss)
    check_options("recommend", options)
    if parts_of(model):
        raise ForecastError("the model is sparse already and has its schedule: recommend takes a plain one")
    twin = sparsify(copy.deepcopy(model), Constant(0.5, growth="none"), **options)  # the only copy
    own = sparsifier(twin)
    rest = rest_of(model, twin, own, per_step, loss)
    task = Task(round(elements_per_token(own)), rest / per_step, steps * per_step, unique)
    found = sorted(_options(task, end, steps), key=lambda option: option.share)
    option = _choose(found, task, budget)
    expected = None
    if option.schedule is not None:
        own = sparsifier(sparsify(densify(twin), option.schedule, **options))
        expected = of_run(own, steps, per_step, rest)
    blocks = sorted({w.grid.block for w in own.weights.values()})
    _, width, data = task.rival(option.share)
    rival = f"dense, {width:.2f} of the width, {data:.2f} of the tokens"
    reasons = _reasons(option, rival, budget)
    return Recommendation(option, found, rival, blocks, expected, reasons, _unknown(task, loss, blocks))


def _check_long_enough(tokens: float) -> None:
    """Raise if the law would be asked of a run that is nothing like the study's."""
    if tokens < FIT.tokens[0] / _SHORTER:
        raise ForecastError(
            f"a run of {tokens:.3g} tokens is too short for a recommendation: the law of losses is fitted to runs of "
            f"{FIT.tokens[0]:.3g} to {FIT.tokens[1]:.3g}, and its differences make no sense below a tenth of that. "
            "Give the tokens of the whole run that is planned; for a trial take a schedule by hand, "
            "mst_compile.MixedSparsity(total_steps=...)"
        )


def _options(task: Task, end: str, steps: int) -> list[Option]:
    found = [Option("dense", None, 1.0, 0.0, task.loss(task.weights) - task.rival(1.0)[0])]
    for sparsity in SPARSITIES:
        schedule: Schedule
        if end == "sparse":
            schedule, name = Constant(sparsity, growth="none"), f"static masks, {sparsity:.0%}"
            active = (1 - sparsity) * task.weights
        else:
            schedule = MixedSparsity(steps, sparsity)
            name = f"{sparsity:.0%} from the start, restored at the end"
            active = task.weights * (1 - _mean_sparsity(schedule))
        loss, share = task.loss(active), task.share(active)
        found.append(Option(name, schedule, share, loss - task.loss(task.weights), loss - task.rival(share)[0]))
    return found


def _mean_sparsity(schedule: MixedSparsity) -> float:
    """Over the steps of a run; masks follow the target at events alone, what the mean hardly shows."""
    start, end = schedule.restoration_start, schedule.restoration_end
    points = range(start, end, max(1, (end - start) // _POINTS))
    falling = (end - start) * sum(schedule.sparsity_at(step) for step in points) / max(1, len(points))
    return (start * schedule.sparsity + falling) / schedule.total_steps


def _choose(found: list[Option], task: Task, budget: float | None) -> Option:
    if budget is None:
        return min((o for o in found if o.schedule is not None), key=lambda option: option.lead)
    affordable = [option for option in found if option.share * task.dense_flops <= budget]
    if not affordable:
        least = found[0].share * task.dense_flops
        raise ForecastError(
            f"budget={budget:g} FLOPs is less than the cheapest option ({found[0].name}) takes, {least:.3g}; train on "
            "fewer tokens, or a smaller model"
        )
    return min(affordable, key=lambda option: option.behind)


def _reasons(option: Option, rival: str, budget: float | None) -> list[str]:
    if option.schedule is None:
        return ["the budget pays for dense training, which has the lowest loss"]
    told = (
        "of those in the budget it has the lowest predicted loss"
        if budget is not None
        else "of the sparse ones it does best against dense runs of its FLOPs"
    )
    reasons = [f"{told}, {option.behind:+.3f} nats against plain dense, at {option.share:.2f} of its FLOPs"]
    within = abs(option.lead) <= FIT.error
    if within:
        verdict = (
            f"about as good ({option.lead:+.3f}, and the law errs by {FIT.error:.3f}): take this for the wide model"
        )
    elif option.lead < 0:
        verdict = f"predicted to be {-option.lead:.3f} worse"
    else:
        verdict = f"predicted to be {option.lead:.3f} BETTER: train that one, unless you need the wide model"
    return [*reasons, f"the best dense run of equal FLOPs ({rival}) is {verdict}"]


def _unknown(task: Task, loss: object, blocks: list[int]) -> list[str]:
    found = ["how your data and tokenizer compare with the study's English bytes"]
    cheapest = task.weights * (1 - max(SPARSITIES))
    if cheapest < FIT.active[0] or task.weights > FIT.active[1]:
        few, many = (f"{n / 1e6:.2g}" for n in FIT.active)
        found.append(f"runs of {task.weights / 1e6:.3g} M hidden weights: the study has {few} to {many} M active ones")
    if not FIT.tokens[0] <= task.tokens <= FIT.tokens[1]:
        few, many = (f"{n / 1e6:.2g}" for n in FIT.tokens)
        found.append(f"runs of {task.tokens / 1e6:.3g} M tokens: the study has {few} to {many} M")
    if task.tokens / min(task.unique, task.tokens) > FIT.repeats:
        found.append(f"text seen {task.tokens / task.unique:.3g} times: the study has {FIT.repeats:.3g}")
    if loss is None:
        found.append("attention and other work beside linear layers: pass loss=lambda: model(x, y)")
    if max(blocks) > 8:
        found.append(f"blocks of {max(blocks)}: the fit has few runs of blocks larger than 8")
    return [*found, "time: mst_compile.forecast(model, loss=...) of the sparsified model measures it"]


def _for_auto(model: nn.Module, **sizes: Any) -> MixedSparsity:
    """For :meth:`MixedSparsity.auto`."""
    if "end" in sizes:
        raise ForecastError(
            f"end={shown(sizes['end'])}: MixedSparsity always ends dense; for a model that stays sparse take "
            "mst_compile.recommend(..., end='sparse').schedule"
        )
    schedule = recommend(model, **sizes).schedule
    if not isinstance(schedule, MixedSparsity):
        raise ForecastError(f"budget={shown(sizes['budget'])} pays for dense training, which needs no schedule")
    return schedule


advisers.append(_for_auto)
