"""Choose one of a graph's variants at every call: with dense or sparse products, with full or sparse attention.

Which one runs is decided from the densities of the parameters that come in and from the attention pattern of the
moment; a variant is compiled when it is first needed. Nothing recompiles when topology, sparsity or attention change.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import BackwardCFunction

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.shards import behind
from mst_compile.errors import TopologyChangedError
from mst_compile.graph.compiler import CompileFn, Compiler, Kind, Variant
from mst_compile.graph.context import Product, Slot
from mst_compile.graph.gain import SlotTimes, saves, uniform_threshold
from mst_compile.graph.notes import warn_written
from mst_compile.graph.served import fake_index, range_of, size_of
from mst_compile.lowering import device
from mst_compile.lowering.device import Layer
from mst_compile.state.binding import Arrival, of
from mst_compile.state.indexes import activity, epoch
from mst_compile.state.lookout import look_at_copies
from mst_compile.state.uses import Baseline
from mst_compile.state.weight import SparseWeight

_MOST_SIZES = 64  # that a graph keeps its products' times for, as of batches of several lengths
_FIRST_CALLS = 2  # at which the values of weights are looked at


class _Choice(NamedTuple):
    """What was chosen at a call, and by what it holds still.

    One value, replaced as a whole: threads that run one graph for weights of their own, or at sizes of their own, must
    not be handed each other's.

    Attributes:
        indices: of the weights that came in, or None for the dense variant.
        held: the state of these weights.
        sizes: whether gradients were recorded, and the inputs' sizes that say how many tokens are multiplied.
        epoch: the masks of the moment.
    """

    indices: list[Tensor] | None
    held: list[SparseWeight | None]
    sizes: list[Any]
    epoch: int


class Dispatch:
    """The callable that Dynamo runs in place of a graph that holds sparse parameters.

    Args:
        found: position among the inputs -> state of the sparse parameter that came in there.
        dense_threshold: the dense variant runs when the parameters' mean density is at least this, and below it all
            products are sparse; None: what is faster on the weights' device.
        first_call: the inputs of the first call, where ``example_inputs`` are fakes of another one's.
    """

    _last = 0  # id of the graph that was the last to run: no reference, which would keep it alive

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        found: Mapping[int, SparseWeight],
        compile_fn: CompileFn,
        dense_threshold: float | None,
        first_call: Sequence[Any] | None = None,
    ) -> None:
        self._found = found
        self._first = next(iter(found))
        given = example_inputs if first_call is None else first_call
        # What comes in is a part that a rank holds of a DTensor, which knows its weight.
        self._local = [i for i in found if behind(given[i]) is not given[i]]
        self._attention = found[self._first].attention
        self._given_threshold = dense_threshold
        self._device = device.of(example_inputs[self._first].device.type)
        choose = dense_threshold is None and self._device.chooses
        self._compiler = Compiler(graph_module, example_inputs, found, compile_fn, choose, first_call)
        self._slots = self._compiler.slots
        self._positions = list(dict.fromkeys(slot.key for slot in self._slots))
        self._signatures = {i: found[i].signature for i in self._positions}
        self._variants: dict[tuple[bool, bool], Variant] = {}
        self._choice: _Choice | None = None  # of the last call
        self._calls_to_look = _FIRST_CALLS
        self._places: dict[type, dict[int, int]] = {}  # class of the graph's node -> of inputs, see _places_of
        self._times_of: dict[tuple[Any, ...], tuple[SlotTimes, float]] = {}  # sizes -> times, threshold
        own = self._own(given)
        indices = self._indices(given, own)
        self._make((indices is not None, self._patterned(own)), [*given, *(indices or [])])

    def __call__(self, *args: Any) -> Any:
        own = self._own(args)
        first = getattr(own[self._first], "_mst_weight", None)
        if first is not None and first.baseline is not None:
            return self._run_baseline(first.baseline, args)
        indices = self._indices(args, own)
        kind = indices is not None, self._patterned(own)
        inputs = args if indices is None else (*args, *indices)
        variant = self._variants.get(kind) or self._make(kind, inputs)
        if variant.constants and not all(constant.holds(args[constant.position]) for constant in variant.constants):
            kind = kind[0], False  # another mask than the one that was found causal
            variant = self._variants.get(kind) or self._make(kind, inputs)
        out = variant.run(*inputs)
        if torch.is_grad_enabled():
            self._guard_backward(own, out, sparse=kind[0])
            self._note_queries(args, own, variant)
        return out

    def _own(self, args: Sequence[Any]) -> Sequence[Any]:
        """The inputs with Parameters in the place of what this rank holds of them."""
        if not self._local:
            return args
        own = list(args)
        for i in self._local:
            own[i] = behind(args[i])
        return own

    def _run_baseline(self, told: Baseline, args: Sequence[Any]) -> Any:
        """Run what would run if nothing were sparse, for somebody who times that."""
        variant = self._compiler.baseline(args)
        told.seen, told.differs = True, told.differs or not self._compiler.is_dense_variant(variant)
        return variant.run(*args)

    def _make(self, kind: tuple[bool, bool], inputs: Sequence[Any]) -> Variant:
        self._variants[kind] = self._compiler.variant(Kind(*kind), inputs)
        self._choice = None  # tuning has measured some times now
        self._times_of.clear()
        return self._variants[kind]

    def _indices(self, args: Sequence[Any], own: Sequence[Any]) -> list[Tensor] | None:
        """The index tensors of the parameters that came in, or None if the dense variant shall run.

        Args:
            own: as :meth:`_own` has them.
        """
        if not self._positions:
            return None
        held, written, recording = [], False, torch.is_grad_enabled()
        look, now_active, copies = self._calls_to_look > 0, activity.value, []
        for i in self._positions:
            parameter = own[i]
            weight = getattr(parameter, "_mst_weight", None)
            held.append(weight)
            if weight is not None:
                moved = weight.address != parameter.data_ptr() or weight.was_freed()
                if moved or weight.clean != parameter._version:
                    written = True
                if weight.recording is not recording:
                    weight.recording, look = recording, True
                if weight.looked != now_active:
                    weight.looked = now_active
                    if not weight.trained:
                        copies.append((weight, parameter))
        # Writes through .data leave no trace: looked for at the first calls, and where training and evaluation change
        # places, as that is when averages are swapped in and adapters merged.
        if look:
            self._calls_to_look = max(0, self._calls_to_look - 1)
            written |= self._look(own)
        elif copies:
            written |= look_at_copies(copies)
        if written and not self._hold_zeros(own):
            self._choice = None
            return None
        sizes = [recording, *(_size(args[i]) for i in self._compiler.varying)]
        choice, now = self._choice, epoch.value
        if choice is None or (held, sizes, now) != choice[1:] or Dispatch._last != id(self):
            choice = _Choice(self._choose(args, own, tuple(sizes)), held, sizes, now)
            self._choice, Dispatch._last = choice, id(self)
        return choice.indices

    def _look(self, args: Sequence[Any]) -> bool:
        """Look at the values of all weights that came in; whether any stand outside the active blocks."""
        found = False
        for i in self._positions:
            weight = of(args[i])
            if weight is not None and not isinstance(args[i], FakeTensor):
                found |= not weight.look_here(args[i])
        return found

    def _hold_zeros(self, args: Sequence[Any]) -> bool:
        """Whether all weights that came in are 0 outside their active blocks, as sparse products take them to be."""
        wrong = [
            weight for i in self._positions if (weight := of(args[i])) is not None and not weight.holds_zeros(args[i])
        ]
        if wrong:
            warn_written(wrong)
        return not wrong

    def _choose(self, args: Sequence[Any], own: Sequence[Any], sizes: tuple[Any, ...]) -> list[Tensor] | None:
        """The index tensors, or None, by the masks of the moment and the times of these sizes."""
        indices: list[Tensor] = []
        sizes_of: list[tuple[int, int]] = []
        held = {i: of(own[i]) for i in self._positions}
        for i, part in self._slots:
            parameter, weight = own[i], held[i]
            if weight is None and isinstance(parameter, FakeTensor):
                weight = self._found[i]  # DDP's first call
            # Another layer may share this graph: one that is not sparse, or on another grid, runs dense.
            if weight is None or weight.signature != self._signatures[i] or (part and weight.part):
                break
            if weight.index is None or weight.index.device != parameter.device:
                weight.to_device(parameter.device)
            index = weight.index if part is None else range_of(weight, part).index
            assert index is not None
            sizes_of.append(size_of(weight, part))
            fake = isinstance(parameter, FakeTensor)
            indices.append(fake_index(weight, part, parameter.fake_mode) if fake else index)
        given = self._given_threshold
        times, threshold = (None, 0.0 if given is None else given)
        if given is None and len(indices) == len(self._slots):
            times, threshold = self._times(args, sizes)
        sparse = len(indices) == len(self._slots) and self._pays(sizes_of, times)
        for i, weight in held.items():
            if weight is not None:
                weight.uses.seen, weight.uses.dense_now = True, not sparse
                if weight.signature == self._signatures[i]:
                    weight.uses.dense_threshold = threshold
                    weight.uses.dense_products = self._dense_products(times, i, sizes_of) if sparse else ()
        return indices if sparse else None

    def _pays(self, sizes_of: Sequence[tuple[int, int]], times: SlotTimes | None) -> bool:
        """Whether the variant with sparse products is the one to run, given how many elements of each slot are active,
        and how many it has."""
        if times is None:
            assert self._given_threshold is not None
            return sum(active for active, _ in sizes_of) < self._given_threshold * sum(n for _, n in sizes_of)
        return saves(times, [active / n for active, n in sizes_of], self._device.chooses)

    def _times(self, args: Sequence[Any], sizes: tuple[Any, ...]) -> tuple[SlotTimes, float]:
        """The times of the products at these sizes, and the density from which sparse ones save nothing."""
        found = self._times_of.get(sizes)
        if found is None:
            times = self._measured(args)
            found = times, uniform_threshold(times, self._device.chooses)
            if len(self._times_of) < _MOST_SIZES:
                self._times_of[sizes] = found
        return found

    def _dense_products(
        self, times: SlotTimes | None, position: int, sizes_of: Sequence[tuple[int, int]]
    ) -> tuple[str, ...]:
        """The products with a weight, or with parts of it, that run dense within the variant with sparse ones."""
        if times is None or not self._device.chooses:
            return ()
        slots = zip(self._slots, times, sizes_of, strict=True)
        found = (
            (name, t, active / n)
            for slot, layers, (active, n) in slots
            if slot.key == position
            for layer in layers
            for name, t in layer.items()
        )
        return tuple(dict.fromkeys(name for name, t, density in found if t.falls_back and density >= t.crossover))

    def _measured(self, args: Sequence[Any]) -> SlotTimes:
        """The times of each slot's products, from the device."""
        if any(isinstance(args[i], FakeTensor) for i in self._positions):
            return [[] for _ in self._slots]  # DDP's first call
        slots = [
            [self._layer(product, slot, args) for product in self._compiler.products[slot]] for slot in self._slots
        ]
        tuned = any(sparse for sparse, _ in self._variants)
        found = iter(self._device.times([layer for layers in slots for layer in layers], tuned))
        return [[next(found) for _ in layers] for layers in slots]

    def _layer(self, product: Product, slot: Slot, args: Sequence[Any]) -> Layer:
        weight, tokens = args[slot.key], self._compiler.tokens(product, args)
        rows, cols, block, *_ = self._signatures[slot.key]
        grid = BlockGrid(rows, cols, block) if slot.part is None else slot.part.grid(block)
        trained = torch.is_grad_enabled()
        told = product.bias, trained, product.groups, product.dense
        return Layer(grid, product.transposed, tokens, product.dtype, weight.dtype, *told)

    def _patterned(self, args: Sequence[Any]) -> bool:
        """Whether attention is sparse in the model that is running: another may share this graph."""
        parameter = args[self._first]
        weight = of(parameter)
        if isinstance(parameter, FakeTensor):
            return self._attention.pattern != "full"  # DDP's first call
        if weight is None or weight.attention.parts != self._attention.parts:
            return False
        return weight.attention.pattern != "full"

    def _guard_backward(self, args: Sequence[Any], out: Any, sparse: bool) -> None:
        """Turn a topology change between this forward pass and its backward pass into a clear error; and tell weights
        which gradients are 0 outside the active blocks, as sparse products compute them."""
        for output in out if isinstance(out, list | tuple) else (out,):
            node = output.grad_fn if isinstance(output, Tensor) else None
            if node is not None:
                break
        else:
            return
        then, used, before = epoch.value, [], []
        for i in self._found:
            weight = getattr(args[i], "_mst_weight", None)
            if weight is not None:
                used.append(weight)
                before.append(weight.changes)

        def check(_: Any) -> None:
            if then != epoch.value and before != [w.changes for w in used]:
                changed = next(w.name for w, b in zip(used, before, strict=True) if w.changes != b)
                raise TopologyChangedError(
                    f"the topology of {changed} changed between the forward pass and this backward pass, so the "
                    "gradients would belong to another model. Call optimizer.step() or sparsifier(model).step() only "
                    "after backward(), and run the forward pass again"
                )

        node.register_prehook(check)
        if sparse and self._compiler.masked:
            self._tell_of_gradients(args, node)

    def _tell_of_gradients(self, args: Sequence[Any], node: Any) -> None:
        """Once the backward pass has computed them, and before anything else can have become of them."""
        weights = [(i, weight) for i in self._compiler.masked if (weight := of(args[i])) is not None]
        places = self._places_of(node, args, weights)
        targets: list[tuple[int, SparseWeight, Tensor]] = [
            (places[i], weight, args[i]) for i, weight in weights if i in places
        ]
        if not targets:  # nor is there always a node that can be referred to
            return
        itself: Any = weakref.ref(node)  # which holds its hooks
        waiting: list[Arrival] = []

        def note(gradients: tuple[Tensor | None, ...], _: Any) -> None:
            while waiting:
                waiting.pop().remove()
            after: Sequence[tuple[Any, int]] = ()
            for place, weight, parameter in targets:
                gradient = gradients[place]
                # A hook on the way may write without a trace.
                if type(gradient) is Tensor and gradient.layout == torch.strided and not parameter._backward_hooks:
                    weight.note_computed(gradient)
                    if parameter.grad is not None:
                        after = after or itself().next_functions
                        if _parameter_of(after[place][0]) is parameter:
                            waiting.append(Arrival(weight, parameter, after[place][0]))

        node.register_hook(note)

    def _places_of(self, node: Any, args: Sequence[Any], weights: list[tuple[int, SparseWeight]]) -> dict[int, int]:
        """Position of an input -> which of the gradients that the graph's node computes is its.

        Asked of the node when it is first seen, as it has hundreds. Each compiled graph has a class of nodes of its
        own; nodes of another kind, as of an output that is a view, compute no gradients of the graph.
        """
        if not isinstance(node, BackwardCFunction):
            return {}
        places = self._places.get(type(node))
        if places is None or any(i not in places and args[i].requires_grad for i, _ in weights):
            # A node of parameters' own holds the parameter; the places of others are not known.
            held = {id(_parameter_of(after)): place for place, (after, _) in enumerate(node.next_functions)}
            places = {i: held[id(args[i])] for i, _ in weights if id(args[i]) in held}
            self._places[type(node)] = places
        return places

    def _note_queries(self, args: Sequence[Any], own: Sequence[Any], variant: Variant) -> None:
        """Note the attentions of this pass that have a pattern, if someone counts: their queries' shapes, and then the
        size of a value."""
        weight = of(own[self._first])
        if weight is not None and weight.attention.queries is not None:
            weight.attention.queries += [self._compiler.sizes(shape, args) for shape in variant.shapes]


def _parameter_of(node: Any) -> Tensor | None:
    """The parameter whose gradients a node adds up, if it is such a one."""
    parameter: Tensor | None = getattr(node, "variable", None)
    return parameter


def _size(x: Any) -> Any:
    """What may vary of an input from call to call; at the first one numbers are symbols with a hint."""
    if isinstance(x, Tensor):
        return x.shape
    return x.node.hint if isinstance(x, torch.SymInt) else x
