"""What holds after every step of a real training run, in eager and in compiled mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Blocks
from mask_cases import element_masks, expand
from oracles import assert_same_course
from torch import Tensor
from torch._dynamo.utils import counters
from training import (
    MODES,
    OPTIMIZERS,
    SCHEDULE,
    STEPS,
    assert_density_is_the_schedules,
    assert_zero_outside,
    batches,
    fresh,
    loss_of,
    runner,
    train,
)

import mst_compile.graph.backend
from mst_compile import Constant, MixedSparsity, sparsifier
from mst_compile.rules import masks
from mst_compile.rules.growth import Mixed
from mst_compile.rules.guard import coverage
from mst_compile.rules.schedule import Schedule


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_invariants_over_a_whole_schedule(name: str, mode: str) -> None:
    model = fresh()
    optimizer = OPTIMIZERS[name](model.parameters())
    run, own, parameters = runner(model, mode), sparsifier(model), dict(model.named_parameters())
    for step, x in enumerate(batches(), 1):
        event_next = SCHEDULE.is_topology_event(step) and SCHEDULE.sparsity_at(step) > 0
        loss_of(run, x).backward()
        before = element_masks(model)
        for n, mask in before.items():
            outside = parameters[n].grad[~mask]  # type: ignore[index]
            if not event_next:
                assert not outside.any(), "a gradient outside the mask that nobody asked for"
            elif outside.numel() and step > 1:
                assert outside.count_nonzero() > 0.5 * outside.numel(), "growth needs the dense gradient"
        optimizer.step()
        assert own.step_count == step
        assert_zero_outside(model, optimizer)
        assert_density_is_the_schedules(model, step)
        for n, mask in element_masks(model).items():
            grown = mask & ~before[n]
            state = {k: v for k, v in optimizer.state[parameters[n]].items() if k != "step"}
            assert not any(v[grown].any() for v in (parameters[n].detach(), *state.values()) if v is not None)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert own.density == 1.0
    assert all(w.is_dense for w in own.weights.values())
    assert all(bool((p != 0).double().mean() > 0.9) for p in model.parameters() if p.dim() == 2)
    mst_compile.densify(model)
    plain = Blocks()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("growth", ["mixed", "gradient", "random", "none"])
def test_the_topology_event_is_the_rule(growth: Any) -> None:
    """Masks after an event are those that the rule gives for weights and gradients seen from outside."""
    schedule = Constant(0.6, growth=growth, interval=2, drop_fraction=0.4)
    model = fresh(schedule, seed=11)
    own, parameters = sparsifier(model), dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    previous: dict[str, Tensor] = {}
    for step, x in enumerate(batches(6), 1):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        gradients = {n: p.grad.detach().clone() for n, p in parameters.items()}  # type: ignore[union-attr]
        before = own.masks
        optimizer.step()
        for name, weight in own.weights.items():
            if step % 2 or growth == "none":
                assert torch.equal(before[name], own.masks[name])
                continue
            # SGD without momentum: the event sees this step's update, dropped blocks included.
            b, mask = weight.grid.block, before[name]
            keep = expand(mask, *parameters[name].shape, b)
            updated = previous[name] - 1e-2 * gradients[name] * keep
            size, slope = (t.unfold(0, b, b).unfold(1, b, b).square().mean((2, 3)) for t in (updated, gradients[name]))
            share = {"mixed": 0.75, "gradient": 1.0, "random": 0.0}[growth]
            generator = masks.generator(11, step, name)
            expected = masks.update_mask(
                mask,
                coverage(mask, size),
                size,
                slope,
                int(mask.sum()),
                schedule.drop_fraction,
                Mixed(share),
                generator,
            )
            assert torch.equal(own.masks[name], expected)
        previous = {n: p.detach().clone() for n, p in parameters.items()}


# -- eager = compiled --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_eager_and_compiled_runs_agree(inner: str) -> None:
    """One roundoff apart at the first step; SGD keeps it near that (Adam would divide by it)."""
    results = []
    for mode in ("none", inner):
        model = fresh()
        losses = train(model, torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9), mode, batches())
        results.append((losses, sparsifier(model).masks, copy.deepcopy(model.state_dict())))
    (eager, masks, weights), (fast, fast_masks, fast_weights) = results
    assert_same_course(torch.tensor(fast), torch.tensor(eager), 16)
    assert all(torch.equal(masks[n], fast_masks[n]) for n in masks)
    for key, value in weights.items():
        assert_same_course(fast_weights[key], value, 16)
    assert fast[-1] < 0.9 * fast[0], "it does learn"


def test_eager_and_compiled_losses_agree_for_200_steps() -> None:
    """Through all phases, with an event every few steps; the losses differ by roundings that SGD carries along."""
    schedule = MixedSparsity.published(
        200, sparsity=0.8, warmup=20, restoration=40, settle=20, interval=6, ramp_interval=3
    )
    losses, masks = [], []
    for mode in ("none", "inductor"):
        model = fresh(schedule)
        optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9)
        losses.append(train(model, optimizer, mode, batches(150)))
        masks.append(sparsifier(model).masks)
        losses[-1] += train(model, optimizer, mode, batches(50))
        assert sparsifier(model).density == 1.0
    assert_same_course(torch.tensor(losses[1]), torch.tensor(losses[0]), 16)
    assert all(torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())
    assert losses[0][-1] < 0.7 * losses[0][0], "it does learn"


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_one_graph_and_two_compilations_for_a_schedule(inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = 0
    get_inner = mst_compile.graph.backend._inner

    def counting(*args: Any) -> Callable[..., Any]:
        compile_fn = get_inner(*args)

        def compile_one(*inputs: Any) -> Any:
            nonlocal compilations
            compilations += 1
            return compile_fn(*inputs)

        return compile_one

    monkeypatch.setattr(mst_compile.graph.backend, "_inner", counting)
    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run = runner(model, inner)
    data = batches()
    loss_of(run, next(data)).backward()
    optimizer.step()
    densities = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in data:
            optimizer.zero_grad()
            loss_of(run, x).backward()
            optimizer.step()
            densities.add(sparsifier(model).density)
    assert len(densities) >= 5
    assert sparsifier(model).step_count == STEPS
    assert counters["stats"]["unique_graphs"] == 1
    assert compilations == 2, "the sparse and the dense variant"
    assert all("matched" in row.status for row in mst_compile.explain(model))


@pytest.mark.parametrize("mode", ["none", "aot_eager", "inductor"])
@pytest.mark.parametrize("schedule", [Constant(0.0, interval=2), MixedSparsity.published(12, 0.0, interval=2)])
def test_sparsity_zero_is_bitwise_the_plain_model(schedule: Schedule, mode: str) -> None:
    plain, model = fresh(None), fresh(schedule)
    fast = mode if mode == "none" else "inductor" if mode == "inductor" else "aot_eager"
    results = []
    for m, backend in ((plain, fast), (model, "mst")):
        optimizer = torch.optim.AdamW(m.parameters(), 1e-2)
        options = {"options": {"mst.inner": mode}} if backend == "mst" else {}
        run = m if mode == "none" else torch.compile(m, backend=backend, **options)
        losses = []
        for x in batches(12):
            optimizer.zero_grad()
            loss = loss_of(run, x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, [p.detach() for p in m.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert sparsifier(model).density == 1.0
