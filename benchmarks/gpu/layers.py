"""The three products of one linear layer: ours against cuBLAS and other libraries, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from mst_compile.lowering import inductor  # noqa: F401  (registers the lowerings)
from torch import Tensor
from torch._dynamo.utils import counters

import mst_compile  # noqa: F401  (registers the operators)
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import new_index, write_index
from mst_compile.doctor.trial import error
from mst_compile.ops import linear as ops
from mst_compile.rules import masks
from mst_compile.rules.density import active_count
from mst_compile.rules.guard import backbone

from . import rivals
from .plan import ExpertsCell, LayerCell, crossover, verdict
from .report import Run
from .timing import Call, median_times

OPERATIONS = ("forward", "grad-input", "grad-weight")
BENCHMARK = "gpu_layers"
# In units of eps. Rounding to nearest costs a half; float32 sums of thousands of terms add rounding of their own, and
# cuBLAS may add up its parts in the half precision.
_ALLOWED = {torch.float32: 200.0, torch.bfloat16: 4.0, torch.float16: 4.0}


class Layer:
    """Operands of one layer with weight ``[n, k]`` and ``m`` tokens; the topology changes in place.

    Attributes:
        benchmark: the ledger's name of what is measured with it. library: what the dense products are.
    """

    benchmark, library = BENCHMARK, "torch.mm"

    def __init__(self, cell: LayerCell, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        self.block = cell.block
        self.grid = BlockGrid(cell.n, cell.k, cell.block)
        self.index = new_index(self.grid, device)
        self.x, self.grad, self._values = normal(cell.m, cell.k), normal(cell.m, cell.n), normal(cell.n, cell.k)
        self.weight = torch.empty_like(self._values)
        self.mask = torch.zeros(self.grid.shape, dtype=torch.bool)

    @property
    def density(self) -> float:
        return self.grid.count_elements(self.mask) / (self.grid.rows * self.grid.cols)

    def set_density(self, density: float) -> None:
        """A random mask of this density that leaves no block row or column empty, written in place."""
        spine = backbone(self.grid.shape)
        count = active_count(density, self.grid.blocks, int(spine.sum()))
        self.mask = masks.random_mask(spine, count, masks.generator(0, count, "benchmark"))
        write_index(self.index, self.grid, self.mask)
        self.weight.copy_(self._values * self._inside())

    def _inside(self) -> Tensor:
        return self.grid.expand(self.mask.to(self.weight.device))

    def dense(self) -> dict[str, Call]:
        x, grad, weight = self.x, self.grad, self.weight
        return {
            "forward": lambda: torch.mm(x, weight.t()),
            "grad-input": lambda: torch.mm(grad, weight),
            "grad-weight": lambda: torch.mm(grad.t(), x),
        }

    def reference(self) -> dict[str, Tensor]:
        """Results in float32 of the operators' own reference."""
        x, grad, weight, index = self.x.float(), self.grad.float(), self.weight.float(), self.index
        gw, _ = ops.grad_weight_reference(grad, x, index, self.block, False, torch.float32, False)
        return {
            "forward": ops.linear_reference(x, weight, None, index, self.block, False),
            "grad-input": ops.grad_input_reference(grad, weight, index, self.block, False),
            "grad-weight": gw,
        }

    def complaint(self, operation: str, result: object, reference: Tensor) -> str | None:
        """What is wrong with a result, or None."""
        if not isinstance(result, Tensor):
            return None
        worst = error(result, reference)
        if not worst <= _ALLOWED[result.dtype]:
            return f"wrong result, {worst:.3g} eps off"
        if operation == "grad-weight" and bool((result.masked_fill(self._inside(), 0) != 0).any()):
            return "wrong result, not exactly 0 outside the active blocks"
        return None


