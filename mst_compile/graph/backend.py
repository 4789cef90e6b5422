"""The Dynamo backend ``"mst"``: ``torch.compile(model, backend="mst", mode=..., options=...)``.

Found through the entry point group ``torch_dynamo_backends``; nothing needs to be imported. On a model without sparse
weights it is ``"inductor"``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx

from mst_compile.errors import BackendOptionError, MSTWarning
from mst_compile.graph.cachekey import SourceKey
from mst_compile.graph.compiler import find_weights, given_inputs
from mst_compile.graph.dispatch import Dispatch
from mst_compile.graph.late import Late
from mst_compile.lowering import device, inductor  # noqa: F401  (inductor registers the lowerings)
from mst_compile.state.uses import note_compiled

_INNER = ("inductor", "aot_eager", "eager")
_DEFAULTS: dict[str, Any] = {"mst.dense_threshold": None, "mst.inner": "inductor", "mst.keep_memory": True}


def mst(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        mode: as for ``torch.compile(backend="inductor")``.
        options: Inductor's options, and our own: ``"mst.dense_threshold"`` (mean density from which the dense variant
            runs, and below which all products are sparse; by default ``$MST_COMPILE_DENSE_THRESHOLD``, else what was
            measured to be faster, on a CPU for every product by itself),
            ``"mst.keep_memory"`` (see :mod:`mst_compile.lowering.memory`; default true) and ``"mst.inner"``
            (``"inductor"``, or ``"aot_eager"``/``"eager"`` for debugging).

    Raises:
        BackendOptionError: an option does not exist or has a bad value.
    """
    own, patches = _split_options(mode, options)
    devices = _devices(example_inputs)
    compile_fn = _inner(own["mst.inner"], patches, devices)
    found = find_weights(graph_module, example_inputs)
    note_compiled(x for i, x in enumerate(given_inputs(graph_module, example_inputs)) if i in found)
    if not found:
        return Late(graph_module, example_inputs, compile_fn, own["mst.dense_threshold"])
    if own["mst.keep_memory"]:
        for used in devices:
            used.keep_memory()
    return Dispatch(graph_module, example_inputs, found, compile_fn, own["mst.dense_threshold"])


def _split_options(mode: str | None, options: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our own options, completed by defaults, and the patches of Inductor's configuration."""
    own, patches = dict(_DEFAULTS), {}
    if mode and mode != "default":
        known = list_mode_options()
        if mode not in known:
            raise BackendOptionError(f"mode {mode!r} does not exist; choose one of {', '.join(map(repr, known))}")
        patches.update(known[mode])
    inductor_options = set(list_options())
    for name, given in (options or {}).items():
        if name.startswith("mst."):
            if name not in own:
                raise BackendOptionError(f"option {name!r} does not exist; ours are {', '.join(_DEFAULTS)}")
            own[name] = given
        elif name.replace("-", "_") in inductor_options:
            patches[name.replace("-", "_")] = given
        else:
            raise BackendOptionError(f"option {name!r} is neither ours nor Inductor's (torch._inductor.list_options())")
    threshold = own["mst.dense_threshold"] = _threshold(own["mst.dense_threshold"])
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if threshold is not None and not (number and 0 <= threshold <= 1):
        raise BackendOptionError(f"mst.dense_threshold must lie in [0, 1] or be None, got {threshold!r}")
    if not isinstance(own["mst.keep_memory"], bool):
        raise BackendOptionError(f"mst.keep_memory must be True or False, got {own['mst.keep_memory']!r}")
    if own["mst.inner"] not in _INNER:
        raise BackendOptionError(f"mst.inner must be one of {', '.join(map(repr, _INNER))}, got {own['mst.inner']!r}")
    # Freezing would fold the weights of one step into the graph.
    patches["freezing"] = False
    slot = "post_grad_custom_post_pass"
    patches[slot] = SourceKey(patches.get(slot, inductor_config.post_grad_custom_post_pass))
    return own, patches


def _threshold(given: Any) -> Any:
    """The user's threshold, that of the environment where there is none."""
    text = os.environ.get("MST_COMPILE_DENSE_THRESHOLD", "")
    if given is not None or not text:
        return given
    try:
        return float(text)
    except ValueError:
        raise BackendOptionError(f"MST_COMPILE_DENSE_THRESHOLD must be a number in [0, 1], got {text!r}") from None


def _inner(name: str, patches: dict[str, Any], devices: Sequence[device.Device]) -> Callable[..., Any]:
    if name == "inductor":
        reason = next((reason for reason in (used.why_not_compiled() for used in devices) if reason), None)
        if reason is not None:
            _warn_not_compiled(reason)
            name = "eager"
    if name == "eager":
        return lambda graph_module, _: graph_module.forward
    if name == "aot_eager":
        return torch._dynamo.lookup_backend("aot_eager")
    return functools.partial(compile_fx, config_patches=patches)


def _devices(example_inputs: Sequence[Any]) -> list[device.Device]:
    return [device.of(t) for t in sorted({x.device.type for x in example_inputs if isinstance(x, torch.Tensor)})]


@functools.cache
def _warn_not_compiled(reason: str) -> None:
    warnings.warn(
        f"the model runs in eager mode (correct, but it saves little or no time): {reason}",
        MSTWarning,
        stacklevel=2,
    )
