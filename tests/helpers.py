"""Small models, ways to run them, and what is compared: with float64, with what was before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mask_cases import element_masks
from oracles import assert_all_as_good_as
from torch import Tensor, nn

import mst_compile

DEBUG = {"mst.inner": "aot_eager"}


class Blocks(nn.Module):
    """A small residual network: two layers a block, of which the first widens."""

    def __init__(self, width: int = 32, depth: int = 2, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


# -- running models ----------------------------------------------------------------------------------------------------


def compiled(model: Any, inner: str = "aot_eager", **kwargs: Any) -> Any:
    return torch.compile(model, backend="mst", options={"mst.inner": inner}, **kwargs)


def static(sparsity: float = 0.7) -> mst_compile.Constant:
    return mst_compile.Constant(sparsity, growth="none")


def scalar(out: Any) -> Tensor:
    """A loss that weighs every output differently, in the output's own precision or better."""
    if hasattr(out, "loss") and out.loss is not None:
        return out.loss
    weighed, square = _terms(out[0] if isinstance(out, tuple | list) else out)
    return weighed.sum() + square


def _terms(out: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`scalar` adds up."""
    out = out.double() if out.dtype == torch.float64 else out.float()
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return out * weight, out.square().mean()


def sizes_of(truth: dict[str, Tensor]) -> dict[str, float]:
    """The sum of the absolute terms of the loss, which may cancel; of a model whose output is a tensor."""
    if "output" not in truth:
        return {}
    weighed, square = _terms(truth["output"])
    return {"loss": float(weighed.abs().sum() + square)}


def loss_and_grads(
    model: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> dict[str, Tensor]:
    """The output of a model, its loss, and the gradients of its parameters and floating-point arguments."""
    args = tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )
    model.zero_grad()
    out = run(*args, **(kwargs or {}))
    loss = scalar(out)
    loss.backward()
    found = {"loss": loss.detach()}
    if isinstance(out, Tensor):
        found["output"] = out.detach()
    found |= {f"grad {n}": p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"grad input {i}": a.grad for i, a in enumerate(args) if isinstance(a, Tensor) and a.grad is not None}
    model.zero_grad()
    return found


def oracle(model: nn.Module, build: Callable[[], nn.Module], args: tuple[Any, ...], **kwargs: Any) -> dict[str, Tensor]:
    """What the plain model computes in float64 from the same weights, gradients masked: the specification."""
    plain = build().double()
    plain.load_state_dict(model.state_dict())
    plain.train(model.training)
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    found = loss_and_grads(plain, plain, wide, kwargs)
    for name, mask in element_masks(model).items():
        found[f"grad {name}"] = found[f"grad {name}"] * mask
    return found


def check_model(
    build: Callable[[], nn.Module],
    *args: Any,
    inner: str = "aot_eager",
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    precision: torch.dtype = torch.float32,
    call: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    sparsity: float = 0.7,
    compile_options: dict[str, Any] | None = None,
    forward_options: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Sparsify a model, and compare eager and compiled mode with the fp64 oracle: output and every gradient.

    Args:
        precision: dtype whose eps bounds the error (that of autocast, if there is one in ``context`` or the model).
        call: what is run and compiled, given the model; the model itself if not said.
    """
    model = mst_compile.sparsify(build(), static(sparsity), **options)
    kwargs = forward_options or {}
    truth = oracle(model, build, args, **kwargs)
    function = call(model)
    fast = compiled(function, inner, **(compile_options or {}))
    with context():
        eager = loss_and_grads(model, function, args, kwargs)
        actual = loss_and_grads(model, fast, args, kwargs)
    assert_all_as_good_as(actual, eager, truth, precision, sizes_of(truth))
    for name, mask in element_masks(model).items():
        for found in (eager, actual):
            assert not found[f"grad {name}"][~mask].any(), name
    return model


def statuses(model: nn.Module) -> dict[str, str]:
    return {row.name: row.status for row in mst_compile.explain(model)}


# -- nothing changed ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """The block leaves weights, attributes, hooks and keys of the modules as they were, their sparse state, and the
    global random state."""
    before = [_picture(m) for m in modules]
    values = [{n: p.detach().clone() for n, p in _with_values(m)} for m in modules]
    random = torch.random.get_rng_state()
    yield
    assert [_picture(m) for m in modules] == before
    assert torch.equal(torch.random.get_rng_state(), random)
    for module, old in zip(modules, values, strict=True):
        now = dict(module.named_parameters())
        assert all(torch.equal(now[n], v) for n, v in old.items())


def _with_values(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters whose values can be compared."""
    plain = [(n, p) for n, p in module.named_parameters() if not isinstance(p, nn.UninitializedParameter)]
    return [(n, p) for n, p in plain if p.layout == torch.strided and not p.is_meta]


def _picture(module: nn.Module) -> list[Any]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [
        {n: (id(p), None if p.is_inference() else p._version, p.requires_grad) for n, p in parameters.items()},
        {n: (set(vars(p)), dict(getattr(p, "_post_accumulate_grad_hooks", None) or {})) for n, p in parameters.items()},
        {n: {k: _held(v) for k, v in vars(m).items()} for n, m in module.named_modules()},
        list(module.state_dict()),
        [_state(m._mst_sparsifier) for m in module.modules() if "_mst_sparsifier" in vars(m)],
    ]


def _held(value: Any) -> Any:
    """Hooks, children and other dicts of a module by what they hold."""
    return {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)


def _state(own: mst_compile.Sparsifier) -> list[Any]:
    """All that a sparsifier's next step depends on."""
    state = own.state_dict()
    weights = [(w.dense_grad, w.active) for w in own.weights.values()]
    tensors = {k: {n: t.tolist() for n, t in state[k].items()} for k in ("masks", "grown", "scores")}
    return [own.step_count, own.seed, own.attention.pattern, own.auto_step, weights, tensors]