def ours(layer: Layer, tuned_for: float) -> dict[str, Call]:
    """The operators as Inductor compiles them, each by itself, tuned for a density; compiled at their first call."""
    block, dtype = layer.block, layer.weight.dtype

    def linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.linear(x, weight, None, index, block, False, tuned_for)

    def grad_input(grad: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.linear_grad_input(grad, weight, index, block, False, tuned_for)

    def grad_weight(grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return torch.ops.mst.linear_grad_weight(grad, x, index, block, False, dtype, False, tuned_for)[0]

    return {
        "forward": compiled(linear, layer.x, layer.weight, layer.index),
        "grad-input": compiled(grad_input, layer.grad, layer.weight, layer.index),
        "grad-weight": compiled(grad_weight, layer.grad, layer.x, layer.index),
    }


def compiled(function: Callable[..., Tensor], *args: Tensor) -> Call:
    """A function of these tensors as Inductor compiles it, at its first call."""
    run = torch.compile(function, fullgraph=True, backend="inductor", dynamic=False)
    return lambda: run(*args)


@torch.no_grad()
def measure(cell: LayerCell, run: Run) -> None:
    """Compile once, then time every density; rivals come after, so that a crash of theirs costs none of our rows."""
    layer = Layer(cell, run.device, run.dtype)
    calls = ours(layer, cell.tuned_for)
    points: dict[str, list[tuple[float, float]]] = {}
    dense_s: dict[str, float] = {}
    graphs = 0
    for density in densities_of(cell, layer, run, "mst"):
        ratios, dense_s = compare(cell, layer, run, density, "mst", calls)
        before, graphs = graphs, counters["stats"]["unique_graphs"]
        if before not in (0, graphs):
            run.failed(BENCHMARK, case_of(cell, layer), "mst", "the new topology made it compile again")
        for operation, ratio in ratios.items():
            points.setdefault(operation, []).append((layer.density, ratio))
    if len(cell.densities) > 1:
        for operation, some in points.items():
            _report_crossover(cell, run, operation, some, dense_s.get(operation, float("nan")))
    for name, make in rivals.RIVALS.items():
        if name in run.without or rivals.why_absent(name, run.device) is not None:
            continue
        unfit = rivals.why_unfit(name, cell)
        if unfit is not None:
            print(f"{cell.case} without {name}: {unfit}")
            continue
        run.stage(name)
        for density in densities_of(cell, layer, run, name):
            try:
                compare(cell, layer, run, density, name, make(layer.x, layer.weight, layer.grad, layer.block))
            except Exception as failure:
                run.failed(BENCHMARK, case_of(cell, layer), name, f"{type(failure).__name__}: {failure}")
                if not run.usable():
                    return
                break


def densities_of(cell: LayerCell | ExpertsCell, layer: Layer, run: Run, side: str) -> Iterator[float]:
    """Set each density in turn while time is left; those that this grid cannot tell apart come once."""
    done: set[int] = set()
    for i, density in enumerate(cell.densities):
        if run.budget.left <= 0:
            run.skipped(f"{cell.case} {side} at densities {', '.join(f'{d:g}' for d in cell.densities[i:])}")
            return
        layer.set_density(density)
        active = int(layer.mask.sum())
        if active not in done:
            done.add(active)
            yield density


def case_of(cell: LayerCell | ExpertsCell, layer: Layer, operation: str = "all") -> str:
    return f"{cell.case} d={layer.density:.3f} {operation}"


def compare(
    cell: LayerCell | ExpertsCell, layer: Layer, run: Run, density: float, side: str, calls: dict[str, Call]
) -> tuple[dict[str, float], dict[str, float]]:
    """Check, time and record ``side`` against dense; speed-ups and dense seconds by operation (and "sum")."""
    reference = layer.reference()
    good = {}
    for operation, call in calls.items():
        complaint = layer.complaint(operation, call(), reference[operation])
        if complaint is None:
            good[operation] = call
        else:
            run.failed(layer.benchmark, case_of(cell, layer, operation), side, complaint)
    del reference
    sides = {f"{op} dense": call for op, call in layer.dense().items() if op in good}
    median = median_times(sides | {f"{op} {side}": call for op, call in good.items()}, run.device, run.runs)
    dense = {op: median[f"{op} dense"] for op in good}
    own = {op: median[f"{op} {side}"] for op in good}
    if len(good) == len(OPERATIONS):
        dense["sum"], own["sum"] = sum(dense.values()), sum(own.values())
    ratios = {op: dense[op] / own[op] for op in own}
    for op in ratios:
        _record(cell, layer, run, density, side, op, dense[op], own[op])
    return ratios, dense


def _record(
    cell: LayerCell | ExpertsCell, layer: Layer, run: Run, density: float, side: str, operation: str, dense: float,
    own: float,
) -> None:  # fmt: skip
    products = len(OPERATIONS) if operation == "sum" else 1
    tera = 2e-12 * products * cell.m * cell.n * cell.k
    case, ratio = case_of(cell, layer, operation), dense / own
    note = f"{tera * layer.density / own:.4g} TFLOP/s in active blocks"
    judged = verdict(cell.goal(density), ratio) if side == "mst" and operation == "sum" else ""
    if side == "mst":
        run.record(layer.benchmark, case, "dense", dense, 1.0, f"{tera / dense:.4g} TFLOP/s, {layer.library}")
    run.record(layer.benchmark, case, side, own, ratio, "; ".join(filter(None, (note, judged))))
    print(f"{case}: {side} {own * 1e3:.3f} ms, {ratio:.2f}x dense {judged}".rstrip(), flush=True)
    figures = f"{dense * 1e3:.3f}", f"{own * 1e3:.3f}", f"{ratio:.2f}x"
    run.rows.append((cell.case, f"{layer.density:.3f}", operation, side, *figures, judged))


def _report_crossover(
    cell: LayerCell, run: Run, operation: str, points: list[tuple[float, float]], dense: float
) -> None:
    density = crossover(points)
    case = f"{cell.case} crossover {operation}"
    if density is None:
        print(f"{case}: slower than dense at every density")
        return
    print(f"{case}: as fast as dense up to density {density:.2f}", flush=True)
    run.record(BENCHMARK, case, "mst", dense, density, "ratio is the density where dense takes as long as mst")
