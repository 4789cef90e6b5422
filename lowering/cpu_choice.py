"""What is faster on this CPU, ours or the library's: measured where it is first asked.

A product, or causal attention, of some shape, dtype, block and number of tokens is measured once (:mod:`.cpu_times`,
:mod:`.cpu_call_times`, :mod:`.cpu_attention_times`) and kept on disk, for this processor, number of threads,
instruction set, PyTorch and version of the kernels. Within a process an answer never changes. Processes take turns
(:mod:`.turns`), and what is measured while others keep the processor busy is measured again by later ones. Environment
variable:

``MST_COMPILE_TIMES``
    a folder of measurements to go by, whatever machine they come from, and to add to: with it a run makes the same
    choices elsewhere as where it was first made; so nothing in it is measured again
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from mst_compile.kernels import cpu as kernels
from mst_compile.kernels.cpu.forks import Lock

from mst_compile.errors import MSTWarning

from . import cpu_attention_times, cpu_call_times, cpu_group_times, cpu_times, turns
from .agreement import first_answer, several_ranks
from .cpu_attention_times import AttentionTimes, CausalAttention
from .cpu_times import Product
from .device import WORTH, Layer, LayerTimes, Times
from .measured import Measurements, cache_folder, say_not_kept

_PINNED = "MST_COMPILE_TIMES"
_MEASURED = 3  # of the numbers in Times, by cpu_times


def of_product(product: Product) -> Times:
    """Seconds of a product, measured at the first call; without those of :func:`of_call`."""
    dense, fixed, per_density = _products.of(product)
    return Times(dense, fixed, per_density)


def of_groups(product: Product, groups: int, dense: str) -> Times:
    """Seconds of each of several groups of a stack's, measured at the first call; without those of :func:`of_call`."""
    usual, fixed, per_density = _groups.of(cpu_group_times.asked(product, groups, dense))
    return Times(usual, fixed, per_density, falls_back=False)


def of_call(product: Product) -> float:
    """Seconds that a product costs more in a graph with sparse ones, measured at the first call."""
    return _calls.of(cpu_call_times.asked(product))[0]


def of_attention(attention: CausalAttention) -> AttentionTimes:
    """Seconds of causal attention, measured at the first call."""
    return AttentionTimes(*_attentions.of(attention))


def is_attention_faster(heads: int, length: int, size: int, value_size: int, dtype: torch.dtype, trained: bool) -> bool:
    """Whether our kernel for causal attention is the faster one, of so many heads in all sequences of a batch."""
    if not heads or not length or not kernels.supports_head(dtype, size, value_size) or not kernels.available():
        return False
    near = cpu_attention_times.bucket(heads, length)
    times = of_attention(CausalAttention(*near, size, value_size, dtype, trained))
    return times.ours < WORTH * times.usual


def is_dense_faster(product: Product, active: int) -> bool:
    """Whether the dense product is the faster one of a weight with ``active`` of its blocks active."""
    return active >= dense_from(product)


def dense_from(product: Product) -> float:
    """From how many active blocks on the dense product is the faster one."""
    blocks = -(-product.rows // product.block) * -(-product.cols // product.block)
    return of_product(product).crossover * blocks


def times(layers: Sequence[Layer], _: bool) -> list[LayerTimes]:
    """Seconds of the products of each layer; of one that is not trained only the forward product is measured."""
    return [{name: _in_graph(product, layer) for name, product in _of_layer(layer).items()} for layer in layers]


def _in_graph(product: Product, layer: Layer) -> Times:
    """The times of a layer's product, with its call's: of groups as many as there are, of about as many tokens each."""
    more = layer.tokens / product.tokens
    times = of_product(product) if layer.groups == 1 else of_groups(product, layer.groups, layer.dense)
    call = _call_in_graph(product, layer.groups, more)
    return Times(times.dense * more, times.fixed * more, times.per_density * more, call, times.falls_back)


def _call_in_graph(product: Product, groups: int, more: float) -> float:
    """What a product costs beside its kernel, of ``more`` times the tokens. Groups are one operator together, but zeros
    in a weight's gradient are written for each."""
    call = of_call(product)
    if product.kind != cpu_times.GRAD_WEIGHT:
        return call
    once = 0.0 if groups == 1 else min(call, of_call(product._replace(kind=cpu_times.ROWS)))
    return once + (call - once) * more


def _of_layer(layer: Layer) -> dict[str, Product]:
    grid, kinds = layer.grid, (cpu_times.ROWS, cpu_times.COLS)
    forward, back = reversed(kinds) if layer.transposed else kinds
    tokens = cpu_times.bucket(-(-layer.tokens // layer.groups))
    shape = grid.rows, grid.cols, grid.block, tokens, layer.dtype, layer.weight_dtype
    found = {"forward": Product(forward, *shape, layer.bias)}
    if layer.trained:
        found["grad-input"] = Product(back, *shape)
        found["grad-weight"] = Product(cpu_times.GRAD_WEIGHT, *shape, layer.bias)
    return found


# ---- where times come from -------------------------------------------------------------------------------------------


class _Answers:
    """What is known of one kind of question: in this process, else on disk, else measured; the same on all ranks.

    Args:
        length: how many numbers an answer has.
        unknown: the answer where nothing can be measured that all ranks would agree on.
        name: of a question, on disk. measure: what answers it.
    """

    def __init__(
        self,
        length: int,
        unknown: Sequence[float],
        name: Callable[[Any], str],
        measure: Callable[[Any], Sequence[float]],
    ) -> None:
        self.kept = Measurements(lambda: _folder(), length, lambda error: _lost(error), lambda file: _damaged(file))
        self.known: dict[tuple[Hashable, int], Sequence[float]] = {}  # question, threads -> answer
        self._unknown, self._name, self._measure, self._lock = unknown, name, measure, Lock()

    def of(self, question: Any) -> Sequence[float]:
        key = question, torch.get_num_threads()
        found = self.known.get(key)
        if found is None:
            with self._lock:
                found = self.known.get(key)
                if found is None:
                    found = self.known[key] = self._agreed(question, self._name(question))
        return found

    def _agreed(self, question: Any, name: str) -> Sequence[float]:
        def own() -> Sequence[float]:
            found = self.kept.find(name)
            return self._measured(question, name) if found is None else found

        if not several_ranks():
            return own()
        answer = first_answer(name, lambda: " ".join(map(repr, own())))
        return self._unknown if answer is None else [float(number) for number in answer.split()]

    def _measured(self, question: Any, name: str) -> Sequence[float]:
        """Measured in turn, unless another process has while it was waited for."""
        with _turns.take(lambda: self.kept.is_known(name)):
            found = self.kept.find(name) if self.kept.is_known(name) else None
            if found is not None:
                return found
            answers: list[tuple[float, ...]] = []
            share = turns.share_of_processor(lambda: answers.append(tuple(self._measure(question))))
            if share < turns.LOADED and not os.environ.get(_PINNED, ""):
                return self.kept.record_provisional(name, answers[0], share)
            self.kept.record(name, answers[0])
            return answers[0]


_turns = turns.Turns()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name_of_product(product: Product) -> str:
    dtypes = f"{_short(product.dtype)}-{_short(product.weight_dtype)}"
    bias = " bias" if product.bias else ""
    return f"{product.rows}x{product.cols}-{product.block} {product.kind} {product.tokens} {dtypes}{bias}"


def _name_of_attention(attention: CausalAttention) -> str:
    passes = "trained" if attention.trained else "forward"
    values = "" if attention.value_size == attention.size else f"+{attention.value_size}"
    shape = f"{attention.heads} of {attention.length}x{attention.size}{values}"
    return f"attention {shape} {_short(attention.dtype)} {passes}"


# Measurements are asked for by name in their modules, so that others can take their place.
_products = _Answers(
    _MEASURED,
    Times(0.8 / WORTH, 0.0, 1.0)[:_MEASURED],
    _name_of_product,
    lambda product: cpu_times.measure(product)[:_MEASURED],
)
_calls = _Answers(
    1, [1e-9], lambda product: f"call {_name_of_product(product)}", lambda product: [cpu_call_times.measure(product)]
)
_groups = _Answers(
    _MEASURED,
    Times(0.8 / WORTH, 0.0, 1.0)[:_MEASURED],
    lambda asked: f"{asked.groups} {asked.dense} of {_name_of_product(asked.product)}",
    lambda asked: cpu_group_times.measure(asked)[:_MEASURED],
)
_attentions = _Answers(
    len(AttentionTimes._fields),
    AttentionTimes(1.0, 1.0),
    _name_of_attention,
    lambda attention: cpu_attention_times.measure(attention),
)


def _folder() -> Path:
    pinned = os.environ.get(_PINNED, "")
    return Path(pinned) if pinned else cache_folder(f"times-{_machine(torch.get_num_threads())}")


def _lost(error: OSError) -> None:
    """A cache that cannot be written costs time; a folder that somebody named for other runs is missed by them."""
    pinned = os.environ.get(_PINNED, "")
    if pinned:
        _say_lost(pinned, error.strerror or str(error))
    else:
        say_not_kept(error)


def _damaged(file: Path) -> None:
    """What a cache lost is measured again; in a folder that somebody named it is a choice that others have made."""
    if os.environ.get(_PINNED, ""):
        warnings.warn(
            f"{file} of {_PINNED} holds no times that can be read: they are measured anew, and this run may choose "
            "otherwise than those before. Take the file from where the folder was made",
            MSTWarning,
            stacklevel=2,
        )


@functools.cache
def _say_lost(folder: str, reason: str) -> None:
    warnings.warn(
        f"{_PINNED}={folder} cannot be written ({reason}): runs that go by it will not make the choices of this one. "
        "Name a folder that can.",
        MSTWarning,
        stacklevel=2,
    )


@functools.cache
def _machine(threads: int) -> str:
    """A name for all that times depend on."""
    parts = [kernels.processor_name(), kernels.choose_isa(), kernels.source_hash(), torch.__version__, str(threads)]
    parts += [f"{name}={os.environ.get(name, '')}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
